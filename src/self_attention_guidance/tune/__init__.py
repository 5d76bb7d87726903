"""Tuning guidance for your model: successive halving over methods, layers, scales and windows.

Example:
    ```python
    from self_attention_guidance.evaluate import load_encoder
    from self_attention_guidance.generate import load_pixel_model
    from self_attention_guidance.tune import TuneJob, TuneSettings, parse_budget

    loaded = load_pixel_model("emoji-adm")
    settings = TuneSettings(budget=parse_budget("30m"), methods=("sag", "pag"), steps=25)
    found, pictures = TuneJob(loaded, "tuned", settings, load_encoder("emoji")).run()
    found.rows[found.chosen].candidate.guidance  # for `loaded.pipeline.guidance`
    ```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import exported

if TYPE_CHECKING:
    from .halving import prefer_cheaper, search
    from .job import TuneJob, check_budget
    from .plan import Budget, Plan, fewest_pictures, make_plan, parse_budget
    from .report import About, write_report
    from .result import Row, Tuned, settings_content, write_settings
    from .settings import TuneSettings
    from .space import Candidate, Space, space_of

__all__ = [
    "TuneJob",
    "check_budget",
    "TuneSettings",
    "Budget",
    "parse_budget",
    "Plan",
    "make_plan",
    "fewest_pictures",
    "search",
    "prefer_cheaper",
    "Space",
    "space_of",
    "Candidate",
    "Tuned",
    "Row",
    "settings_content",
    "write_settings",
    "About",
    "write_report",
]

# Importing torch takes seconds; a wrong command line is reported without it.
__getattr__, __dir__ = exported(
    __name__,
    {
        ".halving": ("prefer_cheaper", "search"),
        ".job": ("TuneJob", "check_budget"),
        ".plan": ("Budget", "Plan", "fewest_pictures", "make_plan", "parse_budget"),
        ".report": ("About", "write_report"),
        ".result": ("Row", "Tuned", "settings_content", "write_settings"),
        ".settings": ("TuneSettings",),
        ".space": ("Candidate", "Space", "space_of"),
    },
)
