"""Draw the figures of docs/how-it-works.md: `python docs/how_it_works.py`, from the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance, builtin_model
from self_attention_guidance.maths import degrade

IMAGES = Path(__file__).parent / "images"
GUIDANCE = SelfAttentionGuidance(2.0, blur_sigma=3.0, start=0.1)
STEPS = 25
SHOWN = (4, 8, 13, 17, 20, 22, 24)
SEED = 0
ROWS = ("predicted x0", "attention received", "mask", "x0, blurred there", "guidance term")


def main() -> None:
    """Draw all figures."""
    torch.set_num_threads(1)
    pipe: Any = builtin_model("emoji-adm")
    pipe.set_progress_bar_config(disable=True)
    draw_steps(pipe)
    draw_scales(pipe)


def draw_steps(pipe: Any) -> None:
    """What guidance sees at some steps of one picture."""
    seen: list[list[Tensor]] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        handle = pipe.guidance_handle
        if step in SHOWN:
            blurred = degrade(
                handle.x0, handle.mask, GUIDANCE.blur_sigma, GUIDANCE.blur_kernel_size
            )
            term = handle.term[0, :3]
            seen.append([handle.x0[0], handle.attention[0], handle.mask[0], blurred[0], term])
        return tensors

    pipe.guidance = GUIDANCE
    generator = torch.Generator().manual_seed(SEED)
    pipe(num_inference_steps=STEPS, generator=generator, callback_on_step_end=look)
    figure, axes = plt.subplots(len(ROWS), len(SHOWN), figsize=(8, 6), layout="constrained")
    for column, (step, tensors) in enumerate(zip(SHOWN, seen, strict=True)):
        for row, tensor in enumerate(tensors):
            show(axes[row, column], tensor.float(), row)
        axes[0, column].set_title(f"step {step + 1}", fontsize=9)
    for row, name in enumerate(ROWS):
        axes[row, 0].set_ylabel(name, fontsize=8)
    save(figure, "how-it-works-steps.png")


def draw_scales(pipe: Any) -> None:
    """The same seeds at several scales."""
    scales, seeds = (0.0, 1.0, 2.0, 4.0), range(8)
    figure, axes = plt.subplots(len(scales), len(seeds), figsize=(8, 4.2), layout="constrained")
    for row, scale in enumerate(scales):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(
            batch_size=len(seeds),
            num_inference_steps=40,
            sag_scale=scale,
            generator=generators,
            output_type="latent",
        ).images
        for column, image in enumerate(images):
            show(axes[row, column], image.float(), 0)
        axes[row, 0].set_ylabel(f"scale {scale:g}", fontsize=9)
    save(figure, "how-it-works-scales.png")


def show(axis: Any, tensor: Tensor, row: int) -> None:
    """Draw one tensor in the way of its row."""
    axis.set_xticks([])
    axis.set_yticks([])
    name = ROWS[row]
    if name == "attention received":
        axis.imshow(tensor, cmap="magma", vmin=0, vmax=3)
    elif name == "mask":
        axis.imshow(tensor, cmap="gray", vmin=0, vmax=1)
    elif name == "guidance term":
        axis.imshow(tensor.square().mean(0).sqrt(), cmap="viridis", vmin=0, vmax=1)
    else:
        axis.imshow((tensor.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0))


def save(figure: Any, name: str) -> None:
    """Write a figure; the same one has the same bytes."""
    figure.savefig(IMAGES / name, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
