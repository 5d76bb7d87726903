"""The command `batch`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import error_of, help_without_torch, in_a_process, interrupted, run
from self_attention_guidance.batch import Model
from self_attention_guidance.generate import generate, load_pipeline, read_parameters
from test_batch_jobs import listed, rows_of
from tiny_models import MODELS
from tiny_pixels import arrays_of, save_tiny_pixels

UNUSED = {"negative_prompt": "x", "guidance_scale": 7.5, "width": 64, "image": "a.png", "mask": "a"}


def test_help_needs_no_torch() -> None:
    text = help_without_torch("batch")
    assert "sag batch prompts.jsonl" in text
    assert "manifest.parquet" in text


def test_it_draws_what_generate_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = listed(tmp_path / "a.jsonl", [{"prompt": "cat", "seed": 3, "sag_scale": 2, "x": 1}])
    out = tmp_path / "out"
    assert run("batch", source.path, "--out", out, "--steps", 4, "--num-images", 2, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == "note: columns that are not used: x\n"
    summary = json.loads(captured.out)
    assert (summary["total"], summary["done"], summary["failed"], summary["drawn"]) == (2, 2, 0, 2)
    loaded = load_pipeline("emoji")
    settings = loaded.settings(num_inference_steps=4, sag_scale=2.0)
    pictures = generate(loaded.pipeline, "cat", settings, seed=3, num_images=2, model_name="emoji")
    for row, picture in zip(rows_of(out), pictures, strict=True):
        path = out / row["file"]
        assert read_parameters(path).settings["Seed"] == str(picture.seed)
        with Image.open(path) as image:
            assert image.tobytes() == picture.image.tobytes()


def test_pixel_models_draw_without_prompts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--model", "emoji-adm", "--steps", 2, "--out", out)
    assert run("batch", "--num-samples", 3, *options) == 0
    assert [row["seed"] for row in rows_of(out)] == [0, 1, 2]
    assert len({row["sha256"] for row in rows_of(out)}) == 3
    source = listed(tmp_path / "a.jsonl", ["cat"])
    assert run("batch", source.path, *options, "--overwrite") == 3
    assert "prompt must be empty" in rows_of(out)[0]["error"]


def test_columns_that_a_model_without_prompts_cannot_use_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "", name: value} for name, value in UNUSED.items()]
    source = listed(tmp_path / "a.jsonl", [{"prompt": "", "seed": 5}, *rows])
    options = ("--model", "emoji-adm", "--steps", 1, "--out", tmp_path / "out")
    assert run("batch", source.path, *options) == 3
    good, *bad = rows_of(tmp_path / "out")
    assert (good["seed"], good["error"]) == (5, None)
    for name, row in zip(UNUSED, bad, strict=True):
        assert row["error"] == f"{name} must be empty: the model takes no prompts"


def test_a_pixel_model_that_recommends_nothing_has_the_settings_of_sample(
    tmp_path: Path,
) -> None:
    model = Path(save_tiny_pixels(tmp_path / "model"))
    (model / "sag_settings.json").unlink()
    options = ("--model", model, "--steps", 2, "--threshold", 0.9)
    assert run("batch", "--num-samples", 1, *options, "--out", tmp_path / "out") == 0
    (row,) = rows_of(tmp_path / "out")
    sample = ("sample", "--num-samples", 1, *options, "--batch-size", 1)
    assert run(*sample, "--out", tmp_path / "a.npz") == 0
    with Image.open(tmp_path / "out" / row["file"]) as image:
        assert np.array_equal(np.asarray(image), arrays_of(tmp_path / "a.npz")["arr_0"][0])


def test_failed_rows_change_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = listed(tmp_path / "a.jsonl", ["cat", {"prompt": "cat", "width": 7}])
    options = ("--steps", 1, "--out", tmp_path / "out")
    for drawn in ("1 of 2 pictures are done, 1 failed", "1 of them by earlier runs, 1 failed"):
        assert run("batch", source.path, *options) == 3
        assert drawn in capsys.readouterr().out


def test_what_generate_refuses_is_an_error_of_its_row(tmp_path: Path) -> None:
    MODELS["flux"]().save_pretrained(tmp_path / "model")
    cells = {"prompt": "cat", "width": 32, "height": 32}
    rows = [cells, cells | {"negative_prompt": "dog"}, cells | {"height": None}]
    source = listed(tmp_path / "a.jsonl", rows)
    options = ("--model", tmp_path / "model", "--steps", 1, "--max-size", 32)
    assert run("batch", source.path, *options, "--out", tmp_path / "out") == 3
    good, negative, own = (str(row["error"]) for row in rows_of(tmp_path / "out"))
    assert good == "None"
    assert negative.startswith("negative_prompt='dog' has no effect on this model")
    assert own.startswith("size: the model's own size is 1024, and a side must have at most 32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either PROMPTS or --num-samples"),
        (["missing.jsonl"], "there is none"),
        (["--num-samples", "0"], "--num-samples=0"),
        (["--num-samples", "1", "--batch-size", "0"], "--batch-size=0"),
        (["--num-samples", "1", "--together", "0"], "together=0"),
        (["--num-samples", "1", "--workers", "0"], "workers=0"),
        (["--num-samples", "1", "--threads", "0"], "threads=0"),
        (["--num-samples", "1", "--shard-size", "0"], "--shard-size=0"),
        (["--num-samples", "1", "--model", "none"], "model='none'"),
        (["--num-samples", "1", "--scheduler", "none"], "scheduler='none'"),
        (["--num-samples", "1", "--steps", "2000"], "--max-steps"),
        (["--num-samples", "1", "--gpus", "-1"], "gpus=-1"),
        (["--num-samples", "1", "--gpus", "1"], "--gpus=1.0 must not be given for a single worker"),
        (["--num-samples", "1", "--workers", str(10**20)], "--workers=1"),
        (["--num-samples", "1", "--threshold", "-1"], "--threshold"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in error_of(capsys, "batch", *arguments, "--out", tmp_path / "out")


def test_a_model_that_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "ADMPipeline"}')
    message = error_of(
        capsys, "batch", "--num-samples", 1, "--model", broken, "--out", tmp_path / "out"
    )
    assert "cannot be loaded" in message


def test_ctrl_c_leaves_a_job_that_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = in_a_process("batch", "--num-samples", 20, "--steps", 3, "--out", out)
    message = interrupted(job, out)
    assert job.returncode == 130
    assert "of 20 pictures are done" in message
    assert "the same command resumes" in message
    assert message.strip().splitlines()[-1] == "error: interrupted"
    assert run("batch", "--num-samples", 20, "--steps", 3, "--out", out) == 0
    assert [row["row"] for row in sorted(rows_of(out), key=lambda r: r["row"])] == list(range(20))


def test_a_finished_folder_of_another_guidance_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = listed(tmp_path / "a.jsonl", ["red heart"]), tmp_path / "out"
    asked = ["batch", source.path, "--steps", 2, "--out", out]
    assert run(*asked) == 0
    assert run(*asked) == 0
    assert run(*asked, "--device", "cpu") == 0  # asked for in another way, and the same
    capsys.readouterr()
    for options in (["--guidance", "pag"], ["--together", 2], ["--scheduler", "euler"]):
        assert "holds pictures with" in error_of(capsys, *asked, *options)


def test_a_finished_folder_knows_its_model_by_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_pixels(tmp_path / "model")
    command = ("batch", "--num-samples", 1, "--out", tmp_path / "out", "--model")
    assert run(*command, model) == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "__call__", None)  # it would be loaded again
    assert run(*command, "./model") == 0


def test_pictures_that_are_gone_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("batch", "--num-samples", 2, "--model", "emoji-adm", "--steps", 1)
    assert run(*command, "--out", tmp_path) == 0
    next((tmp_path / "images").rglob("*.png")).unlink()
    capsys.readouterr()
    assert run(*command, "--out", tmp_path) == 0
    printed = "note: 1 of 2 pictures are gone or empty, and are drawn again\n"
    assert printed in capsys.readouterr().err
