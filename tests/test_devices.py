"""What guidance asks of a device: no float64, and at most one wait for it in a guided step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from self_attention_guidance import (
    BlurGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    attach,
)
from self_attention_guidance.pipelines.classifier_guidance import ancestral_variance
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
WAITS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__index__,
    torch.Tensor.is_nonzero,
    torch.Tensor.nonzero,
    torch.equal,
    torch.allclose,
    torch.is_nonzero,
    torch.nonzero,
}


class OnDevice(Tensor):
    """A tensor that stands for one on a device without float64."""

    waits = 0

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        to_cpu = func is torch.Tensor.to and any(each == "cpu" for each in args[1:])
        if func in WAITS or to_cpu:
            cls.waits += 1
            result = super().__torch_function__(func, types, args, kwargs)
            return result.as_subclass(Tensor) if isinstance(result, Tensor) else result
        if func is torch.stack and not all(isinstance(each, cls) for each in args[0]):
            raise RuntimeError("all tensors must be on one device")
        asked = (*args, *kwargs.values())
        if func is torch.Tensor.double or any(each is torch.float64 for each in asked):
            raise TypeError("this device has no float64")
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """How often code waited for the device inside the `with` statement."""
    before = OnDevice.waits
    yield lambda: OnDevice.waits - before


def draw_on_device(
    guidances: tuple[Any, ...], name: str, steps: int = 6, **attaching: Any
) -> tuple[Tensor, list[int]]:
    """A loop whose tensors are on a device, and how often guidance waited for it at each step."""
    unet, scheduler = tiny_unet(), tiny_scheduler(getattr(diffusers, name))
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    scheduler.timesteps = timesteps.as_subclass(OnDevice)
    halves = 2 if attaching.get("batch_layout") == "uncond_first" else 1
    texts = torch.randn(2 * halves, 7, 32, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    waits: list[int] = []
    with attach(unet, *guidances, scheduler=scheduler, **attaching), torch.no_grad():
        for index in range(len(timesteps)):
            t = scheduler.timesteps[index]
            plain_t = timesteps[index]
            x_in = scheduler.scale_model_input(x, plain_t)
            batch = torch.cat([x_in] * halves).as_subclass(OnDevice)
            with counted() as waited:
                out = unet(batch, t, texts.as_subclass(OnDevice)).sample
                waits.append(waited())
            out = out.as_subclass(Tensor).chunk(halves)[0]
            x = scheduler.step(out, plain_t, x).prev_sample
    return x, waits


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("layout", [None, "uncond_first"])
def test_a_guided_step_waits_for_the_device_once(name: str, layout: Any) -> None:
    attaching = {} if layout is None else {"batch_layout": layout}
    guidances = (SelfAttentionGuidance(1.0), PerturbedAttentionGuidance(1.0))
    _, waits = draw_on_device(guidances, name, **attaching)
    assert max(waits[1:]) <= 1
    assert waits[0] <= (1 if attaching else 2)  # who does not tell the layout, pays for a look


@pytest.mark.parametrize("form", [int, float, torch.clone])
def test_the_timestep_may_stay_on_the_cpu(form: Callable[[Tensor], Any]) -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(3)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    guidance = BlurGuidance(1.0).attach(unet, scheduler=scheduler, batch_layout="single")
    with guidance as handle, torch.no_grad():
        for t in scheduler.timesteps:
            with counted() as waited:
                unet(x.as_subclass(OnDevice), form(t), texts.as_subclass(OnDevice))
                assert waited() == 1
    assert handle.steps == 3


def test_every_step_is_looked_at_by_the_end() -> None:
    """What a step leaves unread for want of a wait, the next one reads."""
    _, waits = draw_on_device((SelfAttentionGuidance(1.0),), "DDIMScheduler", batch_layout="single")
    assert all(waits)


@pytest.mark.parametrize("name", sorted({*SCHEDULERS} - {"DDPMScheduler"}))  # which draws noise
def test_the_picture_is_that_of_the_cpu(name: str) -> None:
    found, _ = draw_on_device((SelfAttentionGuidance(1.0, every=2),), name, batch_layout="single")
    unet, scheduler = tiny_unet(), tiny_scheduler(getattr(diffusers, name))
    scheduler.set_timesteps(6)
    texts = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guidance = SelfAttentionGuidance(1.0, every=2)
    with guidance.attach(unet, scheduler=scheduler, batch_layout="single"), torch.no_grad():
        for t in scheduler.timesteps:
            out = unet(scheduler.scale_model_input(x, t), t, texts).sample
            x = scheduler.step(out, t, x).prev_sample
    assert torch.equal(found, x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_pictures_with_timesteps_of_their_own_cost_one_wait(kind: str) -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler(prediction_type=kind)
    scheduler.set_timesteps(4)
    x, texts = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    guidance = SelfAttentionGuidance(1.0, every=2)
    waits: list[int] = []
    with guidance.attach(unet, scheduler=scheduler, batch_layout="single"), torch.no_grad():
        for t in scheduler.timesteps[:-1]:
            timesteps = torch.stack([t, t - 100]).as_subclass(OnDevice)
            with counted() as waited:
                unet(x.as_subclass(OnDevice), timesteps, texts.as_subclass(OnDevice))
                waits.append(waited())
    assert max(waits) <= 1


@pytest.mark.parametrize("is_view", [True, False])
def test_what_a_step_leaves_unread_the_next_one_reads(is_view: bool) -> None:
    """Also if each step waits, because its timestep is no view of the scheduler's."""
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(6)
    with torch.no_grad():
        unet.conv_out.weight[0] = torch.nan
    scheduler.timesteps = scheduler.timesteps.as_subclass(OnDevice)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    guidance = BlurGuidance(1.0).attach(unet, scheduler=scheduler, batch_layout="single")
    with guidance, torch.no_grad(), pytest.raises(FloatingPointError, match=r"step 0 \(time"):
        for t in scheduler.timesteps[:2]:
            t = t if is_view else torch.stack([t])
            unet(x.as_subclass(OnDevice), t, texts.as_subclass(OnDevice))


