"""Self-Attention Guidance written out plainly, to compare the library with.

It shares no code with the library: its own denoising loop, explicit attention, mask, blur and
noise levels. Of a diffusers scheduler it uses `set_timesteps`, `scale_model_input`, `step` and
the noise tables; of the denoiser its forward pass and the weights of one attention layer.
Everything but the network runs in float64.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch

VARIANCE_PRESERVING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
"""The sample is x_t; the step reads alphas_cumprod at the integer timestep."""
VARIANCE_PRESERVING_SIGMAS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""The sample is x_t, but its level is sigmas[i] (timesteps are rounded for Karras sigmas)."""
SIGMA_SCALED = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
)
"""The sample is x0 + sigma eps, fed as sample / sqrt(1 + sigma^2) with sigma = sigmas[i]."""
SIGMA_INTERPOLATED = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
"""The same, but every second evaluation is at sigmas_interpol[i]."""


@dataclass
class Level:
    """The network's input is alpha * x0 + sigma * eps; `data` is EDM's sigma_data or None."""

    alpha: float
    sigma: float
    data: float | None = None


@dataclass
class Trace:
    """What a test may want to know of a reference run."""

    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    masks: list[torch.Tensor] = field(default_factory=list)
    received: list[torch.Tensor] = field(default_factory=list)

    @property
    def margin(self) -> float:
        """Smallest distance of any attention received from the threshold 1."""
        return min(float((values - 1).abs().min()) for values in self.received)

    @property
    def masked_share(self) -> float:
        """Share of all positions, over all steps, that was blurred."""
        return float(torch.cat([mask.flatten() for mask in self.masks]).double().mean())


def noise_level(scheduler: Any, index: int, first: int, timestep: torch.Tensor) -> Level:
    """Return the level of the network's input at evaluation `index` of the whole schedule.

    `first` is the index at which sampling began: it fixes the phase of schedulers that
    evaluate the network twice per step.
    """
    name = type(scheduler).__name__
    if name in VARIANCE_PRESERVING:
        product = float(scheduler.alphas_cumprod[int(timestep)].double())
        return Level(math.sqrt(product), math.sqrt(1 - product))
    sigma = _sigma(scheduler, name, index, second=(index - first) % 2 == 1)
    if name == "EDMEulerScheduler":
        data = float(scheduler.config.sigma_data)
        norm = math.hypot(sigma, data)
        return Level(1 / norm, sigma / norm, data)
    norm = math.hypot(1.0, sigma)
    return Level(1 / norm, sigma / norm)


def _sigma(scheduler: Any, name: str, index: int, second: bool) -> float:
    sigmas = scheduler.sigmas.double()
    if name in SIGMA_INTERPOLATED and second:
        # the ancestral scheduler's table lags one entry behind
        lag = 1 if name == "KDPM2AncestralDiscreteScheduler" else 0
        return float(scheduler.sigmas_interpol[index - lag].double())
    if name == "DPMSolverSDEScheduler":
        # the second evaluation is half way between two levels in log sigma
        return float((sigmas[index - 1] * sigmas[index]).sqrt() if second else sigmas[index])
    known = (*VARIANCE_PRESERVING_SIGMAS, *SIGMA_SCALED, *SIGMA_INTERPOLATED, "EDMEulerScheduler")
    if name not in known:
        raise NotImplementedError(name)
    return float(sigmas[index])


