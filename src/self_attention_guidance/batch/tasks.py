"""From the rows of a list to the pictures to draw."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..checks import check_count, check_finite, check_text, seeds_of
from ..generate.sample_settings import SampleSettings
from ..generate.settings import GenerationSettings
from ..generate.start_picture import check_start, digests

COLUMNS = (
    "prompt",
    "id",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "steps",
    "guidance_scale",
    "sag_scale",
    "num_images",
    "image",
    "mask",
    "strength",
)
_MOST_IMAGES = 100_000
# Settings that are whole numbers; all other numbers may have fractions.
_WHOLE = ("num_inference_steps", "width", "height")
# What a model without prompts has no use for.
_OF_PROMPTS = (
    *("prompt", "negative_prompt", "width", "height", "guidance_scale", "image", "mask"),
    "strength",
)


class TableFloat(float):
    """A number of a table; the type of its column holds all whole numbers below `exact`."""

    exact = 2**53

    @classmethod
    def of(cls, value: float, exact: int) -> TableFloat:
        """The number of a column with a shorter type than Python's floats."""
        found = cls(value)
        found.exact = exact
        return found


@dataclass(frozen=True, slots=True)  # a list may have millions
class Task:
    """A picture to draw. Only this and the model decide how it looks.

    Attributes:
        row: Number of its row in the list, from 0.
        image: Number of the picture in its row, from 0.
        id: Name of the row; its number if it has none.
        prompt: Its prompt; may be empty.
        seed: Its seed.
        settings: All other settings, without classes.
        label: Its class; `None` leaves it to the model.
        digest: 64 bits that identify its picture; its place in the list and its id do not count.

    Raises:
        ValueError: A start picture can't be read.
    """

    row: int
    image: int
    id: str
    prompt: str
    seed: int
    settings: GenerationSettings | SampleSettings
    label: int | None = None
    digest: int = field(init=False)

    def __post_init__(self) -> None:
        """Compute the digest: later, a start picture may be gone."""
        settings = self.settings
        is_prompted = isinstance(settings, GenerationSettings)
        pictures = digests(settings).values() if is_prompted else ()
        # A model's 3 and the 3.0 of an option are one setting.
        values = (
            float(value) if type(value) is int and name not in _WHOLE else value
            for name, value in vars(settings).items()
        )
        digest = _digest((self.prompt, self.seed, *values, *pictures))
        object.__setattr__(self, "digest", digest)

    @property
    def name(self) -> str:
        """The name of its file, without ending; names sort in the order of rows."""
        return f"{self.row:09d}-{self.image:03d}"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be drawn.

    Attributes:
        row: Its number in the list, from 0.
        id: Its name, or its number.
        prompt: What it holds instead of a prompt, as text.
        error: The reason, in one line.
    """

    row: int
    id: str
    prompt: str
    error: str

    @property
    def digest(self) -> int:
        """64 bits that identify a bad row."""
        return _digest((self.prompt, self.error))


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The values for empty cells of a row, and the limits of all rows.

    Attributes:
        settings: Settings of the pictures.
        seed: Picture k of a row has this seed plus k, at least 0.
        num_images: Pictures of a row, at least 1.
        max_size: Largest side, in pixels.
        max_steps: Largest number of sampling steps.
        takes_prompts: Whether the model does; otherwise rows may not hold what belongs to prompts.

    Raises:
        ValueError: A setting is out of its range.
    """

    settings: GenerationSettings
    seed: int = 0
    num_images: int = 1
    max_size: int = 2048
    max_steps: int = 1000
    takes_prompts: bool = True

    def __post_init__(self) -> None:
        """Check every setting."""
        seeds_of(self.seed, self.num_images)
        check_count("max_size", self.max_size, least=8)
        check_count("max_steps", self.max_steps)
        _check_limits(self.settings, self)


def tasks_of(row: int, values: Mapping[str, Any] | ValueError, defaults: Defaults) -> list[Task]:
    """The pictures of a row.

    Args:
        row: Its number in the list.
        values: Cells by column, texts or numbers; `None` is an empty cell, and so is ""
            except for prompts. If it is an error, that is raised.
        defaults: Values for empty cells.

    Raises:
        ValueError: A cell is of the wrong kind or out of its range, or there is no prompt.
    """
    if isinstance(values, ValueError):
        raise values
    given = {name: values.get(name) for name in COLUMNS}
    if given["prompt"] is None:
        raise ValueError("prompt is missing")
    filled = {name: value for name, value in given.items() if value is not None and value != ""}
    for column in () if defaults.takes_prompts else _OF_PROMPTS:
        if column in filled:
            raise ValueError(f"{column} must be empty: the model takes no prompts")
    prompt = check_text("prompt", given["prompt"])
    settings = _settings(filled, defaults)
    seed = _whole("seed", filled.get("seed", defaults.seed))
    count = _whole("num_images", filled.get("num_images", defaults.num_images))
    if count > _MOST_IMAGES:
        raise ValueError(f"num_images={count} must be at most {_MOST_IMAGES}")
    name = check_text("id", _name(row, filled.get("id")))
    seeds = enumerate(seeds_of(seed, count))
    return [Task(row, image, name, prompt, number, settings) for image, number in seeds]


