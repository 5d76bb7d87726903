"""The command line draws every model whose denoiser can be guided, each by its own defaults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import (
    AutoPipelineForText2Image,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from transformers import T5Config, T5EncoderModel

from command_line import error_of, run
from self_attention_guidance.batch import Manifest, Storage
from self_attention_guidance.denoiser.families import FAMILIES
from self_attention_guidance.generate import generate, load_pipeline, parts, read_record
from self_attention_guidance.generate.parts import parts_of_pipeline, refuse_unfit_parts
from tiny import tiny_pipeline, tiny_unet
from tiny_models import MODELS

Saved = Callable[[str], Path]

DEFAULTS = {
    "stable_diffusion": (7.5, 50),
    "stable_diffusion_xl": (5.0, 50),
    "stable_diffusion_3": (7.0, 28),
    "flux": (3.5, 28),
    "pixart": (4.5, 20),
    "z_image": (5.0, 50),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("models")

    def save(name: str) -> Path:
        if not (folder / name).exists():
            MODELS[name]().save_pretrained(folder / name)
        return folder / name

    return save


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("name", MODELS)
def test_generate_draws_it_guided(saved: Saved, tmp_path: Path, name: str) -> None:
    asked = ["generate", "red heart", "--model", saved(name), "--steps", 3, "--size", "64x64"]
    for scale in (0, 1):
        assert run(*asked, "--sag-scale", scale, "--out", tmp_path / str(scale)) == 0
    plain, guided = (pixels(tmp_path / str(scale) / "00000-0.png") for scale in (0, 1))
    assert plain.shape == (64, 64, 3)
    assert np.abs(guided - plain).max() > 8


@pytest.mark.parametrize("name", MODELS)
def test_its_picture_is_drawn_again_from_its_file(saved: Saved, tmp_path: Path, name: str) -> None:
    method = "pag" if name in ("stable_diffusion", "stable_diffusion_xl") else "blur"
    asked = ["--model", saved(name), "--guidance", f"{method}:scale=2,start=0.1", "--steps", 2]
    assert run("generate", "blue fox", *asked, "--size", "64x64", "--out", tmp_path) == 0
    record = read_record(tmp_path / "00000-0.png")
    loaded = load_pipeline(str(saved(name)), dtype=record["dtype"])
    settings = loaded.restore(record)
    (again,) = generate(loaded.pipeline, record["prompt"], settings, seed=record["seed"])
    assert record["guidance"]["method"] == method
    assert (np.asarray(again.image) == pixels(tmp_path / "00000-0.png")).all()


@pytest.mark.parametrize("name", MODELS)
def test_it_has_the_defaults_of_its_pipeline(saved: Saved, name: str) -> None:
    settings = load_pipeline(str(saved(name))).settings()
    assert (settings.guidance_scale, settings.num_inference_steps) == DEFAULTS[name]


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3"])
def test_it_is_what_diffusers_draws(saved: Saved, name: str) -> None:
    import torch

    theirs: Any = AutoPipelineForText2Image.from_pretrained(saved(name))
    loaded = load_pipeline(str(saved(name)))
    settings = loaded.settings(num_inference_steps=3, sag_scale=0.0, width=64, height=64)
    (ours,) = generate(loaded.pipeline, "red heart", settings, seed=5)
    picture = theirs(
        "red heart",
        num_inference_steps=3,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert (np.asarray(ours.image) == np.asarray(picture)).all()


@pytest.mark.parametrize(
    ("name", "component"), [("flux", "transformer"), ("stable_diffusion_xl", "text_encoder_2")]
)
def test_pictures_of_other_weights_are_not_mixed(
    saved: Saved,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    component: str,
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(saved(name), tmp_path / "model")
    (tmp_path / "list.jsonl").write_text('{"prompt": "blue fox"}\n')
    asked = ["batch", tmp_path / "list.jsonl", "--model", model, "--steps", 1, "--size", "64x64"]
    assert run(*asked, "--out", tmp_path / "out") == 0
    (weights,) = (model / component).glob("*.safetensors")
    state = load_file(weights)
    name = next(key for key, value in state.items() if value.is_floating_point())
    save_file(state | {name: state[name] + 1}, weights, metadata={"format": "pt"})
    assert not torch.equal(load_file(weights)[name], state[name])
    with (tmp_path / "list.jsonl").open("a") as file:
        file.write('{"prompt": "red fox"}\n')
    assert run(*asked, "--out", tmp_path / "out") == 2
    assert f"networks.{component}=" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "flux"])
def test_compare_and_batch_draw_it(saved: Saved, tmp_path: Path, name: str) -> None:
    asked = ["--model", saved(name), "--steps", 2, "--size", "64x64"]
    grid = tmp_path / "grid.png"
    assert run("compare", "red heart", *asked, "--sag-scales", "0,1", "--out", grid) == 0
    assert grid.exists()
    rows = [json.dumps({"prompt": "blue fox", "seed": seed}) for seed in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(rows) + "\n")
    assert run("batch", tmp_path / "list.jsonl", *asked, "--out", tmp_path / "job") == 0
    assert len(list((tmp_path / "job").rglob("*.png"))) == 3


def test_it_has_the_scheduler_that_was_asked_for(saved: Saved) -> None:
    loaded = load_pipeline(str(saved("stable_diffusion_3")))
    for name, kind in (
        ("euler", FlowMatchEulerDiscreteScheduler),
        ("dpm++ 2m", DPMSolverMultistepScheduler),
    ):
        loaded.use(scheduler=name)
        settings = loaded.settings(num_inference_steps=2, sag_scale=1.0, width=64, height=64)
        assert type(loaded.pipeline.scheduler) is kind
        assert len(list(generate(loaded.pipeline, "red heart", settings))) == 1


class TestRefusals:
    """What can't be drawn is refused by what it is, before any weight is read."""

    def write(self, index: dict[str, Any], folder: Path) -> None:
        """A model without configs, so that its index alone decides."""
        (folder / "model_index.json").write_text(json.dumps(index))
        for part in (name for name, value in index.items() if isinstance(value, list)):
            (folder / part).mkdir()
            (folder / part / "weights.safetensors").touch()

    def refused(self, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
        for weights in folder.rglob("*.safetensors"):
            weights.write_bytes(b"no weights")
        capsys.readouterr()  # the progress of saving
        return error_of(capsys, "generate", "red heart", "--model", folder, "--steps", 1)

    @pytest.mark.parametrize(
        ("kind", "channels", "purpose"),
        [
            (StableDiffusionInpaintPipeline, 9, "inpainting"),
            (StableDiffusionInstructPix2PixPipeline, 8, "editing pictures by instructions"),
        ],
    )
    def test_more_channels(
        self,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        kind: type[Any],
        channels: int,
        purpose: str,
    ) -> None:
        tiny_pipeline(kind, unet=tiny_unet(in_channels=channels)).save_pretrained(tmp_path)
        assert purpose in self.refused(capsys, tmp_path)

    @pytest.mark.parametrize(
        ("name", "part", "changes", "message"),
        [
            ("stable_diffusion_xl", "unet", {"in_channels": 9}, "is for inpainting: its U-Net"),
            ("stable_diffusion_3", "transformer", {"in_channels": 9}, "is for inpainting: its tr"),
            ("flux", "transformer", {"in_channels": 40}, "is for more than text to image: its tr"),
            ("flux", "transformer", {"in_channels": 8}, "8 channels, and the latents of its VAE "),
            ("stable_diffusion", "vae", {"latent_channels": 16}, "latents of its VAE have 16"),
            ("z_image", "vae", {"latent_channels": 16}, "latents of its VAE have 16"),
            ("stable_diffusion", "unet", {"cross_attention_dim": 48}, "width 48, and its text"),
            ("stable_diffusion_xl", "text_encoder", {"hidden_size": 48}, "encoder gives 48 + 32"),
            ("stable_diffusion", "unet", {"addition_embed_type": "text_time"}, "Diffusion XL"),
            ("stable_diffusion", "unet", {"num_class_embeds": 5}, "(num_class_embeds=5)"),
            ("stable_diffusion_xl", "unet", {"class_embed_type": "timestep"}, "its U-Net takes c"),
        ],
    )
    def test_parts_that_do_not_fit(
        self,
        saved: Saved,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        name: str,
        part: str,
        changes: dict[str, object],
        message: str,
    ) -> None:
        folder = shutil.copytree(saved(name), tmp_path / "model")
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        assert message in self.refused(capsys, folder)

    @pytest.mark.parametrize(
        ("name", "scheduler", "message"),
        [
            ("stable_diffusion_xl", "FlowMatchEulerDiscreteScheduler", "unlike its UNet2DCondit"),
            ("pixart", "FlowMatchHeunDiscreteScheduler", "unlike its PixArtTransformer2DModel"),
            ("stable_diffusion_3", "DDIMScheduler", "was trained by flow matching, and its sch"),
        ],
    )
    def test_a_scheduler_of_another_kind(
        self,
        saved: Saved,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        name: str,
        scheduler: str,
        message: str,
    ) -> None:
        folder = shutil.copytree(saved(name), tmp_path / "model")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", scheduler]
        (folder / "model_index.json").write_text(json.dumps(index))
        assert message in self.refused(capsys, folder)

    @pytest.mark.parametrize("name", MODELS)
    def test_parts_that_are_loaded_already(self, name: str) -> None:
        pipe = MODELS[name]()
        refuse_unfit_parts("mine", parts_of_pipeline(pipe))
        pipe.vae.register_to_config(latent_channels=5)
        with pytest.raises(ValueError, match=r"^model='mine' has parts .* its VAE have"):
            refuse_unfit_parts("mine", parts_of_pipeline(pipe))

    def test_all_denoisers_are_known(self) -> None:
        known = parts._FLOW_MATCHING | parts._WITHOUT_FLOW
        assert known - {"ADMUNet2DModel"} == FAMILIES.keys()
        packed = {name for name, family in FAMILIES.items() if family.packing is not None}
        assert packed <= parts._PACKED

    def test_what_only_the_call_shows(
        self, saved: Saved, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """Each command says it in one line: the text of this model has another width."""
        folder = shutil.copytree(saved("pixart"), tmp_path / "model")
        T5EncoderModel(T5Config(vocab_size=16, d_model=48, d_ff=8, num_layers=1)).save_pretrained(
            folder / "text_encoder"
        )
        asked = ["--model", folder, "--steps", 1, "--out"]
        said = "the model can't draw: do its parts fit each other? RuntimeError: mat1 and mat2"
        for command in (["generate", "red"], ["compare", "red"]):
            out = tmp_path / ("a.png" if command[0] == "compare" else "out")
            assert run(*command, *asked, out, "--quiet") == 2
            assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {said}")
        (tmp_path / "a.jsonl").write_text('{"prompt": "red"}\n')
        assert run("batch", tmp_path / "a.jsonl", *asked, tmp_path / "job", "--quiet") == 3
        (row,) = Manifest(Storage(str(tmp_path / "job"))).rows()
        assert row["error"].startswith(said)

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            (StableDiffusionXLImg2ImgPipeline, "needs a picture (image)"),
            (StableDiffusionControlNetPipeline, "needs a picture (image)"),
        ],
    )
    def test_pictures_in(
        self,
        saved: Saved,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        kind: type[Any],
        reason: str,
    ) -> None:
        index = json.loads((saved("stable_diffusion_xl") / "model_index.json").read_text())
        index["_class_name"] = kind.__name__
        self.write(index, tmp_path)
        error = self.refused(capsys, tmp_path)
        assert kind.__name__ in error
        assert reason in error

    def test_a_denoiser_that_is_not_known(
        self, saved: Saved, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        index = json.loads((saved("flux") / "model_index.json").read_text())
        index["transformer"] = ["diffusers", "SanaTransformer2DModel"]
        self.write(index, tmp_path)
        assert "SanaTransformer2DModel" in self.refused(capsys, tmp_path)

    def test_settings_without_effect(
        self, saved: Saved, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        asked = ["generate", "red heart", "--model", saved("flux"), "--out", tmp_path / "out"]
        assert "has no effect" in error_of(capsys, *asked, "--negative-prompt", "blue")
        assert "flow matching" in error_of(capsys, *asked, "--scheduler", "ddim")
        assert "multiple of 16" in error_of(capsys, *asked, "--size", "72x64")
