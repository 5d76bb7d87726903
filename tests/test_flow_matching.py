"""Schedulers of flow matching: the formula with each, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from self_attention_guidance import SelfAttentionGuidance
from test_transformers import Reference, branches, recorded
from tiny_transformers import draw, stable_diffusion_3

FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "Euler, Karras": lambda: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "LCM": lambda: FlowMatchLCMScheduler(shift=3.0),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
    "DPM-Solver++, single steps": lambda: DPMSolverSinglestepScheduler(**FLOW, flow_shift=3.0),
    "DEIS": lambda: DEISMultistepScheduler(**FLOW, flow_shift=3.0),
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_guided_predictions_are_the_formula(name: str) -> None:
    pipe = stable_diffusion_3()
    pipe.scheduler = SCHEDULERS[name]()
    with recorded(pipe) as steps, SelfAttentionGuidance(1.5, blur_sigma=2.0).attach(pipe):
        draw("Stable Diffusion 3.5", pipe, (3,), num_inference_steps=4)
    plain = Reference("Stable Diffusion 3.5", pipe.transformer)
    assert len(steps) >= 4
    for step in steps:
        uncond, cond = branches("Stable Diffusion 3.5", step)
        u, c = (plain.output(call, call["hidden_states"]) for call in (uncond, cond))
        expected = u + 3.0 * (c - u) + plain.term(step, uncond, 1.5, 2.0)
        assert (step.output - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True: not supported"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "flow_prediction needs flow sigmas"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "flow_prediction needs flow sigmas",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(scheduler: Any, message: str) -> None:
    pipe = stable_diffusion_3()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        SelfAttentionGuidance().attach(pipe)
