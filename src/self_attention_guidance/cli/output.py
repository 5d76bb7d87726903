"""Messages and progress bars of the commands."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..generate.loaded import Loaded

_MOST_CLASSES = 12
_QUOTED = re.compile(r"""(?<!\w)(['"])(.*?)\1(?!\w)|\S{160,}""")


def replace_unprintable() -> None:
    """Let stdout and stderr write characters that their encoding lacks, as "\\xe9", not fail."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        # In UTF-8, only names of files need "surrogateescape", which keeps their bytes.
        keeps_bytes = stream.errors == "surrogateescape" and stream.encoding.lower() == "utf-8"
        if not keeps_bytes:
            stream.reconfigure(errors="backslashreplace")


def reason_of(error: Exception) -> str:
    """What an error says, without the number that systems give it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{str(error.filename)!r} cannot be used: {error.strerror}"
    return str(error)


def print_error(message: str) -> None:
    """Print an error on stderr, in one line.

    Args:
        message: What is wrong, its value, and the rule; long values are shortened.
    """

    def shortened(found: re.Match[str]) -> str:
        text = found[0]
        return text if len(text) < 160 else f"{text[:80]}...{text[-40:]}"

    line = _QUOTED.sub(shortened, " ".join(message.split()))
    typer.echo(f"error: {line}", err=True)


def hide_loading_bars() -> None:
    """Hide the bars of loading from a disk, which takes a second. Downloads keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def warn(texts: Iterable[str]) -> None:
    """Print warnings on stderr.

    Args:
        texts: One line each.
    """
    for text in texts:
        typer.echo(f"warning: {text}", err=True)


def note(text: str, quiet: bool = False) -> None:
    """Print a note on stderr.

    Args:
        text: One line.
        quiet: Whether to print nothing.
    """
    if not quiet:
        typer.echo(f"note: {text}", err=True)


def drawn_with(loaded: Loaded[Any], record: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """All settings that pictures were drawn with, in one line.

    Args:
        loaded: The model.
        record: The record of one of the pictures, or of samples.
        seeds: The seeds of all.
    """
    from ..generate.schedulers import label_of

    settings = record["settings"]
    negative = settings.get("negative_prompt")
    parts = [
        "{}x{}".format(*record["size"]),
        f"{settings['num_inference_steps']} steps",
        label_of(record["scheduler"], record["scheduler_config"]),
        *([f"CFG {settings['guidance_scale']:g}"] if "guidance_scale" in settings else []),
        _guidance_of(loaded, record["guidance"]),
        *(f"LoRA {path}:{scale:g}" for path, scale in record.get("loras", [])),
        *([f"negative prompt {negative!r:.60}"] if negative else []),
        *_start_of(loaded, settings),
        *_of_samples(settings, record.get("class_names")),
        *([] if record["dtype"] == "float32" else [record["dtype"]]),
        f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}",
    ]
    return f"drawn by {record['model']}: {', '.join(parts)}"


def _guidance_of(loaded: Loaded[Any], guidance: Mapping[str, Any]) -> str:
    """A guidance as `--guidance` takes it, such that this model is guided in the same way."""
    from ..guidance import METHODS
    from ..guidance.text import guidance_text

    if not guidance["scale"]:
        return "no guidance"
    if "guidances" in guidance:
        return guidance_text(guidance)
    usual = loaded.usual(guidance["method"]).to_dict()
    plain = METHODS[guidance["method"]]().to_dict()
    return guidance_text(guidance, [name for name in usual if usual[name] != plain[name]])


def _start_of(loaded: Loaded[Any], settings: Mapping[str, Any]) -> list[str]:
    """The picture that drawing began with, if it was not noise."""
    from ..generate.kinds import own_strength

    if settings.get("image") is None:
        return []
    mask, strength = settings["mask"], settings["strength"]
    if strength is None:
        strength = own_strength(type(loaded.pipeline), mask is not None)
    return [
        f"image {settings['image']}",
        *([f"mask {mask}"] if mask is not None else []),
        *([f"strength {strength:g}"] if strength is not None else []),
    ]


def _of_samples(settings: Mapping[str, Any], names: Sequence[str] | None) -> list[str]:
    """Settings that only pixel-space models have; those that are off are left out."""
    labels = {"classifier_scale": "classifier", "eta": "eta"}
    numbers = {label: settings.get(name) for name, label in labels.items()}
    found = [f"{label} {value:g}" for label, value in numbers.items() if value]
    classes: Sequence[Any] = names or settings.get("classes") or []
    if classes:
        label = "class" if len(classes) == 1 else "classes"
        more = " ..." if len(classes) > _MOST_CLASSES else ""
        found.append(f"{label} {' '.join(map(str, classes[:_MOST_CLASSES]))}{more}")
    return found


@contextmanager
def progress(
    total: int, description: str | None = None, quiet: bool = False
) -> Generator[Callable[[float], object]]:
    """A bar on stderr, if that is a terminal, that grows with every sampling step.

    Args:
        total: Amount of work.
        description: What is done; `None` is the number of pictures.
        quiet: Whether to show no bar.

    Yields:
        A function that takes the work done since the last call.
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
    """A bar like that of `progress` that also shows the number of drawn pictures and the rate.

    Args:
        pictures: Number of pictures.
        drawn: How many of them an earlier run drew.
        quiet: Whether to show no bar.

    Yields:
        A function that takes the work done since the last call, in pictures.
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
        # Because of rounding, the shares may add up to a little more than the total.
        yield lambda share: bar.update(min(share, pictures - bar.n))


def print_line(line: str | Path) -> None:
    """Print a line on stdout, above a bar if there is one.

    Args:
        line: A path or a text.
    """
    from tqdm import tqdm

    tqdm.write(str(line), file=sys.stdout)
    sys.stdout.flush()
