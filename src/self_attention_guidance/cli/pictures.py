"""The commands `generate` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import PromptOptions, parse_numbers, with_options
from .output import hide_loading_bars, print_line, progress

if TYPE_CHECKING:
    from ..generate import LoadedPipeline


@with_options(PromptOptions)
def generate_command(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT")] = None,
    sag_scale: Annotated[
        float | None, typer.Option(help="SAG: 0 is off. [default: the model's, else 0.75]")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the pictures go.")] = Path(
        "out"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    *,
    options: PromptOptions,
) -> None:
    """Make pictures and print their paths.

    Picture k of a prompt has the seed SEED + k and is saved as INDEX-SEED.png with its settings.

    \b
    Examples:
      sag generate "red heart" "grinning face" --num-images 4
      sag generate "a lighthouse" --model ./my-model --size 512x768 --scheduler "dpm++ 2m karras"
    """
    from ..generate import (
        check_folder,
        check_free,
        generate,
        picture_path,
        save_png,
        seeds_of,
    )

    if not prompts:
        raise ValueError('PROMPT is missing: give at least one ("" is one, too)')
    seeds = seeds_of(options.seed, num_images) * len(prompts)
    _check_before_loading(options, num_images, sag_scale=sag_scale)
    paths = [picture_path(out, index, seed) for index, seed in enumerate(seeds)]
    check_folder(out)
    check_free(paths, overwrite)
    loaded = _load(options)
    settings = loaded.settings(sag_scale=sag_scale, **options.generation_arguments())
    with progress(len(paths)) as advance:
        pictures = generate(
            loaded.pipeline,
            prompts,
            settings,
            seed=options.seed,
            num_images=num_images,
            batch_size=options.batch_size,
            model_name=loaded.name,
            on_progress=advance,
        )
        for picture, path in zip(pictures, paths, strict=True):
            save_png(picture.image, path, picture.parameters, overwrite)
            print_line(path)
            if picture.flagged:
                typer.echo(f"warning: the model's safety checker blanked {path}", err=True)


@with_options(PromptOptions)
def compare_command(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT")] = None,
    sag_scales: Annotated[
        str | None,
        typer.Option(metavar="S,S,...", help="[default: the model's, else 0 and its own]"),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Rows of each prompt, seed by seed.")] = 1,
    show_attention: Annotated[
        bool, typer.Option("--show-attention", help="Show where the pictures were blurred.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The PNG file.")] = Path("compare.png"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    *,
    options: PromptOptions,
) -> None:
    """Draw a grid: one row a prompt and seed, one column a guidance scale.

    Without a prompt, the model's own suggestions are used. The empty prompt is a good one.

    \b
    Examples:
      sag compare "red heart" "" --sag-scales 0,0.5,1
      sag compare "grinning face" --show-attention --out face.png
    """
    from ..generate import (
        check_folder,
        check_free,
        check_scales,
        compare,
        save_png,
    )

    given_scales = check_scales(parse_numbers(sag_scales)) if sag_scales is not None else []
    _check_before_loading(options, num_images)
    check_free([out], overwrite)
    check_folder(out.parent)
    loaded = _load(options)
    default_scales = loaded.recommended.compare_sag_scales or (0, loaded.pipeline.guidance.scale)
    prompts = prompts or list(loaded.recommended.compare_prompts) or [""]
    scales = given_scales or default_scales
    with progress(len(prompts) * num_images * len(scales)) as advance:
        comparison = compare(
            loaded.pipeline,
            prompts,
            scales,
            loaded.settings(**options.generation_arguments()),
            seed=options.seed,
            num_images=num_images,
            batch_size=options.batch_size,
            model_name=loaded.name,
            show_attention=show_attention,
            on_progress=advance,
        )
    save_png(comparison.grid, out, comparison.parameters, overwrite)
    print_line(out)


def _check_before_loading(options: PromptOptions, num_images: int, **settings: object) -> None:
    """Refuses what can be refused before a model is loaded, which takes its time."""
    from ..generate import (
        GenerationSettings,
        check_count,
        check_scheduler_name,
        find_device,
        find_dtype,
        find_model,
        seeds_of,
    )
    from ..guidance import SelfAttentionGuidance

    given: dict[str, Any] = settings | options.generation_arguments()
    GenerationSettings(**{name: value for name, value in given.items() if value is not None})
    SelfAttentionGuidance(**options.guidance_arguments())
    seeds_of(options.seed, num_images)
    check_count("batch_size", options.batch_size)
    if options.scheduler is not None:
        check_scheduler_name(options.scheduler)
    find_dtype(options.dtype, find_device(options.device))
    find_model(options.model)


def _load(options: PromptOptions) -> LoadedPipeline:
    from ..generate import load_pipeline

    hide_loading_bars()
    loaded = load_pipeline(options.model, options.device, options.dtype)
    loaded.use(scheduler=options.scheduler, fast=options.fast, **options.guidance_arguments())
    return loaded
