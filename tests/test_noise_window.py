"""Windows of noise: the same levels at any number of steps, with any scheduler, or an error."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from self_attention_guidance import (
    BlurGuidance,
    Guidance,
    GuidanceGuider,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    Step,
    attach,
)
from self_attention_guidance.guidance.text import parse_guidance
from test_devices import OnDevice, draw_on_device
from test_guidance import draw
from test_guider import draw_modular, modular_xl
from test_stable_diffusion_xl import draw as draw_xl
from test_stable_diffusion_xl import pipe as pipe
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

WINDOW = {"noise_from": 3.0, "noise_to": 0.5}


class Noting(BlurGuidance):
    """Notes the steps that it is asked to weaken."""

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        seen.append(step.index)
        with super().weaken(step) as weak:
            yield weak


seen: list[int] = []


def noise_of(scheduler: Any) -> list[float]:
    """Noise over signal at each timestep, by what diffusers' own schedulers do with a picture."""
    clean, noise = torch.ones(1), torch.zeros(1)

    def of(timestep: Tensor, a: Tensor, b: Tensor) -> float:
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return float(scheduler.scale_noise(a, timestep[None], b))
        return float(scheduler.add_noise(a, b, timestep[None]))

    return [
        of(t, noise, clean) / signal if (signal := of(t, clean, noise)) else math.inf
        for t in scheduler.timesteps
    ]


def inside(scheduler: Any, first: int = 0) -> list[int]:
    """The steps of a run whose noise is in the window."""
    low, high = WINDOW["noise_to"], WINDOW["noise_from"]
    levels = noise_of(scheduler)
    return [step for step, level in enumerate(levels) if step >= first and low < level <= high]


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_the_same_levels_at_any_number_of_steps_and_strength(name: str, strength: Any) -> None:
    cls = StableDiffusionPipeline if strength is None else StableDiffusionImg2ImgPipeline
    made = tiny_pipeline(cls, scheduler=tiny_scheduler(getattr(diffusers, name)))
    given: dict[str, Any] = {"guidance_scale": 3.0}
    if strength is not None:
        given |= {"image": torch.rand(1, 3, 64, 64), "strength": strength}
    ends: list[tuple[float, float]] = []
    for steps in (10, 25, 50):
        seen.clear()
        given["num_inference_steps"] = steps
        with Noting(0.1, **WINDOW).attach(made):
            draw(made, **given)
        first = 0 if strength is None else steps - int(steps * strength)
        fresh = type(made.scheduler).from_config(made.scheduler.config)
        fresh.set_timesteps(steps)
        levels = noise_of(fresh)
        if name != "PNDMScheduler":  # which has a timestep more, and evaluates one twice
            assert seen == inside(fresh, first)
        assert all(WINDOW["noise_to"] < levels[step] <= WINDOW["noise_from"] for step in seen)
        ends.append((levels[seen[0]], levels[seen[-1]]))
        assert len(seen) >= (2 if strength else 3)
    if strength is None:  # at half the strength the run begins inside
        assert all(first > 2 for first, _ in ends)
    assert all(last < 0.75 for _, last in ends)


def loop(scheduler: Any, guidance: Guidance, steps: int) -> int:
    """Weakened passes of a loop."""
    unet = tiny_unet()
    scheduler.set_timesteps(steps)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    with guidance.attach(unet, scheduler=scheduler, batch_layout="single") as handle:
        for t in scheduler.timesteps:
            scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)(x, t)
            with torch.no_grad():
                x = scheduler.step(unet(scaled, t, texts).sample, t, x).prev_sample
    return handle.steps


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "alphas": tiny_scheduler,
    "no signal at first": lambda: tiny_scheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    "sigmas": lambda: tiny_scheduler(EulerDiscreteScheduler),
    "sigmas, Karras": lambda: tiny_scheduler(EulerDiscreteScheduler, use_karras_sigmas=True),
    "EDM": EDMEulerScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
    "flow, shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [10, 25, 50])
def test_the_unit_is_noise_over_signal_with_every_scheduler(name: str, steps: int) -> None:
    scheduler = SCHEDULERS[name]()
    seen.clear()
    loop(scheduler, Noting(0.1, **WINDOW), steps)
    expected = SCHEDULERS[name]()
    expected.set_timesteps(steps)
    assert seen == inside(expected)
    assert len(seen) >= steps // 8


