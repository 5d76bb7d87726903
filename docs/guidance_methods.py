"""Draw the figure of docs/guidance-methods.md: `python docs/guidance_methods.py`."""

from __future__ import annotations

from typing import Any

import torch
from how_it_works import STEPS, plt, save
from torch import Tensor

from self_attention_guidance import (
    Guidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TokenPerturbationGuidance,
    builtin_model,
)

SEED = 0
SHOWN = (8, 16)
LATE = {"start": 0.1, "branch": "uncond"}
# Each at a scale at which one sees it: they are not compared here.
METHODS: dict[str, Guidance] = {
    "self-attention": SelfAttentionGuidance(2.0, blur_sigma=3.0, start=0.1),
    "perturbed attention": PerturbedAttentionGuidance(4.0, **LATE),
    "smoothed energy": SmoothedEnergyGuidance(12.0, **LATE),
    "skipped layers": SkipLayerGuidance(8.0, **LATE),
    "token perturbation": TokenPerturbationGuidance(0.5, **LATE),
}
COLUMNS = ("predicted x0", "weakened", "term")


def main() -> None:
    """A row for each method: two steps, and the picture without and with guidance."""
    torch.set_num_threads(1)
    pipe: Any = builtin_model("emoji-adm")
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, SelfAttentionGuidance(0.0))
    columns = [f"{name}\nstep {step + 1}" for step in SHOWN for name in COLUMNS]
    columns += ["picture\nunguided", "picture\nguided"]
    size = (len(columns), 1.04 * len(METHODS))
    figure, axes = plt.subplots(len(METHODS), len(columns), figsize=size, layout="constrained")
    for row, (name, guidance) in enumerate(METHODS.items()):
        passes: list[tuple[Tensor, Tensor]] = []
        guided = draw(pipe, guidance, passes)
        found = [part for step in SHOWN for part in parts_of(pipe, step, passes)]
        for axis, tensor in zip(axes[row], [*found, plain, guided], strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if tensor.shape[0] == 1:
                axis.imshow(tensor[0], cmap="viridis", vmin=0, vmax=float(tensor.max()))
            else:
                axis.imshow((tensor.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0))
        axes[row, 0].set_ylabel(name, fontsize=6.5)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=7)
    save(figure, "guidance-methods.png")


def draw(
    pipe: Any, guidance: Guidance, passes: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """A picture, (3, height, width); notes what each pass was given and what it returned."""

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if passes is not None:
            sample = kwargs.get("sample", args[0] if args else None)
            passes.append((sample[0].clone(), output[0][0].clone()))

    pipe.guidance = guidance
    # It stands before the hook of guidance, so it sees the first pass as it is.
    hook = pipe.unet.register_forward_hook(note, with_kwargs=True)
    generator = torch.Generator().manual_seed(SEED)
    image = pipe(num_inference_steps=STEPS, generator=generator, output_type="latent").images[0]
    hook.remove()
    return image.float()


def parts_of(pipe: Any, step: int, passes: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The two predictions of the clean picture at a step, and the size of their difference."""
    unguided = 2 * STEPS - len(passes)  # the first steps have one pass, the others two
    at = unguided + 2 * (step - unguided)
    alpha_2 = pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[step])]
    (x_t, eps), (x_weak, eps_weak) = (
        (sample[:3], output[:3]) for sample, output in passes[at : at + 2]
    )
    x0, x0_weak = (
        (x - (1 - alpha_2).sqrt() * e) / alpha_2.sqrt() for x, e in ((x_t, eps), (x_weak, eps_weak))
    )
    return [x0, x0_weak, (eps - eps_weak).square().mean(0, keepdim=True).sqrt()]


if __name__ == "__main__":
    main()
