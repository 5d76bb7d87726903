"""Train the network on pixels, with labels that are left out now and then."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from classes import NULL_LABEL, mirrored_half
from network import build_scheduler, build_unet, set_attention_processor
from shared import stratified_timesteps

BATCH_SIZE = 16
HIGHEST_SNR = 5.0
LOWEST_SNR = 1e-3
NO_LABEL_SHARE = 0.2
PEAK_LEARNING_RATE = 6e-4
WARM_UP = 300
LAST_RATE = 0.01
EMA_DECAY = 0.999
SAVE_EVERY = 250


@dataclass
class State:
    """Everything a checkpoint holds; `spent` is in seconds of wall-clock time."""

    model: UNet2DModel
    average: UNet2DModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    spent: float = 0.0

    def save(self, checkpoint: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        partial = checkpoint.with_suffix(".partial")
        content = {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(content, partial)
        partial.replace(checkpoint)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        content = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.average.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.spent = content["step"], content["spent"]


def new_state() -> State:
    """Random weights, and an optimizer that has seen nothing."""
    model, average = build_unet(), build_unet().eval().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    # The fused kernel's backward pass is slower on CPU.
    set_attention_processor(model, AttnProcessor())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01
    )
    return State(model, average, optimizer)


def learning_rate(step: int, share: float) -> float:
    """Linear warm-up, then half a cosine over the time budget, of which `share` is spent."""
    fall = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * fall


def train(
    pixels: Tensor, labels: Tensor, checkpoint: Path, minutes: float, seed: int = 0
) -> UNet2DModel:
    """Train for `minutes` of wall-clock time; resumes from `checkpoint`.

    Args:
        pixels: Pictures, (pictures, 3, 32, 32) uint8.
        labels: The class of each.
        checkpoint: Written every 250 steps, with the averaged weights under "ema".
        minutes: Time to spend, over all resumed runs.
        seed: Seeds weights, noise and the order of pictures.

    Returns:
        The network with exponentially averaged weights.
    """
    torch.manual_seed(seed)
    state = new_state()
    if checkpoint.exists():
        state.resume(checkpoint)
    torch.manual_seed(seed + state.step)
    clean, signal = pixels.float() / 127.5 - 1, build_scheduler().alphas_cumprod
    began, budget, losses = time.monotonic() - state.spent, minutes * 60, list[float]()
    while state.spent < budget:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, state.spent / budget)
        rows = torch.randint(len(clean), (BATCH_SIZE,))
        loss = denoising_loss(state.model, clean[rows], labels[rows], signal)
        update(state, loss)
        losses.append(loss.item())
        state.step += 1
        state.spent = time.monotonic() - began
        if state.step % SAVE_EVERY == 0 or state.spent >= budget:
            state.save(checkpoint)
            recent = sum(losses) / len(losses)
            losses.clear()
            print(f"step {state.step} {state.spent:.0f} s loss {recent:.4f}", flush=True)
    return state.average


def denoising_loss(model: UNet2DModel, clean: Tensor, labels: Tensor, signal: Tensor) -> Tensor:
    """Noise-prediction error, weighted much as Min-SNR does (Hang et al., arXiv 2303.09556).

    Args:
        model: The network.
        clean: Pictures in [-1, 1]; some are mirrored.
        labels: Their classes; some are replaced by `NULL_LABEL`.
        signal: The schedule's cumulative products of alpha.

    Returns:
        The mean, a scalar.
    """
    timesteps = stratified_timesteps(len(clean))
    clean = mirrored_half(clean, labels)
    labels = torch.where(torch.rand(len(labels)) < NO_LABEL_SHARE, NULL_LABEL, labels)
    alpha_squared = signal[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    noisy = alpha_squared.sqrt() * clean + (1 - alpha_squared).sqrt() * noise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = model(noisy, timesteps, labels).sample
    weight = noise_weight(alpha_squared / (1 - alpha_squared))
    return (weight * (predicted.float() - noise).square()).mean()


def noise_weight(snr: Tensor) -> Tensor:
    """Weight of a squared error in the noise: the root of Min-SNR's weight of that in x0.

    The root gives noisy timesteps more weight. They decide what is drawn, and a small error in the
    noise is a large one in x0 there: with Min-SNR's own weights the samples had wild colours.
    """
    return snr.clamp(max=HIGHEST_SNR).sqrt() / snr.clamp(min=LOWEST_SNR)


def update(state: State, loss: Tensor) -> None:
    """One step of the optimizer, and of the averaged weights, which move faster at first."""
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    decay = min(EMA_DECAY, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        torch._foreach_lerp_(
            list(state.average.parameters()), list(state.model.parameters()), 1 - decay
        )
