"""The former place of `models.builtin`; imports from here still work."""

from .models.builtin import *  # noqa: F403
