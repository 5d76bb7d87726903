"""The demo by its API: the same pixels as the library, limits, and nothing of the host."""

from __future__ import annotations

import gc
import json
import re
import socket
import threading
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs the extra 'demo' (gradio)")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from command_line import error_of, help_without_torch
from demo_app import SETTINGS, running
from family import KINDS
from self_attention_guidance import PerturbedAttentionGuidance, SelfAttentionGuidance
from self_attention_guidance.demo import Limits, VisitorSettings, build_page
from self_attention_guidance.demo.earlier import values_of
from self_attention_guidance.demo.limits import check_axes
from self_attention_guidance.demo.pictures import Pictures
from self_attention_guidance.demo.steps import step_pictures
from self_attention_guidance.demo.studio import Studio
from self_attention_guidance.generate import (
    LoadedPipeline,
    compare_axes,
    generate,
    load_pipeline,
    make_scheduler,
    overlay_attended,
    parse_axis,
    read_record,
    save_png,
    with_guidances,
)
from self_attention_guidance.generate.counting import counted_rows
from test_any_model import saved  # noqa: F401  # a fixture
from tiny import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[str, LoadedPipeline]]:
    with running(max_steps=20, max_size=128, max_images=6) as started:
        yield started


@pytest.fixture
def client(demo: tuple[str, LoadedPipeline], tmp_path: Path) -> Client:
    return Client(demo[0], verbose=False, download_files=tmp_path)


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_api_gives_the_librarys_pixels_and_settings(
    demo: tuple[str, LoadedPipeline], client: Client
) -> None:
    model = demo[1]
    before = model.pipeline.guidance, model.pipeline.scheduler
    (unguided, guided), costs, blurred = client.predict(
        **{**SETTINGS, "scheduler": "euler", "threshold": 0.9}, api_name="/generate"
    )
    # Two rows a step, three with guidance.
    assert re.fullmatch(
        r"Unguided [\d.]+ s, 8 network evaluations; guided [\d.]+ s, 12 network evaluations", costs
    )
    assert (model.pipeline.guidance, model.pipeline.scheduler) == before
    pipeline = model.pipeline
    own = model.recommended.make_guidance()
    pipeline.scheduler = make_scheduler("euler", before[1].config)
    pipeline.guidance = replace(own, scale=2.0, threshold=0.9, start=0.0, stop=1.0, every=1)
    try:
        for path, scale in ((unguided, 0.0), (guided, 2.0)):
            settings = model.settings(num_inference_steps=4, sag_scale=scale)
            (expected,) = generate(pipeline, "cat", settings, seed=4, model_name="emoji")
            assert np.array_equal(pixels(path), np.asarray(expected.image))
            assert read_record(path) == expected.record
        (expected,) = generate(pipeline, "cat", settings, seed=4, record_attention=True)
        assert expected.attended is not None
        overlay = overlay_attended(expected.image, expected.attended)
        assert np.array_equal(pixels(blurred), np.asarray(overlay))
    finally:
        pipeline.guidance, pipeline.scheduler = before
    assert not np.array_equal(pixels(unguided), pixels(guided))


@pytest.mark.parametrize("method", ["blur", "pag", "seg", "slg", "tpg"])
def test_every_method_that_the_model_supports_draws(client: Client, method: str) -> None:
    asked = {**SETTINGS, "method": method, "blur_sigma": 0.0 if method == "seg" else 3.0}
    paths, _, blurred = client.predict(**asked, api_name="/generate")
    record = read_record(paths[1])["guidance"]
    assert (record["method"], record["scale"]) == (method, 2.0)
    assert record.get("blur_sigma", 3.0) == ("inf" if method == "seg" else 3.0)
    assert (pixels(paths[0]) != pixels(paths[1])).any()
    assert (blurred is not None) == (method == "blur")


def test_steps_are_pictures_of_every_second_pass(client: Client) -> None:
    strips = client.predict(**SETTINGS, api_name="/steps")
    assert len(strips) == 4
    drawn = [pixels(strip["image"]) for strip in strips]
    assert all(not np.array_equal(drawn[0], other) for other in drawn[1:])
    few = client.predict(**{**SETTINGS, "every": 2}, api_name="/steps")
    assert len(few) == 2


