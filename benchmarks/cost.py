"""What guidance costs, against diffusers' own class and no guidance, alternating in one run.

The extra time of a guided picture is compared with that of the passes of one row which it needs:
one for each step.

python benchmarks/cost.py [--pairs 5] [--steps 4] [--size 256]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers import StableDiffusionSAGPipeline as FrozenPipeline
from tqdm import tqdm

from self_attention_guidance import StableDiffusionSAGPipeline


def components() -> dict[str, Any]:
    """A U-Net of Stable Diffusion 1.5's configuration, with random weights; no text encoder."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    # Latents are timed, so the smallest decoder with the right factor of 8 will do.
    blocks = ("DownEncoderBlock2D",) * 4
    vae = AutoencoderKL(
        down_block_types=blocks,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        latent_channels=4,
    )
    rest = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    return {"unet": unet.eval(), "scheduler": scheduler, "vae": vae, **dict.fromkeys(rest)}


def seconds(pipeline: Any, options: argparse.Namespace, sag_scale: float) -> float:
    """Wall-clock time of one picture's latents with classifier-free guidance."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 1, 77, 768, generator=generator)
    begin = time.perf_counter()
    pipeline(
        prompt_embeds=embeddings[0],
        negative_prompt_embeds=embeddings[1],
        height=options.size,
        width=options.size,
        num_inference_steps=options.steps,
        sag_scale=sag_scale,
        generator=generator,
        output_type="latent",
    )
    return time.perf_counter() - begin


def seconds_of_rows(unet: Any, options: argparse.Namespace) -> float:
    """Wall-clock time of one pass of one row for each step."""
    side = options.size // 8
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, side, side, generator=generator)
    embeddings = torch.randn(1, 77, 768, generator=generator)
    begin = time.perf_counter()
    with torch.no_grad():
        for _ in range(options.steps):
            unet(latents, 500, embeddings)
    return time.perf_counter() - begin


def main() -> None:
    """Time both pipelines and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=256, help="pixels; default: %(default)s")
    options = parser.parse_args()
    parts = components()
    ours = StableDiffusionSAGPipeline(**parts, requires_safety_checker=False)
    frozen = FrozenPipeline(**parts, requires_safety_checker=False)
    for pipeline in (ours, frozen):
        pipeline.set_progress_bar_config(disable=True)
        seconds(pipeline, options, 0.75)
    ratios: dict[str, list[float]] = {
        "time / diffusers' class": [],
        "time / no SAG": [],
        "extra time / passes of one row": [],
    }
    for _ in tqdm(range(options.pairs)):
        guided = seconds(ours, options, 0.75)
        rows = seconds_of_rows(parts["unet"], options)
        unguided = seconds(ours, options, 0)
        theirs = seconds(frozen, options, 0.75)
        found = (guided / theirs, guided / unguided, (guided - unguided) / rows)
        for values, value in zip(ratios.values(), found, strict=True):
            values.append(value)
    for name, values in ratios.items():
        middle = statistics.median(values)
        print(f"{name}: median {middle:.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
