"""What a run of tuning found, and the `sag_settings.json` that is made of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluate import Estimate
from ..generate.files import whole_file
from .plan import Plan
from .scores import Drawn, Score
from .space import Candidate


@dataclass(frozen=True)
class Row:
    """A setting in the report; all figures are of the seeds that took no part in the choice.

    Attributes:
        candidate: The setting.
        score: With its 95 % interval.
        against_unguided: How much larger the score is than without guidance, paired.
        against_own: The same against what the model was drawn with before.
        drawn: What its pictures are like.
    """

    candidate: Candidate
    score: Estimate
    against_unguided: Estimate
    against_own: Estimate
    drawn: Drawn


@dataclass(frozen=True)
class Tuned:
    """What a run found.

    Attributes:
        rows: No guidance first, then the best settings, the chosen one first of them unless it is
            no guidance, and last the model's own if it is none of these.
        chosen: Number of the row that was chosen, or that the user chose.
        own: What the model was drawn with before.
        ranking: All that the last rung was drawn for, the best first, with their scores there.
        seeds: On how many seeds these scores are, and those of the rows.
        tried: How many settings were tried.
        failures: Why some could not be drawn.
        pictures: How many were drawn.
        seconds: How long it took.
        plan: What was meant to be drawn.
        steps: Sampling steps.
        score: What settings were ranked by.
    """

    rows: tuple[Row, ...]
    chosen: int
    own: Candidate
    ranking: tuple[tuple[Candidate, float], ...]
    seeds: tuple[int, int]
    tried: int
    failures: Mapping[str, str]
    pictures: int
    seconds: float
    plan: Plan
    steps: int
    score: Score


def settings_content(candidate: Candidate, steps: int, there: Path) -> dict[str, Any]:
    """What `sag_settings.json` holds for a setting.

    Args:
        candidate: The setting.
        steps: Sampling steps that it was tried with.
        there: An earlier file, whose section "compare" is kept; it need not exist.
    """
    settings = candidate.guidance.to_dict()
    usual = type(candidate.guidance)().to_dict()
    generation: dict[str, Any] = {"num_inference_steps": steps}
    if candidate.cfg is not None:
        generation["guidance_scale"] = candidate.cfg
    kept = {n: v for n, v in settings.items() if n in ("method", "scale") or v != usual[n]}
    content: dict[str, Any] = {"guidance": kept, "generation": generation}
    earlier: Any = json.loads(there.read_text(encoding="utf-8")) if there.is_file() else {}
    return content | ({"compare": earlier["compare"]} if "compare" in earlier else {})


def write_settings(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a `sag_settings.json` in one go.

    Args:
        path: The file; one that is there is replaced.
        content: Of `settings_content`.
    """
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def as_json(found: Tuned) -> dict[str, Any]:
    """What a run found, as `json.dumps` takes it.

    Args:
        found: By the run.
    """
    return {
        "score": found.score.title,
        "chosen": found.chosen,
        "seeds": found.seeds,
        "tried": found.tried,
        "pictures": found.pictures,
        "seconds": found.seconds,
        "failures": dict(found.failures),
        "rows": [
            {
                "setting": str(row.candidate),
                "guidance": row.candidate.guidance.to_dict(),
                "guidance_scale": row.candidate.cfg,
                "score": dataclasses.asdict(row.score),
                "against_unguided": dataclasses.asdict(row.against_unguided),
                "against_own": dataclasses.asdict(row.against_own),
                "evaluations": row.drawn.evaluations,
                "seconds": row.drawn.seconds,
            }
            for row in found.rows
        ],
        "ranking": [{"setting": str(each), "score": score} for each, score in found.ranking],
    }
