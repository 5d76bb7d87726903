"""Pictures are drawn again, to the pixel, from what their files say of them."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import run
from self_attention_guidance import BlurGuidance, Guidance, NoisyClassifier
from self_attention_guidance.batch import SampleJob
from self_attention_guidance.evaluate.sources import NpzSource
from self_attention_guidance.generate import (
    compare,
    generate,
    load_pipeline,
    load_pixel_model,
    read_parameters,
    read_record,
)
from self_attention_guidance.guidance import METHODS
from test_batch_jobs import listed, rows_of
from tiny import save_tiny_model, seeded
from tiny_pixels import arrays_of, one_thread, save_tiny_pixels

# All settings of every method, none of them the default.
TIMES = "start=0.25,stop=0.75,every=2,noise_from=40,noise_to=0.05,rescale=0.7,norm_limit=0.02"
BLUR = f"{TIMES},blur_sigma=2.5,blur_kernel_size=5"
LAYER = {
    "prompts": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "pixels": "up_blocks.0.attentions.0",
}
SETTINGS = {
    "sag": BLUR + ",scale=2.5,branch=cond,threshold=0.9,layer={layer}",
    "blur": BLUR + ",scale=1.5,branch=cond",
    "pag": TIMES + ",scale=2,branch=uncond,layers={layer}",
    "seg": TIMES + ",scale=2,branch=uncond,layers={layer},blur_sigma=2.5",
    "slg": TIMES + ",scale=2,branch=uncond,layers={block}",
    "tpg": TIMES + ",scale=2,branch=uncond,layers=mid,seed=3",
}


def guidance_text(method: str, kind: str) -> str:
    layer = LAYER[kind]
    return f"{method}:{SETTINGS[method].format(layer=layer, block=layer.removesuffix('.attn1'))}"


def test_no_setting_of_any_method_is_left_out_here() -> None:
    assert SETTINGS.keys() == METHODS.keys()
    for method, text in SETTINGS.items():
        named = {part.split("=")[0] for part in text.split(",")}
        assert named | {"method"} == METHODS[method]().to_dict().keys()


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("prompts") / "tiny"))


@pytest.fixture(scope="module")
def pixel_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_pixels(tmp_path_factory.mktemp("pixels") / "tiny")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    with seeded(0):
        NoisyClassifier(
            num_classes=7,
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            attention_head_dim=32,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            downsample_type="conv",
            timestep_channels=32,
        ).save_pretrained(folder)
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def loaded_pipeline(model: str, dtype: str) -> Any:
    loaded = load_pipeline(model, "cpu", dtype)
    loaded.pipeline.set_progress_bar_config(disable=True)
    return loaded


def drawn_again(record: dict[str, Any], model: str, loaded: Any = None) -> np.ndarray:
    """A picture of a prompt, from its record and its model alone."""
    loaded = loaded or loaded_pipeline(model, record["dtype"])
    settings = loaded.restore(record)
    (picture,) = generate(
        loaded.pipeline, record["prompt"], settings, seed=record["seed"], model_name=record["model"]
    )
    outcome = {"weakened_predictions": picture.record["weakened_predictions"]}
    assert picture.record == outcome | record
    return np.asarray(picture.image)


# What hides a setting here: of a run's two windows, that of fractions is the narrower at both
# ends, and a limit makes terms of all scales as large as itself.
HIDDEN_BY = {"noise_from": "start", "noise_to": "stop", "scale": "norm_limit"}


def without(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The record without each of its guidance's settings."""
    for name in record["guidance"].keys() - {"method"}:
        left_out = (name, HIDDEN_BY.get(name))
        kept = {n: v for n, v in record["guidance"].items() if n not in left_out}
        less = {**record, "guidance": Guidance.from_dict(kept).to_dict()}
        less.pop("weakened_predictions", None)
        yield name, less


# Pictures of prompts