def test_steps_without_guidance_show_no_earlier_picture(
    demo: tuple[str, LoadedPipeline],
) -> None:
    studio, asked = Studio(demo[1], Limits()), VisitorSettings(**SETTINGS)
    assert studio.steps(asked, lambda share: None)
    with pytest.raises(ValueError, match="no step is guided: sag_scale is 0"):
        studio.steps(replace(asked, sag_scale=0.0), lambda share: None)


def test_the_term_of_packed_latents_is_shown_as_a_picture() -> None:
    pipe, draw = KINDS["Flux"].make(), KINDS["Flux"].draw
    with SelfAttentionGuidance(2.0).attach(pipe) as handle:
        draw(pipe)
    assert handle.x0 is not None
    channels = handle.x0.shape[1]
    pipe.vae = AutoencoderKL(latent_channels=channels, block_out_channels=(4,), norm_num_groups=2)
    term = np.asarray(step_pictures(pipe, handle, 64)["guidance term"]).astype(int)
    assert np.abs(np.diff(term, axis=0)).max() > 0
    assert np.abs(np.diff(term, axis=1)).max() > 0


def test_steps_of_a_guidance_without_a_mask(tmp_path: Path) -> None:
    """They show the settings that its guidance has, and no controls for others."""
    folder = save_tiny_model(tmp_path / "model", {"guidance": {"method": "pag", "every": 2}})
    model = load_pipeline(str(folder), "cpu")
    model.pipeline.set_progress_bar_config(disable=True)
    studio = Studio(model, Limits())
    asked = VisitorSettings(**SETTINGS)
    strips = studio.steps(asked, lambda share: None)
    with_sag = replace(model, recommended=replace(model.recommended, guidance={}))
    with_mask = Studio(with_sag, Limits()).steps(asked, lambda share: None)
    assert len(strips) == len(with_mask) == 4
    assert strips[0].width < with_mask[0].width
    (unguided, _), (guided, _) = studio.pair(asked, lambda share: None)
    assert guided.record["guidance"]["method"] == "pag"
    assert unguided.image.tobytes() != guided.image.tobytes()
    with counted_rows(model.pipeline.unet) as drawn:
        blocks = build_page(model, Limits()).app.blocks.values()
    assert drawn == []  # no prompt is recommended
    shown = [getattr(block, "label", "") for block in blocks if getattr(block, "visible", False)]
    assert "PAG scale (0 is off)" in shown
    assert "Mask threshold" not in shown


def test_it_begins_with_a_picture_as_the_library_does(
    demo: tuple[str, LoadedPipeline], client: Client, start: Path, mask: Path
) -> None:
    pipeline = demo[1].pipeline
    own, plain = pipeline.guidance, client.predict(**SETTINGS, api_name="/generate")[0][1]
    drawn = []
    for masks in ({}, {"mask": mask}):
        given = {"image": handle_file(start), "strength": 0.5}
        given |= {name: handle_file(path) for name, path in masks.items()}
        paths, costs, _ = client.predict(**SETTINGS, **given, api_name="/generate")
        assert "guided" in costs and costs.endswith(", 6 network evaluations")  # two steps
        settings = demo[1].settings(
            num_inference_steps=4,
            sag_scale=2.0,
            image=str(start),
            strength=0.5,
            **{name: str(path) for name, path in masks.items()},
        )
        pipeline.guidance = replace(own, scale=2.0, start=0.0, stop=1.0, every=1)
        try:
            (expected,) = generate(pipeline, "cat", settings, seed=4, model_name="emoji")
        finally:
            pipeline.guidance = own
        assert np.array_equal(pixels(paths[1]), np.asarray(expected.image))
        record = read_record(paths[1])
        assert record["settings"]["image"] == "start.png"  # not where it was kept
        assert record["start"] == expected.record["start"]
        assert str(Path(paths[1]).parent.parent) not in json.dumps(record)
        drawn.append(pixels(paths[1]))
        strips = client.predict(**SETTINGS, **given, api_name="/steps")
        assert len(strips) == 2
    assert (drawn[0] != drawn[1]).any()
    again = client.predict(**SETTINGS, api_name="/generate")[0][1]
    assert np.array_equal(pixels(again), pixels(plain))  # nothing of it is left


