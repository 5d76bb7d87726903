"""What diffusers asks of a pipeline class: signatures, saved folders, other tasks, memory."""

from __future__ import annotations

import gc
import inspect
import json
import pydoc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    DiTPipeline,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import Tensor

import tiny_pixels
from self_attention_guidance import (
    ADMPipeline,
    DiTSAGPipeline,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    StableDiffusionSAGPipeline,
    StableDiffusionXLSAGPipeline,
)
from self_attention_guidance.models.originals import dit_scheduler
from self_attention_guidance.pipelines.guided import share_tasks
from test_dit_pipeline import with_1001_labels
from tiny import aligned, tiny_pipeline, tiny_scheduler, tiny_vae
from tiny_xl import xl_pipeline

SD, XL = StableDiffusionSAGPipeline, StableDiffusionXLSAGPipeline
PARENTS: dict[type, type] = {
    SD: StableDiffusionPipeline,
    XL: StableDiffusionXLPipeline,
    DiTSAGPipeline: DiTPipeline,
}
MAKE: dict[type, Callable[[], Any]] = {
    SD: lambda: tiny_pipeline(SD),
    XL: lambda: xl_pipeline(XL),
    DiTSAGPipeline: lambda: DiTSAGPipeline(with_1001_labels(), tiny_vae(), dit_scheduler()),
    ADMPipeline: tiny_pixels.tiny_pipeline,
}
SIZE: dict[str, Any] = {"height": 64, "width": 64}


def draw(pipe: Any, **arguments: Any) -> Tensor:
    """A picture, as numbers, of whatever the pipeline draws."""
    usual: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    if isinstance(pipe, DiTPipeline):
        usual["class_labels"] = [3]
    elif not isinstance(pipe, ADMPipeline):
        usual |= {"prompt": "red", **SIZE}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(**{**usual, **arguments}, generator=generator)[0])


def parameters(call: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(call).parameters)


# Signatures


