"""Samples of pixel-space models, their files and their models."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

from self_attention_guidance import (
    ADMPipeline,
    BlurGuidance,
    SelfAttentionGuidance,
)
from self_attention_guidance.batch.npz import StreamedArray, write_npz
from self_attention_guidance.generate import (
    SampleSettings,
    draw_tiles,
    load_pixel_model,
    make_pixel_scheduler,
    read_parameters,
    to_image,
    to_uint8,
)
from tiny_pixels import (
    FEW,
    arrays_of,
    finish,
    one_thread,
    pictures_of,
    save_tiny_pixels,
    tiny_pipeline,
    tiny_unet,
)


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_pixels(tmp_path_factory.mktemp("samples") / "tiny")


# The files


def test_file_is_what_evaluators_read(tmp_path: Path) -> None:
    done = finish(tiny_pipeline(num_class_embeds=7), tmp_path / "new" / "a.npz", seed=3)
    assert (done.count, done.drawn) == (5, 5)
    arrays = arrays_of(done.path)
    assert list(arrays) == ["arr_0", "arr_1", "sag_settings"]
    assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (5, 16, 16, 3))
    assert (arrays["arr_1"].dtype, arrays["arr_1"].shape) == (np.int64, (5,))
    labels = [np.random.default_rng(seed).integers(7) for seed in range(3, 8)]
    assert arrays["arr_1"].tolist() == labels
    assert arrays["arr_0"].std() > 20
    with zipfile.ZipFile(done.path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert sorted(path.name for path in done.path.parent.iterdir()) == ["a.npz", "a.png"]


def test_grid_shows_the_pictures_with_their_settings(tmp_path: Path) -> None:
    done = finish(tiny_pipeline(), tmp_path / "a.npz", model_name="tiny")
    with Image.open(done.grid) as grid:
        assert grid.size == (3 * 196 + 4, 2 * 196 + 4)
    settings = read_parameters(done.grid).settings
    expected = {
        "Steps": "2",
        "Sampler": "DDIM",
        "Size": "16x16",
        "Model": "tiny",
        "SAG Guidance Scale": "2",
    }
    assert expected.items() <= settings.items()


def test_tiles_are_at_most_64_and_nearly_square(tmp_path: Path) -> None:
    assert draw_tiles([Image.new("L", (256, 128))] * 5).size == (3 * 516 + 4, 2 * 260 + 4)
    done = finish(tiny_pipeline(), tmp_path / "a.npz", 66, replace(FEW, sag_scale=0), batch_size=33)
    with Image.open(done.grid) as grid:
        assert grid.size == (8 * 196 + 4, 8 * 196 + 4)
    with pytest.raises(ValueError, match="at least one picture"):
        draw_tiles([])


def test_samples_without_classes_have_no_labels(tmp_path: Path) -> None:
    assert "arr_1" not in arrays_of(finish(tiny_pipeline(), tmp_path / "a.npz").path)
    pipe = tiny_pipeline(num_class_embeds=7, null_label=6)
    assert "arr_1" not in arrays_of(finish(pipe, tmp_path / "b.npz").path)
    chosen = finish(pipe, tmp_path / "c.npz", settings=replace(FEW, classes=(1,)))
    assert arrays_of(chosen.path)["arr_1"].tolist() == [1] * 5
    assert (pictures_of(chosen.path) != pictures_of(tmp_path / "b.npz")).any()


def test_samples_of_one_channel(tmp_path: Path) -> None:
    done = finish(tiny_pipeline(in_channels=1, out_channels=1), tmp_path / "a.npz")
    assert pictures_of(done.path).shape == (5, 16, 16, 1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_hold_all_channels(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    kept = io.BytesIO()
    to_image(pixels).save(kept, "PNG")
    with Image.open(kept) as image:
        assert (np.asarray(image).reshape(pixels.shape) == pixels).all()


def test_pictures_of_more_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 4 channels: the model draws 5"):
        to_image(np.zeros((5, 7, 5), dtype=np.uint8))


def test_bytes_are_the_originals() -> None:
    samples = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 2, 3)
    assert to_uint8(samples).ravel().tolist() == [0, 0, 127, 254, 255, 255]


def test_npz_refuses_pieces_that_do_not_fit(tmp_path: Path) -> None:
    piece = np.zeros((2, 4), dtype=np.uint8)
    write_npz(tmp_path / "a.npz", {"a": StreamedArray((4, 4), "uint8", [piece, piece])})
    assert (arrays_of(tmp_path / "a.npz")["a"] == np.zeros((4, 4))).all()
    for shape, message in (((3, 4), "2 rows, the array 3"), ((2, 5), r"of shape \(2, 4\)")):
        with pytest.raises(ValueError, match=message):
            write_npz(tmp_path / "b.npz", {"a": StreamedArray(shape, "uint8", [piece])})


# The samples


@pytest.mark.parametrize(("scheduler", "eta"), [(DDPMScheduler(), 0.0), (DDIMScheduler(), 0.5)])
def test_a_sample_depends_on_its_seed_only(tmp_path: Path, scheduler: Any, eta: float) -> None:
    pipe = tiny_pipeline(scheduler, num_class_embeds=7)
    settings = replace(FEW, eta=eta)
    one = pictures_of(finish(pipe, tmp_path / "1.npz", settings=settings, batch_size=1).path)
    three = pictures_of(finish(pipe, tmp_path / "3.npz", settings=settings, batch_size=3).path)
    part = pictures_of(finish(pipe, tmp_path / "part.npz", 2, settings, seed=2).path)
    assert np.abs(one - three).max() <= 1
    assert np.abs(one[2:4] - part).max() <= 1
    assert (one[0] != one[1]).any()


def test_guidance_changes_samples_and_scale_0_does_not(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    guided = pictures_of(finish(pipe, tmp_path / "sag.npz").path)
    off = arrays_of(finish(pipe, tmp_path / "off.npz", settings=replace(FEW, sag_scale=0)).path)
    pipe.guidance = BlurGuidance(2.0, blur_sigma=2.0, blur_kernel_size=5)
    blurred = pictures_of(finish(pipe, tmp_path / "blur.npz").path)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    plain = pipe(2, num_inference_steps=2, generator=generators, sag_scale=0, output_type="latent")
    assert (off["arr_0"][:2] == to_uint8(plain.images)).all()
    assert (guided != off["arr_0"]).any()
    assert (blurred != guided).any()
    assert (blurred != off["arr_0"]).any()


class Brightness(ModelMixin, ConfigMixin):
    """A classifier of bright and dark pictures."""

    @register_to_config
    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.sharpness = torch.nn.Parameter(torch.tensor(500.0))

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        bright = x_t.mean(dim=(1, 2, 3))
        return self.sharpness * torch.stack([bright, -bright], dim=1)


def test_classifier_guides_towards_the_labels(tmp_path: Path) -> None:
    pipe = tiny_pipeline(DDPMScheduler())
    pipe.register_modules(classifier=Brightness())
    done = arrays_of(finish(pipe, tmp_path / "a.npz", 8, replace(FEW, num_inference_steps=10)).path)
    labels = done["arr_1"]
    assert set(labels) == {0, 1}
    means = done["arr_0"].mean(axis=(1, 2, 3))
    assert means[labels == 0].min() > means[labels == 1].max()
    off = finish(pipe, tmp_path / "b.npz", settings=replace(FEW, classifier_scale=0))
    assert "arr_1" not in arrays_of(off.path)


def test_schedulers_are_spaced_as_the_originals() -> None:
    plain = DDPMScheduler(clip_sample=False).config
    learned = DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace").config
    ddim: Any = make_pixel_scheduler("ddim", learned, learned_variance=True)
    expected = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
    assert {**expected, "clip_sample": True}.items() <= dict(ddim.config).items()
    ddim.set_timesteps(25)
    assert ddim.timesteps.tolist() == list(range(960, -1, -40))
    assert make_pixel_scheduler("ddim", plain, False).config["clip_sample"] is False
    ddpm: Any = make_pixel_scheduler("ddpm", ddim.config, learned_variance=True)
    assert ddpm.config["variance_type"] == "learned_range"
    ddpm.set_timesteps(250)
    assert (ddpm.timesteps[0], ddpm.timesteps[-1], len(ddpm.timesteps)) == (999, 0, 250)
    fixed: Any = make_pixel_scheduler("ddpm", plain, learned_variance=False)
    assert fixed.config["variance_type"] == "fixed_small"
    solver: Any = make_pixel_scheduler("dpm++ 2m", learned, learned_variance=True)
    assert solver.config["variance_type"] is None


# Models


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
def test_pipelines_of_diffusers_load(tmp_path: Path, pipeline_class: Any) -> None:
    pipeline_class(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "theirs")
    loaded = load_pixel_model(str(tmp_path / "theirs"), "cpu")
    assert type(loaded.pipeline) is ADMPipeline
    assert loaded.name == "theirs"
    assert loaded.pipeline.guidance == ADMPipeline.guidance
    assert loaded.settings() == SampleSettings()


def test_folder_says_what_it_recommends(model: str) -> None:
    loaded = load_pixel_model(model, "cpu")
    assert loaded.pipeline.guidance == SelfAttentionGuidance(1.5)
    assert loaded.settings(eta=0.5) == SampleSettings(num_inference_steps=2, eta=0.5)
    assert loaded.settings(num_inference_steps=9).num_inference_steps == 9
    assert load_pixel_model(model, "cpu", "bfloat16").pipeline.unet.dtype == torch.bfloat16
