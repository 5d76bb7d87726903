"""Stable Diffusion 1 and 2 with Self-Attention Guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..checks import as_python, check_count
from .guided import USUAL_SCALE, GuidedPipelineMixin, share_tasks, with_arguments_of

Callback = Callable[[int, Any, Tensor], None]
StepCallback = (
    Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
    | PipelineCallback
    | MultiPipelineCallbacks
)

_PARENTS = inspect.signature(StableDiffusionPipeline.__call__).parameters.keys()
_PASSED_ON = _PARENTS - {"self", "kwargs"}


class StableDiffusionSAGPipeline(GuidedPipelineMixin, StableDiffusionPipeline):
    """A drop-in replacement for the class of the same name that diffusers deprecated.

    It is diffusers' `StableDiffusionPipeline`, with all of its features, and a `sag_scale` in its
    call. The attributes `guidance` and `guidance_handle` are those of `GuidedPipelineMixin`.
    Source: Hong et al., ICCV 2023, arXiv 2210.00939.
    """

    # Arguments have the positions of the class that this one replaces, not those of the parent.
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = 50,
        guidance_scale: float = 7.5,
        sag_scale: float | None = USUAL_SCALE,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        *,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_rescale: float = 0.0,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  # the parent's
        **kwargs: Any,
    ) -> Any:
        """Draw pictures of a prompt.

        Args:
            prompt: What to draw; one prompt, or a list for a batch.
            height: Height in pixels, a multiple of 8; `None` is the model's own size.
            width: Like `height`.
            num_inference_steps: Steps of denoising, at least 1. With `timesteps` or `sigmas`, it
                has no effect and may be `None`.
            guidance_scale: Weight of classifier-free guidance; 1 is off.
            sag_scale: Weight of `guidance`, any finite number; 0 is off and costs nothing. If it
                is not given, the scale of `guidance` counts, which is 0.75 unless it was changed.
            negative_prompt: What not to draw.
            num_images_per_prompt: Pictures of each prompt.
            eta: Share of fresh noise in DDIM, 0 to 1.
            generator: One generator, or a list with one for each picture.
            latents: Start noise, (pictures, 4, height / 8, width / 8) for Stable Diffusion.
            prompt_embeds: Embeddings instead of `prompt`: (prompts, tokens, channels).
            negative_prompt_embeds: Embeddings instead of `negative_prompt`, same shape.
            ip_adapter_image: Image prompt of a loaded IP-Adapter.
            ip_adapter_image_embeds: Instead of `ip_adapter_image`: a tensor for each IP-Adapter,
                as `prepare_ip_adapter_image_embeds` returns them.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Return an object instead of a tuple.
            callback: Called as `callback(step, timestep, latents)`.
            callback_steps: Steps from one call of `callback` to the next, at least 1.
            cross_attention_kwargs: Passed to the attention processors.
            clip_skip: Layers of the text encoder to skip from its end.
            timesteps: The timesteps, decreasing, for schedulers that take them.
            sigmas: Noise levels instead of `timesteps`, decreasing.
            guidance_rescale: How much of the contrast that classifier-free guidance adds is
                removed, 0 to 1 (arXiv 2305.08891, Sec. 3.4).
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)`; the tensors
                that it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs: Names of the tensors that it gets.
            **kwargs: Further arguments of newer versions of `StableDiffusionPipeline`.

        Returns:
            `StableDiffusionPipelineOutput` with `images` and `nsfw_content_detected`, or a tuple
            of both.

        Raises:
            ValueError: An argument is out of its range, or the scheduler or U-Net can't be guided.
        """
        arguments = {name: value for name, value in locals().items() if name in _PASSED_ON}
        arguments |= kwargs
        if timesteps is None and sigmas is None:
            check_count("num_inference_steps", as_python(num_inference_steps))
        if callback is not None:
            every = check_count("callback_steps", as_python(callback_steps))
            _add_callback(callback, every, arguments)
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

    @with_arguments_of(StableDiffusionPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Embed prompts, as calls of the pipeline do.

        Args:
            *args: Arguments of diffusers' class.
            **kwargs: Arguments of diffusers' class.

        Returns:
            The embeddings of the prompts and of the negative prompts, (pictures, tokens, channels)
            each; without classifier-free guidance, the second is `None`.
        """
        text_encoder = self.text_encoder
        if hasattr(text_encoder, "final_layer_norm") and not hasattr(text_encoder, "text_model"):
            vars(self)["text_encoder"] = _OlderTextEncoder(text_encoder)
        try:
            prompt_embeds, negative_prompt_embeds = super().encode_prompt(*args, **kwargs)
        finally:
            vars(self)["text_encoder"] = text_encoder
        return prompt_embeds, negative_prompt_embeds


class _OlderTextEncoder:
    """A text encoder whose layers are where diffusers' `clip_skip` looks for them.

    transformers 5 moved the layers from `CLIPTextModel.text_model` to the model itself.
    """

    def __init__(self, text_model: Any) -> None:
        self.text_model = text_model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.text_model, name)


def _add_callback(callback: Callback, every: int, arguments: dict[str, Any]) -> None:
    """Call a callback of the older kind from diffusers' present callback argument.

    The older kind is called once for each step, not once for each network evaluation.
    """
    present = arguments["callback_on_step_end"]
    inputs = arguments["callback_on_step_end_tensor_inputs"]
    if isinstance(present, PipelineCallback | MultiPipelineCallbacks):
        inputs = present.tensor_inputs
    by_hand = arguments["timesteps"] is not None or arguments["sigmas"] is not None

    def on_step_end(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        outputs = {} if present is None else present(pipeline, index, timestep, tensors)
        order, total = pipeline.scheduler.order, pipeline.num_timesteps
        steps = total if by_hand else arguments["num_inference_steps"]
        ends_a_step = index + 1 > total - steps * order and (index + 1) % order == 0
        if (ends_a_step or index == total - 1) and index % every == 0:
            callback(index // order, timestep, outputs.get("latents", tensors["latents"]))
        return outputs

    arguments["callback_on_step_end"] = on_step_end
    arguments["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(["latents", *inputs]))


share_tasks(StableDiffusionSAGPipeline, "stable-diffusion")
