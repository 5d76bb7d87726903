"""`sag tune` from its command line to its report, on tiny models."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image, ImageOps

from command_line import error_of, help_without_torch, run
from self_attention_guidance import ADMPipeline, BlurGuidance, PerturbedAttentionGuidance
from self_attention_guidance.batch.storage import Storage
from self_attention_guidance.cli.tune import Features
from self_attention_guidance.evaluate import ENCODERS, load_set, open_set
from self_attention_guidance.evaluate.encoder import Encoded
from self_attention_guidance.generate import (
    SampleSettings,
    draw_samples,
    load_pipeline,
    load_pixel_model,
    read_record,
)
from self_attention_guidance.guidance.text import guidance_text, parse_guidance
from self_attention_guidance.models.builtin import recommended_settings
from self_attention_guidance.tune import (
    About,
    Budget,
    Tuned,
    TuneJob,
    TuneSettings,
    write_report,
)
from self_attention_guidance.tune.gallery import Chunk, Gallery
from tiny import save_tiny_model
from tiny_pixels import arrays_of, one_thread, tiny_pipeline

FEW = ["--methods", "sag,pag", "--quiet"]
STEPS = 2
# No guidance, the model's own, the defaults of two methods, and a few others.
PICTURES = 136
# Far from the default, so that it has to be looked for.
KNOWN = PerturbedAttentionGuidance(16.0)


class Colours:
    """An encoder of a few features, in which small sets of pictures differ clearly."""

    name = "emoji"

    def encode(self, pictures: torch.Tensor) -> Encoded:
        values = pictures.double() / 255
        return Encoded(torch.cat([values.mean((2, 3)), values.std((2, 3))], 1), None, None)


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def quick_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is for power failures, and takes most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny model draws with a known guidance, of seeds that no run has."""
    pipe = tiny_pipeline()
    pipe.guidance = KNOWN
    settings = SampleSettings(num_inference_steps=STEPS)
    path = tmp_path_factory.mktemp("reference") / "pag.npz"
    np.savez(path, arr_0=draw_samples(pipe, settings, range(1000, 1064)))
    return path


def tune(model: Path, *arguments: object, budget: int = PICTURES) -> dict[str, Any]:
    """Runs the command, and returns what it found but for times."""
    assert run("tune", model, *FEW, "--steps", STEPS, "--budget", budget, *arguments) == 0
    return without_times(json.loads((model / "sag_tune" / "result.json").read_text("utf-8")))


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    rows = [{n: value for n, value in row.items() if n != "seconds"} for row in found["rows"]]
    return {**{n: value for n, value in found.items() if n != "seconds"}, "rows": rows}


