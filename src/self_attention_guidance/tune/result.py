"""The result of a tuning run, and the `sag_settings.json` that is made from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batch.storage import json_object
from ..evaluate import Estimate
from ..generate.files import whole_file
from .plan import Plan
from .scores import Drawn, Score
from .space import Candidate


@dataclass(frozen=True)
class Row:
    """A setting in the report; all figures are from seeds that were not used to choose.

    Attributes:
        candidate: The setting.
        score: The score with its 95 % interval.
        against_unguided: How much larger the score is than without guidance, paired.
        against_own: How much larger it is than with the model's earlier settings, paired; `None` if
            these could not be drawn.
        drawn: Results of its pictures.
    """

    candidate: Candidate
    score: Estimate
    against_unguided: Estimate
    against_own: Estimate | None
    drawn: Drawn


@dataclass(frozen=True)
class Tuned:
    """The result of a run.

    Attributes:
        rows: No guidance first; then the best settings, beginning with the chosen one unless that
            is no guidance; last the model's own if it is none of these.
        chosen: Number of the row that the run or the user chose.
        own: The model's earlier settings.
        ranking: The settings of the last rung with their scores there, the best first.
        seeds: Number of seeds of these scores, and of those of the rows.
        tried: Number of settings that were tried.
        failures: Why some settings could not be drawn.
        pictures: Number of drawn pictures.
        seconds: Duration of the run.
        plan: The plan of the run.
        steps: Sampling steps.
        score: The score that ranked the settings.
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
    """The content of `sag_settings.json` for a setting.

    Args:
        candidate: The setting.
        steps: Sampling steps that it was tried with.
        there: An earlier file, whose section "compare" is kept, without its scales if they are of
            another method; it need not exist.

    Raises:
        ValueError: That file is damaged.
    """
    settings = candidate.guidance.to_dict()
    usual = type(candidate.guidance)().to_dict()
    generation: dict[str, Any] = {"num_inference_steps": steps}
    if candidate.cfg is not None:
        generation["guidance_scale"] = candidate.cfg
    kept = {n: v for n, v in settings.items() if n in ("method", "scale") or v != usual[n]}
    content: dict[str, Any] = {"guidance": kept, "generation": generation}
    try:
        earlier = json_object(there.read_bytes()) if there.is_file() else {}
        kinds = {name: dict for name in ("guidance", "compare") if name in earlier}
        json_object(earlier, **kinds)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"out={str(there)!r} is damaged ({error}): delete it") from error
    compared = dict(earlier.get("compare", {}))
    if earlier.get("guidance", {}).get("method", "sag") != settings["method"]:
        compared.pop("sag_scales", None)
    return content | ({"compare": compared} if compared else {})


def write_settings(path: Path, content: Mapping[str, Any]) -> None:
    """Write a `sag_settings.json` in one go.

    Args:
        path: The file; an existing one is replaced.
        content: What `settings_content` returned.
    """
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def as_json(found: Tuned) -> dict[str, Any]:
    """The result of a run, as `json.dumps` takes it.

    Args:
        found: The result.
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
                "against_own": row.against_own and dataclasses.asdict(row.against_own),
                "evaluations": row.drawn.evaluations,
                "seconds": row.drawn.seconds,
            }
            for row in found.rows
        ],
        "ranking": [{"setting": str(each), "score": score} for each, score in found.ranking],
    }
