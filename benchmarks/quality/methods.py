"""What is compared: each method's settings are searched with equal effort.

The candidates of a method are points of a Sobol sequence, so that every setting is spread evenly
over its range. Scales are not searched by their numbers, which mean something else for each method
and layer, but by the size of the term that they give: its range is the same for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from drawing import size_of_term
from self_attention_guidance import Guidance
from self_attention_guidance.models.builtin import builtin_folder, recommended_settings
from settings import Setting, fitting
from tasks import TASKS, Task

STEPS = 25
CANDIDATES = 12
# Root mean square of the term, where that of the noise is 1.
SIZES = (0.05, 1.2)
CFG_SCALES = (1.5, 6.0)
# Guidance begins at most so much later than the task's earliest step.
_LATEST = 0.4


@dataclass(frozen=True)
class Budget:
    """Network evaluations for one sample.

    Attributes:
        name: For files and the command line.
        title: For tables.
        of: The number, by whether classifier-free guidance is used.
    """

    name: str
    title: str
    of: dict[bool, float]


BUDGETS = {
    budget.name: budget
    for budget in (
        # 25 steps with a weakened pass at each.
        Budget("every", "25 steps, each guided", {False: 2 * STEPS, True: 3 * STEPS}),
        # 25 steps without guidance, and a tenth more.
        Budget("cheap", "a tenth above 25 steps", {False: 1.1 * STEPS, True: 2.2 * STEPS}),
        # SAG alone: what a weakened pass at each step is worth when there are fewer.
        Budget(
            "few", "a tenth above 25 steps, each guided", {False: 1.1 * STEPS, True: 2.2 * STEPS}
        ),
        # Without guidance alone: what more steps are worth.
        Budget("plain", "25 steps, not guided", {False: STEPS, True: 2 * STEPS}),
        Budget("double", "twice the first", {False: 4 * STEPS, True: 6 * STEPS}),
    )
}

_SCHEDULER = "dpm++ 2m"
_BY_SCHEDULER = "-dpm++"
# The second is a better sampler instead of guidance.
_UNGUIDED = ("none", "none-dpm++")
METHODS = (*_UNGUIDED, "blur", "sag", "pag", "seg", "slg", "tpg", "sag+pag")
# With fewer weakened passes, and more steps for what is saved.
FAST_METHODS = ("sag-fast", "pag-fast", "tpg-fast")
# Guidance and the better sampler, where the sampler changes something.
_MODEL_OF_SCHEDULER = "emoji-adm"


@dataclass(frozen=True)
class Point:
    """A row of the report: a method at a budget, on a task.

    Attributes:
        task: Its name.
        budget: Its name.
        method: One or more short names of guidances; "none" is classifier-free guidance alone, and
            "shipped" is what the model recommends for itself.
        dtype: Of the network's products: "bfloat16" or "float32".
    """

    task: str
    budget: str
    method: str
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Under which its results are kept."""
        ending = "" if self.dtype == "bfloat16" else f"-{self.dtype}"
        return f"{self.task}/{self.budget}/{self.method}{ending}"

    @property
    def searched(self) -> Point:
        """The point whose search chooses the settings."""
        budget = "cheap" if self.budget == "cheap" else "every"
        return Point(self.task, budget, self.method)

    def setting_of(self, found: Setting) -> Setting:
        """What is drawn, from what the search found."""
        evaluations = BUDGETS[self.budget].of[TASKS[self.task].has_cfg]
        return fitting(dataclasses.replace(found, dtype=self.dtype), evaluations)


def points() -> Iterator[Point]:
    """All points, in the order in which they are measured."""
    for name, task in TASKS.items():
        fast = with_scheduler(task, FAST_METHODS)
        yield from (Point(name, "every", method) for method in (*METHODS, *fast))
        yield from (Point(name, budget, "none") for budget in ("plain", "double"))
        yield Point(name, "few", "sag")
        cheap = with_scheduler(task, ("sag", "pag", "tpg"))
        yield from (Point(name, "cheap", each) for each in dict.fromkeys((*METHODS, *cheap)))
        if recommended_settings(builtin_folder(task.model)).guidance:
            yield Point(name, "cheap", "shipped")
    for task in TASKS:
        yield from (Point(task, "every", method, "float32") for method in ("none", "sag", "pag"))


def with_scheduler(task: Task, methods: tuple[str, ...]) -> tuple[str, ...]:
    """Methods, and for models whose samples depend on the sampler, the same with the better one."""
    if task.model != _MODEL_OF_SCHEDULER:
        return methods
    return (*methods, *(f"{method}{_BY_SCHEDULER}" for method in methods))


