"""The figures of a point, and the file that they are kept in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drawing import Drawn
from points import Point
from self_attention_guidance.evaluate import (
    METRICS,
    Estimate,
    FeatureSet,
    LoadedSet,
    estimate,
    load_encoder,
    load_set,
    open_set,
    paired_difference,
    random_halves,
    repeated_values,
)
from self_attention_guidance.evaluate.statistics import moments_of

HERE = Path(__file__).parent
FOLDER = HERE / "results"
KEYS = ("frechet_distance", "kid", "precision", "recall")
REPETITIONS = 100
_DIGITS = {"frechet_distance": 4, "kid": 6, "precision": 5, "recall": 5}


@dataclass(frozen=True)
class Result:
    """What was measured at a point.

    Attributes:
        description: The point's, as JSON.
        count: Samples.
        scale: Of the guidance; for points with `like`, the one that was found.
        rows: Rows of the network for one sample.
        term_size: Root-mean-square of the guidance term over second passes; `None` if unguided.
        values: (REPETITIONS + 1,) by figure: on all samples, then on halves, which are the same
            for all points of as many samples.
    """

    description: dict[str, Any]
    count: int
    scale: float
    rows: float
    term_size: float | None
    values: dict[str, Tensor]

    def estimate(self, key: str) -> Estimate:
        """A figure and its 95 % interval."""
        metric = next(metric for metric in METRICS if metric.key == key)
        return estimate(self.values[key], metric.least, metric.most)

    def gain(self, key: str, other: Result) -> Estimate:
        """How much larger a figure is than at another point with the same seeds, paired."""
        return paired_difference(self.values[key], other.values[key])


def measured(point: Point, scale: float, drawn: list[Drawn]) -> Result:
    """The figures of all samples of a point, in the order of their seeds."""
    features = torch.cat([part.features for part in drawn])
    reference = _reference(point.model)
    assert reference.features is not None
    found = FeatureSet("emoji", reference.features.size, features)
    samples = LoadedSet(Path(point.name), moments_of(features), None, found)
    halves = random_halves(len(features), REPETITIONS, seed=0)
    values = repeated_values(samples, reference, halves)
    squares, passes = (sum(part) for part in zip(*(d.term_squares for d in drawn), strict=True))
    return Result(
        description=point.description(),
        count=len(features),
        scale=scale,
        rows=sum(part.rows for part in drawn) / len(features),
        term_size=(squares / passes) ** 0.5 if passes else None,
        values={key: values[key] for key in KEYS},
    )


def path_of(point: Point) -> Path:
    """The file of a point's figures."""
    return FOLDER / f"{point.name}.json"


def write(point: Point, result: Result) -> None:
    """Keep the figures of a point."""
    told = dict(vars(result)) | {
        "values": {
            key: [round(value, _DIGITS[key]) for value in values.tolist()]
            for key, values in result.values.items()
        }
    }
    path = path_of(point)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in told.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(point: Point, count: int | None = None) -> Result | None:
    """The figures of a point; `None` if they are not there, or of other settings or samples.

    Args:
        point: The point.
        count: Samples that are wanted; `None` takes any number.
    """
    path = path_of(point)
    if not path.is_file():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    values = {key: torch.tensor(v, dtype=torch.float64) for key, v in told["values"].items()}
    result = Result(**{**told, "values": values})
    as_written = json.loads(json.dumps(point.description()))
    is_same = result.description == as_written and count in (None, result.count)
    return result if is_same else None


def _reference(model: str) -> LoadedSet:
    path = HERE / "references" / f"{model}.npz"
    return load_set(open_set(path), load_encoder("emoji"), batch_size=64)