def test_start_pictures_are_bounded(client: Client, tmp_path: Path, start: Path) -> None:
    large, huge, other = (tmp_path / f"{name}.png" for name in ("large", "huge", "other"))
    Image.new("RGB", (200, 72)).save(large)
    Image.new("1", (8000, 8000)).save(huge)
    other.write_text("no picture")
    (tmp_path / "half.png").write_bytes(start.read_bytes()[:2000])
    for given, message in (
        ({"image": large}, "image='large.png' has 200x72 pixels, and a side must have at most 128"),
        ({"image": huge}, "8000x8000 pixels are too many"),
        ({"image": other}, "other.png is no picture that can be read"),
        ({"image": tmp_path / "half.png"}, "image='half.png' is no picture that can be read"),
        ({"mask": start}, "mask='start.png' needs image"),
    ):
        files = {name: handle_file(path) for name, path in given.items()}
        with pytest.raises(AppError, match=message) as raised:
            client.predict(**SETTINGS, **files, api_name="/generate")
        assert "gradio" not in str(raised.value) and "\n" not in str(raised.value)
    sized = {**SETTINGS, "size": 64, "image": handle_file(large)}
    assert pixels(client.predict(**sized, api_name="/generate")[0][1]).shape == (64, 64, 3)


def test_a_model_that_begins_with_noise_only_says_so(saved: Callable[[str], Path]) -> None:  # noqa: F811
    blocks = build_page(load_pipeline(str(saved("pixart"))), Limits()).app.blocks.values()
    (note,) = (b for b in blocks if "begins with noise" in str(getattr(b, "value", "")))
    assert "diffusers has no image to image for PixArtSigmaPipeline" in str(note.value)
    shown = [block for block in blocks if getattr(block, "label", "") == "Strength"]
    assert [block.visible for block in shown] == [False]


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_pictures_of_the_host_or_of_the_network_are_not_taken(
    demo: tuple[str, LoadedPipeline], start: Path, meta: dict[str, Any]
) -> None:
    """Asked without gradio's client, which would upload a file of the visitor's."""
    address = demo[0].rstrip("/") + "/gradio_api/call/generate"
    asked = VisitorSettings(**SETTINGS, method="sag")
    for path in (str(start), "http://127.0.0.1:9/a.png"):
        given = {**vars(asked), "image": {"path": path, **meta}}
        data = json.dumps({"data": [*given.values()]}).encode()
        header = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address, data, header)) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{address}/{event}") as answer:
            assert answer.read().startswith(b"event: error")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"method": "sag", "threshold": 0.9, "every": 2, "scheduler": "euler"},
        {"method": "seg", "blur_sigma": 0.0, "layers": "mid", "scheduler": "dpm++ 2m"},
        {"method": "slg", "start": 0.25, "stop": 0.5, "blur_sigma": 1.0, "size": 64},
    ],
)
def test_a_picture_gives_its_settings_back(
    demo: tuple[str, LoadedPipeline], tmp_path: Path, changed: dict[str, Any]
) -> None:
    studio = Studio(demo[1], Limits())
    asked = VisitorSettings(**{**SETTINGS, "method": "sag", **changed})
    (_, _), (guided, _) = studio.pair(asked, lambda share: None)
    save_png(guided.image, tmp_path / "a.png", guided.record)
    values, message = values_of(str(tmp_path / "a.png"), studio)
    assert message == "The page now has its settings."
    read = {name: type(getattr(asked, name))(values.get(name, "")) for name in SETTINGS}
    again = replace(asked, **read, method=values["method"], layers=values["layers"])
    assert again == asked
    assert studio.pair(again, lambda share: None)[1][0].image.tobytes() == guided.image.tobytes()


