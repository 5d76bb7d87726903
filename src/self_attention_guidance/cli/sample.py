"""The command `sample`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..generate.classes import class_names, parse_classes, refuse_empty_names
from .loading import check_sampling, note_fast_without_effect
from .options import SamplingOptions
from .output import counting_progress, drawn_with, hide_loading_bars, note, print_line

if TYPE_CHECKING:
    from ..batch import FinishedSamples
    from ..generate import LoadedPixelModel
    from ..pipelines.adm import ADMPipeline


@dataclass(frozen=True, kw_only=True)
class SampleCommand(SamplingOptions):
    """Draw samples of a pixel-space model into one .npz file that evaluators read.

    The file holds arr_0 (uint8, NHWC) and, if there are classes, arr_1. A .png beside it shows the
    first 64. If it is interrupted or killed, the same command resumes.

    \b
    Examples:
      sag sample --num-samples 64 --steps 25 --scheduler ddim --classes heart,food-fruit
      sag sample --model ./imagenet128 --num-samples 8 --classes 207,360 --sag-scale 0.1
      sag sample --model ./imagenet256 --num-samples 50000 --batch-size 16 --out in256.npz
    """

    num_samples: Annotated[int, typer.Option(help="Number of pictures.")]
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .npz file.")] = Path("samples.npz")
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False
    workers: Annotated[int, typer.Option(help="Batches drawn at once; uses Ray.")] = 1
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|HUB_ID",
            help="A builtin model, a folder of a pixel-space model, or a hub id.",
        ),
    ] = "emoji-adm"
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="C,C,...",
            help="Used in turn: numbers, or names from the model's classes.json."
            " [default: random ones, or none if the model needs none]",
        ),
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps. [default: the model's, else 250]")
    ] = None
    eta: Annotated[float, typer.Option(help="DDIM: share of fresh noise.")] = 0.0
    seed: Annotated[int, typer.Option(help="Picture i, from 0, has the seed SEED + i.")] = 0
    batch_size: Annotated[int, typer.Option(help="Pictures made at once.")] = 8
    sag_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance: 0 is off. [default: the model's, else the method's own: for SAG 0.5]"
        ),
    ] = None
    blur_guidance: Annotated[
        bool,
        typer.Option("--blur-guidance", help="The same as --guidance blur: SAG without a mask."),
    ] = False
    classifier: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A classifier to guide with, from `sag convert`."),
    ] = None
    classifier_scale: Annotated[
        float | None, typer.Option(help="Classifier guidance: 0 is off. [default: 1]")
    ] = None

    def guidance_arguments(self) -> dict[str, Any]:
        """The settings of guidance that were given, for `Guidance.from_dict`.

        Raises:
            ValueError: As in `SamplingOptions`, or one has no effect with --blur-guidance.
        """
        if not self.blur_guidance:
            return super().guidance_arguments()
        for name in ("guidance", "threshold", "layer"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must not be given with --blur-guidance, which"
                    " blurs everywhere"
                )
        chosen = replace(self, blur_guidance=False, guidance=["blur"])
        return chosen.guidance_arguments()

    def sample_arguments(self) -> dict[str, Any]:
        """Arguments of `SampleSettings` but for the classes; `None` means not given."""
        return {
            "num_inference_steps": self.steps,
            "sag_scale": self.sag_scale,
            "classifier_scale": self.classifier_scale,
            "eta": self.eta,
        }

    def class_names(self) -> dict[str, int]:
        """The numbers of the model's classes by their names.

        Raises:
            ValueError: There is no such model, or its names have another format.
        """
        from ..generate import find_pixel_model
        from ..generate.finding import model_folder

        return class_names(model_folder(find_pixel_model(self.model)))

    def chosen_classes(self) -> tuple[int, ...] | None:
        """The classes by their numbers; `None` means not given.

        Raises:
            ValueError: The model has no such class, or there is no such model.
        """
        return None if self.classes is None else parse_classes(self.classes, self.class_names())

    def run(self) -> None:
        """Draw the missing samples, and write the files."""
        from ..batch.crew import Crew

        crew = Crew(workers=self.workers)
        _check_before_loading(self)

        from ..batch import SampleJob
        from ..generate import read_record
        from ..generate.schedulers import check_steps_of

        loaded = _load_model(self)
        note_fast_without_effect(loaded, self, self.sag_scale == 0)
        _use(loaded, self)
        settings = loaded.settings(**self.sample_arguments(), classes=self.chosen_classes())
        # Before the job, whose folder would bind the next run to these settings.
        loaded.pipeline.check_eta(settings.eta)
        check_steps_of(loaded.pipeline.scheduler, settings.num_inference_steps)
        job = SampleJob(
            loaded.pipeline,
            self.out,
            self.num_samples,
            settings,
            seed=self.seed,
            overwrite=self.overwrite,
            model_name=loaded.name,
            class_names=None if self.classes is None else self.class_names(),
        )
        with counting_progress(self.num_samples, job.drawn, self.quiet) as advance:
            load = functools.partial(_load_pipeline, self)
            finished = job.run(self.batch_size, advance, crew, load)
        print_line(finished.path)
        print_line(finished.grid)
        print_line(_summary(finished))
        seeds = range(self.seed, self.seed + self.num_samples)
        note(drawn_with(loaded, read_record(finished.path), seeds), self.quiet)


def _check_before_loading(options: SampleCommand) -> None:
    """Refuse wrong options before a model is loaded, which takes long."""
    from ..generate import SampleSettings, check_samples_path, find_classifier, find_pixel_model
    from ..generate.schedulers import check_eta

    given = options.sample_arguments()
    SampleSettings(**{name: value for name, value in given.items() if value is not None})
    check_sampling(options, options.num_samples, "num_samples")
    if options.scheduler is not None:
        check_eta(options.eta, options.scheduler)
    if options.classifier is not None:
        find_classifier(options.classifier)
    check_samples_path(options.out, options.overwrite)
    if options.classes is not None:
        refuse_empty_names(options.classes)
    find_pixel_model(options.model)
    SampleSettings(classes=options.chosen_classes() or ())


def _load_model(options: SampleCommand) -> LoadedPixelModel:
    from ..generate import load_pixel_model

    hide_loading_bars()
    return load_pixel_model(options.model, options.device, options.dtype, options.classifier)


def _use(loaded: LoadedPixelModel, options: SampleCommand) -> None:
    guidance = options.guidance_arguments()
    loaded.use(scheduler=options.scheduler, fast=options.fast, **guidance)


def _load_pipeline(options: SampleCommand) -> ADMPipeline:
    loaded = _load_model(options)
    _use(loaded, options)
    return loaded.pipeline


def _summary(finished: FinishedSamples) -> str:
    count = f"{finished.count} picture" + ("s" if finished.count != 1 else "")
    if finished.drawn == 0:
        return f"{count}, all of them drawn before"
    before = finished.count - finished.drawn
    earlier = f", {before} of them drawn before, {finished.drawn} now" if before else ""
    rate = finished.drawn / finished.seconds
    return f"{count}{earlier} in {finished.seconds:.1f} s, {rate:.3g} a second"
