"""The former home of `models.builtin`, from which imports go on working."""

from .models.builtin import *  # noqa: F403
