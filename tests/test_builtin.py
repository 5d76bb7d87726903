"""The builtin model's loader and the settings that model folders recommend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from self_attention_guidance import (
    ADMPipeline,
    BlurGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    builtin_model,
)
from self_attention_guidance.generate import load_pipeline, make_scheduler
from self_attention_guidance.models.builtin import (
    RecommendedSettings,
    builtin_folder,
    builtin_names,
    recommended_settings,
)
from self_attention_guidance.models.versions import dtype_argument
from tiny import save_tiny_model


def write_settings(folder: Path, content: object) -> Path:
    (folder / "sag_settings.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_emoji_loads_in_float32_with_its_recommended_settings() -> None:
    pipe = builtin_model("emoji")
    dtypes = {weight.dtype for weight in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]}
    assert dtypes == {torch.float32}
    assert pipe.guidance == recommended_settings(builtin_folder("emoji")).make_guidance()


def test_emoji_takes_from_pretrained_arguments() -> None:
    unet = builtin_model("emoji", **dtype_argument(torch.bfloat16)).unet
    assert unet.dtype == torch.bfloat16


def test_loading_does_not_warn_of_types(recwarn: pytest.WarningsRecorder) -> None:
    builtin_model("emoji")
    builtin_model("emoji-adm")
    assert not [w for w in recwarn if "dtype" in str(w.message)]


def test_emoji_draws_a_coloured_picture_on_white() -> None:
    pipe = builtin_model()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe(
        "red heart", num_inference_steps=8, guidance_scale=3, generator=generator, output_type="pt"
    ).images[0]
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert image.shape == (3, 64, 64)
    assert corners.mean() > 0.9
    assert image[0].mean() - image[2].mean() > 0.05


@pytest.fixture(scope="module")
def pixels() -> ADMPipeline:
    pipe = builtin_model("emoji-adm")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_pixels(pipe: ADMPipeline, **arguments: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    return pipe(
        batch_size=8, num_inference_steps=10, generator=generators, output_type="pt", **arguments
    ).images


def test_emoji_adm_is_small_and_recommends_its_settings(pixels: ADMPipeline) -> None:
    folder = builtin_folder("emoji-adm")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8_000_000
    assert {weight.dtype for weight in pixels.unet.parameters()} == {torch.float32}
    assert pixels.guidance == recommended_settings(folder).make_guidance()
    classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    assert len(classes) == pixels.config["null_label"] == pixels.unet.config.num_class_embeds - 1


def test_emoji_adm_draws_on_white_and_guidance_shows(pixels: ADMPipeline) -> None:
    unguided, guided = draw_pixels(pixels, sag_scale=0), draw_pixels(pixels)
    for pictures in (unguided, guided):
        assert pictures.shape == (8, 3, 32, 32)
        assert pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean() > 0.8
    assert (guided - unguided).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m", "unipc", "euler", "heun", "lms"])
def test_emoji_adm_draws_with_other_schedulers(name: str) -> None:
    """Its steps begin where hardly anything of the picture is left, which not all can stand."""
    pipe = builtin_model("emoji-adm")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    pictures = draw_pixels(pipe, sag_scale=0)
    assert pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean() > 0.9
    assert (pictures[..., 1:] - pictures[..., :-1]).abs().mean() < 0.2  # of noise, 0.5


def test_emoji_adm_draws_what_its_classes_say(pixels: ADMPipeline) -> None:
    classes = json.loads((builtin_folder("emoji-adm") / "classes.json").read_text())
    faces = draw_pixels(pixels, class_labels=classes.index("face-smiling"))
    plants = draw_pixels(pixels, class_labels=classes.index("plant-other"))
    yellow = faces[:, :2].mean() - faces[:, 2].mean()
    green = plants[:, 1].mean() - plants[:, 0].mean()
    assert yellow > 0.15
    assert green > faces[:, 1].mean() - faces[:, 0].mean()


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"name='emojo'.*emoji"):
        builtin_model("emojo")
    assert "emoji" in builtin_names()


def test_folder_without_settings_recommends_nothing(tmp_path: Path) -> None:
    assert recommended_settings(tmp_path) == RecommendedSettings()
    assert recommended_settings(tmp_path).make_guidance() == SelfAttentionGuidance()


def test_settings_are_read(tmp_path: Path) -> None:
    write_settings(
        tmp_path,
        {
            "guidance": {"scale": 1.5, "blur_sigma": 3.0},
            "generation": {"guidance_scale": 3, "num_inference_steps": 25},
            "compare": {"prompts": ["red heart", ""], "sag_scales": [0, 1.5]},
        },
    )
    settings = recommended_settings(tmp_path)
    assert settings.make_guidance() == SelfAttentionGuidance(scale=1.5, blur_sigma=3.0)
    assert (settings.guidance_scale, settings.num_inference_steps) == (3, 25)
    assert settings.compare_prompts == ("red heart", "")
    assert settings.compare_sag_scales == (0, 1.5)


def test_presets_may_be_of_any_method(tmp_path: Path) -> None:
    write_settings(
        tmp_path,
        {
            "guidance": {"method": "pag", "scale": 2.0, "layers": ["mid_block.attentions.0"]},
            "fast": {"method": "blur", "scale": 3.0, "every": 2},
        },
    )
    settings = recommended_settings(tmp_path)
    assert settings.make_guidance() == PerturbedAttentionGuidance(
        2.0, layers=("mid_block.attentions.0",)
    )
    assert settings.make_fast_guidance() == BlurGuidance(3.0, every=2)


@pytest.mark.parametrize("fast", [None, {}, {"scale": 2.5}, {"blur_sigma": 2.0, "every": 5}])
def test_without_a_fast_preset_it_is_that_of_the_method(tmp_path: Path, fast: Any) -> None:
    """The older form, too: what differs in it."""
    content = {"guidance": {"scale": 1.5, "blur_sigma": 3.0, "start": 0.5}}
    write_settings(tmp_path, content | ({} if fast is None else {"fast": fast}))
    wanted = SelfAttentionGuidance.fast(**{"blur_sigma": 3.0, **(fast or {})})
    assert recommended_settings(tmp_path).make_fast_guidance() == wanted
    write_settings(tmp_path, {"guidance": {"method": "pag", "scale": 9.0}})
    found = recommended_settings(tmp_path).make_fast_guidance()
    assert found == PerturbedAttentionGuidance.fast()


def test_a_model_that_recommends_pag_draws_with_it(tmp_path: Path) -> None:
    recommended = {"method": "pag", "scale": 2.0, "every": 2}
    folder = save_tiny_model(tmp_path / "model", {"guidance": recommended})
    loaded = load_pipeline(str(folder), "cpu")
    assert loaded.pipeline.guidance == PerturbedAttentionGuidance(2.0, every=2)
    loaded.use(start=0.5)
    assert loaded.pipeline.guidance == PerturbedAttentionGuidance(2.0, every=2, start=0.5)
    loaded.use(fast=True, scale=1.0)
    assert loaded.pipeline.guidance == PerturbedAttentionGuidance.fast(1.0)
    loaded.use(method="sag", threshold=0.5)
    assert loaded.pipeline.guidance == SelfAttentionGuidance(threshold=0.5)
    loaded.use(method="sag", fast=True)
    assert loaded.pipeline.guidance == SelfAttentionGuidance.fast()


def test_emoji_styles_draws_backgrounds_that_it_is_asked_for() -> None:
    pipe = builtin_model("emoji-styles")
    pipe.set_progress_bar_config(disable=True)
    colours = {"blue": (30, 136, 229), "yellow": (253, 216, 53), "black": (33, 33, 33)}
    prompts = [f"rocket, flat, on {name}" for name in colours]
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    pictures = pipe(
        prompts, num_inference_steps=10, guidance_scale=3.0, generator=generators
    ).images
    for picture, colour in zip(pictures, colours.values(), strict=True):
        corner = torch.tensor(picture.convert("RGB").getpixel((2, 2)))
        assert (corner - torch.tensor(colour)).abs().max() < 40


def test_emoji_styles_lists_its_captions() -> None:
    captions = json.loads((builtin_folder("emoji-styles") / "captions.json").read_text())
    assert len(captions["things"]) == 977
    assert not set(captions["things"]) & set(captions["held_out_things"])
    assert {style for _, style in captions["held_out_pairs"]} == set(captions["styles"])


@pytest.mark.parametrize(("name", "method"), [("emoji", "sag"), ("emoji-adm", "tpg")])
def test_the_shipped_files_name_the_method_of_each_preset(name: str, method: str) -> None:
    content = json.loads((builtin_folder(name) / "sag_settings.json").read_text())
    assert content["guidance"]["method"] == content["fast"]["method"] == method


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "JSON object"),
        ({"guidence": {}}, "'guidence' is unknown; known names are compare, fast, generation"),
        ({"guidance": {"sigma": 1}}, "guidance: 'sigma' is not a setting of sag: .*blur_sigma"),
        ({"guidance": {"blur_sigma": -1}}, "guidance: blur_sigma"),
        ({"guidance": {"method": "pga"}}, "guidance: method='pga' must be one of .*pag"),
        ({"guidance": {"method": "pag", "blur_sigma": 1}}, "'blur_sigma' is not a setting of pag"),
        ({"fast": {"sigma": 1}}, "fast: 'sigma' is not a setting of sag: .*blur_sigma"),
        ({"fast": {"method": "sag", "layers": []}}, "fast: 'layers' is not a setting of sag"),
        ({"fast": {"scale": None}}, "fast: scale=None must be a finite number"),
        ({"guidance": 3}, "guidance must be a JSON object, not 3"),
        ({"generation": {"num_inference_steps": 0}}, "num_inference_steps=0 must be a whole"),
        ({"generation": {"guidance_scale": "3"}}, "guidance_scale='3' must be a number"),
        ({"compare": {"prompts": "red heart"}}, "prompts='red heart' must be a list of texts"),
        ({"compare": {"sag_scales": [0, None]}}, "must be a list of numbers"),
    ],
)
def test_bad_settings_name_the_file_and_the_rule(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"sag_settings\.json: .*{message}"):
        recommended_settings(write_settings(tmp_path, content))


def test_settings_that_are_not_json_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "sag_settings.json").write_text("{scale: 1}")
    with pytest.raises(ValueError, match=r"sag_settings\.json"):
        recommended_settings(tmp_path)
