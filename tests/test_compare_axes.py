"""Grids of any two settings: every cell is the picture that its settings draw alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import error_of, run
from self_attention_guidance import (
    BlurGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
)
from self_attention_guidance.generate import (
    AXES,
    Axis,
    Comparison,
    GenerationSettings,
    LoadedPipeline,
    compare,
    compare_axes,
    draw_grid,
    generate,
    load_pipeline,
    read_parameters,
    read_record,
)
from self_attention_guidance.generate.axes import parse_axis
from self_attention_guidance.generate.metadata import text_of
from tiny import save_tiny_model
from tiny_pixels import one_thread

SETTINGS = {
    # All of it differs from what the method or the network has by default.
    "guidance": {"scale": 1.5, "start": 0.1, "blur_sigma": 2.0, "layer": "up.1.attentions.0"},
    "generation": {"guidance_scale": 3.0, "num_inference_steps": 2},
}
VALUES: dict[str, list[Any]] = {
    "prompt": ["red heart", "a, b"],
    "seed": [0, 9],
    "guidance": [None, PerturbedAttentionGuidance(2.0)],
    "scale": [0, 3.0],
    "cfg": [1.0, 5.0],
    "steps": [2, 3],
    "blur": [0.5, 3.0],
    "window": [(0.0, 0.5), (0.5, 1.0)],
    "layer": [None, "mid"],
}


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("axes") / "tiny", SETTINGS))


@pytest.fixture
def loaded(model: str) -> LoadedPipeline:
    found = load_pipeline(model, "cpu")
    found.use()
    return found


def alone(loaded: LoadedPipeline, changes: dict[str, Any]) -> np.ndarray:
    """The picture that `generate` draws with an axis' value, or several."""
    usual = loaded.pipeline.guidance
    scale = changes.get("scale")
    guidance = changes.get("guidance", usual)
    if guidance is None:
        guidance, scale = usual, 0.0
    if "window" in changes:
        guidance = replace(guidance, start=changes["window"][0], stop=changes["window"][1])
    layer = changes.get("layer")
    if layer is not None:
        name = "layers" if isinstance(guidance, PerturbedAttentionGuidance) else "layer"
        guidance = replace(guidance, **{name: layer})
    if "blur" in changes:
        guidance = replace(guidance, blur_sigma=changes["blur"])
    loaded.pipeline.guidance = guidance
    settings = loaded.settings(
        sag_scale=scale,
        guidance_scale=changes.get("cfg"),
        num_inference_steps=changes.get("steps"),
    )
    try:
        (picture,) = generate(
            loaded.pipeline, changes.get("prompt", ""), settings, seed=changes.get("seed", 4)
        )
    finally:
        loaded.pipeline.guidance = usual
    return np.asarray(picture.image)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        *(pair for pair in itertools.combinations(AXES, 2) if pair != ("guidance", "blur")),
        ("scale", "guidance"),
        ("window", "guidance"),
    ],
)
def test_cells_are_what_their_settings_draw(
    loaded: LoadedPipeline, rows: str, columns: str
) -> None:
    usual = loaded.pipeline.guidance
    found = compare_axes(
        loaded.pipeline,
        Axis(rows, VALUES[rows]),
        Axis(columns, VALUES[columns]),
        loaded.settings(),
        seed=4,
    )
    for (c, column), (r, row) in itertools.product(
        enumerate(VALUES[columns]), enumerate(VALUES[rows])
    ):
        expected = alone(loaded, {rows: row, columns: column})
        assert (np.asarray(found.columns[c][r].image) == expected).all(), (row, column)
    assert loaded.pipeline.guidance == usual


