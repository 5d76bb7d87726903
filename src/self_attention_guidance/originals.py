"""The former place of `models.originals`; imports from here still work."""

from .models.originals import *  # noqa: F403
