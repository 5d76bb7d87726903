"""`--lora`, `--offload` and `--compile`: what changes a model when it is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from command_line import error_of, run
from self_attention_guidance.batch import artists
from self_attention_guidance.generate import load_pipeline, read_record
from test_any_model import pixels
from test_batch_jobs import rows_of
from test_together import add_lora
from tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_model(tmp_path_factory.mktemp("loading") / "tiny"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    source = copy.deepcopy(load_pipeline(str(model), "cpu").pipeline.unet)
    add_lora(source, "default", 1)
    layers = get_peft_model_state_dict(source)
    StableDiffusionPipeline.save_lora_weights(folder, layers, weight_name="style.safetensors")
    return folder / "style.safetensors"


def drawn(model: Path, out: Path, *options: object) -> np.ndarray:
    asked = ["generate", "a", "--model", model, "--steps", 4, "--out", out, "--overwrite"]
    assert run(*asked, *options) == 0
    return pixels(out / "00000-0.png")


class TestLora:
    def test_it_is_diffusers_own(self, tmp_path: Path, model: Path, lora: Path) -> None:
        theirs = load_pipeline(str(model), "cpu")
        theirs.pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="a")
        theirs.pipeline.set_adapters(["a"], [0.5])
        theirs.pipeline.set_progress_bar_config(disable=True)
        wanted = theirs.pipeline(
            "a", num_inference_steps=4, sag_scale=0.75, generator=torch.Generator().manual_seed(0)
        ).images[0]
        found = drawn(model, tmp_path, "--lora", f"{lora}:0.5", "--sag-scale", 0.75)
        assert (found == np.asarray(wanted)).all()
        assert (found != drawn(model, tmp_path, "--sag-scale", 0.75)).any()

    def test_several_add_up(self, tmp_path: Path, model: Path, lora: Path) -> None:
        once = drawn(model, tmp_path, "--lora", lora)
        twice = drawn(model, tmp_path, "--lora", f"{lora}:0.25", "--lora", f"{lora}:0.75")
        assert np.abs(once - twice).max() <= 1
        none = drawn(model, tmp_path, "--lora", f"{lora}:1", "--lora", f"{lora}:-1")
        assert np.abs(none - drawn(model, tmp_path)).max() <= 1
        assert np.abs(none - once).max() > 1

    def test_a_picture_is_drawn_again_with_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path, lora: Path
    ) -> None:
        before = drawn(model, tmp_path / "a", "--lora", f"{lora}:0.3")
        assert f", LoRA {lora}:0.3, seed 0" in capsys.readouterr().err
        path = tmp_path / "a" / "00000-0.png"
        assert read_record(path)["loras"] == [[str(lora), 0.3]]
        again = tmp_path / "b"
        assert run("generate", "--like", path, "--model", model, "--out", again) == 0
        assert (pixels(again / "00000-0.png") == before).all()

    def test_a_batch_has_it_and_its_identity(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path, lora: Path
    ) -> None:
        (tmp_path / "list.csv").write_text("prompt\na\n")
        batch = ("batch", tmp_path / "list.csv", "--model", model, "--steps", 4)
        batch += ("--out", tmp_path / "job")
        assert run(*batch, "--lora", lora) == 0
        found = pixels(tmp_path / "job" / rows_of(tmp_path / "job")[0]["file"])
        assert np.abs(found - drawn(model, tmp_path / "one", "--lora", lora)).max() <= 1
        (tmp_path / "list.csv").write_text("prompt\na\nb\n")
        capsys.readouterr()
        assert "out holds pictures with" in error_of(capsys, *batch, "--lora", f"{lora}:0.5")

    def test_mistakes_are_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path, lora: Path
    ) -> None:
        (tmp_path / "style.pt").touch()
        save_file({"other.weight": torch.ones(2)}, tmp_path / "other.safetensors")
        for text, message in (
            ("none.safetensors", "--lora='none.safetensors' does not exist"),
            (tmp_path / "style.pt", "must be FILE.safetensors or FILE.safetensors:SCALE"),
            (f"{lora}:much", "the scale 'much' must be a finite number"),
            (f"{lora}:nan", "the scale 'nan' must be a finite number"),
            (tmp_path / "other.safetensors", "other.safetensors'"),
        ):
            asked = ("generate", "a", "--model", model, "--lora", text, "--out", tmp_path / "out")
            assert message in error_of(capsys, *asked)
        sample = ("batch", "--num-samples", 1, "--model", "emoji-adm", "--out", tmp_path / "out")
        assert "emoji-adm takes no prompts" in error_of(capsys, *sample, "--lora", lora)


def test_offloading_needs_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    asked = ("generate", "a", "--model", model, "--device", "cpu", "--out", tmp_path)
    assert "--offload='model' needs a GPU" in error_of(capsys, *asked, "--offload", "model")
    assert "must be model or sequential" in error_of(capsys, *asked, "--offload", "all")


@pytest.mark.parametrize("preloaded", [[], ["Attention"]])
def test_a_list_is_drawn_while_weights_are_offloaded(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, preloaded: list[str]
) -> None:
    """On a GPU, `--offload sequential` does so. Weights and pictures are those of other runs."""

    def load(*arguments: Any, **options: Any) -> Any:
        loaded = load_pipeline(*arguments, **options)
        for part in loaded.pipeline.components.values():
            if isinstance(part, nn.Module):
                cpu_offload(part, torch.device("cpu"), preload_module_classes=preloaded)
        return loaded

    asked = ["batch", "--num-samples", 2, "--model", model, "--steps", 4, "--device", "cpu"]
    assert run(*asked, "--out", tmp_path / "plain") == 0
    monkeypatch.setattr(artists, "load_pipeline", load)
    assert run(*asked, "--out", tmp_path / "offloaded") == 0
    plain, offloaded = (rows_of(tmp_path / out) for out in ("plain", "offloaded"))
    assert [row["sha256"] for row in plain] == [row["sha256"] for row in offloaded]
    jobs = [(tmp_path / out / "job.json").read_text() for out in ("plain", "offloaded")]
    assert jobs[0] == jobs[1]


def test_a_compiled_network_is_guided(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module, compiled = nn.Module.compile, []

    def compile_soon(module: nn.Module) -> None:
        # Of compiling, only making machine code is left out: test_compile has that.
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_soon)
    guided, unguided = (drawn(model, tmp_path, "--sag-scale", scale) for scale in (1, 0))
    found = drawn(model, tmp_path, "--sag-scale", 1, "--compile")
    assert compiled == ["UNet2DConditionModel"]
    assert np.abs(guided - found).max() <= 1
    assert np.abs(unguided - found).max() > 1
