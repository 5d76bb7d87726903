"""DiT (Peebles and Xie, arXiv 2212.09748) with Self-Attention Guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiTPipeline
from torch import nn

from .guided import USUAL_SCALE, GuidedPipelineMixin

# The original guides three of the four channels; its comment says "for exact reproducibility".
CFG_CHANNELS = 3


class DiTSAGPipeline(GuidedPipelineMixin, DiTPipeline):
    """diffusers' `DiTPipeline` with a `sag_scale` and the original's classifier-free guidance.

    Self-Attention Guidance alone does not need this class: `SelfAttentionGuidance.attach` also
    takes a `DiTPipeline`. The attributes `guidance` and `guidance_handle` are those of
    `GuidedPipelineMixin`. Source: Hong et al., ICCV 2023, arXiv 2210.00939.
    """

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        sag_scale: float | None = USUAL_SCALE,
        cfg_channels: int | None = CFG_CHANNELS,
    ) -> Any:
        """Draw pictures of classes.

        Args:
            class_labels: A class for each picture.
            guidance_scale: Weight of classifier-free guidance; 1 is off.
            generator: One generator, or a list with one for each picture.
            num_inference_steps: Steps of denoising, at least 1.
            output_type: "pil", "np" or "pt".
            return_dict: Return an object instead of a tuple.
            sag_scale: Weight of `guidance`, any finite number; 0 is off. If it is not given, the
                scale of `guidance` counts, which is 0.75 unless it was changed.
            cfg_channels: Number of latent channels that classifier-free guidance changes: the
                first 3 of 4, as in the original. `None` is all, as in diffusers' class.

        Returns:
            `ImagePipelineOutput` with `images`, or the tuple `(images,)`.

        Raises:
            ValueError: An argument is out of its range, or the scheduler can't be guided.
        """
        transformer: nn.Module = self.transformer
        with ExitStack() as stack:
            stack.enter_context(_own_null_label(transformer))
            stack.enter_context(self.guided(sag_scale))
            if guidance_scale > 1 and cfg_channels is not None:
                rows = 2 * len(class_labels)
                stack.enter_context(_cfg_on_first_channels(transformer, rows, cfg_channels))
            return super().__call__(
                class_labels,
                guidance_scale,
                generator,
                num_inference_steps,
                output_type,
                return_dict,
            )


@contextmanager
def _own_null_label(transformer: nn.Module) -> Generator[None]:
    """Replace the label of "no class" that `DiTPipeline` hard-codes, 1000, by the network's own."""
    config: Any = transformer.config

    def replace(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        labels = kwargs["class_labels"].clamp(max=config.num_embeds_ada_norm)
        return args, {**kwargs, "class_labels": labels}

    hook = transformer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _cfg_on_first_channels(transformer: nn.Module, rows: int, channels: int) -> Generator[None]:
    """Copy the other latent channels from the conditional half to the unconditional half.

    Where both halves are equal, classifier-free guidance changes nothing, whatever its weight. The
    hook runs after Self-Attention Guidance, which needs the original halves.
    """
    latents: int = transformer.config.in_channels  # type: ignore[union-attr]

    def copy_conditional(module: nn.Module, args: Any, output: Any) -> Any:
        sample = output[0]
        if len(sample) != rows:  # the weakened pass
            return None
        sample = sample.clone()
        sample[rows // 2 :, channels:latents] = sample[: rows // 2, channels:latents]
        return dataclasses.replace(output, sample=sample)

    hook = transformer.register_forward_hook(copy_conditional)
    try:
        yield
    finally:
        hook.remove()
