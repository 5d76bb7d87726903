"""Inputs at the edges of what guidance can do: right, or refused in one clear sentence."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from self_attention_guidance import (
    BlurGuidance,
    Guidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TokenPerturbationGuidance,
    attach,
)
from self_attention_guidance.denoiser.outputs import TwoCalls
from self_attention_guidance.guidance import guidance_of
from self_attention_guidance.guidance.tpg import token_order
from test_guidance import difference, draw
from tiny import BETAS, tiny_pipeline, tiny_scheduler, tiny_unet
from tiny_transformers import TRANSFORMERS
from tiny_transformers import draw as draw_transformer

TWO_CALLS = ("Flux", "Chroma", "Qwen-Image", "Lumina 2", "CogView 4")
TEXT = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))


def noise(pictures: int = 1) -> Tensor:
    return torch.randn(pictures, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def one_call(guidance: Guidance, scheduler: Any = None, **arguments: Any) -> tuple[Any, Tensor]:
    """The handle and the guided output of one call of a tiny U-Net."""
    net = arguments.pop("net", None) or tiny_unet()
    rows, layout = arguments.pop("rows", 1), arguments.pop("layout", "single")
    if scheduler is None:
        scheduler = tiny_scheduler()
        scheduler.set_timesteps(4)
    text = TEXT.expand(rows, -1, -1)
    with guidance.attach(net, scheduler=scheduler, batch_layout=layout) as handle:
        output = net(
            noise(rows), scheduler.timesteps[1], encoder_hidden_states=text, **arguments
        ).sample
    return handle, output


# Held terms in two calls a step


@pytest.mark.parametrize("name", TWO_CALLS)
def test_held_terms_are_rescaled_by_their_own_branch(name: str) -> None:
    pipe: Any = TRANSFORMERS[name].make()
    plain, ratios = copy.deepcopy(pipe.transformer), []
    with PerturbedAttentionGuidance(6.0, every=2, rescale=1.0).attach(pipe) as handle:

        def compare(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            if not handle._each.of(pipe.transformer).run.is_weak:
                ratios.append(float(output[0].std() / plain(*args, **kwargs)[0].std()))

        pipe.transformer.register_forward_hook(compare, with_kwargs=True)
        with torch.no_grad():
            draw_transformer(name, pipe, (3,), cfg=3.0, num_inference_steps=4)
    assert len(ratios) == 8
    assert ratios[::2] == pytest.approx([1.0] * 4, abs=1e-3)


# Inference mode


def residuals() -> list[Tensor]:
    """What a T2I-Adapter gives, in the way that diffusers deprecated: blocks add it in place."""
    generator = torch.Generator().manual_seed(3)
    shapes = (1, 32, 8, 8), (1, 64, 4, 4)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cut_first_prediction_is_guided_or_refused_for_its_reason(mode: Any) -> None:
    """Kontext, Qwen-Image-Edit and FLUX.2 Klein cut off the tokens of the other pictures."""
    calls, prediction = TwoCalls(), torch.zeros(1, 4, 2)
    with mode():
        prediction = prediction.clone()
        calls.begin(False, True, 1, False)
        first = calls.finish(prediction, {})[0][:, :2]
        calls.begin(True, True, 1, False)
        if mode is torch.no_grad:
            calls.finish(prediction, {0: torch.ones(1, 4, 2)})
            assert torch.equal(first, torch.ones(1, 2, 2))
        else:
            with pytest.raises(RuntimeError, match=r"or cut under torch.inference_mode\(\)"):
                calls.finish(prediction, {0: torch.ones(1, 4, 2)})


@pytest.mark.filterwarnings("ignore:.*down_block_additional_residuals:FutureWarning")
def test_what_blocks_change_in_place_is_not_taken_from_the_first_pass() -> None:
    terms: list[Tensor] = []
    modes: list[Callable[[], AbstractContextManager[None]]] = [torch.no_grad, torch.inference_mode]
    for mode in modes:
        with mode():
            guidance = PerturbedAttentionGuidance(2.0)
            handle, _ = one_call(guidance, down_block_additional_residuals=residuals())
            terms.append(handle.term.clone())
    assert torch.equal(*terms)


# Gradient checkpointing


@pytest.mark.parametrize(
    ("guidance", "is_right"),
    [
        (SelfAttentionGuidance(1.0), True),
        (SkipLayerGuidance(2.0), True),
        (SmoothedEnergyGuidance(2.0), False),
        (PerturbedAttentionGuidance(2.0), False),
        (TokenPerturbationGuidance(2.0), False),
    ],
    ids=lambda value: getattr(value, "method", ""),
)
def test_gradients_through_checkpoints_are_right_or_refused(
    guidance: Guidance, is_right: bool
) -> None:
    gradients: list[Tensor] = []
    for has_checkpoints in (False, True):
        net = tiny_unet().train()
        if has_checkpoints:
            net.enable_gradient_checkpointing()
            if not is_right:
                with pytest.raises(RuntimeError, match="disable_gradient_checkpointing"):
                    one_call(guidance, net=net)
                return
        _, output = one_call(guidance, net=net)
        (output**3).sum().backward()
        gradients.append(net.conv_in.weight.grad)
    assert difference(*gradients) < 1e-4


# Schedulers of one's own


class Midpoints(KDPM2DiscreteScheduler):
    pass


class Some(DDIMScheduler):
    def __init__(self, prediction_type: str = "epsilon", **others: Any) -> None:
        super().__init__(prediction_type=prediction_type, **others)


class All(DDIMScheduler):
    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)


class Flow(FlowMatchEulerDiscreteScheduler):
    pass


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize(
    "guidance",
    [SelfAttentionGuidance(1.0), PerturbedAttentionGuidance(3.0, noise_from=3.0)],
    ids=["sag", "pag"],
)
def test_a_subclass_of_a_scheduler_has_its_noise_levels(guidance: Guidance) -> None:
    found: list[Any] = []
    for cls in (KDPM2DiscreteScheduler, Midpoints):
        pipe = tiny_pipeline(StableDiffusionPipeline, scheduler=tiny_scheduler(cls))
        with guidance.attach(pipe):
            found.append(draw(pipe, num_inference_steps=6))
    assert difference(*found) == 0


@pytest.mark.parametrize("cls", [DDIMScheduler, Some, All])
def test_a_subclass_of_a_scheduler_has_its_settings(cls: Any) -> None:
    scheduler = cls(**BETAS, clip_sample=True)
    scheduler.set_timesteps(5)
    handle, _ = one_call(SelfAttentionGuidance(1.0), scheduler)
    assert handle.x0.abs().max() == 1


def test_a_subclass_of_a_flow_matching_scheduler_is_one() -> None:
    scheduler = Flow()
    scheduler.set_timesteps(5)
    handle, output = one_call(BlurGuidance(1e-9), scheduler)
    sigma = scheduler.sigmas[1]
    assert difference(handle.x0, noise() - sigma * output) < 1e-4


def test_sigmas_that_change_during_a_run_are_followed() -> None:
    scheduler = EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(4)
    net, x_t = tiny_unet(), noise() * scheduler.init_noise_sigma
    guidance = BlurGuidance(1e-9)
    with (
        guidance.attach(net, scheduler=scheduler, batch_layout="single") as handle,
        torch.no_grad(),
    ):
        for number, timestep in enumerate(scheduler.timesteps):
            if number == 2:
                scheduler.sigmas[2:] *= 0.5
            scaled = scheduler.scale_model_input(x_t, timestep)
            output = net(scaled, timestep, encoder_hidden_states=TEXT).sample
            taken = scheduler.step(output, timestep, x_t)
            assert difference(handle.x0, taken.pred_original_sample) < 1e-4
            x_t = taken.prev_sample


# Compiled parts


@pytest.mark.parametrize(
    "cls",
    [
        SelfAttentionGuidance,
        PerturbedAttentionGuidance,
        SmoothedEnergyGuidance,
        SkipLayerGuidance,
        TokenPerturbationGuidance,
    ],
)
def test_blocks_that_are_compiled_have_their_names_and_their_order(cls: type[Guidance]) -> None:
    pipe: Any = TRANSFORMERS["PixArt-Sigma"].make()
    found: list[Any] = []
    for is_compiled in (False, True):
        blocks = pipe.transformer.transformer_blocks
        for number, block in enumerate(blocks):
            if is_compiled:
                blocks[number] = torch.compile(block, backend="eager")
        with cls(1.0).attach(pipe):
            found.append(draw_transformer("PixArt-Sigma", pipe, (3,), num_inference_steps=2))
    assert difference(*found) < 1e-4


# Sums, and settings that are none


def test_a_sum_is_attached_as_its_parts() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    sag, pag = SelfAttentionGuidance(1.0), PerturbedAttentionGuidance(2.0)
    found: list[Any] = []
    for guidances in ((sag, pag), (sag + pag,)):
        with attach(pipe, *guidances) as handle:
            found.append(draw(pipe))
        assert handle.guidances == (sag, pag)
    assert difference(*found) == 0


def test_a_row_without_its_half_is_refused_as_that() -> None:
    with pytest.raises(ValueError, match="a batch of 1 has no halves"):
        one_call(PerturbedAttentionGuidance(2.0), layout="uncond_first")


def test_a_blur_of_queries_that_changes_nothing_is_refused_as_that() -> None:
    with pytest.raises(RuntimeError, match="had no effect"):
        one_call(SmoothedEnergyGuidance(2.0, blur_sigma=0.01))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: PerturbedAttentionGuidance(layers=5), "layers=5 must be"),  # pyright: ignore
        (lambda: Guidance.from_dict(None), "settings=None must be"),  # pyright: ignore
        (lambda: Guidance.from_dict({"method": ["sag"]}), "method=.*must be one of"),
        (lambda: guidance_of([]), "settings=.* must be"),  # pyright: ignore
        (lambda: guidance_of({"method": "sag+pag", "guidances": 5}), "guidances=5 must be"),
        (lambda: guidance_of({"method": "sag+pag", "guidances": [5, 6]}), "settings=5 must be"),
    ],
)
def test_what_are_no_settings_is_refused_by_name(read: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read()


# The last step


@pytest.mark.parametrize("start", [0.0, 0.75])
@pytest.mark.parametrize("branch", ["uncond", "cond"])
def test_steps_of_lumina_2_without_cfg_are_guided(branch: str, start: float) -> None:
    pipe = TRANSFORMERS["Lumina 2"].make()
    arguments: dict[str, Any] = {"num_inference_steps": 4, "cfg_trunc_ratio": 0.6}
    plain = draw_transformer("Lumina 2", pipe, (3,), 4.0, **arguments)
    with SelfAttentionGuidance(1.0, branch=branch, start=start).attach(pipe) as handle:
        guided = draw_transformer("Lumina 2", pipe, (3,), 4.0, **arguments)
    assert handle.steps == (4 if start == 0 else 1)
    assert not torch.equal(guided, plain)


def loop_in_two_calls(net: Any, scheduler: Any, cfg_steps: int) -> Tensor:
    """A loop of one's own, with the condition first, and without CFG after some steps."""
    scheduler.set_timesteps(4)
    x = noise()
    for step, t in enumerate(scheduler.timesteps):
        x_in = x.clone()
        cond = net(x_in, t, encoder_hidden_states=TEXT).sample
        if step < cfg_steps:
            uncond = net(x_in, t, encoder_hidden_states=0 * TEXT).sample
            cond = uncond + 3.0 * (cond - uncond)
        x = scheduler.step(cond, t, x).prev_sample
    return x