def bad_row(row: int, values: Mapping[str, Any] | ValueError, error: ValueError) -> BadRow:
    """A row that `tasks_of` refused.

    Args:
        row: Its number in the list.
        values: The cells that were given to `tasks_of`.
        error: What `tasks_of` raised.
    """
    cells: Mapping[str, Any] = {} if isinstance(values, ValueError) else values
    line = " ".join(str(error).split())
    prompt = cells.get("prompt")
    return BadRow(
        row,
        clean(_name(row, cells.get("id"))),
        clean(str(prompt))[:1000] if prompt is not None else "",
        clean(line)[:1000],
    )


def unconditional_tasks(count: int, defaults: Defaults) -> Iterator[Task]:
    """Pictures without a prompt; picture i has the default seed plus i.

    Args:
        count: Number of pictures, at least 1.
        defaults: Settings of all of them.
    """
    for number, seed in enumerate(seeds_of(defaults.seed, count)):
        yield Task(number, 0, str(number), "", seed, defaults.settings)


def _settings(filled: Mapping[str, Any], defaults: Defaults) -> GenerationSettings:
    changes: dict[str, Any] = {}
    if "negative_prompt" in filled:
        changes["negative_prompt"] = check_text("negative_prompt", filled["negative_prompt"])
    for column, name in {
        "width": "width",
        "height": "height",
        "steps": "num_inference_steps",
    }.items():
        if column in filled:
            changes[name] = check_count(column, _whole(column, filled[column]))
            _check_limit(column, changes[name], defaults)
    for column in ("image", "mask"):
        if column in filled:
            changes[column] = check_text(column, filled[column])
    for column in ("guidance_scale", "sag_scale", "strength"):
        if column in filled:
            changes[column] = _number(column, filled[column])
    if not changes:  # the defaults have been checked
        return defaults.settings
    settings = replace(defaults.settings, **changes)
    _check_limits(settings, defaults)
    return settings


def _check_limits(settings: GenerationSettings, defaults: Defaults) -> None:
    check_start(settings, defaults.max_size)
    for name in ("width", "height"):
        _check_limit(name, getattr(settings, name) or 0, defaults)
    _check_limit("steps", settings.num_inference_steps, defaults)


def _check_limit(column: str, value: int, defaults: Defaults) -> None:
    limit = "max_steps" if column == "steps" else "max_size"
    if value > (most := getattr(defaults, limit)):
        option = limit.replace("_", "-")
        raise ValueError(f"{column}={value!r:.60} must be at most {most} (--{option})")


def clean(text: str) -> str:
    """Text that UTF-8 can hold.

    Args:
        text: The text; what is not a character in it becomes "?".
    """
    return text.encode("utf-8", "replace").decode("utf-8")


def _whole(name: str, value: object) -> int:
    """A whole number; tables store it as text, or as a float if the column has empty cells."""
    value = _read(name, value, int, "a whole number")
    if isinstance(value, float) and value.is_integer():
        exact = getattr(value, "exact", TableFloat.exact)
        if abs(value) >= exact:
            raise ValueError(
                f"{name}={value:.17g} may not be the number that was written: the list has it as a "
                f"float, which is exact below 2**{exact.bit_length() - 1}; write it as text"
            )
        value = int(value)
    return check_count(name, value, least=0)


def _number(name: str, value: object) -> float:
    return float(check_finite(name, _read(name, value, float, "a finite number")))


def _read(name: str, value: object, kind: Callable[[str], object], rule: str) -> object:
    """A cell's value; texts are converted to the type of the column."""
    if not isinstance(value, str):
        return value
    try:
        return kind(value.replace("_", " "))  # only Python reads 1_0 as ten
    except ValueError:
        raise ValueError(f"{name}={value[:40]!r} must be {rule}") from None


def _name(row: int, value: object) -> str:
    return str(row) if value is None or value == "" else str(value)[:1000]


def _digest(values: tuple[Any, ...]) -> int:
    found = hashlib.blake2b(repr(values).encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(found.digest(), "big")
