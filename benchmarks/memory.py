"""Peak memory of a step at the size of Stable Diffusion XL, each case in a process of its own.

python benchmarks/memory.py [--size 1024] [--dtype float32]

Random weights, classifier-free guidance, one step on the CPU. Reading attention and the second pass
come after the first pass has given its memory back, so the peak should not grow.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from self_attention_guidance import SelfAttentionGuidance

CASES = ("weights alone", "no SAG", "SAG")


def network(dtype: torch.dtype) -> UNet2DConditionModel:
    """A U-Net of Stable Diffusion XL's configuration with random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    torch.set_default_dtype(torch.float32)
    return unet.eval()


@torch.no_grad()
def run(case: str, options: argparse.Namespace) -> None:
    """Run one case, and print the peak of this process in MiB."""
    dtype = getattr(torch, options.dtype)
    unet, scheduler, side = network(dtype), EulerDiscreteScheduler(), options.size // 8
    scheduler.set_timesteps(4)
    if case == "SAG":
        guidance = SelfAttentionGuidance(0.75)
        guidance.attach(unet, scheduler=scheduler, batch_layout="uncond_first")
    if case != "weights alone":
        latents = torch.randn(1, 4, side, side).to(dtype)
        added = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.rand(2, 6) * 1024}
        unet(
            torch.cat([latents] * 2),
            scheduler.timesteps[0],
            torch.randn(2, 77, 2048).to(dtype),
            added_cond_kwargs={name: value.to(dtype) for name, value in added.items()},
        )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    """Start a process for each case and compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="pixels; default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--case", choices=CASES, help="run this one in this process")
    options = parser.parse_args()
    if options.case:
        run(options.case, options)
        return
    arguments = ["--size", str(options.size), "--dtype", options.dtype]
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{case}: {int(done.stdout):,} MiB", flush=True)


if __name__ == "__main__":
    main()