@torch.no_grad()
def test_a_last_step_without_its_second_call_is_guided() -> None:
    """A loop of one's own does not say whether a second call follows."""
    net, scheduler = tiny_unet(), tiny_scheduler()
    for cfg_steps, passes in ((3, 3), (4, 4)):
        drawn: list[Tensor] = []
        for stop in (0.75, 1.0):
            guidance = SelfAttentionGuidance(1.0, start=0.5, stop=stop)
            layout: Any = {"scheduler": scheduler, "batch_layout": "cond_call_first"}
            with guidance.attach(net, **layout) as handle:
                drawn.append(loop_in_two_calls(net, scheduler, cfg_steps))
        assert handle.steps == passes
        assert not torch.equal(*drawn)


# Several pictures by turns


@torch.no_grad()
@pytest.mark.parametrize("guidance", [PerturbedAttentionGuidance(2.0), SelfAttentionGuidance(1.0)])
def test_the_picture_that_goes_on_does_not_get_the_held_term_of_another(guidance: Any) -> None:
    """As in a choice among several pictures that are drawn up to a step."""
    net, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(12)
    guidance = dataclasses.replace(guidance, every=4)

    def drawn(x: Tensor, steps: slice) -> Tensor:
        for t in scheduler.timesteps[steps]:
            predicted = net(x, t, encoder_hidden_states=TEXT).sample
            x = scheduler.step(predicted, t, x).prev_sample
        return x

    results: list[Tensor] = []
    for others in (1, 2):
        with guidance.attach(net, scheduler=scheduler, batch_layout="single"):
            chosen = drawn(noise(), slice(6))
            for other in range(others):
                drawn(noise() * (1 + other) + 0.1, slice(6))
            results.append(drawn(chosen, slice(6, 12)))
    assert torch.equal(*results)