def test_timesteps_and_what_was_left_unread_cost_one_wait() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(6)
    scheduler.timesteps = scheduler.timesteps.as_subclass(OnDevice)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    guidance = BlurGuidance(1.0).attach(unet, scheduler=scheduler, batch_layout="single")
    waits: list[int] = []
    with guidance as handle, torch.no_grad():
        for t in scheduler.timesteps:
            with counted() as waited:
                unet(x.as_subclass(OnDevice), torch.stack([t]), texts.as_subclass(OnDevice))
                waits.append(waited())
            assert len(handle._each.of(unet).run._checks) <= 4  # of one step
    assert waits[1:-1] == [1] * 4


def test_checks_of_a_stopped_run_are_not_raised_by_the_next_one() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(6)
    scheduler.timesteps = scheduler.timesteps.as_subclass(OnDevice)
    bad, texts = torch.full((1, 4, 8, 8), torch.nan), torch.randn(1, 7, 32).as_subclass(OnDevice)
    good = torch.randn(1, 4, 8, 8)
    guidance = BlurGuidance(1.0).attach(unet, scheduler=scheduler, batch_layout="single")
    with guidance, torch.no_grad():
        unet(bad.as_subclass(OnDevice), torch.stack([scheduler.timesteps[1]]), texts)
        for t in scheduler.timesteps:
            unet(good.as_subclass(OnDevice), torch.stack([t]), texts)


def test_not_finite_is_reported_although_the_first_step_does_not_wait_for_it() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(3)
    scheduler.timesteps = scheduler.timesteps.as_subclass(OnDevice)
    with torch.no_grad():
        unet.conv_out.weight[0] = torch.nan
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    guidance = BlurGuidance(1.0).attach(unet, scheduler=scheduler, batch_layout="single")
    with (
        guidance,
        torch.no_grad(),
        pytest.raises(FloatingPointError, match=r"step 0 \(time"),
    ):
        for t in scheduler.timesteps:
            unet(x.as_subclass(OnDevice), t, texts.as_subclass(OnDevice))


def test_the_scheduler_of_a_pipeline_may_keep_its_tables_on_a_device() -> None:
    """Pipelines ask schedulers for their timesteps on the device."""
    pipe = tiny_pipeline(StableDiffusionPipeline)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("red", num_inference_steps=3, output_type="latent", generator=generator).images

    with SelfAttentionGuidance(1.0).attach(pipe):
        expected = draw()
    set_timesteps = pipe.scheduler.set_timesteps

    def on_device(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        pipe.scheduler.timesteps = pipe.scheduler.timesteps.as_subclass(OnDevice)

    pipe.scheduler.set_timesteps = on_device
    with SelfAttentionGuidance(1.0).attach(pipe):
        assert torch.equal(draw().as_subclass(Tensor), expected)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_pipeline_with_several_schedulers_waits_once_a_step(is_first: bool) -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    own, other = pipe.scheduler, tiny_scheduler(diffusers.EulerDiscreteScheduler)
    other.set_timesteps(7)
    schedulers = [own, other] if is_first else [other, own]
    waits: list[int] = []

    class Two(StableDiffusionPipeline):
        def __call__(self) -> None:
            own.set_timesteps(4)
            for each in schedulers:
                each.timesteps = each.timesteps.as_subclass(OnDevice)
            for t in own.timesteps:
                with counted() as waited, torch.no_grad():
                    self.unet(torch.ones(1, 4, 8, 8).as_subclass(OnDevice), t, texts)
                    waits.append(waited())

    texts = torch.randn(1, 7, 32).as_subclass(OnDevice)
    pipe.__class__ = Two
    pipe.scheduler, pipe.extra = schedulers[0], schedulers[1]
    with SelfAttentionGuidance(1.0, start=0.2).attach(pipe, batch_layout="single"):
        pipe()
    assert max(waits[1:-1]) <= 1  # the last step also waits for what was left to it


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
def test_classifier_guidance_needs_no_float64(kind: Any) -> None:
    """`add_noise` moves the scheduler's table to the device."""
    scheduler = diffusers.DDPMScheduler(variance_type=kind)
    scheduler.set_timesteps(4)
    output, table = torch.randn(1, 6, 8, 8), scheduler.alphas_cumprod
    for timestep in scheduler.timesteps:
        scheduler.alphas_cumprod = table
        expected = ancestral_variance(scheduler, timestep, output)
        scheduler.alphas_cumprod = table.as_subclass(OnDevice)
        found = ancestral_variance(scheduler, timestep, output.as_subclass(OnDevice))
        assert torch.equal(found.as_subclass(Tensor), expected)