def candidates(task: Task, method: str, budget: Budget) -> list[Setting]:
    """The settings of a method that are tried; the same for the same arguments.

    A weakened pass runs at every step of the window; at the budget "cheap" and for the fast
    methods, at every second to fourth.
    """
    evaluations = budget.of[task.has_cfg]
    if method == "shipped":
        return [fitting(shipped(task), evaluations)]
    if method in _UNGUIDED and not task.has_cfg:
        return [fitting(_unguided(method, 1.0), evaluations)]
    sobol = torch.quasirandom.SobolEngine(8, scramble=True, seed=0)
    rows = sobol.draw(CANDIDATES, dtype=torch.float64).tolist()
    return [_candidate(task, method, budget, _Choices(row), evaluations) for row in rows]


class _Choices:
    """One point of the unit cube, read setting by setting."""

    def __init__(self, coordinates: list[float]) -> None:
        self.coordinates = iter(coordinates)

    def between(self, least: float, most: float) -> float:
        return least + next(self.coordinates) * (most - least)

    def between_in_logarithm(self, least: float, most: float) -> float:
        return math.exp(self.between(math.log(least), math.log(most)))

    def one_of(self, options: tuple[Any, ...]) -> Any:
        return options[min(int(next(self.coordinates) * len(options)), len(options) - 1)]


def _candidate(
    task: Task, method: str, budget: Budget, choices: _Choices, evaluations: float
) -> Setting:
    cfg = 1.0
    if task.has_cfg:
        cfg = round(1 + choices.between_in_logarithm(CFG_SCALES[0] - 1, CFG_SCALES[1] - 1), 2)
    if method in _UNGUIDED:
        return fitting(_unguided(method, cfg), evaluations)
    size = choices.between_in_logarithm(*SIZES)
    latest = task.earliest + _LATEST
    window: dict[str, Any] = {"start": round(choices.between(task.earliest, latest), 2)}
    scheduler = _SCHEDULER if method.endswith(_BY_SCHEDULER) else None
    method = method.removesuffix(_BY_SCHEDULER)
    if budget.name == "cheap" or method in FAST_METHODS:
        window["stop"] = round(choices.between(0.6, 1.0), 2)
        window["every"] = choices.one_of((2, 3, 4))
    parts = method.removesuffix("-fast").split("+")
    share = choices.between(0.2, 0.8) if len(parts) > 1 else 1.0
    guidance: list[Guidance] = []
    for part, of_size in zip(parts, (share, 1 - share), strict=False):
        settings: dict[str, Any] = {"method": part, **window}
        if part in ("sag", "blur"):
            settings["blur_sigma"] = choices.one_of((1.5, 3.0))
        layers = task.layers.get(part, (None,))
        layer = layers[0] if len(parts) > 1 else choices.one_of(layers)
        if layer is not None:
            settings["layer" if part == "sag" else "layers"] = layer
        unit = size_of_term(task, Guidance.from_dict(settings), cfg)
        scale = float(f"{size * of_size / unit:.2g}")
        guidance.append(Guidance.from_dict({**settings, "scale": scale}))
    return fitting(Setting(tuple(guidance), cfg=cfg, scheduler=scheduler), evaluations)


def shipped(task: Task) -> Setting:
    """What the task's model recommends for itself."""
    settings = recommended_settings(builtin_folder(task.model))
    cfg = settings.guidance_scale if task.has_cfg and settings.guidance_scale else 1.0
    return Setting((settings.make_guidance(),), cfg=cfg)


def _unguided(method: str, cfg: float) -> Setting:
    return Setting(cfg=cfg, scheduler=_SCHEDULER if method == "none-dpm++" else None)


@dataclass(frozen=True)
class Trial:
    """A candidate, and what each round of the search found.

    Attributes:
        setting: What was tried.
        distances: Fréchet distances, by the number of samples.
    """

    setting: Setting
    distances: dict[int, float]


# Rounds of the search: so many candidates go on, with so many samples each.
ROUNDS = ((CANDIDATES, 32), (3, 64))


def search(settings: list[Setting], distance: Callable[[Setting, int], float]) -> list[Trial]:
    """Successive halving; the best comes first.

    Args:
        settings: The candidates.
        distance: Of a setting's first samples, so many, from the reference.
    """
    trials = [Trial(setting, {}) for setting in settings]
    if len(trials) == 1:
        return trials
    for kept, count in ROUNDS:
        for trial in trials[:kept]:
            trial.distances[count] = distance(trial.setting, count)
        trials[:kept] = sorted(trials[:kept], key=lambda trial: trial.distances[count])
    return trials
