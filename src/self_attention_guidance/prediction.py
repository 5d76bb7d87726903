"""Noise levels, and what a network's output says about the clean sample.

In the denoiser's own input space every supported model sees

    x_t = alpha_t * x0 + sigma_t * eps,

and its output u is linear in the clean sample: x0 = from_input * x_t + from_output * u. This is
the one file that knows how schedulers state their noise level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")

# Where schedulers that evaluate a midpoint keep its noise level, relative to their step index.
_MIDPOINT_OFFSETS = {"KDPM2DiscreteScheduler": 0, "KDPM2AncestralDiscreteScheduler": -1}


@dataclass(frozen=True)
class Prediction:
    """The linear relations between a network's input, output and clean sample at one step.

    Every field is float32 of shape (batch or 1, 1, 1, 1).

    Attributes:
        alpha: Signal level of the network's input.
        sigma: Noise level of the network's input.
        from_input: Weight of the input x_t in x0.
        from_output: Weight of the output u in x0.
        correction: Weight of the change of x0 in the guidance term, (1 - from_input * alpha) /
            from_output: 0 for epsilon, -sigma for v, 1 for sample, -1 for flow prediction.
        clip: x0 is limited to [-clip, clip] by the scheduler; `None` if it is not.
    """

    alpha: Tensor
    sigma: Tensor
    from_input: Tensor
    from_output: Tensor
    correction: Tensor
    clip: float | None

    def rows(self, rows: slice) -> Prediction:
        """The relations for part of a batch; the same object if all rows share one step."""
        if len(self.alpha) == 1:
            return self
        levels = (self.alpha, self.sigma, self.from_input, self.from_output, self.correction)
        return Prediction(*(level[rows] for level in levels), clip=self.clip)

    def x0(self, x_t: Tensor, output: Tensor) -> Tensor:
        """The predicted clean sample, not clipped; shapes (batch, channels, height, width)."""
        return self.from_input * x_t + self.from_output * output

    def output(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """The network's output that predicts `x0`; shapes (batch, channels, height, width)."""
        return (x0 - self.from_input * x_t) / self.from_output

    def clipped(self, x0: Tensor) -> Tensor:
        """`x0` as the scheduler uses it."""
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def renoise(self, x_t: Tensor, x0: Tensor, x0_degraded: Tensor) -> Tensor:
        """alpha_t * x0_degraded + sigma_t * eps, eps being the noise in `x_t` beside `x0`.

        Written as a change of `x_t`, so that it is bit-equal where nothing was degraded.
        """
        return x_t + self.alpha * (x0_degraded - x0)

    def term(
        self, output: Tensor, degraded_output: Tensor, x0: Tensor, x0_degraded: Tensor
    ) -> Tensor:
        """The guidance term eps - eps' (Eq. 16), in the units of the network's output.

        Args:
            output: u, the network's output at x_t.
            degraded_output: u', its output at the degraded input.
            x0: The clean sample predicted at x_t, not clipped.
            x0_degraded: The degraded clean sample.

        Returns:
            What is added to `output`, times the scale; same shape.
        """
        return (output - degraded_output) + self.correction * (x0_degraded - x0)


def prediction_at(scheduler: Any, timestep: Any, device: torch.device) -> Prediction:
    """What `scheduler` says of the denoiser call at `timestep`.

    Args:
        scheduler: A diffusers scheduler whose timesteps are set.
        timestep: The timestep given to the denoiser: a number or a tensor of any shape.
        device: Where the result is wanted.

    Returns:
        The relations between input, output and clean sample.

    Raises:
        ValueError: The scheduler's prediction type is not supported.
    """
    check_scheduler(scheduler)
    kind = _prediction_type(scheduler)
    if hasattr(scheduler, "sigmas"):
        sigma = torch.as_tensor(_present_sigma(scheduler, timestep)).double().cpu().view(1, 1, 1, 1)
        if kind == "flow_prediction":
            return _flow_matching(sigma, device)
        if "sigma_data" in scheduler.config:
            return _preconditioned(sigma, kind, float(scheduler.config.sigma_data), device)
        alpha = (1 + sigma**2).rsqrt()
        return _variance_preserving(alpha, sigma * alpha, kind, _clip(scheduler), device)
    steps = torch.as_tensor(timestep).flatten().round().long()
    steps = steps.to(scheduler.alphas_cumprod.device)
    alpha_squared = scheduler.alphas_cumprod[steps].double().cpu().view(-1, 1, 1, 1)
    alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    return _variance_preserving(alpha, sigma, kind, _clip(scheduler), device)


def sharpen_noise_levels(scheduler: Any) -> None:
    """Give a DDPM or DDIM scheduler its noise levels in float64, in place.

    diffusers computes them in float32, in which 1 - alphas_cumprod of the least noisy steps of a
    cosine schedule has lost most of its digits. Levels that do not follow from the config are
    left alone.

    Args:
        scheduler: A `DDPMScheduler` or `DDIMScheduler`; others are left alone.
    """
    config = scheduler.config
    if not isinstance(scheduler, DDPMScheduler | DDIMScheduler) or config.rescale_betas_zero_snr:
        return
    count, kind = config.num_train_timesteps, config.beta_schedule
    if config.trained_betas is not None:
        betas = torch.as_tensor(config.trained_betas, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float64)
    elif kind == "squaredcos_cap_v2":  # arXiv 2102.09672, Eq. 17
        angle = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * math.pi / 2
        level = angle.cos() ** 2
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    else:
        return
    levels = (1 - betas).cumprod(0)
    if torch.allclose(levels, scheduler.alphas_cumprod.double().cpu(), rtol=1e-3, atol=1e-6):
        scheduler.alphas_cumprod = levels