OPTIONS = ("--steps", 8, "--guidance-scale", 4.5, "--negative-prompt", "b, c", "--size", "48x40")


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_of_generate(tmp_path: Path, model: str, method: str) -> None:
    command = ["generate", 'two\nlines: "\N{CAT FACE}"', "--model", model, *OPTIONS, "--seed", 9]
    command += ["--scheduler", "dpm++ 2m karras", "--guidance", guidance_text(method, "prompts")]
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / dtype / "00000-9.png"
        assert run(*command, "--dtype", dtype, "--out", path.parent) == 0
        record = read_record(path)
        assert (drawn_again(record, model) == pixels(path)).all()
    record = read_record(tmp_path / "float32" / "00000-9.png")
    drawn, loaded = pixels(tmp_path / "float32" / "00000-9.png"), loaded_pipeline(model, "float32")
    for name, less in without(record):
        assert (drawn_again(less, model, loaded) != drawn).any(), name


def test_a_picture_of_a_model_that_recommends_its_settings(tmp_path: Path) -> None:
    for options in ([], ["--fast", "--sag-scale", 1]):
        path = tmp_path / str(len(options)) / "00000-0.png"
        assert run("generate", "cat", "--steps", 8, *options, "--out", path.parent) == 0
        assert (drawn_again(read_record(path), "emoji") == pixels(path)).all()