def is_variable(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


@pytest.mark.parametrize("cls", PARENTS)
def test_every_argument_of_the_parent_is_there_by_name(cls: type) -> None:
    theirs, ours = parameters(PARENTS[cls].__call__), parameters(cls.__call__)
    for name, parameter in theirs.items():
        if not is_variable(parameter):
            assert ours[name].default == parameter.default
    bound = parameters(MAKE[cls]().__call__)
    assert list(bound) == list(ours)[1:]
    text = pydoc.render_doc(cls.__call__, renderer=pydoc.plaintext)
    assert all(name in text.split("Draw pictures")[0] for name in theirs)


@pytest.mark.parametrize("cls", [XL, DiTSAGPipeline])
def test_positions_are_those_of_the_parent(cls: type) -> None:
    theirs = [each for each in parameters(PARENTS[cls].__call__).values() if not is_variable(each)]
    ours = list(parameters(cls.__call__).values())[: len(theirs)]
    assert [each.name for each in ours] == [each.name for each in theirs]
    assert {each.kind for each in ours} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    rest = list(parameters(cls.__call__).values())[len(theirs) :]
    assert "sag_scale" in [each.name for each in rest if each.kind is each.KEYWORD_ONLY]


def test_positions_and_defaults_are_those_of_the_class_that_diffusers_deprecated() -> None:
    theirs = parameters(diffusers.StableDiffusionSAGPipeline.__call__)
    ours = parameters(SD.__call__)
    assert list(ours)[: len(theirs)] == list(theirs)
    for name in theirs:
        assert (ours[name].default, ours[name].kind) == (theirs[name].default, theirs[name].kind)
    rest = list(ours.values())[len(theirs) :]
    assert all(each.kind in (each.KEYWORD_ONLY, each.VAR_KEYWORD) for each in rest)


def test_arguments_by_position_mean_what_they_mean_there() -> None:
    pipe, generator = tiny_pipeline(SD), torch.Generator().manual_seed(0)
    front = ("red", 64, 64, 2, 7.5, 0.5, "blue", 2, 0.0, generator, None, None, None, None, None)
    found = pipe(*front, "np", False)
    assert isinstance(found, tuple)
    expected = draw(pipe, sag_scale=0.5, negative_prompt="blue", num_images_per_prompt=2)
    assert torch.equal(torch.as_tensor(found[0]), expected)


@pytest.mark.parametrize("cls", [SD, XL])
def test_prompts_are_encoded_with_the_arguments_of_the_parent(cls: Any) -> None:
    theirs: Any = PARENTS[cls]
    assert parameters(cls.encode_prompt) == parameters(theirs.encode_prompt)


# The settings of guidance


@pytest.mark.parametrize("cls", [SD, XL])
def test_the_scale_is_that_of_the_guidance_unless_the_call_has_one(cls: type) -> None:
    pipe = MAKE[cls]()
    usual = draw(pipe)
    assert torch.equal(draw(pipe, sag_scale=0.75), usual)
    for guidance in (SelfAttentionGuidance(3.0), PerturbedAttentionGuidance(2.0)):
        pipe.guidance = guidance
        found = draw(pipe)
        assert not torch.equal(found, usual)
        assert torch.equal(draw(pipe, sag_scale=guidance.scale), found)
        with guidance.attach(pipe):
            assert torch.equal(draw(pipe, sag_scale=0), found)


@pytest.mark.parametrize("cls", [SD, XL])
@pytest.mark.parametrize(
    "wrong", [None, [PerturbedAttentionGuidance()], "pag", SelfAttentionGuidance]
)
def test_what_is_no_guidance_is_refused_when_it_is_set(cls: type, wrong: Any) -> None:
    pipe = MAKE[cls]()
    with pytest.raises(ValueError, match=r"guidance=.* must be a guidance, .* sag_scale=0"):
        pipe.guidance = wrong
    assert pipe.guidance == SelfAttentionGuidance()


def test_a_handle_beside_the_guidance_of_a_pipeline_is_explained() -> None:
    pipe = MAKE[SD]()
    with PerturbedAttentionGuidance(2.0).attach(pipe):
        with pytest.raises(ValueError, match=r"is guided already, .* needs sag_scale=0 beside a"):
            draw(pipe)
        draw(pipe, sag_scale=0)


# Schedules by hand


@pytest.mark.parametrize("cls", [SD, XL])
@pytest.mark.parametrize("sag_scale", [0.0, 0.75])
def test_timesteps_and_sigmas_of_one_schedule_draw_one_picture(cls: type, sag_scale: float) -> None:
    pipe, timesteps = MAKE[cls](), [951, 600, 300, 20]
    pipe.scheduler = tiny_scheduler(EulerDiscreteScheduler)
    pipe.scheduler.set_timesteps(timesteps=timesteps)
    sigmas = pipe.scheduler.sigmas.tolist()  # to 0 at the end
    settings: dict[str, Any] = {"num_inference_steps": None, "sag_scale": sag_scale}
    by_timesteps = draw(pipe, timesteps=timesteps, **settings)
    assert (draw(pipe, sigmas=sigmas, **settings) - by_timesteps).abs().max() < 1e-3
    for steps in (None, 7):  # beside timesteps it is of no effect
        again = draw(pipe, timesteps=timesteps, **{**settings, "num_inference_steps": steps})
        assert torch.equal(again, by_timesteps)
    others = draw(pipe, num_inference_steps=4, sag_scale=sag_scale)
    assert (others - by_timesteps).abs().max() > 1e-2


# Prompts encoded alone


def only(pipe: Any, text: bool) -> Any:
    """A pipeline of the same class with its text components, or with all but those."""
    parts = {
        name: part if ("text" in name or "tokenizer" in name) == text else None
        for name, part in pipe.components.items()
    }
    more = {"add_watermarker" if isinstance(pipe, XL) else "requires_safety_checker": False}
    return type(pipe)(**parts, **more)


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("cls", [SD, XL])
def test_prompts_are_encoded_without_the_rest(cls: type, clip_skip: int | None) -> None:
    pipe = MAKE[cls]()
    expected = draw(pipe, clip_skip=clip_skip)
    arguments: dict[str, Any] = {"do_classifier_free_guidance": True, "clip_skip": clip_skip}
    arguments |= {"num_images_per_prompt": 1, "device": "cpu"}
    embeds = only(pipe, text=True).encode_prompt(prompt="red", **arguments)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    given = dict(zip(names, embeds, strict=False))
    found = draw(only(pipe, text=False), prompt=None, **given)
    assert (found - expected).abs().max() < 1e-5
    assert clip_skip is None or (draw(pipe) - expected).abs().max() > 1e-4


def test_a_text_encoder_that_others_share_is_left_alone() -> None:
    pipe = tiny_pipeline(SD)
    encoder, during = pipe.text_encoder, []
    arguments: tuple[Any, ...] = ("red", "cpu", 1, True)
    pipe.encode_prompt(*arguments, clip_skip=1)  # at the first one transformers notes something
    before = set(vars(encoder))
    (layer,) = (each for name, each in encoder.named_modules() if name.endswith("final_layer_norm"))
    hook = layer.register_forward_hook(lambda *_: during.append(set(vars(encoder))))
    pipe.encode_prompt(*arguments, clip_skip=1)
    with pytest.raises(TypeError, match="negative_prompt"):
        pipe.encode_prompt(*arguments, negative_prompt=["blue"], clip_skip=1)
    hook.remove()
    assert during == [before] * 5
    assert pipe.text_encoder is encoder


# Saved folders and other tasks

TASKS: dict[type, dict[Any, type]] = {
    SD: {
        AutoPipelineForText2Image: StableDiffusionPipeline,
        AutoPipelineForImage2Image: StableDiffusionImg2ImgPipeline,
        AutoPipelineForInpainting: StableDiffusionInpaintPipeline,
    },
    XL: {
        AutoPipelineForText2Image: StableDiffusionXLPipeline,
        AutoPipelineForImage2Image: StableDiffusionXLImg2ImgPipeline,
        AutoPipelineForInpainting: StableDiffusionXLInpaintPipeline,
    },
}


def settings_of(cls: type) -> dict[str, Any]:
    """What a pipeline of ours needs to draw as diffusers' own."""
    return {"sag_scale": 0} | ({"cfg_channels": None} if cls is DiTSAGPipeline else {})


@pytest.mark.parametrize("cls", PARENTS)
def test_saved_folders_load_as_the_parent_and_as_ours(cls: type, tmp_path: Path) -> None:
    pipe = MAKE[cls]()
    pipe.save_pretrained(tmp_path)
    theirs = aligned(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(theirs) is PARENTS[cls]
    plain = draw(pipe, **settings_of(cls))
    assert torch.equal(draw(theirs), plain)
    ours = aligned(type(pipe).from_pretrained(tmp_path))
    assert type(ours) is cls
    guided = draw(ours)
    assert torch.equal(guided, draw(pipe))
    assert not torch.equal(guided, plain)
    assert cls.__name__ in repr(pipe)


@pytest.mark.parametrize("cls", TASKS)
def test_diffusers_switches_to_other_tasks(cls: type, tmp_path: Path) -> None:
    pipe = MAKE[cls]()
    pipe.save_pretrained(tmp_path)
    for auto, expected in TASKS[cls].items():
        assert type(auto.from_pretrained(tmp_path)) is expected
        other = auto.from_pipe(pipe)
        assert type(other) is expected
        assert other.unet is pipe.unet
        assert torch.equal(draw(type(pipe).from_pipe(other)), draw(pipe))
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert other("red", image=picture, num_inference_steps=4, strength=0.5).images[0].size


@pytest.mark.parametrize("cls", TASKS)
def test_folders_saved_under_our_name_switch_to_other_tasks(cls: type, tmp_path: Path) -> None:
    MAKE[cls]().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": cls.__name__}))
    assert type(AutoPipelineForText2Image.from_pretrained(tmp_path)) is PARENTS[cls]


def test_a_class_without_a_parent_tells_its_package_and_loads(tmp_path: Path) -> None:
    pipe = MAKE[ADMPipeline]()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_module"], index["_class_name"]) == ("self_attention_guidance", "ADMPipeline")
    for loader in (DiffusionPipeline, ADMPipeline):
        loaded = aligned(loader.from_pretrained(tmp_path))
        assert type(loaded) is ADMPipeline
        loaded.guidance = pipe.guidance
        assert torch.equal(draw(loaded), draw(pipe))


def test_pipelines_work_where_the_switch_of_tasks_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.pipelines.auto_pipeline", None)
    share_tasks(SD, "stable-diffusion")


# Memory


@pytest.mark.parametrize("cls", MAKE)
def test_networks_are_free_as_soon_as_their_pipeline_is(cls: type) -> None:
    pipe = MAKE[cls]()
    draw(pipe)
    handle = pipe.guidance_handle
    network = weakref.ref(pipe.components.get("unet") or pipe.components["transformer"])
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert network() is None
    finally:
        gc.enable()
    assert handle.steps == 2
    assert handle.mask is not None