@pytest.mark.parametrize("name", ["alphas", "sigmas", "flow"])
def test_windows_that_touch_share_no_step(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(10)
    middle = noise_of(scheduler)[4]
    parts = []
    for window in ({"noise_to": middle}, {"noise_from": middle}, {"noise_to": 0.0}, {}):
        seen.clear()
        loop(SCHEDULERS[name](), Noting(0.1, **window), 10)
        parts.append([*seen])
    assert parts == [[*range(4)], [*range(4, 10)], [*range(10)], [*range(10)]]


def test_both_windows_must_hold_a_step() -> None:
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(10)
    expected = [step for step in inside(scheduler) if step < 5]
    seen.clear()
    loop(tiny_scheduler(), Noting(0.1, stop=0.5, **WINDOW), 10)
    assert seen == expected
    assert 0 < len(expected) < len(inside(scheduler))
    every = loop(tiny_scheduler(), Noting(0.1, every=2, **WINDOW), 10)
    assert every == math.ceil(len(inside(scheduler)) / 2)


EMPTY = r"no step is guided by BlurGuidance\(.*noise of this run's \d+ steps goes from .* down to"


@pytest.mark.parametrize("window", [{"noise_from": 1e-3}, {"noise_to": 99}, {"stop": 0.2}])
def test_a_window_without_a_step_is_an_error(window: dict[str, float]) -> None:
    given = {**({"noise_from": 1.0} if "stop" in window else {}), **window}
    with pytest.raises(ValueError, match=EMPTY):
        loop(tiny_scheduler(), BlurGuidance(0.1, **given), 10)
    assert loop(tiny_scheduler(), BlurGuidance(0.0, **given), 10) == 0


def test_a_window_before_the_first_step_of_image_to_image_is_an_error() -> None:
    made = tiny_pipeline(StableDiffusionImg2ImgPipeline)
    given: dict[str, Any] = {"image": torch.rand(1, 3, 64, 64), "strength": 0.3}
    made_of = {"prompt": "red", "num_inference_steps": 10, "output_type": "latent", **given}
    one_ends = BlurGuidance(0.1), BlurGuidance(0.1, noise_to=3.0)
    with pytest.raises(ValueError, match=EMPTY), attach(made, *one_ends):
        made(**made_of)
    assert not made.unet._forward_hooks
    with BlurGuidance(0.1, noise_from=3.0).attach(made) as handle:
        made(**made_of)
    assert handle.steps == 3


def test_a_guider_follows_the_window_of_the_whole_run(pipe: Any) -> None:
    """Also where the window is over before classifier-free guidance is."""
    guidances = PerturbedAttentionGuidance(1.0, noise_to=3.0), BlurGuidance(1.0, noise_from=12.0)
    for stop in (0.0, 0.5, 1.0):
        guider = GuidanceGuider(guidances, 5.0, stop=stop)
        guided = draw_modular(modular_xl(pipe, guider))
        if stop != 0.5:
            with attach(pipe, *guidances) as handle:
                expected = draw_xl(pipe, guidance_scale=5.0 if stop else 1.0)
            assert 3 <= handle.steps < 6
            assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match="no step is guided by PerturbedAttention"):
        draw_modular(modular_xl(pipe, GuidanceGuider(PerturbedAttentionGuidance(noise_to=99))))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_window_waits_for_the_device_no_more_often(name: str) -> None:
    window = {"noise_from": 20.0, "noise_to": 0.01}
    guided, waits = draw_on_device(
        (SelfAttentionGuidance(1.0, **window),), name, batch_layout="single"
    )
    expected, plain = draw_on_device((SelfAttentionGuidance(1.0),), name, batch_layout="single")
    assert torch.equal(guided, expected)
    assert waits == plain
    assert OnDevice.waits


def test_settings_go_through_json_and_the_command_line() -> None:
    guidance = SelfAttentionGuidance(0.5, **WINDOW)
    settings = json.loads(json.dumps(guidance.to_dict()))
    assert settings["noise_from"] == 3.0
    assert Guidance.from_dict(settings) == guidance
    given = parse_guidance("sag:scale=0.5,noise_from=3,noise_to=0.5")
    assert Guidance.from_dict(given) == guidance
    without = parse_guidance("sag:scale=0.5,noise_from=none,noise_to=none")
    assert Guidance.from_dict(without) == SelfAttentionGuidance(0.5)
    with pytest.raises(ValueError, match="noise_from='much' must be a number"):
        parse_guidance("pag:noise_from=much")


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"noise_from": 0}, "noise_from=0 must be above noise_to=0"),
        ({"noise_from": 1.0, "noise_to": 1.0}, r"noise_from=1.0 must be above noise_to=1.0"),
        ({"noise_to": -1}, "noise_to=-1 must be at least 0"),
        ({"noise_from": math.inf}, "noise_from=inf must be a finite number"),
        ({"noise_from": "3"}, "noise_from='3' must be a finite number"),
    ],
)
def test_windows_are_checked(window: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerturbedAttentionGuidance(**window)


def test_every_run_without_a_guided_step_warns() -> None:
    """Python shows equal warnings of a line once only, unless it is asked for all."""
    pipe = tiny_pipeline(StableDiffusionPipeline)
    with SelfAttentionGuidance(start=0.9, stop=0.95).attach(pipe), warnings.catch_warnings():
        warnings.simplefilter("default")
        shown: list[str] = []
        warnings.showwarning = lambda message, *_: shown.append(str(message))
        for _ in range(3):
            draw(pipe, num_inference_steps=2)
    assert len(shown) == 3
    assert all("no step is guided by" in each for each in shown)
