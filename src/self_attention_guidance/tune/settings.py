"""What a run of tuning is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_count, check_prompts, check_text, seeds_of
from .plan import Budget, fewest_pictures

RESULT_FILE = "result.json"
"""What a run writes into its folder when it is done."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What a run of tuning is asked for, checked when made.

    Attributes:
        budget: How much may be drawn.
        methods: Short names of guidances; empty is all that suit the model.
        prompts: Given out to the seeds in turn; ("",) draws without.
        steps: Sampling steps of all settings; `None` is the model's own number.
        count: Seeds, those to choose on and those to report on together, a multiple of twice
            `batch_size`; `None` follows from the budget.
        seed: The first one.
        batch_size: Pictures drawn at once; the last bits of pictures depend on it.

    Raises:
        ValueError: A setting is outside its range.
    """

    budget: Budget
    methods: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ("",)
    steps: int | None = None
    count: int | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Checks every setting."""
        check_prompts(self.prompts)
        if self.steps is not None:
            check_count("steps", self.steps)
        fewest_pictures(self.batch_size, 1, self.count)  # checks both
        seeds_of(self.seed, self.count or 1)
        for method in self.methods:
            check_text("methods", method)
