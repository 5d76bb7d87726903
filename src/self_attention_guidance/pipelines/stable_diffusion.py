"""Stable Diffusion 1 and 2 with Self-Attention Guidance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..checks import check_count
from .guided import GuidedPipelineMixin

Callback = Callable[[int, Any, Tensor], None]


class StableDiffusionSAGPipeline(GuidedPipelineMixin, StableDiffusionPipeline):
    """A drop-in for the class of the same name that diffusers deprecated.

    It is diffusers' `StableDiffusionPipeline`, with everything that comes with it, and a
    `sag_scale` in its call. Source: Hong et al., ICCV 2023, arXiv 2210.00939.
    Its `guidance` and `guidance_handle` are those of `GuidedPipelineMixin`.
    """

    # The positions are those of the class that this one replaces, not those of the parent.
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        sag_scale: float = 0.75,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draw pictures of a prompt.

        Args:
            prompt: What to draw; one, or a list for a batch.
            height: In pixels, a multiple of 8; `None` is the model's own size.
            width: Like `height`.
            num_inference_steps: Steps of denoising, at least 1.
            guidance_scale: Weight of classifier-free guidance; 1 is off.
            sag_scale: Weight of self-attention guidance, any finite number; 0 is off and costs
                nothing.
            negative_prompt: What not to draw.
            num_images_per_prompt: Pictures of each prompt.
            eta: Share of fresh noise in DDIM, 0 to 1.
            generator: One, or a list with one per picture.
            latents: Start noise, (pictures, 4, height / 8, width / 8) for Stable Diffusion.
            prompt_embeds: Instead of `prompt`: (prompts, tokens, channels).
            negative_prompt_embeds: Instead of `negative_prompt`, same shape.
            ip_adapter_image: Image prompt of a loaded IP-Adapter.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Return an object instead of a tuple.
            callback: Called as `callback(step, timestep, latents)`.
            callback_steps: Call `callback` every so many steps, at least 1.
            cross_attention_kwargs: Passed to the attention processors.
            clip_skip: Layers of the text encoder to skip from its end.
            **kwargs: Everything else that diffusers' `StableDiffusionPipeline` takes, such as
                `timesteps`, `sigmas`, `guidance_rescale`, `callback_on_step_end`.

        Returns:
            `StableDiffusionPipelineOutput` with `images` and `nsfw_content_detected`, or a tuple
            of both.

        Raises:
            ValueError: An argument is out of its range, or the scheduler or U-Net can't be guided.
        """
        check_count("num_inference_steps", num_inference_steps)
        if callback is not None:
            check_count("callback_steps", callback_steps)
            _add_callback(callback, callback_steps or 1, num_inference_steps, kwargs)
        arguments: dict[str, Any] = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "num_images_per_prompt": num_images_per_prompt,
            "eta": eta,
            "generator": generator,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "ip_adapter_image": ip_adapter_image,
            "output_type": output_type,
            "return_dict": return_dict,
            "cross_attention_kwargs": cross_attention_kwargs,
            "clip_skip": clip_skip,
            **kwargs,
        }
        with self.guided(sag_scale):
            return super().__call__(**arguments)

    def enable_vae_slicing(self) -> None:
        """Decode the pictures of a batch one by one, which needs less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode the pictures of a batch together again."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in overlapping tiles, which needs less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode large pictures in one piece again."""
        self.vae.disable_tiling()

    @functools.wraps(StableDiffusionPipeline.encode_prompt)
    def encode_prompt(  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args: Any, **kwargs: Any
    ) -> Any:
        with _text_model_attribute(self.text_encoder):
            return super().encode_prompt(*args, **kwargs)


@contextmanager
def _text_model_attribute(text_encoder: Any) -> Generator[None]:
    """Give a text encoder the attribute that diffusers' `clip_skip` expects of it.

    transformers 5 moved the layers of `CLIPTextModel.text_model` to the model itself.
    """
    moved = hasattr(text_encoder, "final_layer_norm") and not hasattr(text_encoder, "text_model")
    if moved:
        text_encoder.__dict__["text_model"] = text_encoder
    try:
        yield
    finally:
        if moved:
            del text_encoder.__dict__["text_model"]


def _add_callback(
    callback: Callback, every: int, num_inference_steps: int, kwargs: dict[str, Any]
) -> None:
    """Let diffusers' present callback argument call one of the older kind as well.

    The older kind is called once a step of the schedule, not once an evaluation of the denoiser.
    """
    present = kwargs.get("callback_on_step_end")
    inputs = kwargs.get("callback_on_step_end_tensor_inputs", ["latents"])
    if isinstance(present, PipelineCallback | MultiPipelineCallbacks):
        inputs = present.tensor_inputs
    by_hand = kwargs.get("timesteps") or kwargs.get("sigmas")

    def on_step_end(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        outputs = {} if present is None else present(pipeline, index, timestep, tensors)
        order, total = pipeline.scheduler.order, pipeline.num_timesteps
        warm_up = total - (total if by_hand else num_inference_steps) * order
        ends_a_step = index + 1 > warm_up and (index + 1) % order == 0
        if (ends_a_step or index == total - 1) and index % every == 0:
            callback(index // order, timestep, outputs.get("latents", tensors["latents"]))
        return outputs

    kwargs["callback_on_step_end"] = on_step_end
    kwargs["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(["latents", *inputs]))
