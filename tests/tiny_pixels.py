"""Tiny pixel-space models with random weights, and what the tests of samples do with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention

from self_attention_guidance import (
    ADMPipeline,
    SelfAttentionGuidance,
)
from self_attention_guidance.batch import FinishedSamples, SampleJob
from self_attention_guidance.generate import SampleSettings
from tiny import seeded

FEW = SampleSettings(num_inference_steps=2)
SAG = SelfAttentionGuidance(2.0, blur_sigma=2.0, blur_kernel_size=5)


@contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, tenfold beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tiny_unet(**config: Any) -> UNet2DModel:
    """A small denoiser of 16x16 pictures with sharp attention."""
    with seeded(0):
        unet = UNet2DModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **config,
        ).eval()
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, Attention):
                module.to_q.weight.mul_(4)
                module.to_k.weight.mul_(4)
    return unet


def tiny_pipeline(scheduler: Any = None, null_label: int | None = None, **config: Any) -> Any:
    pipe = ADMPipeline(tiny_unet(**config), scheduler or DDIMScheduler(), null_label=null_label)
    pipe.guidance = SAG
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_pixels(folder: Path) -> str:
    """Save a class-conditional model that recommends settings."""
    tiny_pipeline(num_class_embeds=7).save_pretrained(folder)
    settings = {"guidance": {"scale": 1.5}, "generation": {"num_inference_steps": 2}}
    (folder / "sag_settings.json").write_text(json.dumps(settings))
    return str(folder)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def pictures_of(path: Path) -> np.ndarray:
    return arrays_of(path)["arr_0"].astype(np.int16)


def finish(
    pipe: Any, out: Path, count: int = 5, settings: SampleSettings = FEW, **arguments: Any
) -> FinishedSamples:
    batch_size = arguments.pop("batch_size", 2)
    return SampleJob(pipe, out, count, settings, **arguments).run(batch_size)


def interrupt(pipe: Any, out: Path, batches: int, settings: SampleSettings = FEW) -> None:
    """Leaves a run of five samples after some batches of one."""
    steps = iter(range(batches * settings.num_inference_steps))

    def until_the_last(_: float) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SampleJob(pipe, out, 5, settings).run(1, until_the_last)