def check_scheduler(scheduler: Any) -> None:
    """Refuse schedulers whose noise level or prediction type is not known here.

    Raises:
        ValueError: Names the scheduler, what it says of itself, and what would be accepted.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if not (hasattr(scheduler, "sigmas") or hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(f"scheduler {name} has neither sigmas nor alphas_cumprod: not supported")
    kind = _prediction_type(scheduler)
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"scheduler {name} has prediction_type={kind!r}; it must be one of "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    is_flow = _is_flow_matching(scheduler)
    if is_flow != (kind == "flow_prediction"):
        raise ValueError(
            f"scheduler {name} has prediction_type={kind!r} with "
            f"use_flow_sigmas={is_flow}; flow_prediction needs flow sigmas, and they need it"
        )
    if config.get("invert_sigmas"):
        raise ValueError(f"scheduler {name} has invert_sigmas=True: not supported")
    if "sigma_data" in config and "beta_schedule" in config:
        raise ValueError(
            f"scheduler {name} was made from the config of a variance-preserving scheduler "
            f"(beta_schedule={config['beta_schedule']!r}), but it needs a denoiser with EDM "
            "preconditioning; use EulerDiscreteScheduler for this model"
        )


def is_at(scheduler: Any, timestep: Any) -> bool:
    """Whether a scheduler's state is that of a step at `timestep`, so that it may be the one."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or getattr(scheduler, "num_inference_steps", None) is None:
        return False
    matches = timesteps.cpu() == torch.as_tensor(timestep).cpu()
    if not matches.any() or not hasattr(scheduler, "sigmas"):
        return bool(matches.any())
    index = _step_index(scheduler, timestep)
    return index < len(timesteps) and bool(matches[index])


def step_index(scheduler: Any, timestep: Any) -> int:
    """How many of the scheduler's timesteps lie before the present one."""
    index = _step_index(scheduler, timestep) if hasattr(scheduler, "sigmas") else None
    if index is not None:
        return index
    present = torch.as_tensor(timestep, dtype=torch.float64).flatten()[0].item()
    return int((scheduler.timesteps.double().cpu() - present).abs().argmin())


def _is_flow_matching(scheduler: Any) -> bool:
    # Schedulers made for flow matching have no setting that says so.
    is_made_for_it = type(scheduler).__name__.startswith("FlowMatch")
    return is_made_for_it or bool(getattr(scheduler, "config", {}).get("use_flow_sigmas"))


def _prediction_type(scheduler: Any) -> Any:
    default = "flow_prediction" if _is_flow_matching(scheduler) else None
    return getattr(scheduler, "config", {}).get("prediction_type", default)


def _clip(scheduler: Any) -> float | None:
    config = scheduler.config
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None


def _step_index(scheduler: Any, timestep: Any) -> int:
    # Before the first step, some schedulers have not looked up where they are.
    if scheduler.step_index is not None:
        return scheduler.step_index
    if scheduler.begin_index is not None:
        return scheduler.begin_index
    # Networks that receive rescaled timesteps get them rounded.
    present = torch.as_tensor(timestep).flatten()[0].double().cpu()
    nearest = (scheduler.timesteps.double().cpu() - present).abs().argmin()
    return int(scheduler.index_for_timestep(scheduler.timesteps[nearest]))


def _present_sigma(scheduler: Any, timestep: Any) -> Tensor | float:
    """The scheduler's sigma: that of x0 + sigma * eps, or of (1 - sigma) * x0 + sigma * eps."""
    index = _step_index(scheduler, timestep)
    if not getattr(scheduler, "state_in_first_order", True):
        if hasattr(scheduler, "mid_point_sigma"):
            return scheduler.mid_point_sigma
        offset = _MIDPOINT_OFFSETS.get(type(scheduler).__name__)
        if offset is not None:
            return scheduler.sigmas_interpol[index + offset]
    return scheduler.sigmas[index]


def _variance_preserving(
    alpha: Tensor, sigma: Tensor, kind: str, clip: float | None, device: torch.device
) -> Prediction:
    if kind == "epsilon":
        weights = (1 / alpha, -sigma / alpha, torch.zeros_like(alpha))
    elif kind == "v_prediction":
        weights = (alpha, -sigma, -sigma)
    else:
        one = torch.ones_like(alpha)
        weights = (torch.zeros_like(alpha), one, one)
    return _float32(alpha, sigma, *weights, clip, device)


def _preconditioned(
    sigma: Tensor, kind: str, sigma_data: float, device: torch.device
) -> Prediction:
    """EDM's preconditioning (Karras et al., arXiv 2206.00364, Table 1)."""
    c_in = (sigma**2 + sigma_data**2).rsqrt()
    c_skip = (sigma_data * c_in) ** 2
    c_out = sigma * sigma_data * c_in * (-1 if kind == "v_prediction" else 1)
    return _float32(c_in, sigma * c_in, c_skip / c_in, c_out, (1 - c_skip) / c_out, None, device)


def _flow_matching(sigma: Tensor, device: torch.device) -> Prediction:
    """Rectified flow: x = (1 - sigma) * x0 + sigma * eps, u = eps - x0 (arXiv 2209.03003)."""
    one = torch.ones_like(sigma)
    return _float32(1 - sigma, sigma, one, -sigma, -one, None, device)


def _float32(
    alpha: Tensor,
    sigma: Tensor,
    from_input: Tensor,
    from_output: Tensor,
    correction: Tensor,
    clip: float | None,
    device: torch.device,
) -> Prediction:
    # One copy to the device for all.
    levels = torch.stack((alpha, sigma, from_input, from_output, correction))
    return Prediction(*levels.to(device, torch.float32).unbind(), clip=clip)
