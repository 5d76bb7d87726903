"""Runs of samples that were killed go on, without loss or repetition."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from command_line import run
from self_attention_guidance.batch import SampleJob, Storage, artists
from self_attention_guidance.generate import SampleSettings
from tiny_pixels import (
    FEW,
    SAG,
    finish,
    interrupt,
    one_thread,
    pictures_of,
    save_tiny_pixels,
    tiny_pipeline,
)


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_pixels(tmp_path_factory.mktemp("samples") / "tiny")


class Calls:
    """Counts a denoiser's calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures = 0
        forward = UNet2DModel.forward

        def counted(unet: UNet2DModel, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.pictures += len(sample)
            return forward(unet, sample, *args, **kwargs)

        monkeypatch.setattr(UNet2DModel, "forward", counted)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_run_goes_on_without_loss_or_repetition(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, count = 10, 40
    arguments = ["sample", "--model", model, "--num-samples", str(count), "--steps", str(steps)]
    arguments += ["--batch-size", "2", "--sag-scale", "0", "--device", "cpu"]
    killed, whole = tmp_path / "killed.npz", tmp_path / "whole.npz"
    command = [sys.executable, "-m", "self_attention_guidance.cli", *arguments]
    process = subprocess.Popen(
        [*command, "--out", str(killed)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    parts = tmp_path / "killed.npz.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.rglob("*.png"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGKILL, "")
    assert not killed.exists()
    drawn = len(list(parts.rglob("*.png")))
    assert 0 < drawn < count
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        assert run(*arguments, "--out", killed) == 0
        batches = -(-(count - drawn) // 2)  # a batch of which half was written is filled up
        assert calls.pictures == 2 * batches * steps
    assert not parts.exists()
    assert run(*arguments, "--out", whole) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert killed.with_suffix(".png").read_bytes() == whole.with_suffix(".png").read_bytes()


def test_other_batch_size_device_and_count_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, out = tiny_pipeline(), tmp_path / "a.npz"
    settings = replace(FEW, sag_scale=0)
    interrupt(pipe, out, 3, settings)
    calls = Calls(monkeypatch)
    going_on = SampleJob(pipe, out, 9, settings)
    assert going_on.drawn == 3
    assert going_on.run(4).drawn == 6
    assert calls.pictures == 8 * 2  # the last batch is filled up
    whole = pictures_of(finish(pipe, tmp_path / "b.npz", 9, settings).path)
    assert np.abs(pictures_of(out) - whole).max() <= 1


def test_fewer_samples_than_there_are(tmp_path: Path) -> None:
    interrupt(tiny_pipeline(), tmp_path / "a.npz", 3)
    done = finish(tiny_pipeline(), tmp_path / "a.npz", 2)
    assert (done.count, done.drawn) == (2, 0)
    assert len(pictures_of(done.path)) == 2


def other_weights() -> Any:
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(0.1)
    return pipe


def other_guidance() -> Any:
    pipe = tiny_pipeline()
    pipe.guidance = replace(SAG, threshold=0.5)
    return pipe


@pytest.mark.parametrize(
    ("make", "settings", "seed", "message"),
    [
        (tiny_pipeline, replace(FEW, eta=0.5), 0, r"with eta=0\.0, not 0\.5: go on"),
        (tiny_pipeline, replace(FEW, num_inference_steps=3), 0, "num_inference_steps=2, not 3"),
        (tiny_pipeline, FEW, 1, "seed=0, not 1"),
        (tiny_pipeline, replace(FEW, sag_scale=1), 0, r"guidance\.scale=2\.0, not 1\.0"),
        (tiny_pipeline, replace(FEW, sag_scale=0), 0, r"guidance\.scale=2\.0, not 0\.0; .*more"),
        (lambda: tiny_pipeline(DDPMScheduler()), FEW, 0, "scheduler='DDIMScheduler', not 'DDPM"),
        (other_weights, FEW, 0, "unet='UNet2DModel [0-9a-f]{16}', not 'UNet2DModel"),
        (other_guidance, FEW, 0, r"guidance\.threshold=1\.0, not 0\.5"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, make: Any, settings: SampleSettings, seed: int, message: str
) -> None:
    out = tmp_path / "a.npz"
    interrupt(tiny_pipeline(), out, 1)
    with pytest.raises(ValueError, match=message):
        SampleJob(make(), out, 5, settings, seed=seed)
    assert SampleJob(tiny_pipeline(), out, 5, FEW).drawn == 1


def test_other_settings_begin_anew_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    interrupt(tiny_pipeline(), out, 4)
    assert finish(tiny_pipeline(), out, seed=1, overwrite=True, batch_size=3).drawn == 5
    plain = finish(tiny_pipeline(), tmp_path / "b.npz", seed=1, batch_size=3)
    assert out.read_bytes() == plain.path.read_bytes()
    assert not (tmp_path / "a.npz.parts").exists()


def test_a_run_that_another_one_overtook_looks_again(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    late, same = (SampleJob(tiny_pipeline(), out, 5, FEW, seed=seed) for seed in (1, 0))
    interrupt(tiny_pipeline(), out, 4)
    with pytest.raises(ValueError, match="an unfinished run with seed=0, not 1"):
        late.run(1)
    assert len(list((tmp_path / "a.npz.parts").rglob("*.png"))) == 4
    assert same.run(1).drawn == 1
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match=r"a\.npz' exists"):
        late.run(1)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.png"]


def test_a_broken_device_ends_the_run_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(artists, "draw_samples", fail)
    with pytest.raises(ChildProcessError, match="no longer responds: RuntimeError: CUDA error"):
        finish(tiny_pipeline(), tmp_path / "a.npz")


def test_no_folder_is_left_where_an_open_lock_can_not_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows."""
    unlink, open_locks = Path.unlink, set[str]()
    locked = Storage.locked

    @contextmanager
    def watched(self: Storage) -> Iterator[None]:
        with locked(self):
            open_locks.add(".lock")
            yield
        open_locks.clear()

    def unlink_closed(path: Path, **how: Any) -> None:
        if path.name in open_locks:
            raise PermissionError(13, "used by another process", str(path))
        unlink(path, **how)

    monkeypatch.setattr(Storage, "locked", watched)
    monkeypatch.setattr(Path, "unlink", unlink_closed)
    finish(tiny_pipeline(), tmp_path / "a.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.png"]


def test_damaged_settings_are_refused(tmp_path: Path) -> None:
    interrupt(tiny_pipeline(), tmp_path / "a.npz", 1)
    (tmp_path / "a.npz.parts" / "job.json").write_text("[")
    with pytest.raises(ValueError, match=r"an unfinished run with a damaged job\.json"):
        SampleJob(tiny_pipeline(), tmp_path / "a.npz", 5, FEW)


def test_settings_without_batches_do_not_count(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    interrupt(tiny_pipeline(), out, 1)
    next((tmp_path / "a.npz.parts").rglob("*.png")).unlink()
    interrupt(tiny_pipeline(), out, 1, replace(FEW, eta=0.5))
    assert SampleJob(tiny_pipeline(), out, 5, replace(FEW, eta=0.5)).drawn == 1


def test_a_lost_batch_is_drawn_again(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    interrupt(tiny_pipeline(), out, 4)
    pictures = tmp_path / "a.npz.parts" / "images" / "000000"
    (pictures / "000000001-000.png").unlink()
    (pictures / "000000002-000.png").write_bytes(b"")
    half = (pictures / "000000000-000.png").read_bytes()[:60]
    (pictures / "000000000-000.png").write_bytes(half)
    with pytest.raises(ValueError, match=r"000000000-000\.png' is damaged .* delete it"):
        finish(tiny_pipeline(), out, batch_size=1)
    (pictures / "000000000-000.png").unlink()
    assert finish(tiny_pipeline(), out, batch_size=1).drawn == 1
    finish(tiny_pipeline(), tmp_path / "b.npz", batch_size=1)
    assert out.read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_run_that_was_killed_when_it_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.npz"
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", lambda self, *names: None)
        finish(tiny_pipeline(), out)
    before = out.read_bytes()
    assert finish(tiny_pipeline(), out).drawn == 0
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.png"]


def test_run_that_was_killed_when_it_deleted_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.npz"
    remove, left = os.unlink, iter(range(2))

    def unlink_two(path: Any, **how: Any) -> None:
        if str(path).endswith(".png") and next(left, None) is None:
            raise KeyboardInterrupt
        remove(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink_two)
        with pytest.raises(KeyboardInterrupt):
            finish(tiny_pipeline(), out, batch_size=1)
    before = out.read_bytes()
    assert len(list((tmp_path / "a.npz.parts").rglob("*.png"))) == 3
    with pytest.raises(FileExistsError):
        SampleJob(tiny_pipeline(), out, 6, FEW)
    with pytest.raises(FileExistsError):
        SampleJob(tiny_pipeline(), out, 5, FEW, seed=1)
    assert finish(tiny_pipeline(), out).drawn == 0
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.png"]


def test_finished_file_is_kept_unless_asked(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    out.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"a\.npz' exists"):
        SampleJob(tiny_pipeline(), out, 5, FEW)
    with pytest.raises(KeyboardInterrupt):
        SampleJob(tiny_pipeline(), out, 5, FEW, overwrite=True).run(1, stop_at_the_third_step())
    with pytest.raises(FileExistsError, match=r"a\.npz' exists"):
        SampleJob(tiny_pipeline(), out, 5, FEW)
    assert out.read_bytes() == b"mine"
    assert finish(tiny_pipeline(), out, overwrite=True).drawn == 4
    assert len(pictures_of(out)) == 5


def stop_at_the_third_step() -> Any:
    steps: Iterator[int] = iter(range(2))

    def stop(_: float) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    return stop


def test_foreign_files_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "a.npz.parts").mkdir()
    (tmp_path / "a.npz.parts" / "mine.txt").write_text("mine")
    finish(tiny_pipeline(), tmp_path / "a.npz")
    assert [path.name for path in (tmp_path / "a.npz.parts").iterdir()] == ["mine.txt"]


def test_progress_adds_up_to_the_missing_samples(tmp_path: Path) -> None:
    interrupt(tiny_pipeline(), tmp_path / "a.npz", 2)
    shares: list[float] = []
    SampleJob(tiny_pipeline(), tmp_path / "a.npz", 5, FEW).run(2, shares.append)
    assert sum(shares) == pytest.approx(3)
    assert len(shares) == 4
