"""The settings of a tuning run."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_count, check_prompts, check_text, seeds_of
from .plan import MOST_SEEDS, Budget, fewest_pictures

RESULT_FILE = "result.json"
"""The file that a run writes into its folder when it is done."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """The settings of a tuning run, checked when made.

    Attributes:
        budget: Time or number of pictures.
        methods: Short names of guidances; empty is all that suit the model.
        prompts: Used by the seeds in turn; ("",) draws without a prompt.
        steps: Sampling steps of all settings; `None` is the model's own number.
        count: Number of seeds, half to choose on and half to report on, a multiple of twice
            `batch_size`; `None` derives it from the budget.
        seed: The first seed.
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
        """Check every setting."""
        check_prompts(self.prompts)
        if self.steps is not None:
            check_count("steps", self.steps)
        fewest_pictures(self.batch_size, 1, self.count)  # checks both
        seeds_of(self.seed, self.count or 2 * MOST_SEEDS)
        for method in self.methods:
            check_text("methods", method)
