"""The former home of `models.originals`, from which imports go on working."""

from .models.originals import *  # noqa: F403
