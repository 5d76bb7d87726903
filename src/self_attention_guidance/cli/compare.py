"""The command `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .loading import check_prompting, load_pipeline_of
from .options import PromptOptions, parse_numbers, with_options
from .output import print_line, progress, warn_unread

if TYPE_CHECKING:
    from ..generate import LoadedPipeline


@dataclass(frozen=True, kw_only=True)
class CompareOptions(PromptOptions):
    """The options of `compare`; `None` was not given."""

    sag_scales: Annotated[
        str | None,
        typer.Option(metavar="S,S,...", help="[default: the model's, else 0 and its own]"),
    ] = None
    num_images: Annotated[int, typer.Option(help="Rows of each prompt, seed by seed.")] = 1
    show_attention: Annotated[
        bool, typer.Option("--show-attention", help="Show where the pictures were blurred.")
    ] = False
    out: Annotated[Path, typer.Option(metavar="FILE", help="The PNG file.")] = Path("compare.png")
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = (
        False
    )


@with_options(CompareOptions)
def compare_command(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT")] = None,
    *,
    options: CompareOptions,
) -> None:
    """Draw a grid: one row a prompt and seed, one column a guidance scale.

    Without a prompt, the model's own suggestions are used. The empty prompt is a good one.

    \b
    Examples:
      sag compare "red heart" "" --sag-scales 0,0.5,1
      sag compare "grinning face" --show-attention --out face.png
    """
    from ..generate import check_folder, check_free, check_scales

    given = options.sag_scales
    given_scales = check_scales(parse_numbers(given)) if given is not None else []
    check_prompting(options, options.num_images)
    if options.out.suffix.lower() not in (".png", ""):
        raise ValueError(
            f"out={str(options.out)!r} must end in .png: the grid's settings are in that format"
        )
    check_free([options.out], options.overwrite)
    check_folder(options.out.parent)

    from ..generate import compare, save_png

    loaded = load_pipeline_of(options)
    prompts = prompts or list(loaded.recommended.compare_prompts) or [""]
    scales = given_scales or _default_scales(loaded, options)
    with progress(len(prompts) * options.num_images * len(scales), options.quiet) as advance:
        comparison = compare(
            loaded.pipeline,
            prompts,
            scales,
            loaded.settings(**options.generation_arguments()),
            seed=options.seed,
            num_images=options.num_images,
            batch_size=options.batch_size,
            model_name=loaded.name,
            show_attention=options.show_attention,
            on_progress=advance,
        )
    save_png(comparison.grid, options.out, comparison.record, options.overwrite)
    for picture in comparison.columns[0]:
        if picture.unread:
            warn_unread(picture)
    print_line(options.out)


def _default_scales(loaded: LoadedPipeline, options: CompareOptions) -> Sequence[float]:
    """What the model suggests for its own guidance; else without, and with that of the options."""
    guidance, recommended = loaded.pipeline.guidance, loaded.recommended
    is_own = guidance.method == recommended.make_guidance().method
    if is_own and recommended.compare_sag_scales and "scale" not in options.guidance_arguments():
        return recommended.compare_sag_scales
    return (0, guidance.scale)
