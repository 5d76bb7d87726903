"""The figures of a setting, what the search tried, and the files that both are kept in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drawing import Drawn
from judging import QUESTIONS
from methods import Trial
from self_attention_guidance.evaluate import (
    METRICS,
    Estimate,
    FeatureSet,
    LoadedSet,
    estimate,
    paired_difference,
    random_halves,
    repeated_values,
)
from self_attention_guidance.evaluate.statistics import moments_of
from settings import Setting
from tasks import Task, reference

FOLDER = Path(__file__).parent / "results"
REPETITIONS = 100
_FROM_FEATURES = ("frechet_distance", "precision", "recall")
_LARGEST = {metric.key: metric.most for metric in METRICS}


@dataclass(frozen=True)
class Result:
    """What was measured of a setting.

    Attributes:
        task: The task's description.
        setting: How its samples were drawn.
        count: Samples; sample i of every result has the same seed.
        values: (REPETITIONS + 1,) by figure: on all samples, then on halves, which are the same
            for all results of as many samples.
    """

    task: dict[str, Any]
    setting: Setting
    count: int
    values: dict[str, Tensor]

    def estimate(self, key: str) -> Estimate:
        """A figure and its 95 % interval."""
        return estimate(self.values[key], 0.0, _LARGEST.get(key, 1.0))

    def gain(self, key: str, other: Result) -> Estimate:
        """How much larger a figure is than another result's, paired."""
        return paired_difference(self.values[key], other.values[key])


def measured(task: Task, setting: Setting, samples: Drawn) -> Result:
    """The figures of samples of the report."""
    count = len(samples.features)
    halves = random_halves(count, REPETITIONS, seed=0)
    sets = [
        LoadedSet(Path(task.name), moments_of(rows), None, _in_order(rows))
        for rows in (samples.features, reference(task.name, is_search=False))
    ]
    found = repeated_values(*sets, halves)
    values = {key: found[key].double() for key in _FROM_FEATURES}
    columns = {"saturation": samples.saturation.double()}
    for number in range(samples.right.shape[1]):
        columns[QUESTIONS[number]] = samples.right[:, number].double()
    weights = halves.double() / halves.double().sum(1, keepdim=True)
    values |= {key: weights @ column for key, column in columns.items()}
    return Result(task.description(), setting, count, values)


def _in_order(rows: Tensor) -> FeatureSet:
    return FeatureSet("emoji", (64, 64), rows, order=torch.arange(len(rows)))


def write(name: str, result: Result) -> None:
    """Keep a result under a name such as "adm/every/sag"."""
    values = {key: [round(v, 5) for v in part.tolist()] for key, part in result.values.items()}
    content = {**vars(result), "setting": result.setting.to_dict(), "values": values}
    _write(name, content)


def read(name: str, task: Task, count: int | None = None) -> Result | None:
    """A result that was kept; `None` if there is none of these weights and so many samples."""
    stored = _read(name)
    if stored is None or stored["task"] != json.loads(json.dumps(task.description())):
        return None
    if count not in (None, stored["count"]):
        return None
    values = {key: torch.tensor(v, dtype=torch.float64) for key, v in stored["values"].items()}
    return Result(stored["task"], Setting.from_dict(stored["setting"]), stored["count"], values)


def write_trials(name: str, task: Task, trials: list[Trial]) -> None:
    """Keep what the search tried, the best first."""
    described = [
        {
            "setting": trial.setting.to_dict(),
            "evaluations": trial.setting.evaluations,
            "distances": {str(n): round(value, 4) for n, value in trial.distances.items()},
        }
        for trial in trials
    ]
    _write(f"{name}-trials", {"task": task.description(), "trials": described})


def read_trials(name: str, task: Task) -> list[Trial] | None:
    """What `write_trials` kept; `None` if nothing, or of other weights."""
    stored = _read(f"{name}-trials")
    if stored is None or stored["task"] != json.loads(json.dumps(task.description())):
        return None
    return [
        Trial(
            Setting.from_dict(one["setting"]),
            {int(count): value for count, value in one["distances"].items()},
        )
        for one in stored["trials"]
    ]


def _write(name: str, content: dict[str, Any]) -> None:
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def _read(name: str) -> dict[str, Any] | None:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
