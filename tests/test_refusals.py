"""Networks in a state that guidance can't trust: right, or refused with the true reason."""

from __future__ import annotations

import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from diffusers import (
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_first_block_cache, apply_layerwise_casting
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

import tiny_pixels
from self_attention_guidance import (
    BlurGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    StableDiffusionSAGPipeline,
)
from test_guidance import LAYER, draw
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet
from tiny_transformers import TRANSFORMERS
from tiny_transformers import draw as draw_transformer

GUIDANCES = [SelfAttentionGuidance(1.0), BlurGuidance(1.0), PerturbedAttentionGuidance(1.0)]


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline(StableDiffusionPipeline)


def replace_a_block(unet: Any) -> None:
    compute = unet.mid_block.forward
    unet.mid_block.forward = lambda *args, **kwargs: compute(*args, **kwargs)


def replace_the_whole(unet: Any) -> None:
    compute = unet.forward
    unet.forward = lambda *args, **kwargs: compute(*args, **kwargs)


@pytest.mark.parametrize("wraps", [False, True])
def test_a_forward_that_was_replaced_in_its_class_is_refused_by_name(
    pipe: Any, wraps: bool
) -> None:
    class Cached(UNet2DConditionModel):
        """Stands in for diffusers' class, so that no other test sees the change."""

        forward = UNet2DConditionModel.forward

    def cached(self: Any, *args: Any, **kwargs: Any) -> Any:
        return UNet2DConditionModel.forward(self, *args, **kwargs)

    Cached.__module__ = UNet2DConditionModel.__module__
    pipe.unet.__class__ = Cached
    with SelfAttentionGuidance(1.0).attach(pipe):
        pass
    # as TeaCache does it
    Cached.forward = functools.wraps(UNet2DConditionModel.forward)(cached) if wraps else cached
    message = r"the forward of Cached was replaced by '\S+"
    with pytest.raises(ValueError, match=message):
        SelfAttentionGuidance(1.0).attach(pipe)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "accelerate's hook": lambda block: add_hook_to_module(block, ModelHook()),
    "a hook of diffusers": lambda block: apply_layerwise_casting(
        block, torch.float32, torch.float32
    ),
    "no compiling": lambda block: vars(block).update(forward=torch.compiler.disable(block.forward)),
    "compiling": lambda block: vars(block).update(
        forward=torch.compile(block.forward, backend="eager")
    ),
    "mixed precision": lambda block: vars(block).update(
        forward=convert_outputs_to_fp32(torch.autocast("cpu", enabled=False)(block.forward))
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("order", ["", "wr", "rw"])
def test_a_replaced_forward_is_found_behind_wrappers_that_cache_nothing(
    pipe: Any, wrap: Callable[[Any], Any], order: str
) -> None:
    for each in order or "w":
        wrap(pipe.unet.mid_block) if each == "w" else replace_a_block(pipe.unet)
    if order:
        with pytest.raises(ValueError, match=r"mid_block was replaced by 'replace_a_block"):
            BlurGuidance(1.0).attach(pipe)
    else:
        BlurGuidance(1.0).attach(pipe).remove()


@pytest.mark.parametrize("guidance", GUIDANCES, ids=lambda each: each.method)
@pytest.mark.parametrize("replace", [replace_a_block, replace_the_whole])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_forward_is_refused_by_name(
    pipe: Any, guidance: Any, replace: Callable[[Any], None], when: str
) -> None:
    message = (
        r"the forward of UNet2DConditionModel\S* was replaced by 'replace_\w+.*caches over the"
    )
    if when == "before":
        replace(pipe.unet)
    with pytest.raises(ValueError, match=message), guidance.attach(pipe):
        replace(pipe.unet)
        draw(pipe)


def test_caches_of_diffusers_are_refused_however_they_were_switched_on() -> None:
    pipe = TRANSFORMERS["Flux"].make()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"has the hook 'fbc_\w+', a cache, which"):
        SelfAttentionGuidance(1.0).attach(pipe)


def test_hooks_of_diffusers_that_keep_nothing_are_allowed() -> None:
    pipe = TRANSFORMERS["Flux"].make()
    plain = draw_transformer("Flux", pipe, (3,))
    apply_layerwise_casting(pipe.transformer, torch.float32, torch.float32)
    with SelfAttentionGuidance(1.0).attach(pipe):
        assert not torch.equal(draw_transformer("Flux", pipe, (3,)), plain)


def test_merged_tokens_are_refused(pipe: Any) -> None:
    """By a block of another class, as tomesd does it; a quarter of them forms a coarser grid."""
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]

    class Merging(type(block.attn1)):  # type: ignore[misc]
        def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            few = states.unflatten(1, (-1, 4)).mean(2)
            return super().forward(few, *args, **kwargs).repeat_interleave(4, 1)

    block.attn1.__class__ = Merging
    message = (
        r"attends over 16 positions, but its picture has 8 x 8: code that merges or drops tokens"
    )
    with SelfAttentionGuidance(1.0).attach(pipe), pytest.raises(ValueError, match=message):
        draw(pipe, height=128, width=128)


