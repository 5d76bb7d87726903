"""Models that draw tasks, and how a worker gets one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from PIL import Image

from ..checks import check_finite
from ..generate.drawing import PictureRequest, PromptArtist
from ..generate.loaded import recommended_generation
from ..generate.metadata import format_parameters, version_label
from ..generate.models import (
    LoadedPipeline,
    find_device,
    find_dtype,
    find_model,
    load_pipeline,
)
from ..generate.pixel_drawing import draw_samples, to_image
from ..generate.pixel_models import (
    LoadedPixelModel,
    find_pixel_model,
    is_pixel_model,
    load_pixel_model,
)
from ..generate.run_identity import describe_run, describe_scheduler, fingerprint
from ..generate.sample_settings import SampleSettings, choose_labels
from ..generate.schedulers import check_scheduler_name, scheduler_label
from ..generate.settings import GenerationSettings, check_size
from ..guidance import BlurGuidance, SelfAttentionGuidance
from ..models.builtin import recommended_settings
from .tasks import Task


@dataclass(frozen=True)
class Drawing:
    """A picture of a task.

    Attributes:
        image: The picture.
        parameters: All settings, in the form of `format_parameters`.
        facts: Settings that were decided by the model, by columns of the manifest.
        flagged: Whether the model's safety checker blacked it out.
    """

    image: Image.Image
    parameters: str
    facts: Mapping[str, Any]
    flagged: bool = False


class Artist(Protocol):
    """Draws tasks; a picture depends on its task and the number of tasks alone."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What pictures depend on beside their tasks; values that JSON can hold."""
        ...

    def draw(self, tasks: Sequence[Task]) -> list[Drawing]:
        """Draws tasks of equal settings in one batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that each worker loads for itself. It can be pickled.

    Attributes:
        name: As in `load_pipeline` or `load_pixel_model`.
        device: As in `find_device`.
        dtype: As in `find_dtype`.
        scheduler: A name of `scheduler_names()`; `None` is the model's own.
        fast: Whether guidance is the model's fast preset, and not what it recommends.
        guidance: Settings of `SelfAttentionGuidance` that differ from these.

    Raises:
        ValueError: There is no such model, or a setting is unknown or outside its range.
    """

    name: str = "emoji"
    device: str = "auto"
    dtype: str = "auto"
    scheduler: str | None = None
    fast: bool = False
    guidance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Checks what can be checked before it is loaded."""
        self.find()
        SelfAttentionGuidance(**self.guidance)
        if self.scheduler is not None:
            check_scheduler_name(self.scheduler)
        # Workers may have GPUs where this process has none.
        find_dtype(self.dtype, find_device("cpu"))

    def find(self) -> str:
        """The folder, file or hub id of the model.

        Raises:
            ValueError: There is none.
        """
        if is_pixel_model(self.name):
            return find_pixel_model(self.name)
        return find_model(self.name)[0]

    def settings(self, **given: Any) -> GenerationSettings:
        """Settings of pictures: what is given, else what the model recommends.

        Args:
            **given: Arguments of `GenerationSettings`; `None` counts as not given.

        Raises:
            ValueError: A setting is outside its range.
        """
        return recommended_generation(recommended_settings(self.find()), **given)

    def __call__(self) -> Artist:
        """Loads it.

        Raises:
            ValueError: It cannot be loaded.
        """
        load = load_pixel_model if is_pixel_model(self.name) else load_pipeline
        loaded = load(self.name, self.device, self.dtype)
        loaded.use(scheduler=self.scheduler, fast=self.fast, **self.guidance)
        if isinstance(loaded, LoadedPixelModel):
            return _PixelTasks(loaded)
        return _PromptTasks(loaded)


class _PromptTasks:
    """An `Artist` of pipelines that take prompts."""

    def __init__(self, loaded: LoadedPipeline) -> None:
        self.pipeline: Any = loaded.pipeline
        self.name = loaded.name
        networks = (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder)
        self.identity = {
            "version": version_label(),
            "networks": [fingerprint(network) for network in networks],
            "dtype": str(self.pipeline.unet.dtype).removeprefix("torch."),
            **_identity(self.pipeline),
            **describe_scheduler(self.pipeline.scheduler),
        }

    def draw(self, tasks: Sequence[Task]) -> list[Drawing]:
        settings = tasks[0].settings
        check_size(self.pipeline, settings.width, settings.height)
        artist = PromptArtist(self.pipeline, settings, self.name)
        facts = {
            "negative_prompt": settings.negative_prompt,
            "steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "sag_scale": artist.sag_scale,
            "guidance": _told(self.pipeline.guidance),
            "scheduler": scheduler_label(self.pipeline.scheduler),
            "model": self.name,
        }
        requests = [PictureRequest(n, task.prompt, task.seed) for n, task in enumerate(tasks)]
        return [
            Drawing(picture.image, picture.parameters, facts, picture.flagged)
            for picture in artist.draw(requests)
        ]


class _PixelTasks:
    """An `Artist` of pixel-space models, which take no prompt; classes are drawn with the seed."""

    def __init__(self, loaded: LoadedPixelModel) -> None:
        self.pipeline: Any = loaded.pipeline
        self.name = loaded.name
        described = describe_run(self.pipeline, SampleSettings(), 0)
        of_tasks = ("num_inference_steps", "seed", "sag_scale")
        kept = {name: value for name, value in described.items() if name not in of_tasks}
        self.identity = kept | _identity(self.pipeline)

    def draw(self, tasks: Sequence[Task]) -> list[Drawing]:
        settings = tasks[0].settings
        for name in ("width", "height"):
            if getattr(settings, name) is not None:
                raise ValueError(f"{name} must not be given: {self.name} draws one size")
        if any(task.prompt for task in tasks):
            raise ValueError(f"prompt must be empty: {self.name} takes none")
        seeds = [task.seed for task in tasks]
        given = SampleSettings(
            num_inference_steps=settings.num_inference_steps, sag_scale=settings.sag_scale
        )
        labels = choose_labels(self.pipeline, given, seeds)
        scale = settings.sag_scale
        facts = {
            "steps": settings.num_inference_steps,
            "sag_scale": self.pipeline.guidance.scale if scale is None else scale,
            "guidance": _told(self.pipeline.guidance),
            "scheduler": scheduler_label(self.pipeline.scheduler),
            "model": self.name,
        }
        pixels = draw_samples(self.pipeline, given, seeds, labels)
        return [
            Drawing(to_image(picture), self._parameters(task, facts), facts)
            for picture, task in zip(pixels, tasks, strict=True)
        ]

    def _parameters(self, task: Task, facts: Mapping[str, Any]) -> str:
        values = {
            "Steps": facts["steps"],
            "Sampler": facts["scheduler"],
            "Seed": task.seed,
            "Model": self.name,
            "SAG scale": check_finite("sag_scale", facts["sag_scale"]),
            "Version": version_label(),
        }
        return format_parameters("", "", values)


def _identity(pipeline: Any) -> dict[str, Any]:
    """What pictures of all kinds of models depend on."""
    return {
        "device": pipeline.device.type,
        "guidance": _told(pipeline.guidance),
        "scale": float(pipeline.guidance.scale),
    }


def _told(guidance: SelfAttentionGuidance | BlurGuidance) -> str:
    """Settings of guidance but its scale, which pictures may choose, as JSON."""
    values = {"form": type(guidance).__name__} | asdict(guidance)
    del values["scale"]
    return json.dumps(values)
