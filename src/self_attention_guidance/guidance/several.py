"""Several guidances as one setting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..checks import as_python, check_number
from .base import Guidance

if TYPE_CHECKING:
    from ..denoiser.families import BatchLayout
    from ..denoiser.noise import Scheduler
    from .handle import GuidanceHandle


@dataclass(frozen=True)
class GuidanceSum:
    """Several guidances whose terms add up: `SelfAttentionGuidance(0.5) + BlurGuidance(0.2)`.

    Attributes:
        guidances: At least two guidances. Each has its own settings and weakened pass.
        scale: Factor for all of their scales, any finite number; 0 is off.

    Raises:
        ValueError: There are fewer than two guidances, or the scale is not finite.
    """

    guidances: tuple[Guidance, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check both settings."""
        object.__setattr__(self, "scale", as_python(self.scale))
        check_number("scale", self.scale, -math.inf, math.inf)
        if len(self.guidances) < 2:
            raise ValueError(f"guidances={self.guidances!r} must be at least two")

    @property
    def method(self) -> str:
        """The short names, for example "sag+pag"."""
        return "+".join(each.method for each in self.guidances)

    @property
    def parts(self) -> tuple[Guidance, ...]:
        """The guidances with their final scales, for `attach`."""
        return tuple(
            dataclasses.replace(each, scale=each.scale * self.scale) for each in self.guidances
        )

    def __add__(self, other: Guidance | GuidanceSum) -> GuidanceSum:
        """Return the sum of both."""
        return GuidanceSum(self.parts + other.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON values; `guidance_of` reads them."""
        parts = [each.to_dict() for each in self.guidances]
        return {"method": self.method, "scale": self.scale, "guidances": parts}

    def attach(
        self,
        target: Any,
        *,
        scheduler: Scheduler | None = None,
        batch_layout: BatchLayout | None = None,
    ) -> GuidanceHandle:
        """Guide every call of a denoiser until the handle is removed (see `Guidance.attach`)."""
        from .handle import attach

        return attach(target, *self.parts, scheduler=scheduler, batch_layout=batch_layout)


def guidance_of(settings: Mapping[str, Any]) -> Guidance | GuidanceSum:
    """Make one or several guidances from the output of `to_dict`; defaults for missing settings.

    Args:
        settings: The settings, with the short name as "method". For several guidances, "method" is
            "sag+pag", for example, and "guidances" holds the settings of each.

    Raises:
        ValueError: A method or a setting is not known, or has a value out of its range.
    """
    if not isinstance(settings, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"settings={settings!r} must be settings by name")
    named = [{"method": name} for name in str(settings.get("method")).split("+")]
    if len(named) == 1:
        return Guidance.from_dict(settings)
    for unknown in settings.keys() - {"method", "scale", "guidances"}:
        raise ValueError(f"{unknown!r} is not a setting of several guidances together")
    given = settings.get("guidances", named)
    if not isinstance(given, list | tuple):
        raise ValueError(f"guidances={given!r} must be a list of settings")
    parts = tuple(Guidance.from_dict(each) for each in cast("Sequence[Any]", given))
    found = GuidanceSum(parts, settings.get("scale", 1.0))
    if found.method != settings["method"]:
        raise ValueError(f"method={settings['method']!r} must be {found.method!r}")
    return found
