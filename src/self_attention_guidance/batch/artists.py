"""Models that draw tasks, and how a worker gets one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..generate.arguments import check_size, with_defaults
from ..generate.drawing import GeneratedImage, PromptArtist
from ..generate.finding import find_prompt_or_pixel_model, is_pixel_model
from ..generate.labels import choose_labels
from ..generate.loaded import settings_of
from ..generate.metadata import Record
from ..generate.models import (
    LoadedPipeline,
    find_device,
    find_dtype,
    load_pipeline,
    prompt_class,
)
from ..generate.pixel_drawing import draw_samples, to_image
from ..generate.pixel_models import (
    LoadedPixelModel,
    load_pixel_model,
)
from ..generate.record import describe, describe_samples, fingerprints
from ..generate.sample_settings import SampleSettings
from ..generate.schedulers import check_scheduler_name
from ..generate.settings import GenerationSettings
from ..guidance import guidance_of
from ..models.builtin import recommended_settings
from .tasks import Task


class Artist(Protocol):
    """Draws tasks; a picture depends on its task and the number of tasks alone."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What pictures depend on beside their tasks; values that JSON can hold."""
        ...

    def draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
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
        guidance: Settings that differ from these; with the short name of another guidance as
            "method", those of that one.

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
        guidance_of({"method": "sag", **self.guidance})
        if self.scheduler is not None:
            check_scheduler_name(self.scheduler)
        # Workers may have GPUs where this process has none.
        find_dtype(self.dtype, find_device("cpu"))

    def find(self) -> str:
        """The folder, file or hub id of the model.

        Raises:
            ValueError: There is none.
        """
        return find_prompt_or_pixel_model(self.name)

    def settings(self, **given: Any) -> GenerationSettings:
        """Settings of pictures: what is given, else what the model recommends.

        Args:
            **given: Arguments of `GenerationSettings`; `None` counts as not given.

        Raises:
            ValueError: A setting is outside its range.
        """
        source = self.find()
        own = recommended_settings(source)
        if not is_pixel_model(self.name):
            own = with_defaults(own, prompt_class(self.name, source))
        return settings_of(GenerationSettings, own, **given)

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
        networks = fingerprints(self.pipeline)
        record = describe(self.pipeline, GenerationSettings(), networks=networks)
        self.identity = _identity(record, self.pipeline)

    def draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
        settings = tasks[0].settings
        check_size(self.pipeline, settings.width, settings.height)
        artist = PromptArtist(self.pipeline, settings, self.name)
        return list(artist.draw([task.prompt for task in tasks], [task.seed for task in tasks]))


class _PixelTasks:
    """An `Artist` of pixel-space models, which take no prompt; classes are drawn with the seed."""

    def __init__(self, loaded: LoadedPixelModel) -> None:
        self.pipeline: Any = loaded.pipeline
        self.name = loaded.name
        self.networks = fingerprints(self.pipeline)
        record = describe_samples(self.pipeline, SampleSettings(), self.networks)
        self.identity = _identity(record, self.pipeline)

    def draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
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
        pictures = map(to_image, draw_samples(self.pipeline, given, seeds, labels))
        return [
            GeneratedImage(
                image=picture,
                index=number,
                record=describe_samples(
                    self.pipeline,
                    replace(given, classes=labels[number : number + 1] if labels else ()),
                    self.networks,
                    model=self.name,
                    prompt="",
                    seed=seeds[number],
                    size=picture.size,
                    device=self.pipeline.device.type,
                    together=len(seeds),
                ),
            )
            for number, picture in enumerate(pictures)
        ]


def _identity(record: Record, pipeline: Any) -> dict[str, Any]:
    """What pictures depend on beside their tasks, which may choose another scale."""
    kept = {name: value for name, value in record.items() if name != "settings"}
    return kept | {"guidance": pipeline.guidance.to_dict(), "device": pipeline.device.type}
