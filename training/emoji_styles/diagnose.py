"""Where the right style is lost: in the latents, or from which noise on.

    python training/emoji_styles/diagnose.py --work DIR --model FOLDER

The judge of `judge.py` looks at held-out pictures that went part of the way of a sample: through
the autoencoder, with noise on their latents, and from a noisy latent back through the U-Net with
the caption. The last part of the way that loses the style is what training should learn next.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import judge
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import data
import evaluate

LATENT_NOISE = (0.0, 0.1, 0.2, 0.3)
STARTS = (0.12, 0.24, 0.4, 0.6, 0.8)


@torch.no_grad()
def decoded(pipe: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Pictures, (pictures, 3, 64, 64) from -1 to 1."""
    return pipe.vae.decode(latents / pipe.vae.config["scaling_factor"]).sample.clamp(-1, 1)


@torch.no_grad()
def restored(
    pipe: StableDiffusionPipeline, latents: Tensor, captions: list[str], start: float, scale: float
) -> Tensor:
    """Latents that got noise up to a fraction `start` of the way, and were denoised from there."""
    pipe.scheduler.set_timesteps(evaluate.STEPS)
    timesteps = pipe.scheduler.timesteps[round(evaluate.STEPS * (1 - start)) :]
    text, empty = pipe.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=True)
    sample = pipe.scheduler.add_noise(latents, torch.randn_like(latents), timesteps[:1])
    for timestep in timesteps:
        both = pipe.unet(torch.cat([sample] * 2), timestep, torch.cat([empty, text])).sample
        uncond, cond = both.chunk(2)
        sample = pipe.scheduler.step(uncond + scale * (cond - uncond), timestep, sample).prev_sample
    return sample


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--model", type=Path, required=True, help="an exported model")
    parser.add_argument("--count", type=int, default=150, help="captions (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=3.0, help="CFG scale (default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(data.SEED)
    everything = data.load(options.work / "pictures.npz")
    labels = everything.select(held_out=False).labels
    task = evaluate.held_out_task(everything.held_out_pairs(), options.count)
    answers = judge.targets(task.dataset.pictures, labels)
    critic, pipe = judge.load(options.work, len(labels)), evaluate.load(options.model)

    def tell(name: str, pictures: Tensor) -> None:
        print(name, judge.accuracy(critic, pictures, answers, task.backgrounds), flush=True)

    tell("real pictures", task.shown)
    with torch.no_grad():
        latents = pipe.vae.encode(task.shown).latent_dist.mode()
    latents = latents * pipe.vae.config["scaling_factor"]
    for noise in LATENT_NOISE:
        noisy = latents + noise * torch.randn_like(latents)
        tell(f"latents with noise {noise:g}", decoded(pipe, noisy))
    for start in STARTS:
        back = restored(pipe, latents, task.captions, start, options.scale)
        tell(f"denoised from {start:g} of the way", decoded(pipe, back))


if __name__ == "__main__":
    main()
