"""The drop-in pipeline's callbacks: those of diffusers' class of that name, and its parent's."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

from self_attention_guidance import StableDiffusionSAGPipeline
from test_guidance import draw
from tiny import tiny_pipeline, tiny_scheduler


@pytest.fixture
def sag() -> StableDiffusionSAGPipeline:
    return tiny_pipeline(StableDiffusionSAGPipeline)


def recorder(seen: list[tuple[int, float, float]]) -> Any:
    """A callback of the older kind that notes what it was called with."""

    def note(step: int, timestep: Any, latents: Tensor) -> None:
        seen.append((step, float(timestep), latents.sum().item()))

    return note


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler]
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_callback_is_called_as_the_parent_calls_it(
    sag: StableDiffusionSAGPipeline, scheduler: type, every: int, by_hand: bool
) -> None:
    if by_hand and scheduler in (DDIMScheduler, PNDMScheduler):
        pytest.skip(f"{scheduler.__name__} takes no timesteps by hand")
    sag.scheduler = tiny_scheduler(scheduler)
    arguments: dict[str, Any] = {"num_inference_steps": 5}
    if by_hand:
        arguments = {"num_inference_steps": None, "timesteps": [900, 500, 300, 100, 10]}
    ours: list[Any] = []
    theirs: list[Any] = []
    draw(sag, sag_scale=0, callback=recorder(ours), callback_steps=every, **arguments)
    parent = StableDiffusionPipeline(**sag.components, requires_safety_checker=False)
    parent.set_progress_bar_config(disable=True)
    draw(parent, callback=recorder(theirs), callback_steps=every, **arguments)
    assert ours == theirs
    assert ours


def test_both_kinds_of_callback_together(sag: StableDiffusionSAGPipeline) -> None:
    seen: list[tuple[int, float, float]] = []

    def to_zero(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert set(tensors) == {"latents", "prompt_embeds"}
        return {"latents": tensors["latents"] * 0}

    draw(
        sag,
        callback=recorder(seen),
        callback_on_step_end=to_zero,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert [total for _, _, total in seen] == [0.0, 0.0, 0.0]


def test_a_pipeline_callback_may_switch_cfg_off_half_way(sag: StableDiffusionSAGPipeline) -> None:
    rows: list[int] = []
    sag.unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    draw(sag, callback_on_step_end=callback)
    assert rows == [2, 1, 1, 1, 1, 1]


def test_interrupting_ends_the_run_early(sag: StableDiffusionSAGPipeline) -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
        pipe._interrupt = True
        return tensors

    draw(sag, callback_on_step_end=interrupt)
    assert sag.guidance_handle is not None
    assert sag.guidance_handle.steps == 1
