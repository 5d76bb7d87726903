"""Models that draw tasks, and how a worker loads one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from ..generate.arguments import (
    check_own_size,
    check_size,
    refuse_without_effect,
    with_defaults,
)
from ..generate.drawing import GeneratedImage, Progress, PromptArtist, weakened_predictions
from ..generate.finding import find_prompt_or_pixel_model, is_pixel_model, recommended_by
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
    load_pixel_model,
)
from ..generate.record import describe, describe_samples, fingerprints
from ..generate.sample_settings import SampleSettings
from ..generate.schedulers import check_scheduler_name
from ..generate.settings import GenerationSettings
from ..guidance import guidance_of
from .labels import choose_labels
from .tasks import Task


class Artist(Protocol):
    """What draws tasks; a picture depends only on its task and the number of tasks."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that pictures depend on besides their tasks, as JSON values."""
        ...

    def draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
        """Draw tasks with equal settings in one batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that each worker loads for itself. It can be pickled.

    Attributes:
        name: As in `load_pipeline` or `load_pixel_model`.
        device: As in `find_device`.
        dtype: As in `find_dtype`.
        scheduler: A name of `scheduler_names()`; `None` is the model's own.
        fast: Whether guidance is the model's fast preset instead of what it recommends.
        guidance: Settings that differ from that guidance. With the short name of another guidance
            as "method", they differ from the defaults of that one, or its fast preset.
        loras: As in `load_pipeline`.
        offload: As in `load_pipeline`.
        is_compiled: As in `load_pipeline`.
        max_size: Largest side of pictures in the model's own size, in pixels; `None` is no limit.

    Raises:
        ValueError: There is no such model, or a setting is unknown or outside its range.
    """

    name: str = "emoji"
    device: str = "auto"
    dtype: str = "auto"
    scheduler: str | None = None
    fast: bool = False
    guidance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loras: tuple[tuple[str, float], ...] = ()
    offload: str | None = None
    is_compiled: bool = False
    max_size: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without loading the model."""
        self.find()
        guidance_of({"method": "sag", **self.guidance})
        for name in ("loras", "offload", "is_compiled") if is_pixel_model(self.name) else ():
            if getattr(self, name):
                raise ValueError(f"{name} must not be given: {self.name} takes no prompts")
        if self.scheduler is not None:
            check_scheduler_name(self.scheduler)
        # Workers may have GPUs where this process has none.
        find_dtype(self.dtype, find_device("cpu"))

    def find(self) -> str:
        """The folder, file or hub id of the model.

        Raises:
            ValueError: There is no such model.
        """
        return find_prompt_or_pixel_model(self.name)

    def settings(self, **given: Any) -> GenerationSettings:
        """Settings of pictures: those given, and for the rest what the model recommends.

        Args:
            **given: Arguments of `GenerationSettings`; `None` counts as not given.

        Raises:
            ValueError: A setting is outside its range.
        """
        source = self.find()
        own = recommended_by(source)
        if not is_pixel_model(self.name):
            own = with_defaults(own, prompt_class(self.name, source))
        return settings_of(GenerationSettings, own, **given)

    def __call__(self) -> Artist:
        """Load the model.

        Raises:
            ValueError: It cannot be loaded.
        """
        use: dict[str, Any] = {"scheduler": self.scheduler, "fast": self.fast, **self.guidance}
        if is_pixel_model(self.name):
            pixel_model = load_pixel_model(self.name, self.device, self.dtype)
            pixel_model.use(**use)
            return PixelArtist(pixel_model.pipeline, pixel_model.name)
        loaded = load_pipeline(
            self.name,
            self.device,
            self.dtype,
            loras=self.loras,
            offload=self.offload,
            is_compiled=self.is_compiled,
        )
        loaded.use(**use)
        more = {"is_compiled": True} if self.is_compiled else {}
        return _PromptTasks(loaded, more, self.max_size)


class _PromptTasks:
    """An `Artist` of pipelines that take prompts."""

    def __init__(
        self, loaded: LoadedPipeline, more: Mapping[str, Any], max_size: int | None
    ) -> None:
        self.pipeline: Any = loaded.pipeline
        self.max_size = max_size
        self.name = loaded.name
        networks = fingerprints(self.pipeline)
        record = describe(self.pipeline, GenerationSettings(), networks=networks)
        self.identity = {**_identity(record, self.pipeline), **more}

    def draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
        settings = cast("GenerationSettings", tasks[0].settings)
        check_size(self.pipeline, settings.width, settings.height)
        if self.max_size is not None:
            check_own_size(self.pipeline, settings, self.max_size)
        refuse_without_effect(self.pipeline, settings)
        artist = PromptArtist(self.pipeline, settings, self.name)
        return list(artist.draw([task.prompt for task in tasks], [task.seed for task in tasks]))


class PixelArtist:
    """An `Artist` of pixel-space models, which take no prompt."""

    def __init__(
        self,
        pipeline: Any,
        name: str | None,
        networks: Mapping[str, str] | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Describe the model; draw nothing yet.

        Args:
            pipeline: An `ADMPipeline`.
            name: Name of the model, for the metadata; `None` leaves it out.
            networks: What `fingerprints` returned for the pipeline, if it is known already.
            on_progress: As in `draw_samples`; copies that fill up a batch are not counted.
        """
        self.pipeline = pipeline
        self.name = name
        self.networks = networks or fingerprints(pipeline)
        self.on_progress = on_progress
        record = describe_samples(pipeline, SampleSettings(), self.networks)
        self.identity = _identity(record, pipeline)

    def draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
        """Draw tasks with equal settings in one batch; seeds choose the classes that are missing.

        Args:
            tasks: Tasks without prompts.

        Raises:
            ValueError: The model cannot follow a setting.
            FloatingPointError: A prediction is NaN or infinite.
        """
        given = self._settings(tasks)
        seeds = [task.seed for task in tasks]
        labels = [task.label for task in tasks if task.label is not None]
        chosen = labels or choose_labels(self.pipeline, given, seeds)
        pixels = draw_samples(self.pipeline, given, seeds, chosen, self._progress(tasks))
        scale = given.sag_scale
        scale = self.pipeline.guidance.scale if scale is None else scale
        weakened = weakened_predictions(self.pipeline, scale)
        return [
            GeneratedImage(
                image=picture,
                index=number,
                record=describe_samples(
                    self.pipeline,
                    replace(given, classes=chosen[number : number + 1] if chosen else ()),
                    self.networks,
                    model=self.name,
                    prompt="",
                    seed=seeds[number],
                    size=picture.size,
                    device=self.pipeline.device.type,
                    together=len(seeds),
                    weakened_predictions=weakened,
                ),
            )
            for number, picture in enumerate(map(to_image, pixels))
        ]

    def _settings(self, tasks: Sequence[Task]) -> SampleSettings:
        settings = tasks[0].settings
        if isinstance(settings, SampleSettings):
            return settings
        usual = GenerationSettings()
        for name in ("negative_prompt", "width", "height", "image", "mask", "strength"):
            if getattr(settings, name) != getattr(usual, name):
                raise ValueError(f"{name} must not be given: {self.name} takes no prompts")
        if any(task.prompt for task in tasks):
            raise ValueError(f"prompt must be empty: {self.name} takes none")
        return SampleSettings(
            num_inference_steps=settings.num_inference_steps, sag_scale=settings.sag_scale
        )

    def _progress(self, tasks: Sequence[Task]) -> Progress | None:
        report, share = self.on_progress, len({task.row for task in tasks}) / len(tasks)
        return None if report is None else lambda done: report(done * share)


def _identity(record: Record, pipeline: Any) -> dict[str, Any]:
    """Everything that pictures depend on besides their tasks, which may choose another scale."""
    kept = {name: value for name, value in record.items() if name != "settings"}
    device = pipeline._execution_device.type  # weights may be elsewhere while it does not draw
    return kept | {"guidance": pipeline.guidance.to_dict(), "device": device}