@pytest.mark.parametrize(
    ("axis", "given", "options"),
    [
        ("layer=default,mid", (), [(), ("--layer", "mid")]),
        (
            "layer=default,up.1.attentions.0,mid+up.1",
            ("--guidance", "pag"),
            [
                (),
                ("--guidance", "pag:layers=up.1.attentions.0"),
                ("--guidance", "pag:layers=mid+up.1"),
            ],
        ),
        (
            "window=0-0.5,0.5-1",
            (),
            [("--start", 0, "--stop", 0.5), ("--start", 0.5, "--stop", 1)],
        ),
        ("blur=0.5,3", ("--fast",), [("--blur-sigma", 0.5), ("--blur-sigma", 3)]),
        ("scale=0,2.5", ("--guidance", "sag + pag"), [("--sag-scale", 0), ("--sag-scale", 2.5)]),
        ("cfg=1,5", (), [("--guidance-scale", 1), ("--guidance-scale", 5)]),
        ("steps=2,3", ("--every", 2), [("--steps", 2), ("--steps", 3)]),
        ("seed=0,9", (), [("--seed", 0), ("--seed", 9)]),
        (
            "guidance=none,sag,pag,seg:scale=2,sag:every=2 + pag",
            (),
            [
                ("--sag-scale", 0),
                (),
                ("--guidance", "pag"),
                ("--guidance", "seg:scale=2"),
                ("--guidance", "sag:every=2 + pag"),
            ],
        ),
        ("guidance=sag,pag", ("--fast",), [(), ("--guidance", "pag")]),
        (
            "guidance=sag,pag",
            ("--start", 0.5),
            [(), ("--guidance", "pag")],
        ),
    ],
)
def test_a_value_draws_what_its_option_draws(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    axis: str,
    given: tuple[object, ...],
    options: list[tuple[object, ...]],
) -> None:
    from self_attention_guidance import generate as package

    grids: list[Comparison] = []

    def seen(*arguments: Any, **settings: Any) -> Comparison:
        grids.append(compare_axes(*arguments, **settings))
        return grids[-1]

    monkeypatch.setattr(package, "compare_axes", seen)
    out = tmp_path / "grid.png"
    assert run("compare", "cat", "--model", model, *given, "--columns", axis, "--out", out) == 0
    (found,) = grids
    pictures = [column[0].image for column in found.columns]
    for number, (picture, own) in enumerate(zip(pictures, options, strict=True)):
        folder = tmp_path / str(number)
        rest = () if own[:1] == given[:1] else given
        assert run("generate", "cat", "--model", model, *rest, *own, "--out", folder) == 0
        (drawn,) = folder.iterdir()
        expected = np.asarray(Image.open(drawn))
        assert np.array_equal(np.asarray(picture), expected), own
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_a_blur_is_of_the_guidances_that_have_one(loaded: LoadedPipeline) -> None:
    def drawn(guidance: Any) -> list[bytes]:
        axes = Axis("guidance", [None, guidance]), Axis("blur", [1.0, 3.0])
        found = compare_axes(loaded.pipeline, *axes, loaded.settings())
        return [picture.image.tobytes() for column in found.columns for picture in column]

    off, weak, still_off, strong = drawn(SelfAttentionGuidance(2.0) + PerturbedAttentionGuidance())
    assert off == still_off
    assert len({off, weak, strong}) == 3
    with pytest.raises(ValueError, match=r"blur=1\.0 has no effect on pag, which has no blur"):
        drawn(PerturbedAttentionGuidance())
    with pytest.raises(ValueError, match="nowhere"):
        compare_axes(loaded.pipeline, Axis("layer", ["mid", "nowhere"]), Axis("seed", [1]))
    loaded.pipeline.guidance = BlurGuidance()
    with pytest.raises(ValueError, match="layer=default has no effect on blur, which has no layer"):
        compare_axes(loaded.pipeline, Axis("layer", [None]), Axis("seed", [1]))


def test_costs_count_rows_of_the_network(loaded: LoadedPipeline) -> None:
    progress: list[float] = []
    found = compare_axes(
        loaded.pipeline,
        Axis("cfg", [1.0, 3.0]),
        Axis("guidance", [None, SelfAttentionGuidance(), SelfAttentionGuidance(every=2)]),
        GenerationSettings(num_inference_steps=4),
        on_progress=progress.append,
    )
    counts = [[cost.evaluations for cost in column] for column in found.costs]
    assert counts == [[4, 8], [8, 12], [6, 10]]
    assert all(cost.seconds > 0 for column in found.costs for cost in column)
    assert sum(progress) == pytest.approx(6)


