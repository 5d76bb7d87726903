"""Pixel-space models: ADM, IDDPM and diffusers' DDPM checkpoints, with guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args, get_type_hints

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..checks import as_python, check_count, check_finite
from ..guidance import SelfAttentionGuidance
from .classifier_guidance import classifier_guided_step, log_probability_gradient
from .guided import GuidanceOf, GuidedPipelineMixin, show_to_loaders
from .sharp_levels import sharp_noise_levels

Labels = int | Sequence[int] | Tensor
StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LEARNED_VARIANCES = ("learned", "learned_range")


class ADMPipeline(GuidedPipelineMixin, DiffusionPipeline):
    """A pipeline for ADM, IDDPM and every other `UNet2DModel`, with or without classes.

    Sources: ADM, Dhariwal and Nichol, arXiv 2105.05233; IDDPM, Nichol and Dhariwal,
    arXiv 2102.09672; guidance, Hong et al., arXiv 2210.00939. The attributes `guidance` and
    `guidance_handle` are those of `GuidedPipelineMixin`. The default guidance has the paper's
    settings for ImageNet 256x256.
    """

    model_cpu_offload_seq = "classifier->unet"
    _optional_components = ["classifier"]  # noqa: RUF012  # diffusers reads it from the class

    guidance = GuidanceOf(SelfAttentionGuidance(0.5, blur_sigma=9.0, blur_kernel_size=31))

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        classifier: nn.Module | None = None,
        null_label: int | None = None,
    ) -> None:
        """Combine a network and its scheduler.

        Args:
            unet: Network that predicts noise, v or samples, (batch, channels, height, width). With
                a learned variance, its output has as many more channels for that.
            scheduler: A `DDPMScheduler` (which uses a learned variance), a `DDIMScheduler`, or any
                other scheduler that `SelfAttentionGuidance` supports.
            classifier: A `NoisyClassifier` or another diffusers model: `classifier(x_t,
                timesteps)` gives logits, (batch, classes); only for classifier guidance.
            null_label: The label for "no class", if the network has one.
        """
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)
        self.register_to_config(null_label=null_label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels | None = None,
        num_inference_steps: int = 250,
        sag_scale: float | None = None,
        classifier_scale: float | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Draw pictures.

        Args:
            batch_size: Number of pictures; `None` is the number of labels or latents, else 1.
            class_labels: One class for all pictures, or one for each. With networks without
                classes, only the classifier uses them. `None` draws without a class.
            num_inference_steps: Steps of denoising, at least 1.
            sag_scale: Weight of `guidance`, any finite number, 0 is off; `None` is its own scale.
            classifier_scale: Weight of classifier guidance, any finite number, 0 is off; `None`
                is 1 with a classifier and classes, else 0.
            eta: Share of fresh noise in DDIM, at least 0; must be 0 with other schedulers.
            generator: One generator, or a list with one for each picture.
            latents: x_T, normal noise of shape (batch, channels, height, width).
            output_type: "pil", "np" (batch, height, width, channels) and "pt" (batch, channels,
                height, width) in [0, 1], or "latent", the tensor in [-1, 1].
            return_dict: Return an object instead of a tuple.
            callback_on_step_end: Called as `callback(pipe, step, timestep, {"latents": x})`; the
                dictionary that it returns may replace the latents.

        Returns:
            `ImagePipelineOutput` with `images`, or the tuple `(images,)`.

        Raises:
            ValueError: An argument is out of its range or does not fit the model.
        """
        check_count("num_inference_steps", as_python(num_inference_steps))
        if check_finite("eta", as_python(eta)) < 0:
            raise ValueError(f"eta={eta} must be at least 0")
        self.check_eta(eta)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}"
            )
        batch_size = _batch_size(batch_size, class_labels, latents)
        labels = self._labels(class_labels, batch_size)
        weight = self._classifier_weight(classifier_scale, class_labels)
        self._check_variance()
        loop = _Loop(self, labels, weight, eta, generator, callback_on_step_end)
        with self._sharp_noise_levels():
            x_t = self._start(batch_size, generator, latents, num_inference_steps)
            with self.guided(sag_scale):
                x_0 = loop.run(x_t)
        images: Any = x_0
        if output_type != "latent":
            images = self.image_processor.postprocess(x_0.float(), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_eta(self, eta: float) -> None:
        """Refuse a share of fresh noise that the scheduler would ignore.

        Args:
            eta: As in a call.

        Raises:
            ValueError: It is not 0, and the scheduler has no such setting.
        """
        if eta and "eta" not in inspect.signature(self.scheduler.step).parameters:
            name = type(self.scheduler).__name__
            raise ValueError(f"eta={eta} has no effect with {name}: it is a setting of DDIM")

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        """Return the types of the components; diffusers 0.36 cannot read them here."""
        hints = get_type_hints(cls.__init__)
        return {name: get_args(hint) or (hint,) for name, hint in hints.items() if name != "return"}

    def _labels(self, class_labels: Labels | None, batch_size: int) -> Tensor | None:
        """Return one label for each picture, (batch,) int64; `None` to draw without a class."""
        classes: int | None = self.unet.config.get("num_class_embeds")
        if class_labels is None and classes is not None:
            class_labels = self.config.get("null_label")
            if class_labels is None:
                raise ValueError(
                    f"class_labels=None must be given: the model draws classes 0 to {classes - 1}"
                )
        if class_labels is None:
            return None
        if classes is None and self.classifier is None:
            raise ValueError(f"class_labels={class_labels!r}: the model has no classes")
        labels = torch.as_tensor(class_labels, device=self._execution_device).long().flatten()
        if classes is not None and not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(f"class_labels={class_labels!r} must be from 0 to {classes - 1}")
        return labels.expand(batch_size)

    def _classifier_weight(self, scale: float | None, class_labels: Labels | None) -> float:
        if scale is None:
            scale = 0.0 if self.classifier is None or class_labels is None else 1.0
        if check_finite("classifier_scale", as_python(scale)) == 0:
            return 0.0
        if self.classifier is None:
            raise ValueError(f"classifier_scale={scale} must be 0: the pipeline has no classifier")
        if class_labels is None:
            raise ValueError(f"classifier_scale={scale} needs class_labels to guide towards")
        return scale

    def _check_variance(self) -> None:
        config = self.unet.config
        learned = config.out_channels == 2 * config.in_channels
        if _uses_learned_variance(self.scheduler) and not learned:
            raise ValueError(
                f"scheduler has variance_type={self.scheduler.variance_type!r}, but the network "
                "has learned no variance; use 'fixed_small' or 'fixed_large'"
            )

    def _sharp_noise_levels(self) -> AbstractContextManager[None]:
        # Apple's GPUs have no float64.
        has_float64 = self._execution_device.type != "mps"
        return sharp_noise_levels(self.scheduler) if has_float64 else nullcontext()

    def _start(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        num_inference_steps: int,
    ) -> Tensor:
        """Set the scheduler's timesteps, and return x_T in its space."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is not None and latents.shape[:2] != shape[:2]:
            raise ValueError(f"latents of shape {tuple(latents.shape)} must be of shape {shape}")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: {len(generator)} given for {batch_size} pictures")
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator, device, self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        return latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma


show_to_loaders(ADMPipeline)


class _Loop:
    """The steps of one call."""

    def __init__(
        self,
        pipeline: ADMPipeline,
        labels: Tensor | None,
        classifier_weight: float,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: StepCallback | None,
    ) -> None:
        self.pipeline = pipeline
        self.labels = labels
        self.classifier_weight = classifier_weight
        self.callback = callback
        known = inspect.signature(pipeline.scheduler.step).parameters
        # The original's DDIM derives the noise from the clipped sample.
        offered = {"eta": eta, "generator": generator, "use_clipped_model_output": True}
        self.step_arguments = {name: value for name, value in offered.items() if name in known}

    def run(self, x_t: Tensor) -> Tensor:
        """Denoise x_T to the sample."""
        timesteps: Tensor = self.pipeline.scheduler.timesteps
        progress_bar: Any = self.pipeline.progress_bar
        with progress_bar(total=len(timesteps)) as bar:
            for number, timestep in enumerate(timesteps):
                x_t = self.step(x_t, timestep)
                if self.callback is not None:
                    tensors = self.callback(self.pipeline, number, timestep, {"latents": x_t})
                    x_t = tensors.get("latents", x_t)
                bar.update()
        return x_t

    def step(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Take one step of the sampler."""
        pipeline = self.pipeline
        unet: Any = pipeline.unet
        scheduler: Any = pipeline.scheduler
        x_in = scheduler.scale_model_input(x_t, timestep)
        seen = timestep * unet.config.get("timestep_scale", 1)
        by_class = {} if unet.class_embedding is None else {"class_labels": self.labels}
        output = _used(scheduler, unet(x_in, seen, **by_class).sample, x_t)
        if self.classifier_weight == 0 or self.labels is None:
            return scheduler.step(output, timestep, x_t, **self.step_arguments).prev_sample
        timesteps = seen.expand(len(x_in))
        gradient = log_probability_gradient(pipeline.classifier, x_in, timesteps, self.labels)
        shift = self.classifier_weight * gradient
        return classifier_guided_step(
            scheduler, output, timestep, x_t, x_in, shift, self.step_arguments
        )


def _uses_learned_variance(scheduler: Any) -> bool:
    return isinstance(scheduler, DDPMScheduler) and scheduler.variance_type in LEARNED_VARIANCES


def _used(scheduler: Any, output: Tensor, x_t: Tensor) -> Tensor:
    """Remove a learned variance from a network's output if the scheduler does not use it."""
    return output if _uses_learned_variance(scheduler) else output[:, : x_t.shape[1]]


def _batch_size(given: int | None, labels: Labels | None, latents: Tensor | None) -> int:
    """Return the number of pictures; refuse arguments that do not agree on it."""
    has_no_axis = getattr(labels, "ndim", 1) == 0
    lengths = {
        "batch_size": None if given is None else check_count("batch_size", as_python(given)),
        "class_labels": (
            None if labels is None or isinstance(labels, int) or has_no_axis else len(labels)
        ),
        "latents": None if latents is None else len(latents),
    }
    known = {name: length for name, length in lengths.items() if length is not None}
    if len(set(known.values())) > 1:
        counts = ", ".join(f"{name} for {length}" for name, length in known.items())
        raise ValueError(f"the number of pictures is not clear: {counts}")
    return next(iter(known.values()), 1)