def test_what_the_page_cannot_take_from_a_picture_is_named(
    demo: tuple[str, LoadedPipeline], tmp_path: Path, start: Path
) -> None:
    studio, path = Studio(demo[1], Limits(max_steps=20)), tmp_path / "a.png"
    pipeline, own = demo[1].pipeline, demo[1].pipeline.guidance

    def message_of(guidance: Any = own, model: str | None = "emoji", **given: Any) -> str:
        settings = demo[1].settings(**{"num_inference_steps": 2, **given})
        pipeline.guidance = guidance
        try:
            (picture,) = generate(pipeline, "cat", settings, model_name=model)
        finally:
            pipeline.guidance = own
        save_png(picture.image, path, picture.record, overwrite=True)
        return values_of(str(path), studio)[1]

    assert message_of() == "The page now has its settings."
    record = read_record(path)
    for name in ("image", "mask", "strength"):  # as before image to image
        del record["settings"][name]
    save_png(Image.new("RGB", (8, 8)), path, record, overwrite=True)
    assert values_of(str(path), studio)[1] == "The page now has its settings."
    del record["settings"]["width"]
    save_png(Image.new("RGB", (8, 8)), path, record, overwrite=True)
    assert values_of(str(path), studio)[1].startswith("Its settings do not fit this page")
    assert "guidance.branch='cond', not 'uncond'" in message_of(replace(own, branch="cond"))
    assert "height=64, not None" in message_of(width=72, height=64)
    assert "It began with" in message_of(image=str(start)) and "upload that" in message_of(
        image=str(start)
    )
    assert "method='sag+pag'" in message_of(own + PerturbedAttentionGuidance(2.0))
    assert "steps=21 must be at most 20" in message_of(num_inference_steps=21)
    assert "was drawn by None, and this page draws with emoji" in message_of(model=None)
    for content in (b"", b"no picture", start.read_bytes(), path.read_bytes()[:-40]):
        path.write_bytes(content)
        values, message = values_of(str(path), studio)
        assert not values and message.startswith("This picture ")


