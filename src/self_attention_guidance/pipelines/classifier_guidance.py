"""Classifier guidance (Dhariwal and Nichol, arXiv 2105.05233, Algorithms 1 and 2)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from ..denoiser.noise import Schedule, check_scheduler
from ..denoiser.outputs import precise


def classifier_guided_step(
    scheduler: Any,
    output: Tensor,
    timestep: Tensor,
    x_t: Tensor,
    x_in: Tensor,
    shift: Tensor,
    step_arguments: dict[str, Any],
) -> Tensor:
    """Take one step of a scheduler, guided by a classifier.

    With DDPM, the mean moves by variance times `shift` (Algorithm 1). With other schedulers, the
    predicted noise moves (Algorithm 2).

    Args:
        scheduler: A diffusers scheduler whose timesteps are set.
        output: The network's output, (batch, channels or twice as many, height, width).
        timestep: The scheduler's present timestep.
        x_t: The sample, (batch, channels, height, width).
        x_in: The network's input: the sample, scaled by the scheduler.
        shift: The gradient of log p(y | x_in), times its scale; same shape as `x_t`.
        step_arguments: Keywords of the scheduler's `step`.

    Returns:
        The next sample, same shape as `x_t`.
    """
    if isinstance(scheduler, DDPMScheduler):
        variance = ancestral_variance(scheduler, timestep, output)
        following: Any = scheduler.step(output, int(timestep), x_t, **step_arguments)
        return following.prev_sample + (variance * shift).to(x_t.dtype)
    check_scheduler(scheduler)
    schedule, at, x_in = Schedule(scheduler), float(timestep), precise(x_in)
    prediction = schedule.prediction(schedule.step_at(at), [at], timestep)
    x0 = schedule.limited(prediction.x0(x_in, output))
    x0 = x0 + prediction.sigma**2 / prediction.alpha * shift
    output = ((x0 - prediction.from_input * x_in) / prediction.from_output).to(output.dtype)
    # The moved clean sample is not clipped again.
    scheduler = _without_clipping(scheduler) if isinstance(scheduler, DDIMScheduler) else scheduler
    return scheduler.step(output, timestep, x_t, **step_arguments).prev_sample


def log_probability_gradient(
    classifier: Any, x_t: Tensor, timesteps: Tensor, labels: Tensor
) -> Tensor:
    """Compute the gradient of log p(y | x_t) with respect to x_t.

    Args:
        classifier: `classifier(x_t, timesteps)` gives logits, (batch, classes).
        x_t: Noisy samples, (batch, channels, height, width).
        timesteps: Timesteps as the network gets them, (batch,).
        labels: The classes y, (batch,) int64.

    Returns:
        The gradient, of the shape and type of `x_t`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made under `torch.inference_mode` have no gradients, but their copies do.
        x_t, timesteps, labels = (each.detach().clone() for each in (x_t, timesteps, labels))
        x_t.requires_grad_(True)
        log_probabilities = classifier(x_t, timesteps).float().log_softmax(dim=-1)
        chosen = log_probabilities.gather(1, labels[:, None])
        return torch.autograd.grad(chosen.sum(), x_t)[0]


def ancestral_variance(scheduler: DDPMScheduler, timestep: Tensor, output: Tensor) -> Tensor:
    """Compute the variance of a DDPM step, the weight of the classifier's gradient.

    A learned variance is interpolated, in log space, between the posterior variance and beta
    (Nichol and Dhariwal, arXiv 2102.09672, Eq. 15). At the last step, the posterior variance is 0,
    and that of the step before is used.

    Args:
        scheduler: A scheduler whose timesteps are set.
        timestep: The present timestep.
        output: The network's output; a learned variance is its second half.

    Returns:
        The variance, float32: (batch, channels, height, width), or one number.
    """
    posterior, beta = _variances(scheduler, timestep)
    if posterior == 0:
        steps = scheduler.timesteps
        posterior = _variances(scheduler, steps[-2])[0] if len(steps) > 1 else beta
    kind = scheduler.variance_type
    if kind == "learned":
        return output.chunk(2, dim=1)[1]
    if kind == "learned_range":
        share = (output.chunk(2, dim=1)[1].float() + 1) / 2
        return torch.exp(share * beta.log().float() + (1 - share) * posterior.log().float())
    return (beta if kind.startswith("fixed_large") else posterior).float()


def _variances(scheduler: DDPMScheduler, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Compute posterior variance and beta, in float64, for one step of the spaced process."""
    levels = scheduler.alphas_cumprod.cpu().double()  # Apple's GPUs have no float64
    before = int(scheduler.previous_timestep(int(timestep)))
    now, then = levels[int(timestep)], levels[before] if before >= 0 else torch.ones_like(levels[0])
    beta = 1 - now / then
    return (1 - then) / (1 - now) * beta, beta


def _without_clipping(scheduler: DDIMScheduler) -> DDIMScheduler:
    """Copy a scheduler with clipping off; it keeps no state between steps."""
    copied = copy.copy(scheduler)
    copied.register_to_config(clip_sample=False, thresholding=False)
    return copied