def clean_from_output(kind: str, level: Level, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return the x0 that the network's output `u` at input `x` means."""
    if level.data is not None:
        skip, out, c_in = _edm(kind, level)
        return skip * x / c_in + out * u
    if kind == "epsilon":
        return (x - level.sigma * u) / level.alpha
    if kind == "v_prediction":
        return level.alpha * x - level.sigma * u
    return u


def output_from_clean(
    kind: str, level: Level, x: torch.Tensor, clean: torch.Tensor
) -> torch.Tensor:
    """Return the output that would mean `clean` at input `x`: the inverse of the above."""
    if level.data is not None:
        skip, out, c_in = _edm(kind, level)
        return (clean - skip * x / c_in) / out
    if kind == "epsilon":
        return (x - level.alpha * clean) / level.sigma
    if kind == "v_prediction":
        return (level.alpha * x - clean) / level.sigma
    return clean


def _edm(kind: str, level: Level) -> tuple[float, float, float]:
    """c_skip, c_out and c_in of EDM preconditioning (Karras et al. 2022, table 1)."""
    c_in, data = level.alpha, float(level.data or 0)
    sigma = level.sigma / c_in
    skip = data**2 / (sigma**2 + data**2)
    out = sigma * data / math.sqrt(sigma**2 + data**2)
    return skip, (out if kind == "epsilon" else -out), c_in


def attention_received(attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return (batch, positions): mean over heads and sum over queries of softmax(QK^T / sqrt d)."""
    hidden = hidden.double()
    queries = hidden @ attention.to_q.weight.double().T
    keys = hidden @ attention.to_k.weight.double().T
    width = queries.shape[-1] // attention.heads
    total = torch.zeros(hidden.shape[:2], dtype=torch.float64)
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        scores = queries[..., part] @ keys[..., part].transpose(1, 2) / math.sqrt(width)
        total += torch.softmax(scores, dim=-1).sum(dim=1)
    return total / attention.heads


def nearest(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Upsample (batch, h, w): pixel (i, j) takes the mask at (floor(i h/H), floor(j w/W))."""
    rows = torch.tensor([i * mask.shape[1] // height for i in range(height)])
    columns = torch.tensor([j * mask.shape[2] // width for j in range(width)])
    return mask[:, rows][:, :, columns]


def blur(image: torch.Tensor, taps: int = 9, sigma: float = 1.0) -> torch.Tensor:
    """Gaussian blur of (batch, channels, h, w) with one 2-D kernel and mirrored borders."""
    radius = taps // 2
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    squares = offsets[:, None] ** 2 + offsets[None, :] ** 2
    kernel = torch.exp(-squares / (2 * sigma**2))
    kernel /= kernel.sum()
    height, width = image.shape[-2:]
    blurred = torch.zeros_like(image)
    for i in range(taps):
        rows = [_mirror(y + i - radius, height) for y in range(height)]
        for j in range(taps):
            columns = [_mirror(x + j - radius, width) for x in range(width)]
            blurred += kernel[i, j] * image[:, :, rows][:, :, :, columns]
    return blurred


def _mirror(position: int, size: int) -> int:
    """Reflect an index at the borders without repeating the border pixel."""
    if position < 0:
        return -position
    return 2 * (size - 1) - position if position >= size else position


class _Watch:
    """Hooks that remember the input of the mid block's self-attention and its grid."""

    def __init__(self, unet: Any) -> None:
        transformer = unet.mid_block.attentions[0]
        self.attention = transformer.transformer_blocks[0].attn1
        self.hooks = [
            transformer.register_forward_pre_hook(self._see_grid),
            self.attention.register_forward_pre_hook(self._see_hidden),
        ]

    def _see_grid(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.grid = tuple(args[0].shape[-2:])

    def _see_hidden(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.hidden = args[0].detach()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _clips(scheduler: Any) -> float | None:
    config = scheduler.config
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None


def guided_output(
    unet: Any,
    scheduler: Any,
    level: Level,
    x: torch.Tensor,
    timestep: torch.Tensor,
    embeds: tuple[torch.Tensor | None, torch.Tensor],
    guidance_scale: float,
    sag_scale: float,
    trace: Trace,
) -> torch.Tensor:
    """Return the network's output at input `x` after CFG and SAG, in float64."""
    kind, (uncond, cond) = scheduler.config.prediction_type, embeds

    def network(sample: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return unet(sample.float(), timestep, encoder_hidden_states=text).sample.double()

    watch = _Watch(unet)
    base = network(x, cond if uncond is None else uncond)
    watch.close()
    prediction = base
    if uncond is not None:
        prediction = base + guidance_scale * (network(x, cond) - base)
    if sag_scale == 0:
        return prediction

    x = x.double()
    clean = clean_from_output(kind, level, x, base)
    noise = (x - level.alpha * clean) / level.sigma
    limit = _clips(scheduler)
    shown = clean if limit is None else clean.clamp(-limit, limit)
    received = attention_received(watch.attention, watch.hidden)
    small = (received > 1).reshape(-1, *watch.grid)
    mask = nearest(small, *x.shape[-2:])[:, None].double()
    degraded_clean = mask * blur(shown) + (1 - mask) * shown
    degraded = level.alpha * degraded_clean + level.sigma * noise
    second = network(degraded, cond if uncond is None else uncond)
    second_clean = clean_from_output(kind, level, degraded.float().double(), second)
    trace.masks.append(small)
    trace.received.append(received)
    guided_clean = clean + sag_scale * (degraded_clean - second_clean)
    return prediction + output_from_clean(kind, level, x, guided_clean) - base


@torch.no_grad()
def sample(
    unet: Any,
    scheduler: Any,
    latents: torch.Tensor,
    embeds: tuple[torch.Tensor | None, torch.Tensor],
    *,
    guidance_scale: float = 7.5,
    sag_scale: float = 0.75,
    generator: torch.Generator | None = None,
    first: int | None = None,
    step_options: dict[str, Any] | None = None,
    **schedule: Any,
) -> Trace:
    """Denoise `latents`; `schedule` goes to `set_timesteps`, `embeds` is (uncond or None, cond).

    With `first` the schedule begins at that evaluation and `latents` are the clean ones, to
    which noise of that level is added (image to image); without, they are unit noise.
    """
    scheduler.set_timesteps(device="cpu", **schedule)
    trace, begin = Trace(), first or 0
    timesteps = scheduler.timesteps[begin:]
    if first is None:
        latents = latents * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        noise = torch.randn(latents.shape, generator=generator)
        latents = _noised(scheduler, latents, begin, timesteps[0], noise)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    options.update(step_options or {})
    for number, timestep in enumerate(timesteps):
        level = noise_level(scheduler, begin + number, begin, timestep)
        x = scheduler.scale_model_input(latents, timestep)
        output = guided_output(
            unet, scheduler, level, x, timestep, embeds, guidance_scale, sag_scale, trace
        )
        latents = scheduler.step(output.float(), timestep, latents, **options).prev_sample
    trace.latents = latents
    return trace


def _noised(
    scheduler: Any, clean: torch.Tensor, begin: int, timestep: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    level = noise_level(scheduler, begin, begin, timestep)
    if type(scheduler).__name__ in (*VARIANCE_PRESERVING, *VARIANCE_PRESERVING_SIGMAS):
        return level.alpha * clean + level.sigma * noise
    return clean + level.sigma / level.alpha * noise
