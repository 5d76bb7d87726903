"""Generated input of every kind: the outcome is right, or one clear error.

`make nightly` tries 40 times as many as `make test`, more than 10,000.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from command_line import run
from self_attention_guidance import BlurGuidance, SelfAttentionGuidance
from self_attention_guidance.batch import Manifest, PromptList, Storage
from self_attention_guidance.batch.tasks import COLUMNS, bad_row, tasks_of
from self_attention_guidance.generate import (
    GenerationSettings,
    SampleSettings,
    generate,
    load_pipeline,
    load_pixel_model,
    picture_path,
    read_parameters,
    save_png,
    scheduler_names,
)
from stand_in import DEFAULTS, StandIn
from test_batch_jobs import job, rows_of
from test_batch_parts import row
from tiny import save_tiny_model
from tiny_pixels import save_tiny_pixels

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
# Text that files and terminals have trouble with is in it: surrogates, NUL, line ends, RTL marks.
TEXT = st.text(max_size=200)
ANY_TEXT = st.one_of(TEXT, st.text(st.characters(), max_size=200))
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 8, 64, 1e308]),
)
CELLS = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, ANY_TEXT, NUMBERS.map(str)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
ROWS = st.dictionaries(st.one_of(st.sampled_from(COLUMNS), TEXT), CELLS, max_size=6)


def examples(quick: int) -> Any:
    """So many examples, and 40 times as many in the nightly profile."""
    return settings(
        max_examples=quick * (40 if NIGHTLY else 1),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not NIGHTLY,
    )


def is_one_line(error: BaseException) -> bool:
    return "\n" not in str(error).strip()


@examples(60)
@given(values=ROWS, prompt=st.one_of(st.none(), ANY_TEXT))
def test_rows(values: dict[str, Any], prompt: str | None) -> None:
    if prompt is not None:
        values["prompt"] = prompt
    try:
        tasks = tasks_of(0, values, DEFAULTS)
    except ValueError as error:
        bad = bad_row(0, values, error)
        assert "\n" not in bad.error
        json.dumps(vars(bad), ensure_ascii=False).encode()
        return
    assert tasks
    for task in tasks[:3]:
        assert task.prompt == values["prompt"]
        assert 0 <= task.seed < 2**64
        assert 1 <= task.settings.num_inference_steps <= DEFAULTS.max_steps
        for side in (task.settings.width, task.settings.height):
            assert side is None or (side % 8 == 0 and side <= DEFAULTS.max_size)


@examples(40)
@given(content=st.binary(max_size=400), form=st.sampled_from(["jsonl", "csv", "parquet", "csv.gz"]))
def test_files_of_bytes(content: bytes, form: str) -> None:
    _read(content, form)


@examples(40)
@given(
    lines=st.lists(st.one_of(ROWS.map(json.dumps), ANY_TEXT), max_size=8),
    header=st.sampled_from(["", "prompt\n", "prompt,seed\n"]),
    form=st.sampled_from(["jsonl", "csv"]),
)
def test_files_of_lines(lines: list[str], header: str, form: str) -> None:
    _read((header + "\n".join(lines)).encode("utf-8", "surrogatepass"), form)


def _read(content: bytes, form: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{form}"
        path.write_bytes(content)
        try:
            for number, values in enumerate(PromptList(str(path))):
                try:
                    tasks_of(number, values, DEFAULTS)
                except ValueError as error:
                    bad_row(number, values, error)
        except ValueError as error:
            assert str(error).startswith("prompts=")
            assert is_one_line(error)


@examples(15)
@given(
    rows=st.lists(st.one_of(ROWS, ANY_TEXT.map(lambda t: {"prompt": t})), min_size=1, max_size=8)
)
def test_jobs(rows: list[dict[str, Any]]) -> None:
    assume(all(r.get("prompt") != "kill" for r in rows))
    for values in rows:
        count = values.get("num_images")
        if isinstance(count, int | float | str):
            values["num_images"] = 2 if str(count).isdecimal() else count
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json.dumps(values) + "\n" for values in rows))
        out = Path(folder) / "out"
        summary = job(PromptList(str(path)), out, StandIn()).run()
        found = rows_of(out)
        assert len(found) == summary.total == summary.done + summary.failed
        assert {r["row"] for r in found} == set(range(len(rows)))
        for r in found:
            assert (r["error"] is None) == (r["file"] is not None)
            if r["file"] is not None:
                with Image.open(out / r["file"]) as image:
                    image.load()
        assert job(PromptList(str(path)), out, StandIn()).run().drawn == 0


@examples(60)
@given(
    values=st.dictionaries(
        st.sampled_from([field.name for field in fields(SelfAttentionGuidance)]),
        st.one_of(NUMBERS, TEXT, st.none(), st.booleans(), st.floats(0, 1)),
    )
)
def test_settings_of_guidance(values: dict[str, Any]) -> None:
    for form in (SelfAttentionGuidance, BlurGuidance):
        names = [field.name for field in fields(form)]
        known = {name: value for name, value in values.items() if name in names}
        try:
            guidance = form(**known)
        except ValueError as error:
            assert is_one_line(error)
            continue
        assert 0 <= guidance.start < guidance.stop <= 1
        assert np.isfinite([float(guidance.scale), float(guidance.blur_sigma)]).all()


@examples(60)
@given(values=st.dictionaries(st.sampled_from(["a", "b", "c", "d", "e"]), st.one_of(NUMBERS, TEXT)))
def test_settings_of_pictures(values: dict[str, Any]) -> None:
    for form in (GenerationSettings, SampleSettings):
        names = dict(zip("abcde", form.__dataclass_fields__, strict=False))
        given_values = {names[n]: v for n, v in values.items() if n in names}
        try:
            found = form(**given_values)
        except ValueError as error:
            assert is_one_line(error)
        else:
            assert found.num_inference_steps >= 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "prompts")


@pytest.fixture(scope="module")
def pixel_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_pixels(tmp_path_factory.mktemp("models") / "pixels"))


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    pipeline: Any = load_pipeline(str(model)).pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@examples(12)
@given(
    prompt=st.one_of(
        ANY_TEXT, st.text(min_size=1, max_size=20).map(lambda t: (t * 10_000)[:10_000])
    ),
    negative=ANY_TEXT,
)
def test_prompts(pipeline: Any, prompt: str, negative: str) -> None:
    try:
        given_settings = GenerationSettings(
            negative_prompt=negative, num_inference_steps=1, guidance_scale=2.0
        )
        (picture,) = generate(pipeline, prompt, given_settings)
    except ValueError as error:  # surrogates are no characters
        assert not _is_text(prompt + negative), error
        return
    with tempfile.TemporaryDirectory() as folder:
        path = picture_path(folder, 0, 0)
        save_png(picture.image, path, picture.parameters)
        assert read_parameters(path).settings["Steps"] == "1"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@examples(12)
@given(
    width=st.integers(-8, 80),
    height=st.integers(1, 10).map(lambda n: 8 * n),
    scheduler=st.sampled_from(scheduler_names()),
    steps=st.integers(-1, 4),
    scale=st.floats(-5, 5),
)
def test_sizes_and_schedulers(
    model: Path, width: int, height: int, scheduler: str, steps: int, scale: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        status = run(
            *("generate", "", "--model", model, "--out", folder, "--scheduler", scheduler),
            *("--size", f"{width}x{height}", "--steps", steps, "--sag-scale", scale),
        )
        files = list(Path(folder).iterdir())
        assert (status, len(files)) in ((0, 1), (2, 0))
        for file in files:
            with Image.open(file) as image:
                assert image.size == (width, height)


@examples(12)
@given(data=st.data())
def test_damaged_checkpoints(model: Path, pixel_model: Path, data: st.DataObject) -> None:
    source, load = data.draw(
        st.sampled_from([(model, load_pipeline), (pixel_model, load_pixel_model)])
    )
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        _copy(source, copy)
        file = copy / "unet" / "diffusion_pytorch_model.safetensors"
        _damage(file, data)
        try:
            loaded: Any = load(str(copy))
        except ValueError as error:
            assert str(error).startswith("model=")
            assert is_one_line(error)
            return
        pipe = loaded.pipeline
        pipe.set_progress_bar_config(disable=True)
        try:
            if load is load_pipeline:
                (picture,) = generate(pipe, "", GenerationSettings(num_inference_steps=1))
                assert picture.image.size
            else:
                arguments = {"num_inference_steps": 1, "output_type": "latent"}
                assert pipe(batch_size=1, class_labels=[0], **arguments).images.isfinite().all()
        except FloatingPointError as error:
            assert is_one_line(error)


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())


def _damage(file: Path, data: st.DataObject) -> None:
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["bits", "header", "cut", "nan", "dtype", "missing", "shape"]))
    if kind in ("bits", "header"):
        most = len(content) if kind == "bits" else 400
        for place in data.draw(st.lists(st.integers(0, most - 1), min_size=1, max_size=8)):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
    elif kind == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        tensors = load_file(file)
        name = data.draw(st.sampled_from(sorted(tensors)))
        if kind == "nan":
            tensors[name] = torch.full_like(tensors[name], float("nan"))
        elif kind == "dtype":
            tensors[name] = tensors[name].to(
                data.draw(st.sampled_from([torch.int8, torch.float64]))
            )
        elif kind == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name].flatten()[:1].clone()
        save_file(tensors, file, {"format": "pt"})


@examples(25)
@given(
    places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=4),
)
def test_damaged_parquet_lists(places: Sequence[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        parquet.write_table(pa.table({"prompt": ["cat", "dog"] * 5, "seed": range(10)}), path)
        content = bytearray(path.read_bytes())
        for place, bit in places:
            content[place % len(content)] ^= 1 << bit
        _read(bytes(content), "parquet")


@examples(25)
@given(
    places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_damaged_manifests(places: Sequence[tuple[int, int]], cut: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest(Storage(folder))
        manifest.add([row(number) for number in range(20)])
        manifest.join()
        path = Path(folder) / "manifest.parquet"
        content = bytearray(path.read_bytes())
        for place, bit in places:
            content[place % len(content)] ^= 1 << bit
        path.write_bytes(content if cut is None else content[: cut % len(content)])
        try:
            Manifest(Storage(folder)).finished()
        except ValueError as error:
            assert is_one_line(error)
            assert "damaged" in str(error)


COMMANDS = ["generate", "compare", "sample", "batch", "evaluate", "tune", "convert", "demo", ""]
OPTIONS = [
    *("--steps", "--seed", "--batch-size", "--size", "--scheduler", "--sag-scale", "--blur-sigma"),
    *("--out", "--num-images", "--num-samples", "--classes", "--sag-scales", "--threshold"),
    *("--start", "--stop", "--every", "--branch", "--dtype", "--device", "--json", "--port"),
    *("--workers", "--shard-size", "--fast", "--overwrite", "--preset", "--layer"),
    "--guidance",
]


@examples(40)
@given(
    command=st.sampled_from(COMMANDS),
    arguments=st.lists(
        st.one_of(st.sampled_from(OPTIONS), TEXT, NUMBERS.map(str), st.sampled_from(["--", "-x"])),
        max_size=6,
    ),
)
def test_command_lines(command: str, arguments: list[str]) -> None:
    """Whatever they say, there is no such model and no such file."""
    with tempfile.TemporaryDirectory() as folder:
        missing = str(Path(folder) / "missing")
        known = {
            "generate": ["--model", missing],
            "compare": ["--model", missing],
            "sample": ["--model", missing],
            "batch": ["--model", missing],
            "demo": ["--model", missing],
            "evaluate": [missing],
            "tune": [missing],
        }.get(command, [])
        before = os.getcwd()
        os.chdir(folder)
        try:
            status = run(*filter(None, [command]), *known, *arguments)
        finally:
            os.chdir(before)
        assert status == 2 or (status == 0 and "--help" in arguments) or not command
