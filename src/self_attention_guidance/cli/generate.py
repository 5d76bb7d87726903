"""The command `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .loading import check_prompting, load_pipeline_of
from .options import OneScaleOptions, with_options
from .output import print_line, progress


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(OneScaleOptions):
    """The options of `generate`; `None` was not given."""

    num_images: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the pictures go.")] = Path(
        "out"
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False


@with_options(GenerateOptions)
def generate_command(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT")] = None,
    *,
    options: GenerateOptions,
) -> None:
    """Make pictures and print their paths.

    Picture k of a prompt has the seed SEED + k and is saved as INDEX-SEED.png with its settings.

    \b
    Examples:
      sag generate "red heart" "grinning face" --num-images 4
      sag generate "a lighthouse" --model ./my-model --size 512x768 --scheduler "dpm++ 2m karras"
    """
    from ..generate import check_folder, check_free, generate, picture_path, save_png, seeds_of

    if not prompts:
        raise ValueError('PROMPT is missing: give at least one ("" is one, too)')
    seeds = seeds_of(options.seed, options.num_images) * len(prompts)
    check_prompting(options, options.num_images)
    paths = [picture_path(options.out, index, seed) for index, seed in enumerate(seeds)]
    check_folder(options.out)
    check_free(paths, options.overwrite)
    loaded = load_pipeline_of(options)
    with progress(len(paths)) as advance:
        pictures = generate(
            loaded.pipeline,
            prompts,
            loaded.settings(**options.generation_arguments()),
            seed=options.seed,
            num_images=options.num_images,
            batch_size=options.batch_size,
            model_name=loaded.name,
            on_progress=advance,
        )
        for picture, path in zip(pictures, paths, strict=True):
            save_png(picture.image, path, picture.record, options.overwrite)
            print_line(path)
            if picture.flagged:
                typer.echo(f"warning: the model's safety checker blanked {path}", err=True)
