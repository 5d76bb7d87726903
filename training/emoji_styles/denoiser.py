"""Train the U-Net and the text encoder together on precomputed latents."""

from __future__ import annotations

import copy
import json
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import save
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from networks import CHANNELS, Model, build_scheduler
from torch import Tensor, nn
from transformers import CLIPTokenizer

import data
from captions import EMPTY_SHARE, MIRRORED_SHARE, CaptionWriter, Reader
from data import Picture

WARM_UP_STEPS = 500
EMA_DECAY = 0.9995
# Errors in x0 weigh SNR + 1, as v-prediction has it, but never more than this: shapes are learned
# first. A run that ends with larger weights learns outlines and shading.
LARGEST_WEIGHT = 6.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """How one run goes."""

    device: str
    minutes: float
    channels: Sequence[int] = CHANNELS
    """Of a new U-Net; one that goes on keeps its own."""
    dropout: float = 0.0
    """For runs that see each picture hundreds of times."""
    largest_weight: float = LARGEST_WEIGHT
    """See `denoising_loss`."""
    anneal_minutes: float = 0.0
    """The learning rate falls to zero over the last so many minutes of the run."""
    batch_size: int = 32
    learning_rate: float = 8e-4
    compile: bool = False
    save_minutes: float = 5.0
    snapshot_minutes: float | None = None
    """Keep the averaged weights every so many minutes, beside the checkpoint."""

    def rate(self, step: int, elapsed: float) -> float:
        """Linear warm-up, then constant: the run need not know how many will follow it."""
        remaining = self.minutes * 60 - elapsed
        fall = min(1.0, max(remaining, 0.0) / (self.anneal_minutes * 60 or 1e-9))
        return self.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS) * fall


@dataclass
class Progress:
    """What a checkpoint holds beside the networks and the optimizer."""

    step: int = 0
    samples: int = 0
    hours: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(data.SEED))

    @property
    def counts(self) -> dict[str, float]:
        """Steps, samples and hours."""
        return {"step": self.step, "samples": self.samples, "hours": self.hours}


@dataclass(frozen=True)
class Examples:
    """Pictures and their latents, (pictures, 2, 11, 4, 16, 16) float16.

    As they are and mirrored, on every background.
    """

    pictures: Sequence[Picture]
    latents: Tensor


