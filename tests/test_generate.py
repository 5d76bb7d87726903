"""Prompts and seeds to pictures, files, metadata and grids."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image, ImageChops, ImageFont
from safetensors.torch import load_file, save_file

from self_attention_guidance import (
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    StableDiffusionSAGPipeline,
)
from self_attention_guidance.generate import (
    GenerationSettings,
    LoadedPipeline,
    SampleSettings,
    check_folder,
    check_free,
    compare,
    draw_grid,
    find_device,
    find_dtype,
    find_model,
    format_parameters,
    generate,
    load_pipeline,
    make_scheduler,
    overlay_attended,
    parse_parameters,
    picture_path,
    read_parameters,
    save_png,
    scheduler_label,
    scheduler_names,
    seeds_of,
)
from self_attention_guidance.generate.grid import wrap
from single_file import CONFIGURATION_OF_SD1, save_single_file
from tiny import (
    put_into_hub_cache,
    save_tiny_model,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
)
from tiny_models import flux

FEW = GenerationSettings(num_inference_steps=3, guidance_scale=3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def pipe(folder: Path) -> StableDiffusionSAGPipeline:
    pipeline = load_pipeline(str(folder), device="cpu").pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def largest_difference(first: Image.Image, second: Image.Image) -> int:
    pair = [np.asarray(image, dtype=np.int16) for image in (first, second)]
    return int(np.abs(pair[0] - pair[1]).max())


# Sampling


@pytest.mark.parametrize("scheduler", ["ddim", "euler-a", "dpm++ sde"])
def test_picture_depends_on_neither_batch_nor_neighbours(
    pipe: StableDiffusionSAGPipeline, scheduler: str
) -> None:
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler.config)
    together = list(generate(pipe, ["a", "b"], FEW, seed=5, num_images=2, batch_size=4))
    apart = list(generate(pipe, ["b"], FEW, seed=6, num_images=1, batch_size=1))
    same = together[3]
    assert (same.prompt, same.seed) == ("b", 6)
    assert largest_difference(same.image, apart[0].image) <= 1
    assert largest_difference(together[2].image, same.image) > 1


def test_seeds_and_indices_count_prompt_by_prompt(pipe: StableDiffusionSAGPipeline) -> None:
    pictures = list(generate(pipe, ["a", "b"], FEW, seed=7, num_images=2, batch_size=3))
    found = [(picture.index, picture.prompt, picture.seed) for picture in pictures]
    assert found == [(0, "a", 7), (1, "a", 8), (2, "b", 7), (3, "b", 8)]


def test_pictures_are_made_as_they_are_asked_for(pipe: StableDiffusionSAGPipeline) -> None:
    done: list[float] = []
    pictures = generate(pipe, "a", FEW, num_images=3, batch_size=2, on_progress=done.append)
    assert not done
    next(pictures)
    assert sum(done) == pytest.approx(2)
    assert len(list(pictures)) == 2
    assert sum(done) == pytest.approx(3)


def test_sag_scale_changes_the_picture_and_defaults_to_the_pipelines(
    pipe: StableDiffusionSAGPipeline,
) -> None:
    pipe.guidance = SelfAttentionGuidance(scale=2.0, blur_sigma=3.0)
    own, same, off = (
        next(generate(pipe, "a", dataclasses.replace(FEW, sag_scale=scale)))
        for scale in (None, 2.0, 0.0)
    )
    assert own.image.tobytes() == same.image.tobytes()
    assert own.image.tobytes() != off.image.tobytes()
    assert parse_parameters(own.parameters).settings["SAG Guidance Scale"] == "2"
    assert parse_parameters(off.parameters).settings["SAG Guidance Scale"] == "0"


def test_attended_share_of_a_sum_is_that_of_its_own_passes(
    pipe: StableDiffusionSAGPipeline,
) -> None:
    own, everywhere = pipe.guidance, SelfAttentionGuidance(1.0, threshold=0.0, stop=0.5)
    try:
        for guidance in (everywhere, everywhere + PerturbedAttentionGuidance(1.0, layers="mid")):
            pipe.guidance = guidance
            (picture,) = generate(pipe, "a", FEW, record_attention=True)
            assert picture.attended is not None
            assert (picture.attended == 1).all()
    finally:
        pipe.guidance = own


def test_attended_share_counts_guided_steps_only(pipe: StableDiffusionSAGPipeline) -> None:
    settings = dataclasses.replace(FEW, sag_scale=1.0, num_inference_steps=4)
    full = next(generate(pipe, "a", settings, record_attention=True))
    pipe.guidance = SelfAttentionGuidance(start=0.0, stop=0.5)
    half = next(generate(pipe, "a", settings, record_attention=True))
    off = next(generate(pipe, "a", dataclasses.replace(FEW, sag_scale=0), record_attention=True))
    assert full.attended is not None
    assert half.attended is not None
    assert full.attended.shape == (4, 4)
    assert 0 < full.attended.mean() < 1
    assert set(np.unique(full.attended * 4)) <= {0, 1, 2, 3, 4}
    assert set(np.unique(half.attended * 2)) <= {0, 1, 2}
    assert off.attended is None


def test_metadata_reproduces_the_picture(pipe: StableDiffusionSAGPipeline) -> None:
    settings = dataclasses.replace(FEW, negative_prompt="blurry, dark", width=48, height=32)
    picture = next(generate(pipe, "one\ntwo", settings, seed=9, model_name="tiny"))
    read = parse_parameters(picture.parameters)
    assert (read.prompt, read.negative_prompt) == ("one\ntwo", "blurry, dark")
    assert read.settings["Model"] == "tiny"
    width, height = map(int, read.settings["Size"].split("x"))
    again = GenerationSettings(
        negative_prompt=read.negative_prompt,
        sag_scale=float(read.settings["SAG Guidance Scale"]),
        guidance_scale=float(read.settings["CFG scale"]),
        num_inference_steps=int(read.settings["Steps"]),
        width=width,
        height=height,
    )
    pipe.scheduler = make_scheduler(read.settings["Sampler"], pipe.scheduler.config)
    second = next(generate(pipe, read.prompt, again, seed=int(read.settings["Seed"])))
    assert second.image.tobytes() == picture.image.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number, at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf must be a finite number"),
        ({"sag_scale": float("nan")}, "sag_scale=nan must be a finite number"),
        ({"sag_scale": "1"}, "sag_scale='1' must be a finite number"),
        ({"width": 60}, "width=60 must be a multiple of 8"),
        ({"height": -8}, "height=-8 must be a whole number, at least 1"),
        ({"negative_prompt": None}, "negative_prompt: None must be a text"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, r"prompts=\[\] must hold at least one"),
        ({"prompts": ["a", 3]}, "prompts: 3 must be a text"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
        ({"num_images": 0}, "num_images=0"),
        ({"seed": -1}, "seed=-1 must be a whole number, at least 0"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seeds must be below"),
    ],
)
def test_bad_arguments_are_refused_by_the_call(
    pipe: StableDiffusionSAGPipeline, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(pipe, **{"prompts": "a", **arguments})  # type: ignore[arg-type]


def test_too_small_size_is_refused(pipe: StableDiffusionSAGPipeline) -> None:
    with pytest.raises(ValueError, match="width=8 must be at least 16 for this model"):
        generate(pipe, "a", dataclasses.replace(FEW, width=8, height=32))


def test_numbers_of_numpy_are_numbers(pipe: StableDiffusionSAGPipeline) -> None:
    given: dict[str, Any] = {
        "num_inference_steps": np.int64(2),
        "sag_scale": np.float32(0.5),
        "guidance_scale": np.float64(3.0),
        "width": np.int32(64),
        "height": np.int32(64),
    }
    usual = GenerationSettings(
        num_inference_steps=2, sag_scale=0.5, guidance_scale=3.0, width=64, height=64
    )
    settings = GenerationSettings(**given)
    assert repr(settings) == repr(usual)
    seeds: dict[str, Any] = {"seed": np.int64(3), "num_images": np.int64(2)}
    found = [
        *generate(pipe, "a", settings, **seeds),
        *generate(pipe, "a", usual, seed=3, num_images=2),
    ]
    assert [picture.seed for picture in found] == [3, 4, 3, 4]
    assert found[1].record == found[3].record
    assert found[1].image.tobytes() == found[3].image.tobytes()
    samples = SampleSettings(num_inference_steps=given["num_inference_steps"], classes=np.arange(3))
    assert samples == SampleSettings(num_inference_steps=2, classes=(0, 1, 2))
    assert repr(samples) == repr(SampleSettings(num_inference_steps=2, classes=(0, 1, 2)))
    for wrong in (np.array([0.5]), [np.float64(1.5)], "12", 3):
        with pytest.raises(ValueError, match="classes="):
            SampleSettings(classes=wrong)  # type: ignore[arg-type]


def test_seeds() -> None:
    assert list(seeds_of(3, 2)) == [3, 4]


# Models


def test_saved_settings_come_with_the_folder(tmp_path: Path) -> None:
    content = {"guidance": {"scale": 2.0}, "generation": {"num_inference_steps": 7}}
    loaded = load_pipeline(str(save_tiny_model(tmp_path / "mine", content)), device="cpu")
    assert loaded.name == "mine"
    assert loaded.pipeline.guidance == SelfAttentionGuidance(scale=2.0)
    assert loaded.settings(guidance_scale=2.0) == GenerationSettings(
        num_inference_steps=7, guidance_scale=2.0
    )
    assert loaded.settings(num_inference_steps=3).num_inference_steps == 3


def test_missing_models_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist: give a folder .* \(.*emoji.*\)"):
        load_pipeline(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="could not be loaded from the Hugging Face hub"):
        load_pipeline("nobody/no-such-model")
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        load_pipeline(str(tmp_path))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def assert_same_weights(loaded: LoadedPipeline, folder: Path) -> None:
    wanted = load_pipeline(str(folder), "cpu").pipeline
    for part in ("unet", "vae", "text_encoder"):
        found = getattr(loaded.pipeline, part).state_dict()
        expected = getattr(wanted, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_of_the_hub(tmp_path: Path, hub_cache: Path) -> None:
    folder = save_tiny_model(tmp_path / "mine")
    put_into_hub_cache(folder, hub_cache, "someone/tiny")
    loaded = load_pipeline("someone/tiny", "cpu")
    assert loaded.name == "tiny"
    assert_same_weights(loaded, folder)


def test_a_single_file(tmp_path: Path, hub_cache: Path) -> None:
    folder = save_tiny_model(tmp_path / "mine")
    put_into_hub_cache(folder, hub_cache, CONFIGURATION_OF_SD1)
    original = load_pipeline(str(folder), "cpu").pipeline
    file = save_single_file(original, tmp_path / "model.safetensors")
    loaded = load_pipeline(str(file), "cpu")
    assert loaded.name == "model"
    assert_same_weights(loaded, folder)
    for part, message in (("diffusion_model", "weights are missing"), ("cond", "does not hold '")):
        tensors = load_file(file)
        gone = max(name for name in tensors if part in name)
        save_file({n: v for n, v in tensors.items() if n != gone}, tmp_path / "less.safetensors")
        with pytest.raises(ValueError, match=message):
            load_pipeline(str(tmp_path / "less.safetensors"), "cpu")


@pytest.mark.parametrize("is_file", [False, True])
def test_parts_from_the_hub_must_fit_too(tmp_path: Path, hub_cache: Path, is_file: bool) -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "mine")
    put_into_hub_cache(tmp_path / "mine", hub_cache, CONFIGURATION_OF_SD1)
    name = CONFIGURATION_OF_SD1
    if is_file:
        name = str(save_single_file(pipe, tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="unlike its UNet2DConditionModel"):
        load_pipeline(name, "cpu")


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 4)}, "it holds a LoRA"),
        (tiny_vae, "it holds a VAE"),
        ({"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}, "it holds a VAE"),
        (tiny_text_encoder, "it holds a text encoder"),
        (lambda: ControlNetModel.from_unet(tiny_unet()), "it holds a ControlNet"),
        (tiny_unet, "it holds a network alone"),
        ({"input_blocks.0.0.weight": (8, 3, 3, 3)}, "it holds a network alone"),
        (lambda: flux().transformer, "it holds a transformer"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "it holds a transformer"),
        (
            {FIRST: (8, 4, 3, 3), "conditioner.embedders.0.x": (1,)},
            "it holds a Stable Diff",
        ),
        ({FIRST: (8, 9, 3, 3)}, "is for inpainting: its U-Net takes 9 channels"),
        ({"mine": (1,)}, "it holds something else"),
        ({}, "it holds no weights"),
    ],
)
def test_single_files_of_other_kinds_are_named(tmp_path: Path, parts: Any, message: str) -> None:
    shapes = parts if isinstance(parts, dict) else {}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if not isinstance(parts, dict):
        tensors = {name: value.clone() for name, value in parts().state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        find_model(str(tmp_path / "a.safetensors"))


def test_checkpoints_that_can_run_code_are_refused(tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04")
        with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
            load_pipeline(str(tmp_path / name))


def _renamed(file: Path, rename: Callable[[str], str | None]) -> None:
    tensors = {rename(name): value for name, value in load_file(file).items()}
    save_file({n: v for n, v in tensors.items() if n is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_weight_is_not_made_up(tmp_path: Path, part: str) -> None:
    """The libraries would warn, and draw with random numbers in its place."""
    folder = save_tiny_model(tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    gone = sorted(load_file(file))[3]
    _renamed(file, lambda name: None if name == gone else name)
    with pytest.raises(ValueError, match=f"files of its {part} do not hold"):
        load_pipeline(str(folder))


def test_former_names_of_weights_are_known(tmp_path: Path) -> None:
    """Those of the VAE in the published Stable Diffusion 1 and 2."""
    folder = save_tiny_model(tmp_path / "model")
    wanted = load_pipeline(str(folder)).pipeline.vae.state_dict()
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
    former[".to_out.0."] = ".proj_attn."

    def rename(name: str) -> str:
        for present, old in former.items():
            name = name.replace(present, old)
        return name

    (file,) = (folder / "vae").glob("*.safetensors")
    _renamed(file, rename)
    found = load_pipeline(str(folder)).pipeline.vae.state_dict()
    assert any(".to_q." in name for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json cannot be read"):
        load_pipeline(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionXLPipeline", "unet": [], "text_encoder_2": []}'
    )
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline, whose denoiser"):
        load_pipeline(str(tmp_path))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.safetensors' cannot be loaded"):
        load_pipeline(str(tmp_path / "broken.safetensors"))


def test_devices_and_dtypes() -> None:
    cpu = find_device("cpu")
    assert find_dtype("auto", cpu) == torch.float32
    assert find_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='int8' must be one of auto, float32"):
        find_dtype("int8", cpu)
    for device in ("cuda:63", "gpu"):
        with pytest.raises(ValueError, match=f"device='{device}' is not available.*auto, cpu"):
            find_device(device)


# Schedulers


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of KDPM2
@pytest.mark.parametrize("name", scheduler_names())
def test_every_scheduler_name_round_trips_through_its_label(
    pipe: StableDiffusionSAGPipeline, name: str
) -> None:
    config = pipe.scheduler.config
    made = make_scheduler(name, config)
    label = scheduler_label(made)
    assert label.lower() == name
    assert type(make_scheduler(label, config)) is type(made)


@pytest.mark.parametrize("name", ["dpm++ 2m karras", "DPMpp_2M-Karras", "DPM++ 2M Karras"])
def test_spellings_do_not_matter(pipe: StableDiffusionSAGPipeline, name: str) -> None:
    scheduler = make_scheduler(name, pipe.scheduler.config)
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert scheduler.config["use_karras_sigmas"] is True
    assert scheduler_label(scheduler) == "DPM++ 2M Karras"
    plain = make_scheduler("dpm++ 2m", scheduler.config)
    assert plain.config["use_karras_sigmas"] is False


def test_class_names_keep_the_configuration(pipe: StableDiffusionSAGPipeline) -> None:
    karras = make_scheduler("euler karras", pipe.scheduler.config)
    made = make_scheduler("UniPCMultistepScheduler", karras.config)
    assert made.config["use_karras_sigmas"] is True
    assert made.config["beta_schedule"] == "scaled_linear"


def test_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"scheduler='eular' is unknown: .*euler"):
        make_scheduler("eular", {})
    with pytest.raises(ValueError, match="DDIMScheduler"):
        make_scheduler("DDIMSheduler", {})
    with pytest.raises(ValueError, match=r"ddim, ddpm, .*unipc"):
        make_scheduler("???", {})
    with pytest.raises(ValueError, match="DDIM has no karras spacing"):
        make_scheduler("ddim karras", {})


# Metadata and files


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [("a cat", ""), ("", ""), ("two\nlines: a, b", "c,\nd"), ("é", "ü"), ("猫 🐱", "犬")],
)
def test_parameters_survive_a_png(tmp_path: Path, prompt: str, negative: str) -> None:
    values = {"Steps": 25, "Model": 'a, "b": c', "CFG scale": 3.0, "Eta": 0.1, "None": None}
    path = tmp_path / "picture.png"
    save_png(Image.new("RGB", (8, 8)), path, format_parameters(prompt, negative, values))
    read = read_parameters(path)
    assert (read.prompt, read.negative_prompt) == (prompt, negative)
    assert read.settings == {
        "Steps": "25",
        "Model": 'a, "b": c',
        "CFG scale": "3",
        "Eta": "0.1",
    }


def test_parameters_have_the_web_interfaces_form() -> None:
    values = {"Steps": 25, "Sampler": "DDIM", "CFG scale": 3.0, "Seed": 1, "Size": "64x64"}
    assert format_parameters("a cat", "dogs", values) == (
        "a cat\nNegative prompt: dogs\nSteps: 25, Sampler: DDIM, CFG scale: 3, Seed: 1, Size: 64x64"
    )


def test_picture_without_parameters_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match=r"plain\.png' has no 'parameters' text"):
        read_parameters(tmp_path / "plain.png")


def test_files_are_not_overwritten_unless_asked(tmp_path: Path) -> None:
    path = picture_path(tmp_path, 3, 42)
    assert path.name == "00003-42.png"
    save_png(Image.new("RGB", (8, 8), "red"), path, "first")
    with pytest.raises(FileExistsError, match="00003-42"):
        check_free([path])
    with pytest.raises(FileExistsError, match="00003-42"):
        save_png(Image.new("RGB", (8, 8), "blue"), path, "second")
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    check_free([path], overwrite=True)
    save_png(Image.new("RGB", (8, 8), "blue"), path, "second", overwrite=True)
    assert Image.open(path).getpixel((0, 0)) == (0, 0, 255)
    assert list(tmp_path.iterdir()) == [path]


class InterruptedImage(Image.Image):
    """Writes half a file, then is interrupted."""

    def save(self, fp: IO[bytes], **_: object) -> None:  # type: ignore[override]
        fp.write(b"\x89PNG half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_save_leaves_no_file(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_png(InterruptedImage(), tmp_path / "a.png", "text", overwrite)
    assert list(tmp_path.iterdir()) == []


def test_output_folders_are_checked(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "new" / "deep").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is or lies below a file"):
            check_folder(path)
    with pytest.raises(ValueError, match="is a folder: name a file"):
        check_free([tmp_path])


def test_saved_pictures_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", "text")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


# Grids


def test_grid_shows_every_picture_enlarged() -> None:
    colours = [["red", "lime"], ["blue", "black"]]
    rows = [[Image.new("RGB", (64, 32), colour) for colour in row] for row in colours]
    grid = draw_grid(rows, ["one", ""], ["left", "right"], "footer")
    areas = dict.fromkeys([(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)], 0)
    for count, colour in grid.getcolors(1 << 20) or []:
        if colour in areas:
            areas[colour] = count
    assert set(areas.values()) == {64 * 32 * 6 * 6}


def test_grid_labels_stay_beside_the_pictures() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    long = "a very long prompt " * 40 + "x" * 400
    with_label = draw_grid([[picture]], [long], ["heading"])
    without = draw_grid([[picture]], ["y"], ["heading"])
    assert with_label.height == without.height
    assert with_label.width < 2.5 * without.width
    margin = with_label.crop((0, 0, 8, with_label.height))
    assert ImageChops.invert(margin.convert("L")).getbbox() is None


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("slg:layers=mid+up.1,stop=0.5", ["slg:layers=mid+up.1,", "stop=0.5"]),
        ("a=1,b=2,c=3", ["a=1,b=2,c=3"]),
        ("sag:every=2,scale=1 + pag", ["sag:every=2,scale=1", "+ pag"]),
        ("layer=up.1.attentions.0.attn1", ["layer=", "up.1.attentions.0.", "attn1"]),
        ("W" * 20, ["W" * 10, "W" * 10]),
    ],
)
def test_labels_break_between_settings_first(text: str, lines: list[str]) -> None:
    font = ImageFont.load_default(14)
    width = font.getlength("W" * 10) if text[0] == "W" else font.getlength("slg:layers=mid+up.1,s")
    assert wrap(text, width, font, most=3) == lines


def test_a_grid_has_room_for_a_long_footer() -> None:
    def below(footer: str) -> Image.Image:
        grid = draw_grid([[Image.new("RGB", (64, 64))]], ["a"], ["b"], footer)
        return grid.crop((0, 192, grid.width, grid.height))

    short, long = (below("  ·  ".join(["setting 1"] * count)) for count in (1, 12))
    assert long.height > short.height
    ink = ImageChops.invert(long.convert("L")).getbbox()
    assert ink is not None and 4 < long.height - ink[3] < 30 and ink[2] < long.width - 8


def test_grid_refuses_uneven_rows() -> None:
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="must match"):
        draw_grid([[picture]], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="must match"):
        draw_grid([], [], [])


def test_overlay_colours_exactly_the_attended_region() -> None:
    attended = np.zeros((2, 2))
    attended[0, 1] = 1.0
    shown = np.asarray(overlay_attended(Image.new("RGB", (64, 64), "white"), attended))
    coloured = (shown != 255).any(axis=2)
    assert coloured[:96, 96:].all()
    assert coloured.sum() == 96 * 96


def test_comparison_has_a_column_a_scale_and_the_same_seed(
    pipe: StableDiffusionSAGPipeline,
) -> None:
    result = compare(pipe, ["a", ""], [0, 2.0], FEW, seed=4, show_attention=True)
    off, guided = result.columns
    assert {picture.seed for picture in [*off, *guided]} == {4}
    assert off[0].image.tobytes() != guided[0].image.tobytes()
    plain = next(generate(pipe, "a", dataclasses.replace(FEW, sag_scale=0.0), seed=4))
    assert largest_difference(off[0].image, plain.image) <= 1
    without = compare(pipe, ["a", ""], [0, 2.0], FEW, seed=4)
    assert result.grid.width > without.grid.width
    read = parse_parameters(result.parameters)
    assert read.prompt == "a\n"
    assert read.settings["SAG Guidance Scale"] == "0, 2"
    assert read.settings["SAG Blur Sigma"] == "1"


@pytest.mark.parametrize("scales", [[], [0, float("nan")]])
def test_comparison_refuses_bad_scales(
    pipe: StableDiffusionSAGPipeline, scales: list[float]
) -> None:
    with pytest.raises(ValueError, match="sag_scales"):
        compare(pipe, "a", scales)
