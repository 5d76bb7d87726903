"""How samples are drawn: guidance, steps and the scale of classifier-free guidance."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from self_attention_guidance import Guidance


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Attributes:
        guidance: Guidances that are attached together; none draws without guidance.
        steps: Sampling steps.
        cfg: Scale of classifier-free guidance; 1 is off.
        dtype: Of the network's products: "bfloat16" or "float32".
        scheduler: A name of `sag generate --scheduler`; `None` is the model's own.
    """

    guidance: tuple[Guidance, ...] = ()
    steps: int = 25
    cfg: float = 1.0
    dtype: str = "bfloat16"
    scheduler: str | None = None

    @property
    def evaluations(self) -> int:
        """Network evaluations for one sample: two a step with classifier-free guidance."""
        rows = 2 if self.cfg > 1 else 1
        return rows * self.steps + sum(_passes(each, self.steps) for each in self.guidance)

    def to_dict(self) -> dict[str, Any]:
        """All of it that is not as usual, for JSON."""
        described = {**vars(self), "guidance": [each.to_dict() for each in self.guidance]}
        return {name: value for name, value in described.items() if value is not None}

    @staticmethod
    def from_dict(described: dict[str, Any]) -> Setting:
        """What `to_dict` gave."""
        guidance = tuple(Guidance.from_dict(each) for each in described["guidance"])
        return Setting(**{**described, "guidance": guidance})


def _passes(guidance: Guidance, steps: int) -> int:
    """Weakened passes of one sample."""
    guided = sum(guidance.acts_at(step, steps) for step in range(steps))
    return math.ceil(guided / guidance.every)


def fitting(setting: Setting, evaluations: float) -> Setting:
    """A setting with the most steps that so many evaluations of the network allow."""
    longer = dataclasses.replace(setting, steps=1)
    while longer.evaluations <= evaluations:
        setting = longer
        longer = dataclasses.replace(setting, steps=setting.steps + 1)
    return setting
