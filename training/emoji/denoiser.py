"""Train the U-Net and the text encoder together on precomputed latents."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from captions import MAX_TOKENS, draw_caption
from data import Picture

BATCH_SIZE = 32
MIN_SNR = 5.0


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers, 128 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Two resolutions, 16x16 and 8x8; the mid block attends over 64 tokens."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Model(nn.Module):
    """The two networks that learn together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        """New networks with random weights; the text encoder fits `tokenizer`."""
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet()
        # The fused kernel's backward pass is slow on CPU: 40 % of a step against 20 % explicitly.
        self.unet.set_attn_processor(AttnProcessor())

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The predicted noise, (batch, 4, 16, 16)."""
        states = self.text_encoder(tokens).last_hidden_state
        return self.unet(noisy, timesteps, states).sample


@dataclass(frozen=True, kw_only=True)
class Phase:
    """How one part of the training goes."""

    peak_learning_rate: float
    last_rate: float
    """Learning rate at the end, as a share of the peak."""
    ema_decay: float
    keyword_share: float
    """Share of captions with keywords."""
    noise_emphasis: float
    """0 weighs errors as Min-SNR does; 0.5 gives noisy timesteps, which decide what is drawn,
    about as much weight in x0 as the others."""

    def learning_rate(self, step: int, share: float) -> float:
        """Linear warm-up over 300 steps, then a linear fall over the time budget."""
        fall = 1 - share * (1 - self.last_rate)
        return self.peak_learning_rate * min(1.0, (step + 1) / 300) * fall


# Many pictures first, then the vocabulary alone.
BROAD = Phase(
    peak_learning_rate=1e-3,
    last_rate=0.6,
    ema_decay=0.9995,
    keyword_share=0.25,
    noise_emphasis=0.0,
)
FINAL = Phase(
    peak_learning_rate=8e-4,
    last_rate=0.01,
    ema_decay=0.999,
    keyword_share=0.10,
    noise_emphasis=0.5,
)


@dataclass
class Progress:
    """Everything a checkpoint holds beside the networks."""

    step: int = 0
    spent: float = 0.0


def stratified_timesteps(count: int, steps: int = 1000) -> Tensor:
    """`count` timesteps, one in each of `count` equal slices of the schedule."""
    return ((torch.arange(count) + torch.rand(count)) * (steps / count)).long()


def train(
    latents: Tensor,
    pictures: Sequence[Picture],
    tokenizer: CLIPTokenizer,
    checkpoint: Path,
    minutes: float,
    phase: Phase,
    start: Path | None = None,
    seed: int = 0,
) -> Model:
    """Train for `minutes` of wall-clock time; resumes from `checkpoint`.

    Args:
        latents: Posterior means and standard deviations, (2, pictures, 4, 16, 16).
        pictures: What the latents show.
        tokenizer: Reads the captions.
        checkpoint: Written every 250 steps, with the averaged weights under "ema".
        minutes: Time to spend, over all resumed runs.
        phase: Learning rate, weights and captions.
        start: Checkpoint of an earlier phase, whose networks are the first ones of this.
        seed: Seeds weights, noise and captions.

    Returns:
        The model with exponentially averaged weights.
    """
    torch.manual_seed(seed)
    model, average = Model(tokenizer), Model(tokenizer).eval().requires_grad_(False)
    if start:
        model.load_state_dict(torch.load(start, weights_only=True)["ema"])
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.peak_learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    progress = Progress()
    if checkpoint.exists():
        progress = _resume(checkpoint, model, average, optimizer)
    torch.manual_seed(seed + progress.step)
    rng = random.Random(seed + progress.step)
    signal = build_scheduler().alphas_cumprod
    began, budget, losses = time.monotonic() - progress.spent, minutes * 60, []
    while progress.spent < budget:
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate(progress.step, progress.spent / budget)
        rows = torch.randint(len(pictures), (BATCH_SIZE,))
        clean = latents[0, rows] + latents[1, rows] * torch.randn(BATCH_SIZE, 4, 16, 16)
        texts = [draw_caption(pictures[row], rng, phase.keyword_share) for row in rows.tolist()]
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids
        loss = denoising_loss(model, clean, tokens, signal, phase.noise_emphasis)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, progress.step, phase.ema_decay)
        losses.append(loss.item())
        progress.step += 1
        progress.spent = time.monotonic() - began
        if progress.step % 250 == 0 or progress.spent >= budget:
            _save(checkpoint, model, average, optimizer, progress)
            recent = sum(losses) / len(losses)
            losses = []
            print(f"step {progress.step} {progress.spent:.0f} s loss {recent:.4f}", flush=True)
    return average


def denoising_loss(
    model: Model, clean: Tensor, tokens: Tensor, signal: Tensor, noise_emphasis: float
) -> Tensor:
    """Noise-prediction error with Min-SNR weights (Hang et al., arXiv 2303.09556).

    The weight of an error in x0 is min(snr, 5) to the power of 1 - `noise_emphasis`.
    """
    timesteps = stratified_timesteps(len(clean))
    alpha_squared = signal[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    noisy = alpha_squared.sqrt() * clean + (1 - alpha_squared).sqrt() * noise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = model(noisy, timesteps, tokens)
    snr = alpha_squared / (1 - alpha_squared)
    weight = snr.clamp(max=MIN_SNR) ** (1 - noise_emphasis) / snr
    return (weight * (predicted.float() - noise).square()).mean()


@torch.no_grad()
def update_average(average: Model, model: Model, step: int, limit: float) -> None:
    """Move the averaged weights towards the current ones, faster in the beginning."""
    decay = min(limit, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _save(
    checkpoint: Path,
    model: Model,
    average: Model,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    partial = checkpoint.with_suffix(".partial")
    state = {
        "model": model.state_dict(),
        "ema": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": progress.step,
        "spent": progress.spent,
    }
    torch.save(state, partial)
    partial.replace(checkpoint)


def _resume(
    checkpoint: Path, model: Model, average: Model, optimizer: torch.optim.Optimizer
) -> Progress:
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(step=state["step"], spent=state["spent"])