def job_of(
    model: Path,
    work: Path,
    reference: Path | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> TuneJob:
    loaded = load_pixel_model(str(model))
    loaded.use()
    usual: dict[str, Any] = {"budget": Budget(pictures=PICTURES), "methods": ("sag", "pag")}
    asked = TuneSettings(**{**usual, "steps": STEPS, **settings})
    compared = None if reference is None else load_set(open_set(reference), Colours(), 64)
    return TuneJob(loaded, work, asked, Colours(), compared, overwrite=overwrite)


def test_a_guidance_that_is_known_is_found(model: Path, tmp_path: Path, reference: Path) -> None:
    found, _ = job_of(model, tmp_path / "work", reference, budget=Budget(pictures=400)).run()
    chosen = found.rows[found.chosen]
    assert chosen.candidate.guidance.method == "pag"
    assert chosen.candidate.guidance.scale > 6  # the default is 3
    for difference in (chosen.against_unguided, chosen.against_own):
        assert difference is not None and difference.high is not None and difference.high < 0
    assert chosen.score.value < 0.3 * found.rows[0].score.value


def test_the_settings_are_picked_up_from_the_folder(model: Path) -> None:
    found = tune(model)
    written = recommended_settings(model)
    assert written.num_inference_steps == STEPS
    loaded = load_pixel_model(str(model))
    assert loaded.pipeline.guidance == written.make_guidance()
    setting = found["rows"][found["chosen"]]["setting"]
    assert setting == guidance_text(loaded.pipeline.guidance.to_dict())
    page = (model / "sag_tune" / "report.md").read_text("utf-8")
    assert f"| **{found['chosen']}** |" in page
    assert "sag sample --model" in page
    with Image.open(model / "sag_tune" / "report.png") as grid:
        assert grid.width > grid.height / 2


def test_commands_of_the_report_draw_its_rows_whatever_the_model_recommends(model: Path) -> None:
    found = tune(model, "--methods", "blur")
    page = (model / "sag_tune" / "report.md").read_text("utf-8")
    tune(model, "--methods", "blur", "--choose", 0)
    loaded = load_pixel_model(str(model))
    lines = page.splitlines()
    for number, row in enumerate(found["rows"][1:], 1):
        words = shlex.split(lines[lines.index(f"# {number}") + 1])
        assert words[:2] == ["sag", "sample"]
        drawn = loaded.guidance(**parse_guidance(words[words.index("--guidance") + 1]))
        assert guidance_text(drawn.to_dict()) == row["setting"]


def test_rows_of_the_grid_show_all_that_differs(model: Path, tmp_path: Path) -> None:
    found, gallery = job_of(model, tmp_path / "work", budget=Budget(pictures=104)).run()
    about = About(
        model=str(model),
        takes_prompts=False,
        scheduler=None,
        prompts=[""],
        seed=0,
        reference=None,
        features="colours",
        settings_file=model / "sag_settings.json",
    )
    blank = [Image.new("RGB", (64, 64))] * 64
    pictures: Any = SimpleNamespace(unit=gallery.unit, shown=lambda *_: blank)  # pyright: ignore[reportUnknownLambdaType]

    def grid_of(**settings: Any) -> bytes:
        guidance = PerturbedAttentionGuidance(6.9, **settings)
        first, *others = found.rows
        rows = [replace(first, candidate=replace(first.candidate, guidance=guidance)), *others]
        write_report(tmp_path, replace(found, rows=rows), pictures, about)
        with Image.open(tmp_path / "report.png") as grid:
            return grid.tobytes()

    assert len({grid_of(), grid_of(every=2), grid_of(stop=0.65), grid_of(layers="mid")}) == 4


def test_text_models_are_tuned_in_cfg_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text(f"red heart{' red' * 90}\nblue fox\ngreen tree\n")
    arguments = ["--methods", "pag", "--steps", "1", "--budget", "104"]
    command = ["tune", model, *arguments, "--prompts", tmp_path / "prompts.txt"]
    assert run(*command) == 0
    printed = capsys.readouterr().err
    assert "settings in 1 rung (6 on 8 seeds)" in printed
    assert "too long for this model, and are cut: 1\n" in printed
    chosen = recommended_settings(model)
    assert chosen.guidance_scale is not None
    page = (model / "sag_tune" / "report.md").read_text("utf-8")
    assert "no figure can say" in page
    # The columns begin at seed 8: 8 % 3 = 2.
    listed = [line[2:].split()[:2] for line in page.split("in turn:")[1].split("##")[0].split("\n")]
    assert listed[2:5] == [["green", "tree"], ["red", "heart"], ["blue", "fox"]]
    # Without --guidance, the folder's own settings draw.
    assert run("generate", "red heart", "--model", model, "--out", tmp_path / "a.png") == 0
    record = read_record(tmp_path / "a.png")
    assert record["settings"]["guidance_scale"] == chosen.guidance_scale
    assert record["guidance"]["scale"] == chosen.make_guidance().scale
    # The commands of the report draw its rows, whatever the model recommends now.
    result = json.loads((model / "sag_tune" / "result.json").read_text("utf-8"))
    number = [row["setting"] for row in result["rows"]].index("pag:scale=3, CFG 7.5")
    lines = page.splitlines()
    words = shlex.split(lines[lines.index(f"# {number}") + 1])
    assert run(*words[1:], "--out", tmp_path / "b.png") == 0
    record = read_record(tmp_path / "b.png")
    assert record["guidance"] == PerturbedAttentionGuidance(3.0).to_dict()
    assert record["settings"]["guidance_scale"] == 7.5
    # Another row is taken without drawing.
    assert run(*command, "--choose", "0", "--quiet") == 0
    assert load_pipeline(str(model)).pipeline.guidance.scale == 0
    capsys.readouterr()
    assert error_of(capsys, *command, "--choose", "6", "--quiet").startswith(
        "error: --choose=6 must be a row of the report, 0 to"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_ends_as_an_undisturbed_one(model: Path, reference: Path) -> None:
    whole = tune(model, "--reference", reference)
    settings = (model / "sag_settings.json").read_bytes()
    (model / "sag_settings.json").unlink()
    (model / "sag_tune").rename(model / "whole")
    command = [sys.executable, "-m", "self_attention_guidance.cli", "tune", str(model), *FEW]
    command += ["--steps", str(STEPS), "--budget", str(PICTURES), "--reference", str(reference)]
    parts = model / "sag_tune" / "parts"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.npz"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert 4 <= len(list(parts.glob("*.npz"))) < whole["pictures"] / 8
    assert not (model / "sag_settings.json").exists()
    assert tune(model, "--reference", reference) == whole
    assert (model / "sag_settings.json").read_bytes() == settings
    # Once it is done, the same command draws nothing, and changes nothing.
    assert tune(model, "--reference", reference) == whole


def test_the_choice_sees_one_half_of_the_seeds(
    tmp_path: Path, model: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    draw = Gallery.draw

    def noted(gallery: Gallery, candidate: Any, first: int, keep_pictures: bool = False) -> Chunk:
        numbers.append(first)
        return draw(gallery, candidate, first, keep_pictures)

    monkeypatch.setattr(Gallery, "draw", noted)
    found, _ = job_of(model, tmp_path / "work", reference).run()
    seeds = found.plan.seeds
    begin = next(place for place, number in enumerate(numbers) if number >= seeds)
    assert all(number < seeds for number in numbers[:begin])
    assert all(seeds <= number < 2 * seeds for number in numbers[begin:])
    # Whatever the other half is like, the choice is the same.
    storage = Storage(str(tmp_path / "work"))
    for name in storage.names("parts"):
        if int(name.removesuffix(".npz").rpartition("-")[2]) >= seeds:
            path = tmp_path / "work" / name
            arrays = dict(np.load(path))
            dice = np.random.default_rng(len(name))
            arrays["features"] = dice.normal(size=arrays["features"].shape).astype(np.float32)
            np.savez(path, **arrays)
    again, _ = job_of(model, tmp_path / "work", reference).run()
    assert again.ranking == found.ranking
    assert again.rows[again.chosen].candidate == found.rows[found.chosen].candidate
    assert again.rows[again.chosen].score != found.rows[found.chosen].score


def test_a_run_with_other_settings_is_refused_by_their_name(
    model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = model / "sag_tune"
    with pytest.raises(KeyboardInterrupt):
        job_of(model, work).run(report=interrupt)
    arguments = ["tune", model, *FEW, "--budget", PICTURES]
    capsys.readouterr()
    message = error_of(capsys, *arguments, "--steps", "3")
    assert f"holds a run with steps={STEPS}, not 3" in message and message.startswith(
        "error: --work="
    )
    message = error_of(capsys, *arguments, "--steps", STEPS, "--reference", reference)
    assert "reference=None, not 'pag.npz " in message
    parts = len(list((work / "parts").iterdir()))
    anew = job_of(model, work, steps=1, overwrite=True)
    assert len(list((work / "parts").iterdir())) == parts  # until it runs
    with pytest.raises(KeyboardInterrupt):
        anew.run(report=interrupt)
    assert len(list((work / "parts").iterdir())) == 2


@pytest.mark.parametrize("file", ["job.json", "plan.json", "journal.json"])
def test_a_run_whose_state_is_damaged_keeps_its_pictures(
    model: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    before = tune(model)
    work, out = model / "sag_tune", model / "sag_settings.json"
    command = ["tune", model, *FEW, "--steps", STEPS, "--budget", PICTURES]
    state, parts = (work / file).read_bytes(), len(list((work / "parts").iterdir()))
    capsys.readouterr()
    wrong = [b"", b"{", b"7", b"{}", b"\xff", b"[[1]]", b"[-1]", b"[3]", b'["8"]']
    for content in [*wrong, b'{"asked": {}, "own": []}']:
        (work / file).write_bytes(content)
        message = error_of(capsys, *command)
        assert message.startswith(f"error: --work: '{work}/{file}' is damaged ("), content
        assert message.endswith("or start again with --overwrite\n")
    assert len(list((work / "parts").iterdir())) == parts
    if file == "job.json":
        (work / file).unlink()
        assert "is damaged (it is gone" in error_of(capsys, *command)
    (work / file).write_bytes(state)
    written = out.read_bytes()
    assert tune(model) == before
    assert out.read_bytes() == written
    if file == "job.json":
        (work / file).write_bytes(b"{}")
        assert tune(model, "--overwrite")["pictures"] == before["pictures"]


def test_chunks_that_are_damaged_are_drawn_again(model: Path, tmp_path: Path) -> None:
    found, _ = job_of(model, tmp_path / "work").run()
    parts = sorted((tmp_path / "work" / "parts").iterdir())
    whole = {path: path.read_bytes() for path in parts}
    parts[0].write_bytes(b"")
    parts[1].write_bytes(whole[parts[1]][:60])
    np.savez(parts[2], features=np.zeros((1, 6)))
    np.savez(parts[3], other=np.zeros((1, 6)))
    parts[4].unlink()
    lines: list[str] = []
    again, gallery = job_of(model, tmp_path / "work").run(lines.append)
    assert lines[0] == f"4 damaged files are drawn again: parts/{parts[0].name}"
    assert len(gallery.damaged) == 4
    assert (again.ranking, again.chosen) == (found.ranking, found.chosen)
    for path, content in whole.items():
        assert np.array_equal(arrays_of(path)["features"], np.load(io.BytesIO(content))["features"])


def test_a_run_that_could_not_begin_does_not_block_its_correction(
    model: Path, tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "small.npz", arr_0=noise)
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    command = ["tune", model, *FEW, "--steps", STEPS, "--budget", PICTURES, "--reference"]
    for wrong, message in (("small", "holds pictures of 8x8"), ("other", "5 features a picture")):
        assert message in error_of(capsys, *command, tmp_path / f"{wrong}.npz")
        assert len(list((model / "sag_tune" / "parts").iterdir())) == 1
    assert tune(model, "--reference", reference)["chosen"] >= 0
    capsys.readouterr()
    assert "holds a run with" in error_of(capsys, *command, tmp_path / "small.npz")


def test_the_pipeline_keeps_its_guidance(model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path / "work")
    before = job.loaded.pipeline.guidance
    with pytest.raises(KeyboardInterrupt):
        job.run(report=lambda drawn, *_: interrupt() if drawn > 32 else None)
    assert job.loaded.pipeline.guidance == before
    job.run()
    assert job.loaded.pipeline.guidance == before == job.space.own


def test_folders_of_others_are_not_deleted(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "work" / "parts" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(ValueError, match=r"^work: '.*job\.json' is damaged"):
        job_of(model, tmp_path / "work")
    assert mine.exists()


def test_two_runs_in_one_folder_are_refused(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first, second = job_of(model, work), job_of(model, work)
    with Storage(str(work)).locked(), pytest.raises(ValueError, match=r"^work=.* is in use by an"):
        first.run()
    with pytest.raises(KeyboardInterrupt):
        first.run(report=interrupt)
    with pytest.raises(ValueError, match=r"^work=.* another run has begun here"):
        second.run()
    with pytest.raises(KeyboardInterrupt):
        first.run(report=interrupt)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_reference_of_another_size_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "small.npz", arr_0=noise)
    arguments = [*FEW, "--budget", PICTURES, "--steps", 1, "--reference", tmp_path / "small.npz"]
    message = error_of(capsys, "tune", model, *arguments)
    assert "--reference: it holds pictures of 8x8 pixels, the model draws 16x16" in message


def test_a_budget_is_for_the_methods_that_suit_the_model(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (8, 16)}
    plain = UNet2DModel(**sizes, **blocks, norm_num_groups=4, add_attention=False)
    pipe = ADMPipeline(plain, DDIMScheduler())
    pipe.guidance = BlurGuidance(1.0)
    pipe.save_pretrained(tmp_path / "plain")
    settings = {"guidance": {"method": "blur", "scale": 1.0}}
    (tmp_path / "plain" / "sag_settings.json").write_text(json.dumps(settings))
    command = ["--quiet", "--steps", STEPS, "--budget", 100]
    assert run("tune", tmp_path / "plain", *command, "--overwrite") == 0
    # Before the reference is read.
    monkeypatch.setattr("self_attention_guidance.evaluate.open_set", None)
    capsys.readouterr()
    message = error_of(capsys, "tune", model, *command, "--reference", model)
    assert "--budget=100 pictures are too few to try 7 settings: at least" in message


def test_settings_of_others_are_not_replaced(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "sag_settings.json").write_text('{"guidance": {"scale": 1.5}}')
    message = error_of(capsys, "tune", model, *FEW, "--budget", PICTURES)
    assert "sag_settings.json' exists" in message
    assert not (model / "sag_tune").exists()


def test_a_run_replaces_only_what_it_wrote(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", model, *FEW, "--steps", STEPS, "--budget", PICTURES]
    tune(model)
    own, other = model / "sag_settings.json", tmp_path / "b.json"
    content = own.read_text("utf-8")
    for path in (own, other):
        path.write_text(content.replace('"num_inference_steps": 2', '"num_inference_steps": 30'))
        asked = [*command, "--out", path, "--work", model / "sag_tune"]
        capsys.readouterr()
        assert f"{path.name}' exists: choose another place, or" in error_of(capsys, *asked)
        assert run(*asked, "--overwrite") == 0
        assert path.read_text("utf-8") == content


def test_damaged_settings_are_named_and_cost_no_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    command = ["tune", model, *FEW, "--steps", STEPS, "--budget", PICTURES, "--out", out]
    out.write_text("[")
    message = error_of(capsys, *command, "--overwrite")
    assert message.startswith(f"error: --out='{out}' is damaged (")
    out.unlink()
    assert run(*command) == 0


def test_a_long_time_for_fast_pictures_can_be_resumed(model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            job_of(model, tmp_path / "work", budget=Budget(seconds=1e6)).run(report=interrupt)


class Clock:
    """A clock that only drawing moves: a second a picture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("self_attention_guidance.tune.gallery.time", self)
        pictures = Gallery._pictures

        def slow(gallery: Gallery, candidate: Any, numbers: range) -> Any:
            self.now += len(numbers) * (1 + (candidate.guidance.method == "pag"))
            return pictures(gallery, candidate, numbers)

        monkeypatch.setattr(Gallery, "_pictures", slow)

    def monotonic(self) -> float:
        return self.now


def test_a_time_budget_holds_across_runs(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    budget = Budget(seconds=250)

    def stop(drawn: int, *_: object) -> None:
        if drawn >= 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job_of(model, tmp_path / "work", budget=budget).run(report=stop)
    assert 80 <= clock.now <= 160
    lines: list[str] = []
    found, _ = job_of(model, tmp_path / "work", budget=budget).run(lines.append)
    assert found.seconds <= 250
    assert clock.now == found.seconds > 170
    assert_equal_counts(found)
    # What was decided by the clock stays decided: nothing is drawn again, nor more.
    clock.now += 1000
    again, _ = job_of(model, tmp_path / "work", budget=budget).run()
    assert again.pictures == found.pictures
    assert (again.ranking, again.chosen) == (found.ranking, found.chosen)
    assert "settings in" in lines[0] and lines[1].startswith("about ")


def test_the_pace_of_a_resumed_run_does_not_depend_on_names(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    job_of(model, tmp_path / "work").run()
    paths = sorted((tmp_path / "work" / "parts").iterdir())
    for place, path in enumerate(paths):
        slow = place >= len(paths) - 8
        np.savez(path, **{**arrays_of(path), "elapsed": np.array(800.0 if slow else 0.0)})
    _, gallery = job_of(model, tmp_path / "work").run()
    assert gallery.pace == pytest.approx(8 * 800 / (8 * len(paths)))


def test_time_that_is_short_is_kept_for_the_report(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    def slower(drawn: int, *_: object) -> None:
        clock.now += 3.0 if drawn > 20 else 0.0

    found, _ = job_of(model, tmp_path / "work", budget=Budget(seconds=400)).run(report=slower)
    assert found.seconds <= 400
    assert_equal_counts(found)


@pytest.mark.parametrize("has_reference", [True, False])
def test_pictures_may_be_drawn_one_by_one(
    tmp_path: Path,
    model: Path,
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_reference: bool,
) -> None:
    Clock(monkeypatch)
    compared = reference if has_reference else None
    # So little time that a score has as few pictures as it can.
    short = Budget(seconds=10)
    found, _ = job_of(model, tmp_path / "work", compared, batch_size=1, budget=short).run()
    assert found.seeds == (2, 2)
    assert all(math.isfinite(score) for _, score in found.ranking)
    assert all(math.isfinite(row.score.value) for row in found.rows)


def assert_equal_counts(found: Tuned) -> None:
    assert len({len(row.drawn.features) for row in found.rows}) == 1
    assert found.seeds[1] >= 4


def test_a_setting_that_fails_is_left_out_and_named(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = Gallery._pictures

    def broken(gallery: Gallery, candidate: Any, numbers: range) -> Any:
        if candidate.guidance.method == "pag":
            raise FloatingPointError("step 3: the sample is not finite")
        return pictures(gallery, candidate, numbers)

    monkeypatch.setattr(Gallery, "_pictures", broken)
    found, _ = job_of(model, tmp_path / "work").run()
    assert set(found.failures.values()) == {"step 3: the sample is not finite"}
    chunks = [np.load(path) for path in (tmp_path / "work" / "parts").iterdir()]
    assert found.pictures == sum(len(chunk["features"]) for chunk in chunks) < 8 * len(chunks)
    assert all(row.candidate.guidance.method == "sag" for row in found.rows)


def test_what_fails_on_the_other_seeds_is_compared_with_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = Gallery._pictures
    job = job_of(model, tmp_path / "work")
    own, first = job.space.as_it_is, 8

    def broken(gallery: Gallery, candidate: Any, numbers: range) -> Any:
        if candidate == own and numbers[0] >= first:
            raise FloatingPointError("step 3: the sample is not finite")
        return pictures(gallery, candidate, numbers)

    monkeypatch.setattr(Gallery, "_pictures", broken)
    found, gallery = job.run()
    assert str(own) in found.failures and found.plan.seeds == first
    assert all(row.against_own is None for row in found.rows)
    assert found.rows[1].against_unguided.value != 0
    about = About(
        model="tiny", takes_prompts=False, scheduler=None, prompts=("",), seed=0, reference=None,
        features="emoji", settings_file=tmp_path / "a.json",
    )  # fmt: skip
    page = write_report(tmp_path, found, gallery, about).read_text("utf-8")
    assert "| - |" in page and f"`{own}` could not be drawn: step 3" in page
    found = replace(found, ranking=((own, 0.5), *found.ranking))
    about = replace(about, model=".", reference="\udcff", settings_file=Path("\udcff.json"))
    monkeypatch.chdir(model)
    page = write_report(tmp_path, found, gallery, about).read_text("utf-8")
    assert f"`{own}` had the lowest score, but it could not be drawn on the other seeds" in page
    assert page.startswith("# Settings for tiny\n") and "`\\udcff.json`" in page


def test_no_guidance_is_left_if_all_others_fail(
    tmp_path: Path, model: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = Gallery._pictures

    def broken(gallery: Gallery, candidate: Any, numbers: range) -> Any:
        drawn = pictures(gallery, candidate, numbers)
        if candidate.is_unguided:  # so that it is not among the best
            return [ImageOps.invert(picture) for picture in drawn]
        if numbers[0] >= 4:
            raise FloatingPointError("step 3: the sample is not finite")
        return drawn

    monkeypatch.setattr(Gallery, "_pictures", broken)
    found, _ = job_of(model, tmp_path / "work", reference, batch_size=4, methods=("pag",)).run()
    assert len(found.plan.rungs) == 2
    assert [row.candidate.is_unguided for row in found.rows] == [True]
    assert [each.is_unguided for each, _ in found.ranking] == [True]
    assert found.failures and found.chosen == 0


def test_its_help_is_quick_and_its_encoders_are_those_of_evaluate() -> None:
    assert "sag tune ./my-pixel-model" in help_without_torch("tune")
    assert tuple(each.value for each in Features) == ENCODERS
