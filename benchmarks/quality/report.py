"""Write the study's tables into the pages that show them, and draw its plots.

A page holds `<!-- study: NAME -->` and `<!-- end -->`; what stands between is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import plots
import results
from judging import QUESTIONS
from methods import BUDGETS, Point, points
from results import Result
from self_attention_guidance.evaluate import Estimate
from self_attention_guidance.guidance.text import guidance_text
from settings import Setting
from tasks import TASKS, Task

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quality.md", "docs/quality-trials.md")
_BLOCK = re.compile(r"(<!-- study: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TITLES = {
    "none": "no guidance",
    "blur": "blur",
    "sag": "SAG",
    "pag": "PAG",
    "seg": "SEG",
    "slg": "SLG",
    "tpg": "TPG",
    "sag+pag": "SAG + PAG",
    "sag-fast": "fast SAG",
    "pag-fast": "fast PAG",
    "shipped": "the model's own settings",
    "tpg-fast": "fast TPG",
}
_QUESTION_TITLES = dict(zip(QUESTIONS, ("thing", "thing of 5", "style", "background"), strict=True))


def _title(point: Point) -> str:
    """A point's method as tables name it."""
    method = point.method.removesuffix("-dpm++")
    if method == point.method:
        return _TITLES[method]
    return "DPM-Solver++ alone" if method == "none" else f"{_TITLES[method]} with DPM-Solver++"


@dataclass(frozen=True)
class Row:
    """A point that was measured, among those of its task and budget."""

    point: Point
    result: Result

    @property
    def title(self) -> str:
        """The method as tables name it."""
        title = _title(self.point)
        if self.point.budget == "few":
            return f"{title} at every step"
        has_cfg = TASKS[self.point.task].has_cfg
        return title.replace("no guidance", "CFG alone") if has_cfg else title

    def is_better_than(self, other: Row) -> bool:
        """Whether the distance is lower by more than chance explains."""
        high = self.result.gain("frechet_distance", other.result).high
        return high is not None and high < 0


def rows_of(task: str, budget: str, dtype: str = "bfloat16") -> list[Row]:
    """What was measured at a task and budget, the lowest distance first."""
    wanted = [p for p in points() if (p.task, p.budget, p.dtype) == (task, budget, dtype)]
    found = [(point, results.read(point.name, TASKS[task])) for point in wanted]
    rows = [Row(point, result) for point, result in found if result is not None]
    counts = {row.result.count for row in rows}
    # Only results of as many samples have the same halves.
    rows = [row for row in rows if row.result.count == max(counts)]
    return sorted(rows, key=lambda row: row.result.estimate("frechet_distance").value)


def rank(row: Row, rows: list[Row]) -> int:
    """One more than the number of rows that are better by more than chance explains.

    What a model recommends is not counted: it may be the setting of another row.
    """
    others = [other for other in rows if other.point.method != "shipped"]
    return 1 + sum(other.is_better_than(row) for other in others)


def write_report() -> None:
    """Write all tables and plots from what was measured so far."""
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        path.write_text(_BLOCK.sub(_filled, text), encoding="utf-8")
    for name, task in TASKS.items():
        # What the model recommends is another row's setting, so it would be drawn twice.
        budgets = [
            (
                BUDGETS[each].title,
                [row for row in rows_of(name, each) if row.point.method != "shipped"],
            )
            for each in BUDGETS
            if each != "few"
        ]
        if budgets[0][1]:
            plots.draw_frontier(task.title, budgets, ROOT / "docs" / "images" / _plot_of(name))


def _filled(block: re.Match[str]) -> str:
    kind, _, name = block[2].partition(" ")
    kinds = {
        "answers": answers,
        "claims": claims,
        "judged": judged,
        "table": table,
        "settings": settings,
        "trials": trials,
        "float32": float32,
        "plot": plot,
        "presets": presets,
        "summary": summary,
    }
    found = list(kinds[kind](name))
    return block[1] + "\n" + "\n".join(found or ["Not measured yet."]) + "\n\n" + block[3]


def answers(budget: str) -> Iterator[str]:
    """For each task, the best setting at a budget, and what it gains."""
    lines = [_answer(task, rows_of(name, budget)) for name, task in TASKS.items()]
    if any(lines):
        yield "| Model | best | also in rank 1 | Fréchet distance ↓ | without guidance |"
        yield "| --- | --- | --- | --- | --- |"
        yield from filter(None, lines)