def test_the_command_draws_them_and_the_file_tells(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    out = tmp_path / "grid.png"
    columns = "guidance=none,sag,pag:scale=2,start=0.2,seg"
    shared = ("compare", "--model", model, "--out", out, "--overwrite")
    assert run(*shared, "red heart", "--columns", columns, "--rows", "cfg=1,3") == 0
    assert capsys.readouterr().out == f"{out}\n"
    record = read_record(out)
    assert (record["rows"], record["columns"]) == ("cfg=1,3", columns)
    assert record["prompts"] == ["red heart"]
    assert read_parameters(out).settings["Columns"] == columns
    message = error_of(capsys, "generate", "--like", out, "--model", model)
    assert "is no single picture of a prompt" in message
    for options in (
        ("a", "b", "--columns", "steps=1,2"),
        ("--rows", "seed=1,2"),
        ("--rows", "prompt=a|b, c"),
        ("--rows", "prompt=a|b, c", "--columns", "scale=0,2", "--guidance", "pag"),
    ):
        assert run(*shared, *options) == 0
    assert read_record(out)["prompts"] == ["a", "b, c"]
    assert read_record(out)["guidance"]["method"] == "pag"


WHOLE = "sag: scale=1.5, start=0.1, blur_sigma=2, layer=up.1.attentions.0"


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (("--columns", "cfg=1,3"), [WHOLE]),
        (("--columns", "cfg=1,3", "--quiet"), []),
        (
            ("--columns", "guidance=none,sag,pag,sag:start=0,scale=2"),
            [
                WHOLE,
                "pag: scale=3",
                "sag:start=0,scale=2: blur_sigma=2, layer=up.1.attentions.0",
            ],
        ),
        (
            ("--columns", "guidance=sag,pag:layers=down_blocks.0 + sag:layer=mid"),
            [
                WHOLE,
                "pag + sag: pag scale=3, layers=down.0 + sag scale=1.5, start=0.1, blur_sigma=2,"
                " layer=mid",
            ],
        ),
        (
            ("--columns", "guidance=sag,pag", "--rows", "window=0-1,0-0.5"),
            ["sag: scale=1.5, blur_sigma=2, layer=up.1.attentions.0", "pag: scale=3"],
        ),
        (
            ("--columns", "scale=0,1", "--rows", "layer=default,mid"),
            ["sag: start=0.1, blur_sigma=2, default layer=up.1.attentions.0"],
        ),
        (("--columns", "guidance=none,seg", "--rows", "scale=0,2"), ["seg: defaults"]),
        (("--sag-scales", "0,1"), [WHOLE.replace(" scale=1.5,", "")]),
        (
            ("--sag-scales", "2", "--every", 2),
            ["sag: scale=2, start=0.1, every=2, blur_sigma=2, layer=up.1.attentions.0"],
        ),
    ],
)
def test_a_note_has_each_guidance(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: str,
    options: tuple[object, ...],
    lines: list[str],
) -> None:
    assert run("compare", "a", "--model", model, *options, "--out", tmp_path / "a.png") == 0
    assert capsys.readouterr().err.splitlines() == [f"note: {line}" for line in lines]


@pytest.mark.parametrize(
    ("count", "labels", "seed"),
    [(1, ["a", "b"], "  ·  seed 0"), (2, [f"{p}, seed {s}" for p in "ab" for s in (0, 1)], "")],
)
def test_what_all_pictures_share_is_below_the_grid(
    loaded: LoadedPipeline, count: int, labels: list[str], seed: str
) -> None:
    settings = loaded.settings()
    found = compare(
        loaded.pipeline, ["a", "b"], [0, 2], settings, num_images=count, model_name="tiny"
    )
    rows = list(zip(*([each.image for each in column] for column in found.columns), strict=True))
    line = WHOLE.replace(" scale=1.5,", "")
    footer = f"model tiny  ·  sampler DDIM  ·  steps 2  ·  CFG 3{seed}\n{line}"
    expected = draw_grid(rows, labels, ["without SAG", "SAG 2"], footer)
    assert np.array_equal(np.asarray(found.grid), np.asarray(expected))


@pytest.mark.parametrize(
    ("axis", "place", "name"),
    [
        ("steps", "settings", "num_inference_steps"),
        ("cfg", "settings", "guidance_scale"),
        ("scale", "guidance", "scale"),
        ("blur", "guidance", "blur_sigma"),
        ("window", "guidance", "start"),
        ("window", "guidance", "stop"),
        ("layer", "guidance", "layer"),
        ("seed", "", "seed"),
        ("guidance", "", "guidance"),
    ],
)
def test_the_record_holds_only_what_all_pictures_share(
    loaded: LoadedPipeline, axis: str, place: str, name: str
) -> None:
    def drawn(values: list[Any]) -> dict[str, Any]:
        axes = Axis("prompt", ["a", "b"]), Axis(axis, values)
        return dict(compare_axes(loaded.pipeline, *axes, loaded.settings()).record)

    several = drawn(VALUES[axis])
    assert name not in (several[place] if place else several)
    words = {"num_inference_steps": "Steps", "guidance_scale": "CFG scale", "seed": "Seed"}
    words |= {each: f"SAG {each.title()}" for each in ("layer", "start", "stop")}
    is_shown = {each: f"{word}: " in text_of(several) for each, word in words.items()}
    varied = {"guidance": ("layer", "start", "stop"), "window": ("start", "stop")}.get(
        axis, (name,)
    )
    assert is_shown == {each: each not in varied for each in words}
    one = drawn(VALUES[axis][-1:])
    if axis == "guidance":
        assert several["guidances"] == [None, PerturbedAttentionGuidance(2.0).to_dict()]
        assert 'Guidances: "none | pag:scale=2"' in text_of(several)
    else:
        assert name in (one[place] if place else one)


