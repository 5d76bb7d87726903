"""Checks of arguments before any work; each error is one line."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

# Squares of the values that settings are multiplied with must fit into float32.
_LARGEST = 1e9
# More do not fit into memory or a day; a mistyped number would fill both.
_MOST_IMAGES = 10_000_000
_MOST_STEPS = 100_000

Number = TypeVar("Number", int, float)


class GuidanceError(RuntimeError):
    """Guidance can't act as it was asked to, or can't be sure that it does."""


def seeds_of(seed: int, num_images: int, name: str = "num_images") -> range:
    """Return the seeds of a prompt's pictures: `seed`, `seed + 1`, ...

    Args:
        seed: Seed of the first picture, at least 0.
        num_images: Number of pictures, 1 to ten million.
        name: Name of the number of pictures, for the message.

    Raises:
        ValueError: An argument is outside its range.
    """
    seed, num_images = as_python(seed), as_python(num_images)
    check_count(name, num_images, most=_MOST_IMAGES)
    check_seed(seed)
    if seed + num_images > 2**64:
        raise ValueError(f"seed={seed} with {name}={num_images}: seeds must be below 2**64")
    return range(seed, seed + num_images)


def check_seed(seed: object) -> None:
    """Refuse a seed that no generator of random numbers takes."""
    if check_count("seed", seed, least=0) >= 2**64:
        raise ValueError(f"seed={seed!r:.60} is too large: seeds must be below 2**64")


def check_steps(steps: object, name: str = "num_inference_steps") -> None:
    """Refuse a number of sampling steps that no scheduler takes."""
    check_count(name, steps, most=_MOST_STEPS)


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Return prompts as a list.

    Args:
        prompts: One prompt or several.

    Raises:
        ValueError: There is no prompt, or one is not a text.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError('prompts=[] must hold at least one prompt ("" is one, too)')
    for prompt in prompts:
        check_text("prompts", prompt)
    return prompts


def as_python(value: Any) -> Any:
    """Return Python's own number for one of another kind, such as NumPy's; else the value itself.

    JSON, and so the metadata of pictures, holds no others.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def keep_python_numbers(settings: Any) -> None:
    """Replace the numbers in the fields of a frozen dataclass by Python's own."""
    for each in dataclasses.fields(settings):
        object.__setattr__(settings, each.name, as_python(getattr(settings, each.name)))


def check_count(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Refuse a value that is not a whole number, too small or too large.

    Args:
        name: Name of the argument, for the message.
        value: Its value.
        least: The smallest allowed value.
        most: The largest allowed value; `None` is no limit.

    Returns:
        The value.

    Raises:
        ValueError: It is not a whole number, or outside the limits.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r:.60} must be a whole number, at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={value!r:.60} must be at most {most}")
    return value


def parse_number(text: str, kind: Callable[[str], Number]) -> Number:
    """Read a number as people write it: only Python reads "1_0" as ten.

    Args:
        text: The number.
        kind: `int` or `float`.

    Raises:
        ValueError: It is no number of that kind.
    """
    return kind(text.replace("_", " "))


def check_finite(name: str, value: object) -> float:
    """Refuse a value that is not a finite number, or larger than any useful setting.

    Args:
        name: Name of the argument, for the message.
        value: Its value.

    Returns:
        The value.

    Raises:
        ValueError: It is infinite, not a number, above 1e9 in size, or of another type.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < math.inf:
        raise ValueError(f"{name}={value!r:.60} must be a finite number")
    if abs(value) > _LARGEST:
        raise ValueError(f"{name}={value!r:.60} must be at most {_LARGEST:g} in size")
    return value


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Refuse a value that is not a number within limits; the upper limit may be infinite."""
    if not low <= check_finite(name, value) <= high:
        limits = f"from {low} to {high}" if high < math.inf else f"at least {low}"
        raise ValueError(f"{name}={value!r} must be {limits}")


def check_scales(sag_scales: Sequence[float]) -> list[float]:
    """Return guidance scales as a list of finite numbers.

    Args:
        sag_scales: At least one number.

    Raises:
        ValueError: There is no number, or one is not finite.
    """
    if not sag_scales:
        raise ValueError("sag_scales=[] must hold at least one number")
    return [float(check_finite("sag_scales", scale)) for scale in sag_scales]


def check_text(name: str, value: object) -> str:
    """Refuse a value that is not a text.

    Args:
        name: Name of the argument, for the message.
        value: Its value.

    Returns:
        The value.

    Raises:
        ValueError: It is of another type, or UTF-8 cannot hold it.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name}: {value!r} must be a text")
    if value.encode("utf-8", "replace").decode("utf-8") != value:
        raise ValueError(f"{name} holds half of a surrogate pair, which is not a character")
    return value


def check_layer(name: str, value: object) -> None:
    """Refuse a value that is neither a dotted path nor `None`."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{name}={value!r} must be a dotted module path, or None")