def _answer(task: Task, rows: list[Row]) -> str:
    if len(rows) < 2:
        return ""
    best = rows[0]
    equals = [row.title for row in rows[1:] if rank(row, rows) == 1]
    (without,) = [row for row in rows if row.point.method == "none"]
    cells = [
        task.title,
        best.title,
        ", ".join(equals) or "none",
        interval(best.result.estimate("frechet_distance"), 2),
        interval(without.result.estimate("frechet_distance"), 2),
    ]
    return f"| {' | '.join(cells)} |"


def table(name: str) -> Iterator[str]:
    """A Markdown table of all methods of a task at a budget, as "adm every"."""
    task, budget = name.split()
    rows = rows_of(task, budget)
    has_captions = TASKS[task].has_captions
    if not rows:
        return
    columns = ["rank", "method", "steps", "evaluations", "Fréchet distance ↓"]
    columns += ["against no guidance", "precision ↑", "recall ↑", "saturation"]
    columns += list(_QUESTION_TITLES.values()) if has_captions else []
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    without = next((row for row in rows if row.point.method == "none"), None)
    for row in rows:
        yield _row(row, rows, without, has_captions)


def _row(row: Row, rows: list[Row], without: Row | None, has_captions: bool) -> str:
    result, setting = row.result, row.result.setting
    change = ""
    if without is not None and without is not row:
        change = signed(result.gain("frechet_distance", without.result), 2)
    cells = [
        str(rank(row, rows)),
        row.title,
        str(setting.steps),
        str(setting.evaluations),
        interval(result.estimate("frechet_distance"), 2),
        change,
        interval(result.estimate("precision"), 2),
        interval(result.estimate("recall"), 2),
        interval(result.estimate("saturation"), 3),
    ]
    if has_captions:
        cells += [percent(result.estimate(key)) for key in QUESTIONS]
    return f"| {' | '.join(cells)} |"


def settings(name: str) -> Iterator[str]:
    """What each row of a table was drawn with, as "adm every"."""
    task, budget = name.split()
    for row in rows_of(task, budget):
        yield f"- {row.title}: `{as_typed(row.result.setting, TASKS[task])}`"


def trials(name: str) -> Iterator[str]:
    """What the search tried for a task and budget, as "adm every"."""
    task, budget = name.split()
    for point in points():
        if (point.task, point.budget, point.dtype) != (task, budget, "bfloat16"):
            continue
        found = results.read_trials(point.name, TASKS[task])
        for number, trial in enumerate(found or []):
            if trial.setting.guidance or TASKS[task].has_cfg:
                distances = ", ".join(f"{value:.2f}" for value in trial.distances.values())
                mark = " (chosen)" if number == 0 else ""
                text = as_typed(trial.setting, TASKS[task])
                yield f"- {_title(point)}: `{text}`, {distances}{mark}"


def claims(name: str) -> Iterator[str]:
    """The best row of each budget and the recommended one, against what else one could do.

    And the best row with the better sampler, against the sampler alone.
    """
    rows = {budget: rows_of(name, budget) for budget in BUDGETS}
    unguided = ("none", "none-dpm++")
    rivals = [row for row in rows["every"] if row.point.method in (*unguided, "sag")]
    rivals += rows["double"]
    for budget in ("every", "cheap"):
        own = [row for row in rows[budget] if row.point.method in unguided]
        own += rows["few"] if budget == "cheap" else []
        others = [*own, *(row for row in rivals if row not in own)]
        shown = rows[budget][:1] if len(rows[budget]) > 1 else []
        shown += [row for row in rows[budget] if row.point.method == "shipped"]
        pairs = [(row, other) for row in shown for other in others]
        by_sampler = [row for row in rows[budget] if row.point.method.endswith("-dpm++")]
        if by_sampler and by_sampler[0] not in shown:
            pairs += [(by_sampler[0], row) for row in own if row.point.method == "none-dpm++"]
        for row, other in pairs:
            if other is not row and other.result.count == row.result.count:
                yield _claim(row, other)


def _claim(row: Row, other: Row) -> str:
    words = [
        f"{each.title} with {each.result.setting.evaluations} evaluations" for each in (row, other)
    ]
    change = signed(row.result.gain("frechet_distance", other.result), 2)
    return f"- {words[0]} against {words[1]}: {change}"


def judged(name: str) -> Iterator[str]:
    """Which of the judge's scores each method changes by more than chance explains."""
    for budget in ("every", "cheap"):
        rows = rows_of(name, budget)
        without = next((row for row in rows if row.point.method == "none"), None)
        for row in rows:
            if without is not None and row.result.setting.guidance:
                gains = {
                    title: row.result.gain(key, without.result)
                    for key, title in _QUESTION_TITLES.items()
                }
                changed = [
                    f"{title} {points_of(gain)}" for title, gain in gains.items() if is_clear(gain)
                ]
                evaluations = row.result.setting.evaluations
                found = ", ".join(changed) or "no score"
                yield f"- {row.title} with {evaluations} evaluations: {found}"


