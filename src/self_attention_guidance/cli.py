"""The command line `sag`.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .cli_options import (
    SharedOptions,
    parse_numbers,
    with_shared_options,
)

if TYPE_CHECKING:
    from .generate import LoadedPipeline

# typer does not export the base class of its errors about the command line itself.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="sag",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"self-attention-guidance {__version__}")
        raise typer.Exit


@app.callback()
def _sag(  # pyright: ignore[reportUnusedFunction]  # typer calls it
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Self-Attention Guidance: better pictures from diffusion models, without training.

    \b
    Examples:
      sag generate "red heart" --seed 7
      sag compare "grinning face" "" --sag-scales 0,0.5,1
    """


@app.command("generate")
@with_shared_options
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
    shared: SharedOptions,
) -> None:
    """Make pictures and print their paths.

    Picture k of a prompt has the seed SEED + k and is saved as INDEX-SEED.png with its settings.

    \b
    Examples:
      sag generate "red heart" "grinning face" --num-images 4
      sag generate "a lighthouse" --model ./my-model --size 512x768 --scheduler "dpm++ 2m karras"
    """
    from .generate import (
        check_folder,
        check_free,
        generate,
        picture_path,
        save_png,
        seeds_of,
    )

    if not prompts:
        raise ValueError('PROMPT is missing: give at least one ("" is one, too)')
    seeds = seeds_of(shared.seed, num_images) * len(prompts)
    _check_before_loading(shared, num_images, sag_scale=sag_scale)
    paths = [picture_path(out, index, seed) for index, seed in enumerate(seeds)]
    check_folder(out)
    check_free(paths, overwrite)
    loaded = _load(shared)
    settings = loaded.settings(sag_scale=sag_scale, **shared.generation_arguments())
    with _progress(len(paths)) as advance:
        pictures = generate(
            loaded.pipeline,
            prompts,
            settings,
            seed=shared.seed,
            num_images=num_images,
            batch_size=shared.batch_size,
            model_name=loaded.name,
            on_progress=advance,
        )
        for picture, path in zip(pictures, paths, strict=True):
            save_png(picture.image, path, picture.parameters, overwrite)
            _print_path(path)
            if picture.flagged:
                typer.echo(f"warning: the model's safety checker blanked {path}", err=True)


@app.command("compare")
@with_shared_options
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
    shared: SharedOptions,
) -> None:
    """Draw a grid: one row a prompt and seed, one column a guidance scale.

    Without a prompt, the model's own suggestions are used. The empty prompt is a good one.

    \b
    Examples:
      sag compare "red heart" "" --sag-scales 0,0.5,1
      sag compare "grinning face" --show-attention --out face.png
    """
    from .generate import (
        check_folder,
        check_free,
        check_scales,
        compare,
        save_png,
    )

    given_scales = check_scales(parse_numbers(sag_scales)) if sag_scales is not None else []
    _check_before_loading(shared, num_images)
    check_free([out], overwrite)
    check_folder(out.parent)
    loaded = _load(shared)
    default_scales = loaded.recommended.compare_sag_scales or (0, loaded.pipeline.guidance.scale)
    prompts = prompts or list(loaded.recommended.compare_prompts) or [""]
    scales = given_scales or default_scales
    with _progress(len(prompts) * num_images * len(scales)) as advance:
        comparison = compare(
            loaded.pipeline,
            prompts,
            scales,
            loaded.settings(**shared.generation_arguments()),
            seed=shared.seed,
            num_images=num_images,
            batch_size=shared.batch_size,
            model_name=loaded.name,
            show_attention=show_attention,
            on_progress=advance,
        )
    save_png(comparison.grid, out, comparison.parameters, overwrite)
    _print_path(out)


def _check_before_loading(shared: SharedOptions, num_images: int, **settings: object) -> None:
    """Refuses what can be refused before a model is loaded, which takes its time."""
    from .generate import (
        GenerationSettings,
        check_count,
        check_scheduler_name,
        find_device,
        find_dtype,
        find_model,
        seeds_of,
    )
    from .guidance import SelfAttentionGuidance

    given: dict[str, Any] = settings | shared.generation_arguments()
    GenerationSettings(**{name: value for name, value in given.items() if value is not None})
    SelfAttentionGuidance(**shared.guidance_arguments())
    seeds_of(shared.seed, num_images)
    check_count("batch_size", shared.batch_size)
    if shared.scheduler is not None:
        check_scheduler_name(shared.scheduler)
    find_dtype(shared.dtype, find_device(shared.device))
    find_model(shared.model)


def _load(shared: SharedOptions) -> LoadedPipeline:
    from .generate import load_pipeline, make_scheduler

    _hide_loading_bars()
    loaded = load_pipeline(shared.model, shared.device, shared.dtype)
    pipeline: Any = loaded.pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.guidance = replace(pipeline.guidance, **shared.guidance_arguments())
    if shared.scheduler is not None:
        pipeline.scheduler = make_scheduler(shared.scheduler, pipeline.scheduler.config)
    return loaded


def _hide_loading_bars() -> None:
    """Loading from a disk takes a second; downloads keep their bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def _progress(pictures: int) -> Generator[Callable[[float], object]]:
    """A bar on stderr, if that is a terminal, that grows with every sampling step."""
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    description = f"{pictures} picture" + ("s" if pictures != 1 else "")
    # disable=None: not where stderr is a file or a pipe.
    with tqdm(total=pictures, desc=description, bar_format=form, disable=None) as bar:
        yield bar.update


def _print_path(path: Path) -> None:
    from tqdm import tqdm

    tqdm.write(str(path), file=sys.stdout)  # above the bar
    sys.stdout.flush()


@contextmanager
def _quiet_libraries() -> Generator[None]:
    """Keeps the libraries' remarks to developers from the user of a command line."""
    # Waiting threads sleep: spinning slows small models tenfold where other programs run, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name; `None` is those of the process.

    Returns:
        The exit status: 0, 2 after a user's error (one line on stderr), 130 after Ctrl-C.
    """
    command = typer.main.get_command(app)
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with _quiet_libraries():
            status = command.main(args=given, prog_name="sag", standalone_mode=False)
    except _UsageError as error:
        return _fail(error.format_message(), 2)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    if status == 130:
        return _fail("interrupted", 130)
    return int(status or 0)


def _fail(message: str, status: int) -> int:
    typer.echo("error: " + " ".join(message.split()), err=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