@pytest.mark.parametrize(
    ("rows", "row_values", "columns", "column_values", "kept"),
    [
        ("prompt", "a|b, c", "cfg", "1,3", {"steps": "2", "seed": "4"}),
        ("steps", "1,2", "seed", "5,6", {"guidance_scale": str(SETTINGS["guidance_scale"])}),
        ("window", "0-0.5,0.5-1", "blur", "1,3", {"sag_scale": "2.5", "steps": "2"}),
        ("guidance", "none,sag,pag", "cfg", "1,3", {"method": "pag", "sag_scale": "2.5"}),
    ],
)
def test_a_grid_gives_its_sides_back(
    demo: tuple[str, LoadedPipeline],
    client: Client,
    rows: str,
    row_values: str,
    columns: str,
    column_values: str,
    kept: dict[str, str],
) -> None:
    sides = {"rows": rows, "row_values": row_values}
    sides |= {"columns": columns, "column_values": column_values}
    own = {"steps": 2, "sag_scale": 2.5, "method": kept.get("method", "sag")}
    path = client.predict(**{**SETTINGS, **own}, **sides, api_name="/sweep")
    values, message = values_of(path, Studio(demo[1], Limits()))
    assert message == "The page now has its settings."
    assert values.items() >= sides.items()
    assert values.items() >= kept.items()


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ("prompt=cat|heart", "scale=0, 2"),
        ("guidance=none,sag,pag:scale=2,layers=mid", "cfg=1, 3"),
        ("window=0-0.5,0-1", "blur=1, 3"),
        ("layer=down.0,mid", "seed=4, 5"),
        ("steps=2,4", "seed=4, 5"),
    ],
)
def test_a_sweep_draws_what_the_library_draws(
    demo: tuple[str, LoadedPipeline], client: Client, rows: str, columns: str
) -> None:
    model = demo[1]
    given = dict(zip(("rows", "columns"), (rows, columns), strict=True))
    texts = {side: text.partition("=") for side, text in given.items()}
    sides = {side: name for side, (name, _, _) in texts.items()}
    sides |= {f"{side[:-1]}_values": values for side, (_, _, values) in texts.items()}
    path = client.predict(**SETTINGS, **sides, api_name="/sweep")
    own = model.pipeline.guidance
    model.pipeline.guidance = replace(own, scale=2.0, start=0.0, stop=1.0, every=1)
    try:
        expected = compare_axes(
            model.pipeline,
            *(
                with_guidances(parse_axis("axis", text), lambda of: model.guidance(**of))
                for text in (rows, columns)
            ),
            model.settings(num_inference_steps=4),
            prompt="cat",
            seed=4,
        )
    finally:
        model.pipeline.guidance = own
    tops = slice(0, 200)  # below are seconds, which no two drawings share
    assert np.array_equal(pixels(path)[tops], np.asarray(expected.grid)[tops])
    assert read_record(path)["rows"] == str(parse_axis("rows", rows))
    height, width, _ = pixels(path).shape
    assert width > 2 * 192 and height > 2 * 192
    assert len({p.image.tobytes() for c in expected.columns for p in c}) >= 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 21}, "greater than maximum value 20"),
        ({"steps": 0}, "less than minimum value 1"),
        ({"size": 136}, "greater than maximum value 128"),
        ({"size": 100}, "size=100|width=100"),
        ({"seed": -1}, "less than minimum value 0"),
        ({"seed": None}, "seed is empty"),
        ({"steps": None}, "steps is empty"),
        ({"steps": "4"}, "steps='4' must be a number"),
        ({"seed": [4]}, r"seed=\[4\] must be a number"),
        ({"prompt": "a" * 2001}, "2000"),
        ({"scheduler": "../../etc/passwd"}, "not in the list of choices"),
        ({"sag_scale": 1e9}, "greater than maximum"),
        ({"start": 0.9, "stop": 0.1}, "start"),
        # A message is shown as HTML.
        ({"method": "pag", "layers": "<img src=//x>"}, "layer '&lt;img src=//x&gt;' is not a"),
    ],
)
def test_what_is_out_of_bounds_is_one_sentence_and_the_app_goes_on(
    client: Client, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(AppError, match=message) as raised:
        client.predict(**{**SETTINGS, **changed}, api_name="/generate")
    assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)
    assert client.predict(**{**SETTINGS, "steps": 1}, api_name="/generate")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 21}, "steps=21 must be at most 20 on this page"),
        ({"steps": 0}, "steps=0 must be a whole number, at least 1"),
        ({"size": 136}, "size=136 must be at most 128"),
        ({"seed": -1}, "seed=-1 must be a whole number, at least 0"),
        ({"seed": 2**32}, "seed=4294967296 must be at most"),
        ({"prompt": "a" * 2001}, "at most 2000 characters"),
        ({"scheduler": "../../etc/passwd"}, "scheduler"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"sag_scale": 101.0}, "between -100 and 100"),
        ({"method": "pagg"}, "method='pagg' must be one of "),
    ],
)
def test_limits_do_not_rely_on_the_pages_controls(changed: dict[str, Any], message: str) -> None:
    limits = Limits(max_steps=20, max_size=128)
    VisitorSettings(**SETTINGS).check(limits)
    with pytest.raises(ValueError, match=message):
        VisitorSettings(**{**SETTINGS, **changed}).check(limits)


def test_a_grid_is_bounded() -> None:
    limits = Limits(max_images=6, max_steps=20)
    rows, columns = check_axes("prompt", "a|b, c", "guidance", "none, sag:scale=2", limits)
    assert (rows.values, columns.values) == (["a", "b, c"], [None, "sag:scale=2"])
    for name, values, message in (
        ("scale", "0,1,2,3", "pictures=8 must be at most 6"),
        ("scale", "0,x", "columns='scale=0,x': 'x' must be a number"),
        ("scale", "nan", "finite"),
        ("cfg", "101", "cfg=101 must be between"),
        ("steps", "21", "steps=21 must be at most 20"),
        ("seed", str(2**32), "must be at most"),
        ("guidance", "sag:blur_kernel_size=1001", "blur_kernel_size=1001 must be at most 1000"),
        ("guidance", "+".join(["sag"] * 9), "guidances=9 must be at most"),
        ("guidance", "pagg", "is no guidance; did you mean pag?"),
        ("prompt", "a" * 2001, "2000 characters"),
        ("size", "8", "with a name of prompt"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_axes("layer", "default,mid", name, values, limits)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/file=/etc/passwd",
        "/static/..%2f..%2f..%2f..%2fetc/passwd",
    ],
)
def test_no_file_of_the_host_is_read(demo: tuple[str, LoadedPipeline], path: str) -> None:
    try:
        with urllib.request.urlopen(demo[0].rstrip("/") + path) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        assert error.code in (403, 404)
    else:
        assert b"root:" not in content and b"[project]" not in content