def test_a_wrapper_of_torch_s_kernel_is_read_and_weakened_through(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = F.scaled_dot_product_attention
    for guidance in GUIDANCES:
        with guidance.attach(pipe):
            expected = draw(pipe, (3, 4))
        with monkeypatch.context() as patched:
            patched.setattr(F, "scaled_dot_product_attention", lambda *a, **k: kernel(*a, **k))
            with guidance.attach(pipe):
                assert torch.equal(draw(pipe, (3, 4)), expected)


@pytest.mark.parametrize("guidance", [GUIDANCES[0], GUIDANCES[2]], ids=lambda each: each.method)
def test_a_kernel_that_is_not_torch_s_is_named(
    pipe: Any, guidance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_hand(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value

    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand)
    message = (
        r"no attention was \w+ at .*: torch.nn.functional.scaled_dot_product_attention was repl"
    )
    with guidance.attach(pipe), pytest.raises(RuntimeError, match=message):
        draw(pipe)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends_of_diffusers_that_call_torch_s_kernel_are_read(backend: str) -> None:
    pipe = TRANSFORMERS["Flux"].make()
    guidance = SelfAttentionGuidance(1.0)
    with guidance.attach(pipe):
        expected = draw_transformer("Flux", pipe, (3,))
    pipe.transformer.set_attention_backend(backend)
    with guidance.attach(pipe):
        found = draw_transformer("Flux", pipe, (3,))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def ignore_the_input(pipe: Any) -> Any:
    pipe.unet.register_forward_hook(lambda _m, _i, out: (torch.zeros_like(out[0]),))
    return SelfAttentionGuidance(1.0)


def ignore_the_layer(pipe: Any) -> Any:
    torch.nn.init.zeros_(pipe.unet.get_submodule(LAYER).to_out[0].weight)
    return PerturbedAttentionGuidance(1.0)


@pytest.mark.parametrize("ignore", [ignore_the_input, ignore_the_layer])
def test_guidance_that_does_nothing_is_an_error(pipe: Any, ignore: Callable[[Any], Any]) -> None:
    message = "step 0: .* had no effect: the weakened network predicted the same as the"
    with ignore(pipe).attach(pipe), pytest.raises(RuntimeError, match=message):
        draw(pipe, guidance_scale=1.0)


@pytest.mark.parametrize("setting", [{"threshold": 1e6}, {"blur_sigma": 0.0}])
def test_an_empty_mask_and_a_blur_of_nothing_add_nothing(pipe: Any, setting: Any) -> None:
    plain = draw(pipe, guidance_scale=1.0)
    with SelfAttentionGuidance(1.0, **setting).attach(pipe) as handle:
        assert torch.equal(draw(pipe, guidance_scale=1.0), plain)
    assert handle.steps == 3


# Memory, processes and threads


@pytest.mark.parametrize("pipeline", [StableDiffusionPipeline, StableDiffusionSAGPipeline])
def test_a_network_is_free_when_its_pipeline_is(pipeline: Any) -> None:
    pipe = tiny_pipeline(pipeline)
    handle = (
        SelfAttentionGuidance(1.0).attach(pipe) if pipeline is StableDiffusionPipeline else None
    )
    draw(pipe)
    network = weakref.ref(pipe.unet)
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert network() is None
    finally:
        gc.enable()
    if handle is not None:
        handle.remove()


def test_what_a_handle_shows_carries_no_autograd_graph() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(3)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    guidance = SelfAttentionGuidance(1.0, every=2)
    with guidance.attach(unet, scheduler=scheduler) as handle:
        out = unet(x, scheduler.timesteps[0], torch.randn(1, 7, 32)).sample
    assert handle.x0 is not None and handle.term is not None
    assert not handle.x0.requires_grad and not handle.term.requires_grad
    assert not any(each.requires_grad for each in handle.noted.values())
    assert out.requires_grad  # guidance itself can be differentiated


@pytest.mark.parametrize("name", ["Flux", "Chroma", "Qwen-Image", "Stable Diffusion 3.5"])
def test_a_guided_denoiser_can_be_pickled_after_a_run(name: str) -> None:
    pipe = TRANSFORMERS[name].make()
    with SelfAttentionGuidance(1.0).attach(pipe):
        draw_transformer(name, pipe, (3,), 3.0)
        restored = pickle.loads(pickle.dumps(pipe.transformer))
    assert len(restored._forward_hooks) == 1


def test_a_call_is_not_kept_after_it(pipe: Any) -> None:
    found: list[Any] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        found.append(weakref.ref(kwargs["encoder_hidden_states"]))

    with SelfAttentionGuidance(1.0).attach(pipe):
        with pipe.unet.register_forward_pre_hook(note, with_kwargs=True):
            draw(pipe)
        gc.collect()
        assert {each() for each in found} == {None}


def test_a_pickled_network_is_guided_as_it_was() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler(EulerDiscreteScheduler)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    scheduler.set_timesteps(3)
    t = scheduler.timesteps[0]
    with SelfAttentionGuidance(1.0).attach(unet, scheduler=scheduler), torch.no_grad():
        expected = unet(x, t, texts).sample
        restored = pickle.loads(pickle.dumps(unet))
        assert torch.equal(restored(x, t, texts).sample, expected)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_after_a_thread_was_stopped_in_a_pass_another_one_goes_on(pipe: Any, error: Any) -> None:
    with SelfAttentionGuidance(1.0).attach(pipe), ThreadPoolExecutor(1) as pool:
        expected = draw(pipe)

        def stop(*_: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                raise error

        hook = pipe.unet.mid_block.register_forward_pre_hook(stop)
        with pytest.raises(error):
            pool.submit(draw, pipe).result()
        hook.remove()
        assert torch.equal(draw(pipe), expected)  # while that thread lives on
        assert torch.equal(pool.submit(draw, pipe).result(), expected)


def test_a_processor_that_was_set_after_ctrl_c_stays(pipe: Any) -> None:
    class Mine(AttnProcessor2_0):
        pass

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with SelfAttentionGuidance(1.0).attach(pipe):
        with pipe.unet.conv_out.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
            draw(pipe)
        pipe.unet.set_attn_processor(Mine())
        draw(pipe)
    assert {type(each) for each in pipe.unet.attn_processors.values()} == {Mine}


class Passing(UNet2DConditionModel):
    """A denoiser whose own call names no argument."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_subclass_that_passes_its_arguments_on_is_guided(pipe: Any) -> None:
    with SelfAttentionGuidance(1.0).attach(pipe):
        expected = draw(pipe)
    pipe.unet.__class__ = Passing
    with SelfAttentionGuidance(1.0).attach(pipe):
        assert torch.equal(draw(pipe), expected)
    with (
        SelfAttentionGuidance(1.0).attach(pipe.unet, scheduler=pipe.scheduler),
        pytest.raises(ValueError, match="Passing was called without timestep: give it by name"),
    ):
        pipe.unet(torch.randn(1, 4, 8, 8))


# x0 as the scheduler has it


def used_by(scheduler: Any, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The clean sample that a scheduler derives, by its own step."""
    step = scheduler.step(output, t, x)
    if hasattr(step, "pred_original_sample"):
        return step.pred_original_sample
    return scheduler.model_outputs[-1]


@pytest.mark.parametrize(
    "limits",
    [
        {"thresholding": True, "sample_max_value": 2.0},
        {"thresholding": True, "sample_max_value": 1.0, "dynamic_thresholding_ratio": 0.9},
        {"thresholding": True, "clip_sample": True, "clip_sample_range": 0.3},
        {"clip_sample": True, "clip_sample_range": 0.5},
        {"clip_sample": True},
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_x0_is_limited_as_the_scheduler_does_it(name: str, limits: dict[str, Any]) -> None:
    cls = getattr(diffusers, name)
    # From another scheduler's config, which may hold limits that this one knows nothing of.
    scheduler = cls.from_config({**tiny_scheduler().config, **limits})
    scheduler.set_timesteps(6)
    unet, x, texts = tiny_unet(), torch.randn(2, 4, 8, 8) * 3, torch.randn(2, 7, 32)
    t = scheduler.timesteps[0]
    guidance = BlurGuidance(1e-12)
    with guidance.attach(unet, scheduler=scheduler) as handle, torch.no_grad():
        output = unet(x, t, texts).sample
    expected = used_by(scheduler, output, t, x)
    assert handle.x0 is not None
    assert (handle.x0 - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EulerDiscreteScheduler", {"clip_sample": True}),
        ("CogVideoXDDIMScheduler", {"clip_sample": True}),
        ("CogVideoXDPMScheduler", {"clip_sample": True}),
        ("TCDScheduler", {"clip_sample": True, "thresholding": True}),
        ("UniPCMultistepScheduler", {"thresholding": True, "predict_x0": False}),
    ],
)
def test_limits_that_the_scheduler_does_not_apply_are_not_used(
    name: str, settings: dict[str, Any]
) -> None:
    """It may have them only in its config, or from that of another scheduler."""
    scheduler = getattr(diffusers, name).from_config({**tiny_scheduler().config, **settings})
    scheduler.set_timesteps(4)
    unet, x, texts = tiny_unet(), torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    with BlurGuidance(1.0).attach(unet, scheduler=scheduler) as handle, torch.no_grad():
        unet(x, scheduler.timesteps[0], texts)
    assert handle.x0 is not None
    assert handle.x0.abs().max() > 1


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_user_s_scheduler_is_never_rewritten(error: Any) -> None:
    pipe = tiny_pixels.tiny_pipeline()
    before = {k: v for k, v in vars(pipe.scheduler).items() if isinstance(v, Tensor)}

    def stop(*_: Any) -> Any:
        raise error

    arguments: dict[str, Any] = {"num_inference_steps": 2, "sag_scale": 1.0}
    if error is None:
        pipe(**arguments)
    else:
        with pytest.raises(error):
            pipe(**arguments, callback_on_step_end=stop)
    for name, value in before.items():
        if name not in ("timesteps", "_timesteps"):
            assert getattr(pipe.scheduler, name) is value
