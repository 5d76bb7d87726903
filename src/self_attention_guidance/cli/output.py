"""Messages and progress bars of the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..generate import GeneratedImage


def hide_loading_bars() -> None:
    """Hides the libraries' bars: loading from a disk takes a second. Downloads keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def warn_unread(picture: GeneratedImage) -> None:
    """Tells the end of a prompt that the model did not read.

    Args:
        picture: Drawn of it.
    """
    end = picture.unread if len(picture.unread) < 60 else f"...{picture.unread[-60:]}"
    message = f"warning: the prompt is too long for this model, and its end was cut: {end!r}"
    print(message, file=sys.stderr)


def note(text: str, quiet: bool = False) -> None:
    """Tells on stderr what one need not know.

    Args:
        text: A line.
        quiet: Whether it is kept back.
    """
    if not quiet:
        typer.echo(f"note: {text}", err=True)


def drawn_with(record: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """The settings that pictures were drawn with, those of the model included, in a line.

    Args:
        record: Of one of the pictures.
        seeds: Of all.
    """
    from ..generate.schedulers import label_of
    from ..guidance.text import guidance_text

    settings = record["settings"]
    parts = [
        "{}x{}".format(*record["size"]),
        f"{settings['num_inference_steps']} steps",
        label_of(record["scheduler"], record["scheduler_config"]),
        f"CFG {settings['guidance_scale']:g}",
        guidance_text(record["guidance"]) if record["guidance"]["scale"] else "no guidance",
        *_start_of(settings),
        f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}",
    ]
    return f"drawn by {record['model']}: {', '.join(parts)}"


def _start_of(settings: Mapping[str, Any]) -> list[str]:
    """The picture that drawing began with, if it was not noise."""
    if settings["image"] is None:
        return []
    strength = settings["strength"]
    masked = " with its mask" if settings["mask"] is not None else ""
    return [f"from {settings['image']}{masked}"] + (
        [f"strength {strength:g}"] if strength is not None else []
    )


@contextmanager
def progress(
    total: int, description: str | None = None, quiet: bool = False
) -> Generator[Callable[[float], object]]:
    """A bar on stderr, if that is a terminal, that grows with every sampling step.

    Args:
        total: How much there is to do.
        description: What is done; `None` is so many pictures.
        quiet: Whether there is none at all.

    Yields:
        A function that takes how much was done since it was last called.
    """
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    label = description or f"{total} picture" + ("s" if total != 1 else "")
    # disable=None: not where stderr is a file or a pipe.
    with tqdm(total=total, desc=label, bar_format=form, disable=quiet or None) as bar:
        yield bar.update


@contextmanager
def counting_progress(
    pictures: int, drawn: int, quiet: bool = False
) -> Generator[Callable[[float], object]]:
    """A bar like that of `progress` that also shows how many are drawn, and how fast.

    Args:
        pictures: How many there will be.
        drawn: How many were drawn by an earlier run.
        quiet: Whether there is none at all.

    Yields:
        A function that takes how many pictures' work was done since it was last called.
    """
    from tqdm import tqdm

    form = (
        "{percentage:3.0f}%|{bar}| {n:.1f} of {total} pictures, {rate_noinv_fmt},"
        " {elapsed}<{remaining}"
    )
    with tqdm(
        total=pictures,
        initial=drawn,
        unit=" pictures",
        bar_format=form,
        smoothing=0.05,
        disable=quiet or None,
    ) as bar:
        # Shares of pictures add up to a little more or less than the whole.
        yield lambda share: bar.update(min(share, pictures - bar.n))


def print_line(line: str | Path) -> None:
    """Prints a line on stdout, above a bar if there is one.

    Args:
        line: A path or a text.
    """
    from tqdm import tqdm

    tqdm.write(str(line), file=sys.stdout)
    sys.stdout.flush()