@torch.no_grad()
@pytest.mark.parametrize(
    ("guidance", "is_refused"),
    [
        (SelfAttentionGuidance(1.0), False),
        (SelfAttentionGuidance(1.0, every=3), False),
        (SelfAttentionGuidance(1.0, stop=0.9), True),
        (SelfAttentionGuidance(1.0, noise_to=0.01), True),
        (SelfAttentionGuidance(0.0, stop=0.5), False),
        (TokenPerturbationGuidance(1.0), True),
    ],
)
def test_what_depends_on_the_step_refuses_several_timesteps(
    guidance: Guidance, is_refused: bool
) -> None:
    net, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(4)
    refused = pytest.raises(ValueError, match="give each call one timestep, because the effect")
    attached = guidance.attach(net, scheduler=scheduler, batch_layout="single")
    for timesteps, is_mixed in (
        (scheduler.timesteps[[1, 1]], False),
        (scheduler.timesteps[:2], True),
    ):
        with attached, refused if is_refused and is_mixed else nullcontext():
            net(noise(2), timesteps, encoder_hidden_states=TEXT.expand(2, -1, -1))
        attached = guidance.attach(net, scheduler=scheduler, batch_layout="single")
    attached.remove()


# Numbers


@pytest.mark.parametrize("value", [1e25, -1e25, 10**40, 1e39, 10**10])
@pytest.mark.parametrize("name", ["scale", "norm_limit", "threshold", "blur_sigma", "noise_from"])
def test_numbers_that_no_setting_needs_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must be at most 1e[+]09 in size"):
        SelfAttentionGuidance(**{name: value})