def test_ten_visitors_are_served_in_turn(demo: tuple[str, LoadedPipeline], tmp_path: Path) -> None:
    served: dict[int, np.ndarray] = {}

    def visit(seed: int) -> None:
        own = Client(demo[0], verbose=False, download_files=tmp_path / str(seed))
        pair, *_ = own.predict(**{**SETTINGS, "steps": 2, "seed": seed}, api_name="/generate")
        served[seed] = pixels(pair[1])

    visitors = [threading.Thread(target=visit, args=(seed,)) for seed in range(10)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(120)
    assert sorted(served) == list(range(10))
    first = Client(demo[0], verbose=False, download_files=tmp_path / "again")
    again, *_ = first.predict(**{**SETTINGS, "steps": 2, "seed": 7}, api_name="/generate")
    assert np.array_equal(pixels(again[1]), served[7])


def test_memory_is_flat_however_many_come(tmp_path: Path) -> None:
    """gradio keeps 80 kB for each visitor; here, for a number of them that is bounded."""
    of_gradio = tracemalloc.Filter(True, "*/gradio/*")

    def kept_after(visits: int) -> int:
        for _ in range(visits):
            client = Client(url, verbose=False, download_files=tmp_path)
            client.predict(**{**SETTINGS, "steps": 1}, api_name="/generate")
        gc.collect()
        traces = tracemalloc.take_snapshot().filter_traces([of_gradio]).traces
        return sum(trace.size for trace in traces)

    with running(max_queue=1) as (url, _):
        tracemalloc.start()
        try:
            before = kept_after(4)
            assert kept_after(4) < before + 4 * 10_000
        finally:
            tracemalloc.stop()


def test_only_the_newest_pictures_are_kept() -> None:
    kept = Pictures(most=3)
    paths = [Path(kept.save(Image.new("RGB", (8, 8)), "a")) for _ in range(5)]
    assert [path.exists() for path in paths] == [False, False, True, True, True]


def test_the_models_own_size_has_the_limit_of_the_page() -> None:
    small = Studio(load_pipeline("emoji", "cpu"), Limits(max_size=36))
    asked = VisitorSettings(**{**SETTINGS, "steps": 1})
    with pytest.raises(ValueError, match="the model's own size is 64, and a side must have at mo"):
        small.pair(asked, lambda share: None)
    usual = replace(asked, size=small.usual_size())
    assert small.pair(usual, lambda share: None)[0][0].image.size == (32, 32)
    assert Studio(small.model, Limits(max_size=64)).usual_size() == 0


def test_an_address_that_cannot_be_used_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = error_of(capsys, "demo", "--port", port)
        assert message == f"error: --port={port} can't be used: Address already in use\n"
    assert "--host='no.such.invalid' is unknown" in error_of(
        capsys, "demo", "--host", "no.such.invalid"
    )
    message = error_of(capsys, "demo", "--host", "192.0.2.1")
    assert "--host='192.0.2.1' must be an address of this machine" in message
    monkeypatch.setattr("importlib.metadata.version", lambda _: "5.49.1")
    message = error_of(capsys, "demo")
    assert message.startswith("error: the demo needs gradio 6, and 5.49.1 is there: pip install")


def test_the_command_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-size=7 must be" in error_of(capsys, "demo", "--max-size", 7)
    assert "port=0 must be between" in error_of(capsys, "demo", "--port", 0)
    assert "no_such_model" in error_of(capsys, "demo", "--model", "no_such_model")
    assert "--max-steps=0" in error_of(capsys, "demo", "--max-steps", 0)


def test_help_needs_no_heavy_library() -> None:
    assert "sag demo --host 0.0.0.0" in help_without_torch("demo")
