"""No loader runs the code that a checkpoint or another file contains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import run
from payload import Payload
from self_attention_guidance.batch import Model
from self_attention_guidance.generate import load_pipeline, load_pixel_model
from self_attention_guidance.models.originals import load_original, preset_names
from tiny import save_tiny_model
from tiny_pixels import save_tiny_pixels

NAMES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")


def only_pickled(folder: Path, trace: Path) -> None:
    """Puts a payload in the place of a component's weights."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for name in NAMES:
        torch.save({"weight": Payload(trace)}, folder / name)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("load", [load_pipeline, lambda folder: Model(name=folder)()])
def test_folders_of_prompt_models(tmp_path: Path, part: str, load: Callable[[str], object]) -> None:
    folder, trace = save_tiny_model(tmp_path / "model"), tmp_path / "executed"
    only_pickled(folder / part, trace)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(str(folder))
    assert not trace.exists()


def test_folders_of_pixel_models(tmp_path: Path) -> None:
    folder, trace = Path(save_tiny_pixels(tmp_path / "model")), tmp_path / "executed"
    only_pickled(folder / "unet", trace)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pixel_model(str(folder))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_single_files(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "executed"
    torch.save({"state_dict": {"weight": Payload(trace)}}, tmp_path / name)
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        load_pipeline(str(tmp_path / name))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pipeline(str(tmp_path / "model.safetensors"))
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["adm", "iddpm", "dit", "classifier"])
def test_original_checkpoints(tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "executed"
    torch.save({"weight": Payload(trace)}, tmp_path / "model.pt")
    preset = preset_names(kind)[0]
    with pytest.raises(ValueError, match="nothing was executed"):
        load_original(kind, tmp_path / "model.pt", preset)  # type: ignore[arg-type]
    assert run("convert", kind, tmp_path / "model.pt", tmp_path / "out", "--preset", preset) == 2
    assert not trace.exists()


def test_samples_that_are_evaluated(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    np.savez(tmp_path / "a.npz", arr_0=np.array([Payload(trace)] * 4, dtype=object))
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    assert run("evaluate", tmp_path / "a.npz", tmp_path / "b.npz") == 2
    assert not trace.exists()