def test_a_scale_that_half_precision_cannot_hold_is_named_as_the_cause() -> None:
    net = tiny_unet().half()
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(4)
    attached = SelfAttentionGuidance(1e8).attach(net, scheduler=scheduler, batch_layout="single")
    cause = "the guided prediction is not finite; the scale of guidance is too large for float16"
    with attached, torch.no_grad(), pytest.raises(FloatingPointError, match=cause):
        net(noise().half(), scheduler.timesteps[1], encoder_hidden_states=TEXT.half())


# Tokens and compiled networks


def test_few_tokens_do_not_keep_their_order_by_chance() -> None:
    for tokens in (2, 3, 4):
        for step in range(100):
            order = token_order(0, step, "mid_block", tokens)
            assert sorted(order.tolist()) == [*range(tokens)]
            assert order.tolist() != [*range(tokens)]


def test_a_network_behind_a_guided_compiled_one_is_guided_already() -> None:
    net, scheduler = tiny_unet(), tiny_scheduler()
    compiled: Any = torch.compile(net, backend="eager")
    settings = {"scheduler": scheduler, "batch_layout": "single"}
    for first, second in ((compiled, net), (net, compiled)):
        handle = BlurGuidance(1.0).attach(first, **settings)
        with pytest.raises(ValueError, match="is guided already, by BlurGuidance"):
            SelfAttentionGuidance(1.0).attach(second, **settings)
        handle.remove()
        SelfAttentionGuidance(1.0).attach(second, **settings).remove()
