"""The command `compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..generate.axes import parse_axis, with_guidances
from ..guidance.text import parse_guidance, settings_of
from .like import given_names
from .loading import check_prompting, load_pipeline_of
from .options import PromptOptions, parse_numbers
from .output import note, print_line, progress, warn

if TYPE_CHECKING:
    from ..generate import Axis, Comparison, GenerationSettings, LoadedPipeline


@dataclass(frozen=True, kw_only=True)
class CompareCommand(PromptOptions):
    """Draw a grid: one row a prompt and seed, one column a guidance scale.

    Without a prompt, the model's own suggestions are used. The empty prompt is a good one. --rows
    and --columns compare any two settings, and show the cost below each picture.

    \b
    Examples:
      sag compare "red heart" --columns "guidance=none,sag,pag:scale=2,seg" --rows cfg=1,3,7
      sag compare "red heart" "" --sag-scales 0,0.5,1
      sag compare "grinning face" --show-attention --out face.png
    """

    context: typer.Context
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT")] = None
    sag_scales: Annotated[
        str | None,
        typer.Option(metavar="S,S,...", help="[default: the model's, else 0 and its own]"),
    ] = None
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=V,V,...",
            help="The setting that differs by row: prompt (with | between), seed, guidance,"
            " scale, cfg, steps, blur, window (START-STOP) or layer. [default: prompts and seeds]",
        ),
    ] = None
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=V,V,...",
            help="The setting that differs by column. [default: --sag-scales, or with"
            " --rows the prompts]",
        ),
    ] = None
    num_images: Annotated[int, typer.Option(help="Rows of each prompt, seed by seed.")] = 1
    show_attention: Annotated[
        bool, typer.Option("--show-attention", help="Show where the pictures were blurred.")
    ] = False
    out: Annotated[Path, typer.Option(metavar="FILE", help="The PNG file.")] = Path("compare.png")
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = (
        False
    )

    def run(self) -> None:
        """Draw the grid, save it and print its path."""
        from ..generate import check_folder, check_free, check_scales
        from ..generate.finding import is_pixel_model

        given = self.sag_scales
        given_scales = check_scales(parse_numbers(given)) if given is not None else []
        if is_pixel_model(self.model):
            raise ValueError(
                f"model={self.model!r} takes no prompts: comparisons need a model that takes them"
            )
        check_prompting(self, self.num_images)
        if self.out.suffix.lower() not in (".png", ""):
            raise ValueError(
                f"out={str(self.out)!r} must end in .png: the grid's settings are in that format"
            )
        axes = _axes(self)
        check_free([self.out], self.overwrite)
        check_folder(self.out.parent)

        from ..generate import check_own_size, save_png

        loaded = load_pipeline_of(self)
        settings = loaded.settings(**self.generation_arguments())
        check_own_size(loaded.pipeline, settings, self.max_size)
        prompts = self.prompts or list(loaded.recommended.compare_prompts) or [""]
        if axes:
            comparison = _compare_axes(loaded, axes, prompts, settings, self)
        else:
            scales = given_scales or _default_scales(loaded, self)
            comparison = _compare_scales(loaded, prompts, scales, settings, self)
        save_png(comparison.grid, self.out, comparison.record, self.overwrite)
        drawn = [each for column in comparison.columns for each in column]
        warn(dict.fromkeys(text for picture in drawn for text in picture.warnings))
        print_line(self.out)
        for line in comparison.guidances:
            note(line, self.quiet)


# What an axis replaces: options, and settings in the text of a guidance.
_REPLACED = {
    "seed": ("seed",),
    "steps": ("steps",),
    "cfg": ("guidance_scale",),
    "guidance": ("guidance",),
    "scale": ("scale",),
    "blur": ("blur_sigma",),
    "window": ("start", "stop"),
    "layer": ("layer", "layers"),
}


# What grids of axes have no use for: each picture is drawn alone, so that its cost is its own.
_ONE_PICTURE_A_CELL = ("sag_scales", "num_images", "batch_size", "show_attention")


def _axes(options: CompareCommand) -> dict[str, Axis]:
    """The axes that were given, by option.

    Raises:
        ValueError: They do not fit each other, or another option.
    """
    prompts = options.prompts or []
    given = {"rows": options.rows, "columns": options.columns}
    axes = {name: parse_axis(name, text) for name, text in given.items() if text is not None}
    names = [axis.name for axis in axes.values()]
    if not axes:
        return axes
    given_here = given_names(options.context)
    replaced = [setting for name in names for setting in _REPLACED.get(name, ())]
    for name in (*replaced, *_ONE_PICTURE_A_CELL):
        if name in given_here:
            option = f"--{name.replace('_', '-')}"
            has_axis = name in replaced
            reason = " that replace it" if has_axis else ", which draw one picture a cell"
            raise ValueError(f"{option} must not be given with --rows or --columns{reason}")
    texts = [*(options.guidance or [])]
    shared = options.guidance_arguments()
    for axis in axes.values():
        if axis.name == "guidance":
            texts += [each for each in axis.values if each is not None]
    for text in texts:
        named = parse_guidance(text)
        if "guidance" in names and "guidances" in named:
            settings_of([text], shared)  # refuses options that say nothing of which guidance
        for part in named.get("guidances", [named]):
            for setting in part.keys() & set(replaced):
                raise ValueError(
                    f"guidance={text!r}: {setting} must not be given with --rows or --columns that"
                    " replace it"
                )
    if len(set(names)) < len(names):
        raise ValueError(f"--rows and --columns must differ: both are {names[0]}")
    if len(prompts) > (0 if "prompt" in names else 1) and (len(axes) == 2 or "prompt" in names):
        raise ValueError(f"{len(prompts)} prompts: give them by --rows 'prompt=...|...', or one")
    return axes


def _compare_axes(
    loaded: LoadedPipeline,
    axes: Mapping[str, Axis],
    prompts: Sequence[str],
    settings: GenerationSettings,
    options: CompareCommand,
) -> Comparison:
    from ..generate import Axis, compare_axes

    of_prompts = Axis("prompt", prompts)
    if len(axes) == 1 and next(iter(axes.values())).name == "prompt":
        of_prompts = Axis("seed", [options.seed])
    given = options.guidance_arguments()
    rows, columns = (
        with_guidances(
            axes.get(name, of_prompts),
            lambda named: loaded.guidance(options.fast, **{**given, **named}),
        )
        for name in ("rows", "columns")
    )
    with progress(len(rows.values) * len(columns.values), quiet=options.quiet) as advance:
        return compare_axes(
            loaded.pipeline,
            rows,
            columns,
            settings,
            prompt=prompts[0],
            seed=options.seed,
            model_name=loaded.name,
            on_progress=advance,
        )


def _compare_scales(
    loaded: LoadedPipeline,
    prompts: Sequence[str],
    scales: Sequence[float],
    settings: GenerationSettings,
    options: CompareCommand,
) -> Comparison:
    from ..generate import compare

    with progress(len(prompts) * options.num_images * len(scales), quiet=options.quiet) as advance:
        return compare(
            loaded.pipeline,
            prompts,
            scales,
            settings,
            seed=options.seed,
            num_images=options.num_images,
            batch_size=options.batch_size,
            model_name=loaded.name,
            show_attention=options.show_attention,
            on_progress=advance,
        )


def _default_scales(loaded: LoadedPipeline, options: CompareCommand) -> Sequence[float]:
    """The scales that the model suggests for its own guidance; else 0 and the chosen one."""
    guidance, recommended = loaded.pipeline.guidance, loaded.recommended
    is_own = guidance.method == recommended.make_guidance().method
    if is_own and recommended.compare_sag_scales and "scale" not in options.guidance_arguments():
        return recommended.compare_sag_scales
    return tuple(dict.fromkeys((0, guidance.scale)))