class Trainer:
    """The networks, their moving average and the optimizer, with one checkpoint file."""

    def __init__(
        self, tokenizer: CLIPTokenizer, checkpoint: Path, options: Options, start: Path | None
    ) -> None:
        """Resume from `checkpoint`, else from the exported model `start`, else from nothing."""
        torch.manual_seed(data.SEED)
        self.checkpoint, self.options = checkpoint, options
        self.reader = Reader(tokenizer)
        state: dict[str, Any] = {}
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        if start and not state:
            self.model = Model.exported(start, options.dropout)
        else:
            channels = state.get("channels", options.channels)
            self.model = Model.new(tokenizer, channels, options.dropout)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        for model in (self.model, self.average):
            model.to(options.device)
            # The fused kernel's backward pass is slow on CPU.
            on_cpu = options.device == "cpu"
            model.unet.set_attn_processor(AttnProcessor() if on_cpu else AttnProcessor2_0())
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=options.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=options.device == "cuda",
        )
        self.progress = Progress()
        if state:
            self._resume(state)
        self.signal = build_scheduler().alphas_cumprod.to(options.device)
        self.palette = list(data.BACKGROUNDS)

    def train(self, seen: Examples, held_out: Examples, writer: CaptionWriter, log: Path) -> None:
        """Train for the minutes of the options, with a checkpoint and a line of log regularly.

        Args:
            seen: What to learn.
            held_out: Never learned from; their loss is logged beside the other.
            writer: Draws the captions of `seen`.
            log: One JSON object a line.
        """
        options, progress = self.options, self.progress
        latents = seen.latents.to(options.device)
        predict = torch.compile(self.model) if options.compile else self.model
        stopped = stop_when_asked()
        began = saved = kept = time.monotonic()
        earlier, losses, samples_before = progress.hours, [], progress.samples
        while (elapsed := time.monotonic() - began) < options.minutes * 60 and not stopped:
            for group in self.optimizer.param_groups:
                group["lr"] = options.rate(progress.step, elapsed)
            chosen, texts = self._draw(seen.pictures, writer)
            clean = latents[chosen.to(options.device).unbind(1)].float()
            losses.append(self._step(predict, clean, self.reader(texts).to(options.device)))
            progress.step += 1
            progress.samples += options.batch_size
            progress.hours = earlier + (time.monotonic() - began) / 3600
            now = time.monotonic()
            if options.snapshot_minutes and now - kept >= options.snapshot_minutes * 60:
                self._keep()
                kept = now
            if now - saved >= options.save_minutes * 60:
                self._save()
                self._write(log, losses, held_out, (progress.samples - samples_before), now - saved)
                saved, losses, samples_before = time.monotonic(), [], progress.samples
        self._save()
        if losses:
            spent = time.monotonic() - saved
            self._write(log, losses, held_out, progress.samples - samples_before, spent)

    def _draw(self, pictures: Sequence[Picture], writer: CaptionWriter) -> tuple[Tensor, list[str]]:
        """A batch: (picture, mirrored, background), (batch, 3) int64, and the captions."""
        count, rng = self.options.batch_size, self.progress.rng
        rows = torch.randint(len(pictures), (count,))
        mirrored = torch.rand(count) < MIRRORED_SHARE
        # What is drawn without a caption should not come out mirrored.
        empty = torch.rand(count) < EMPTY_SHARE
        mirrored &= ~empty
        colours = torch.randint(len(self.palette), (count,))
        chosen = torch.stack([rows, mirrored.long(), colours], dim=1)
        texts = [
            "" if silent else writer.draw(pictures[row], self.palette[colour], bool(mirror), rng)
            for silent, (row, mirror, colour) in zip(empty.tolist(), chosen.tolist(), strict=True)
        ]
        return chosen, texts

    def _step(self, predict: nn.Module, clean: Tensor, tokens: Tensor) -> Tensor:
        timesteps = stratified_timesteps(len(clean)).to(clean.device)
        noise = torch.randn_like(clean)
        batch = (clean, noise, timesteps, tokens)
        largest = self.options.largest_weight
        loss = denoising_loss(predict, *batch, self.signal, largest).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        update_average(self.average, self.model, self.progress.step)
        # Not `.item()`: the next step need not wait for this one on a GPU.
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self, examples: Examples, count: int = 512) -> float:
        """The averaged model's loss, always on the same pictures, backgrounds and noise."""
        generator = torch.Generator().manual_seed(data.SEED)
        rows = torch.randint(len(examples.pictures), (count,), generator=generator)
        colours = torch.randint(len(self.palette), (count,), generator=generator)
        noise = torch.randn(count, 4, 16, 16, generator=generator)
        texts = [
            examples.pictures[row].caption(self.palette[colour])
            for row, colour in zip(rows.tolist(), colours.tolist(), strict=True)
        ]
        timesteps = (torch.arange(count) * (1000 / count)).long()
        columns = (examples.latents[rows, 0, colours].float(), noise, timesteps, self.reader(texts))
        chunks = zip(*(column.to(self.options.device).split(64) for column in columns), strict=True)
        losses = [denoising_loss(self.average, *chunk, self.signal) for chunk in chunks]
        return torch.cat(losses).mean().item()

    def _write(
        self, log: Path, losses: list[Tensor], held_out: Examples, samples: int, seconds: float
    ) -> None:
        line = {
            "step": self.progress.step,
            "samples": self.progress.samples,
            "hours": round(self.progress.hours, 4),
            "loss": round(torch.stack(losses).mean().item(), 5),
            "held_out_loss": round(self.held_out_loss(held_out), 5),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": round(samples / seconds, 1),
        }
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _save(self) -> None:
        state = {
            "channels": self.model.channels,
            "model": self.model.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self.progress.counts,
            "captions_rng": self.progress.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
        }
        save(state, self.checkpoint)

    def _keep(self) -> None:
        folder = self.checkpoint.parent / "snapshots"
        folder.mkdir(exist_ok=True)
        weights = {name: value.half() for name, value in self.average.state_dict().items()}
        state = {"channels": self.model.channels, "ema": weights, **self.progress.counts}
        save(state, folder / f"{self.progress.samples:09d}.pt")

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress.step, self.progress.samples = state["step"], state["samples"]
        self.progress.hours = state["hours"]
        self.progress.rng.setstate(state["captions_rng"])
        # A GPU's own generator goes on from the step; the CPU's from where it was.
        torch.manual_seed(data.SEED + self.progress.step)
        torch.set_rng_state(state["torch_rng"])


def stop_when_asked() -> list[int]:
    """A list that is empty until the process is told to stop: the step then ends, and is saved."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    return received


def stratified_timesteps(count: int, steps: int = 1000) -> Tensor:
    """`count` timesteps, one in each of `count` equal slices of the schedule."""
    return ((torch.arange(count) + torch.rand(count)) * (steps / count)).long()


def denoising_loss(
    predict: nn.Module,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    tokens: Tensor,
    signal: Tensor,
    largest_weight: float = LARGEST_WEIGHT,
) -> Tensor:
    """Velocity-prediction error of each example, (batch,).

    Plain v-prediction weighs an error in x0 with SNR + 1. Here the weight stops at
    `largest_weight`, as Min-SNR has it (arXiv 2303.09556), for most of what a sample shows is
    decided where noise is strong. Unlike Min-SNR it stays 1 where there is no signal.
    """
    kept = signal[timesteps].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
    with torch.autocast(clean.device.type, dtype=torch.bfloat16):
        predicted = predict(noisy, timesteps, tokens)
    # SNR + 1 = 1 / (1 - kept); the weight of v is that of x0 times 1 - kept.
    weight = (largest_weight * (1 - kept)).clamp(max=1.0)
    return (weight * (predicted.float() - velocity).square()).mean((1, 2, 3))


@torch.no_grad()
def update_average(average: Model, model: Model, step: int) -> None:
    """Move the averaged weights towards the current ones, faster in the beginning."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
