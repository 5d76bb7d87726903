"""The command `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .like import arguments_like, as_drawn, given_names, record_like
from .loading import check_prompting, load_pipeline_of
from .options import OneScaleOptions, prompts_of
from .output import drawn_with, note, print_line, progress, warn

if TYPE_CHECKING:
    from ..generate import GeneratedImage

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class GenerateCommand(OneScaleOptions):
    """Make pictures and print their paths.

    Picture k of a prompt has the seed SEED + k and is saved as INDEX-SEED.png with its settings.
    Numbering continues in a folder that holds pictures.

    \b
    Examples:
      sag generate "red heart" "grinning face" --num-images 4
      sag generate --prompts prompts.txt --quiet
      sag generate --like out/00000-0.png --sag-scale 2
      sag generate "a lighthouse" --model ./my-model --size 512x768 --scheduler "dpm++ 2m karras"
    """

    context: typer.Context
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT")] = None
    num_images: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER|FILE.png", help="Where the pictures go; one picture can be a file."
        ),
    ] = Path("out")
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start numbering at 0 again, and replace existing files."),
    ] = False
    prompts_file: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts, one per line; - is stdin."),
    ] = None
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="Draw with the prompt and the settings of this picture, except for those given"
            " here.",
        ),
    ] = None

    def run(self) -> None:
        """Draw and save the pictures, and print their paths."""
        from ..generate import check_folder, check_free, next_index, picture_path, seeds_of
        from ..generate.files import check_place

        options, given = self, given_names(self.context)
        prompts = [*(self.prompts or []), *prompts_of(self.prompts_file)]
        record = None if self.like is None else record_like(self.like)
        if record is not None:
            options = as_drawn(self, record, given)
            prompts = prompts or [record["prompt"]]
        if not prompts:
            raise ValueError('PROMPT is missing: give at least one ("" is one, too)')
        seeds = [*seeds_of(options.seed, self.num_images)] * len(prompts)
        arguments = arguments_like(options.generation_arguments(), record, given)
        if _is_file(self.out, len(seeds)):
            folder, paths = self.out.parent, [self.out]
        else:
            folder, first = self.out, 0 if self.overwrite else next_index(self.out)
            paths = [picture_path(folder, first + k, seed) for k, seed in enumerate(seeds)]
        check_place(folder)
        check_free(paths, self.overwrite)
        check_prompting(options, self.num_images, arguments)
        check_folder(folder)
        _draw(prompts, paths, options, arguments, record)


def _is_file(out: Path, pictures: int) -> bool:
    """Whether `--out` names a picture, not a folder.

    Raises:
        ValueError: It names a picture of another format, or one for several.
    """
    suffix = out.suffix.lower()
    if suffix not in _PICTURES or out.is_dir():
        return False
    if suffix != ".png":
        raise ValueError(f"out={str(out)!r} must end in .png: that format holds the settings")
    if pictures > 1:
        raise ValueError(f"out={str(out)!r} is one file, for {pictures} pictures: name a folder")
    return True


def _draw(
    prompts: Sequence[str],
    paths: Sequence[Path],
    options: GenerateCommand,
    arguments: Mapping[str, Any],
    record: Mapping[str, Any] | None,
) -> None:
    from ..generate import check_own_size, generate, save_png

    loaded = load_pipeline_of(options, record)
    settings = loaded.settings(**arguments)
    check_own_size(loaded.pipeline, settings, options.max_size)
    last: GeneratedImage | None = None
    warned: set[str] = set()
    with progress(len(paths), quiet=options.quiet) as advance:
        pictures = generate(
            loaded.pipeline,
            prompts,
            settings,
            seed=options.seed,
            num_images=options.num_images,
            batch_size=options.batch_size,
            model_name=loaded.name,
            on_progress=advance,
        )
        for last, path in zip(pictures, paths, strict=True):
            save_png(last.image, path, last.record, options.overwrite)
            print_line(path)
            warn(text for text in last.warnings if text not in warned)
            warned.update(last.warnings)
            if last.flagged:
                warn([f"the model's safety checker blanked {path}"])
    if last is not None:
        seeds = range(options.seed, options.seed + options.num_images)
        note(drawn_with(loaded, last.record, seeds), options.quiet)