def test_the_record_names_the_default_layer(loaded: LoadedPipeline) -> None:
    found = compare_axes(loaded.pipeline, Axis("layer", [None, "mid"]), Axis("seed", [1]))
    assert found.record["rows"] == "layer=up.1.attentions.0,mid"


def test_axes_are_read_as_they_were_written() -> None:
    texts = ("guidance=none,sag:scale=1,every=2,pag", "cfg=1,7.5", "seed=3,4", "prompt=a, b|c")
    texts += ("blur=0.5,inf", "window=0-0.5,0.2-0.65", "layer=default,mid,up.1+mid")
    assert [str(parse_axis("rows", text)) for text in texts] == list(texts)
    assert parse_axis("rows", texts[0]).values == [None, "sag:scale=1,every=2", "pag"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "cfg"], "--rows='cfg' must be NAME=VALUE,VALUE,... with a name of prompt,"),
        (["--rows", "size=1"], "--rows='size=1' must be NAME=VALUE"),
        (["--rows", "cfg=1,x"], "--rows='cfg=1,x': 'x' must be a number"),
        (["--rows", "seed=1.5"], "--rows='seed=1.5': '1.5' must be a whole number"),
        (["--rows", "cfg=nan"], "--rows='cfg=nan': cfg=nan must be a finite number"),
        (["--rows", "steps=0,2"], "--rows='steps=0,2': steps=0 must be a whole number"),
        (["--rows", "window=0.5"], "'0.5' must be START-STOP, for example 0.2-0.65"),
        (["--rows", "window=0.5-0.2"], "window=0.5-0.2 must be from 0 to 1, upwards"),
        (["--rows", "blur=-1"], "blur=-1.0 must be at least 0"),
        (["--rows", f"seed={2**64}"], "is too large: seeds must be below 2**64"),
        (["--columns", "guidance=pagg"], "'pagg' is no guidance; did you mean pag?"),
        (["--columns", "guidance=pag:sigma=2"], "'sigma' is no setting of pag"),
        (["--rows", "cfg=1", "--columns", "cfg=2"], "must differ: both are cfg"),
        (["--rows", "cfg=1", "--sag-scales", "0,1"], "--sag-scales must not be given with --rows"),
        (["--rows", "cfg=1", "--guidance-scale", 2], "--guidance-scale must not be given with"),
        (["--rows", "steps=1,2", "--steps", 2], "--steps must not be given with --rows"),
        (["--rows", "window=0-1", "--start", 0.5], "--start must not be given with --rows"),
        (["--rows", "seed=1,2", "--seed", 0], "--seed must not be given with --rows"),
        (["--rows", "seed=1,2", "--batch-size", 4], "--batch-size must not be given"),
        (["--rows", "cfg=1", "--num-images", 1], "--num-images must not be given"),
        (["--rows", "blur=1,2", "--blur-sigma", 2], "--blur-sigma must not be given"),
        (["--rows", "layer=mid", "--layer", "mid"], "--layer must not be given"),
        (
            ["--rows", "blur=1,2", "--guidance", "sag:blur_sigma=2"],
            "--guidance='sag:blur_sigma=2': blur_sigma must not be given with --rows",
        ),
        (["--rows", "window=0-1", "--guidance", "pag:stop=0.5 + seg"], "stop must not be given"),
        (["--rows", "scale=1,2", "--columns", "guidance=none,pag:scale=2"], "scale must not be"),
        (["--rows", "guidance=pag", "--guidance", "sag"], "--guidance must not be given"),
        (["--start", 0.5, "--columns", "guidance=sag,sag + pag"], "start of which guidance?"),
        (["--model", "emoji-adm"], "comparisons need a model that takes them"),
        (["b", "--rows", "cfg=1", "--columns", "steps=2"], "2 prompts: give them by --rows"),
    ],
)
def test_errors_are_one_line_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    from self_attention_guidance.cli import compare

    monkeypatch.delattr(compare, "load_pipeline_of")
    assert message in error_of(capsys, "compare", "a", "--out", tmp_path / "a.png", *options)


def test_steps_are_checked_before_the_first_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    monkeypatch.setattr(
        "self_attention_guidance.generate.comparison._draw", lambda *_: pytest.fail("it draws")
    )
    arguments = ("compare", "a", "--model", model, "--out", tmp_path / "a.png")
    message = error_of(capsys, *arguments, "--columns", "steps=2,5000")
    assert message.startswith("error: --steps=5000 must be at most ")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("size", [1], "axis='size' must be one of"),
        ("cfg", [], "must have values"),
        ("prompt", [3], "must be a text"),
        ("seed", [-1], "seed=-1"),
        ("layer", [""], "layer"),
    ],
)
def test_axes_refuse_what_they_cannot_hold(name: str, values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Axis(name, values)