@pytest.mark.parametrize("scheduler", ["euler-a", "dpm++ sde", "plms"])
def test_the_scheduler_is_the_same(tmp_path: Path, model: str, scheduler: str) -> None:
    command = ("generate", "cat", "--model", model, "--steps", 4, "--scheduler", scheduler)
    assert run(*command, "--sag-scale", 0, "--out", tmp_path) == 0
    path = tmp_path / "00000-0.png"
    assert read_record(path)["guidance"] == {"method": "sag", "scale": 0.0}
    assert (drawn_again(read_record(path), model) == pixels(path)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_of_compare(tmp_path: Path, model: str, method: str) -> None:
    text = re.sub(",scale=[^,]*", "", guidance_text(method, "prompts"))
    path = tmp_path / "grid.png"
    arguments = ("compare", "a", "", "--model", model, *OPTIONS, "--num-images", 2, "--seed", 3)
    assert run(*arguments, "--guidance", text, "--sag-scales", "0,2", "--out", path) == 0
    record = read_record(path)
    guidance = Guidance.from_dict(record["guidance"]).to_dict()
    assert record["guidance"] == {n: v for n, v in guidance.items() if n != "scale"}
    loaded = load_pipeline(model, "cpu")
    loaded.pipeline.set_progress_bar_config(disable=True)
    grid = compare(
        loaded.pipeline,
        record["prompts"],
        record["sag_scales"],
        loaded.restore(record),
        model_name=record["model"],
        **{name: record[name] for name in ("seed", "num_images", "batch_size", "show_attention")},
    ).grid
    assert (np.asarray(grid) == pixels(path)).all()


# Samples


@pytest.mark.parametrize("method", METHODS)
def test_samples(tmp_path: Path, pixel_model: str, classifier: Path, method: str) -> None:
    path = tmp_path / "a.npz"
    command = ["sample", "--model", pixel_model, "--num-samples", 3, "--steps", 8, "--out", path]
    command += ["--scheduler", "ddim", "--eta", 0.5, "--seed", 3, "--classes", "4,0,6"]
    command += ["--classifier", classifier, "--classifier-scale", 0.5, "--batch-size", 2]
    assert run(*command, "--guidance", guidance_text(method, "pixels")) == 0
    record = read_record(path)
    assert record == read_record(path.with_suffix(".png"))

    loaded = load_pixel_model(pixel_model, "cpu", record["dtype"], classifier)
    loaded.pipeline.set_progress_bar_config(disable=True)

    def again(record: dict[str, Any], batch_size: int = 2, count: int = 3) -> np.ndarray:
        settings = loaded.restore(record)
        made = {"seed": record["seed"], "model_name": record["model"], "overwrite": True}
        job = SampleJob(loaded.pipeline, tmp_path / "again.npz", count, settings, **made)
        return arrays_of(job.run(batch_size).path)["arr_0"]

    drawn = arrays_of(path)["arr_0"]
    assert (again(record) == drawn).all()
    assert read_record(tmp_path / "again.npz") == record
    assert np.abs(again(record, batch_size=3).astype(int) - drawn).max() <= 1
    first = again(record, count=1)  # not `drawn[:1]`: its batch may round otherwise
    for name, less in without(record):
        if name != "branch":  # drawn without classifier-free guidance, they have one
            assert (again(less, count=1) != first).any(), name
    for change in ({"eta": 0.0}, {"classifier_scale": 0.0}, {"classes": [1]}):
        settings = {**record["settings"], **change}
        assert (again({**record, "settings": settings}, count=1) != first).any(), change


def test_samples_are_read_as_before(tmp_path: Path, pixel_model: str) -> None:
    """By name, as this package and the evaluator of ADM's authors do, and without pickles."""
    path = tmp_path / "a.npz"
    command = ("sample", "--model", pixel_model, "--num-samples", 3, "--classes", "4,0")
    assert run(*command, "--out", path) == 0
    with np.load(path) as file:
        drawn, labels = file["arr_0"], file["arr_1"]
        assert json.loads(file["sag_settings"].item()) == read_record(path)
    assert (drawn.dtype, drawn.shape, labels.tolist()) == (np.uint8, (3, 16, 16, 3), [4, 0, 4])
    assert (np.concatenate(list(NpzSource(path).batches(2))) == drawn).all()
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        version = np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        assert (version, shape, dtype) == ((1, 0), drawn.shape, np.uint8)
        assert member.read() == drawn.tobytes()


# Lists


@pytest.mark.parametrize("method", METHODS)
def test_pictures_of_batch(tmp_path: Path, model: str, method: str) -> None:
    rows = [{"prompt": "cat", "seed": 3, "sag_scale": 2, "width": 48}, {"prompt": "a", "steps": 5}]
    source = listed(tmp_path / "a.jsonl", rows)
    command = ("batch", source.path, "--model", model, *OPTIONS[:-2], "--scheduler", "euler")
    text = guidance_text(method, "prompts")
    assert run(*command, "--guidance", text, "--out", tmp_path / "out") == 0
    for row in rows_of(tmp_path / "out"):
        record = read_record(tmp_path / "out" / row["file"])
        assert (drawn_again(record, model) == pixels(tmp_path / "out" / row["file"])).all()
        assert json.loads(row["guidance"]) == record["guidance"]
        assert row["sag_scale"] == record["guidance"]["scale"]


@pytest.mark.parametrize("method", METHODS)
def test_samples_of_batch(tmp_path: Path, pixel_model: str, method: str) -> None:
    out = tmp_path / "out"
    command = ("batch", "--num-samples", 2, "--seed", 5, "--model", pixel_model, "--steps", 8)
    assert run(*command, "--guidance", guidance_text(method, "pixels"), "--out", out) == 0
    for row in rows_of(out):
        record = read_record(out / row["file"])
        loaded = load_pixel_model(pixel_model, "cpu", record["dtype"])
        loaded.pipeline.set_progress_bar_config(disable=True)
        settings = loaded.restore(record)
        again = SampleJob(
            loaded.pipeline, tmp_path / f"{row['row']}.npz", 1, settings, seed=record["seed"]
        ).run(batch_size=1)
        assert (arrays_of(again.path)["arr_0"][0] == pixels(out / row["file"])).all()
        assert arrays_of(again.path)["arr_1"].tolist() == record["settings"]["classes"]
        assert read_parameters(out / row["file"]).settings["Classes"] == str(
            record["settings"]["classes"][0]
        )


# The text


def test_web_interfaces_find_the_settings_under_their_names(tmp_path: Path, model: str) -> None:
    command = ("generate", "cat", "--model", model, "--steps", 8, "--out", tmp_path)
    assert run(*command, "--guidance", guidance_text("sag", "prompts")) == 0
    parameters = read_parameters(tmp_path / "00000-0.png").settings
    assert {
        name: value for name, value in parameters.items() if "uidance" in name or "SAG" in name
    } == {
        "Guidance Method": "sag",
        "SAG Guidance Enabled": "True",
        "SAG Guidance Scale": "2.5",
        "SAG Start": "0.25",
        "SAG Stop": "0.75",
        "SAG Every": "2",
        "SAG Noise From": "40",
        "SAG Noise To": "0.05",
        "SAG Rescale": "0.7",
        "SAG Norm Limit": "0.02",
        "SAG Branch": "cond",
        "SAG Blur Sigma": "2.5",
        "SAG Blur Kernel Size": "5",
        "SAG Mask Threshold": "0.9",
        "SAG Layer": LAYER["prompts"],
    }
    assert run(*command, "--guidance", "pag", "--overwrite") == 0
    parameters = read_parameters(tmp_path / "00000-0.png").settings
    assert {
        "PAG Scale": "3",
        "PAG Layers": "default",
        "PAG Branch": "cond",
    }.items() <= parameters.items()


def test_the_text_of_samples_tells_what_shaped_them(
    tmp_path: Path, pixel_model: str, classifier: Path
) -> None:
    command = ["sample", "--model", pixel_model, "--num-samples", 1, "--out", tmp_path / "a.npz"]
    command += ["--eta", 0.5, "--classes", "4,0", "--classifier", classifier, "--blur-guidance"]
    assert run(*command, "--every", 2) == 0
    parameters = read_parameters(tmp_path / "a.png").settings
    expected = {"Eta": "0.5", "Classes": "4, 0", "Classifier scale": "1", "Blur Every": "2"}
    assert expected.items() <= parameters.items()
    assert parameters["Guidance Method"] == "blur"
    assert parameters["Classifier"].startswith("NoisyClassifier ")
    assert not [name for name in parameters if "SAG" in name]


def test_a_new_setting_of_a_guidance_appears_by_itself(tmp_path: Path, model: str) -> None:
    try:

        @dataclasses.dataclass(frozen=True)
        class Mine(BlurGuidance, method="mine"):
            new_setting: float = 0.5

        loaded = load_pipeline(model, "cpu")
        loaded.pipeline.set_progress_bar_config(disable=True)
        loaded.pipeline.guidance = Mine(new_setting=0.25)
        (picture,) = generate(loaded.pipeline, "a", loaded.settings(num_inference_steps=2))
        assert "Mine New Setting: 0.25" in picture.parameters
        assert picture.record["guidance"]["new_setting"] == 0.25
        loaded.pipeline.guidance = Mine()
        loaded.restore(picture.record)
        assert loaded.pipeline.guidance == Mine(new_setting=0.25)
        text = ["--guidance", "mine:new_setting=0.75", "--steps", 2, "--out", tmp_path]
        assert run("generate", "a", "--model", model, *text) == 0
        assert read_record(tmp_path / "00000-0.png")["guidance"]["new_setting"] == 0.75
    finally:
        del METHODS["mine"]


def test_files_without_a_record_say_so(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    np.savez(tmp_path / "plain.npz", arr_0=np.zeros(3))
    (tmp_path / "no.npz").write_bytes(b"nothing")
    (tmp_path / "no.png").write_bytes(b"nothing")
    without, png, npz = "has no 'sag_settings' text", "is no PNG picture", "is no .npz file"
    files = {"plain.png": without, "plain.npz": without, "no.npz": npz, "no.png": png}
    for name, reason in files.items():
        with pytest.raises(ValueError, match=f"{name}' {reason}"):
            read_record(tmp_path / name)
