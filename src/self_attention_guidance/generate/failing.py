"""Errors that a model raises inside its call, in one line."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

from ..checks import GuidanceError

# torch has its own class of error for the memory of GPUs only.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


@contextmanager
def failures_in_one_line() -> Generator[None]:
    """Turn what libraries raise for a model whose parts do not fit each other into `ValueError`.

    Raises:
        ValueError: The model can't draw, or guidance can't act.
    """
    try:
        yield
    except GuidanceError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (RuntimeError, TypeError, AttributeError, LookupError, AssertionError) as error:
        line = " ".join(str(error).split())[:300]
        if OUT_OF_MEMORY.search(line) or "CUDA error" in line:
            raise  # it is the machine that fails
        raise ValueError(
            f"the model can't draw: do its parts fit each other? {type(error).__name__}: {line}"
        ) from error