def plot(name: str) -> Iterator[str]:
    """The picture of a task."""
    if rows_of(name, "every"):
        alternative = "Fréchet distance against network evaluations for one sample"
        yield f"![{alternative}](images/{_plot_of(name)})"


def _plot_of(name: str) -> str:
    return f"quality-{name}.png"


def presets(_: str) -> Iterator[str]:
    """For each method, the cheap setting against that at every step."""
    lines: list[str] = []
    for name, task in TASKS.items():
        dear = {row.point.method: row for row in rows_of(name, "every")}
        for row in rows_of(name, "cheap"):
            other = dear.get(row.point.method)
            if row.result.setting.guidance and other and other.result.count == row.result.count:
                figures = [interval(r.result.estimate("frechet_distance"), 2) for r in (other, row)]
                change = signed(row.result.gain("frechet_distance", other.result), 2)
                lines.append(f"| {task.title} | {row.title} | {' | '.join([*figures, change])} |")
    if lines:
        yield "| Model | method | at every step | cheap | difference |"
        yield "| --- | --- | --- | --- | --- |"
        yield from lines


def summary(_: str) -> Iterator[str]:
    """The table of README, which has room for three tasks: what each gains, as far as measured."""
    lines: list[str] = []
    for name, task in list(TASKS.items())[:3]:
        dear = {row.point.method: row for row in rows_of(name, "every")}
        cheap = [row for row in rows_of(name, "cheap") if row.result.setting.guidance]
        if "none" in dear and "sag" in dear:
            best = f"{cheap[0].title}: {_short(cheap[0])}" if cheap else "not measured"
            cells = [_short(dear["none"]), _short(dear["sag"]), best]
            lines.append(f"| {task.title} | {' | '.join(cells)} |")
    if lines:
        titles = ("Fréchet distance ↓ (evaluations)", "no guidance", "SAG", "best cheap method")
        yield f"| {' | '.join(titles)} |"
        yield "| --- | --- | --- | --- |"
        yield from lines


def _short(row: Row) -> str:
    found = interval(row.result.estimate("frechet_distance"), 1)
    return f"{found} ({row.result.setting.evaluations})"


def float32(name: str) -> Iterator[str]:
    """The points that were drawn in both types."""
    lines: list[str] = []
    for task in TASKS:
        usual = {row.point.method: row for row in rows_of(task, "every")}
        for row in rows_of(task, "every", "float32"):
            both = (row, usual[row.point.method])
            cells = [interval(one.result.estimate("frechet_distance"), 2) for one in both]
            lines.append(f"| {TASKS[task].title} | {row.title} | {cells[0]} | {cells[1]} |")
    if lines:
        yield "| Model | method | float32 | bfloat16 |"
        yield "| --- | --- | --- | --- |"
        yield from lines


def as_typed(setting: Setting, task: Task) -> str:
    """A setting as the command line takes it."""
    words = [f"--steps {setting.steps}"]
    if setting.scheduler:
        words.append(f'--scheduler "{setting.scheduler}"')
    words += [f"--guidance {guidance_text(each.to_dict())}" for each in setting.guidance]
    if task.has_cfg:
        words.append(f"--guidance-scale {setting.cfg:g}")
    return " ".join(words)


def interval(found: Estimate, digits: int) -> str:
    """An estimate like "12.3 [11.9, 12.8]"."""
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def percent(found: Estimate) -> str:
    """A share like "41 % [38, 44]"."""
    parts = [f"{100 * value:.0f}" for value in (found.value, found.low or 0, found.high or 0)]
    return f"{parts[0]} % [{parts[1]}, {parts[2]}]"


def points_of(found: Estimate) -> str:
    """A difference of shares in percentage points, like "+7.0 [+3.1, +11.3]"."""
    values = [100 * value for value in (found.value, found.low or 0, found.high or 0)]
    return f"{values[0]:+.1f} [{values[1]:+.1f}, {values[2]:+.1f}]"


def is_clear(difference: Estimate) -> bool:
    """Whether the interval of a difference excludes zero."""
    assert difference.low is not None
    assert difference.high is not None
    return difference.low > 0 or difference.high < 0


def signed(found: Estimate, digits: int) -> str:
    """A difference like "-3.1 [-3.5, -2.7]"; bold if its interval excludes zero."""
    text = f"{found.value:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if is_clear(found) else text
