"""Measure which guidance helps the builtin models, at equal cost, and write the page.

    python benchmarks/quality/study.py [--tasks adm text] [--methods sag pag] [--count 256]
    python benchmarks/quality/study.py --report

For each task, budget and method, settings are searched on some seeds and captions; the best of
them draws others, which are what is reported. What is in `results/` is not measured again, and an
interrupted search goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import results
from drawing import FIRST_REPORTED, drawn
from methods import BUDGETS, Point, Trial, candidates, points, search
from report import write_report
from self_attention_guidance.evaluate.statistics import frechet_distance, moments_of
from settings import Setting
from tasks import TASKS, Task, reference


def measure(point: Point, count: int, work: Path) -> None:
    """Search a point's setting and measure it, as far as that was not done."""
    torch.set_num_threads(1)
    task = TASKS[point.task]
    setting = point.setting_of(_trials(point.searched, work)[0].setting)
    samples = drawn(task, setting, range(FIRST_REPORTED, FIRST_REPORTED + count), work)
    results.write(point.name, results.measured(task, setting, samples))


def _trials(point: Point, work: Path) -> list[Trial]:
    task = TASKS[point.task]
    trials = results.read_trials(point.name, task)
    if trials is None:
        trials = search(
            candidates(task, point.method, BUDGETS[point.budget]),
            lambda setting, samples: _distance(task, setting, samples, work),
        )
        results.write_trials(point.name, task, trials)
    return trials


def _distance(task: Task, setting: Setting, samples: int, work: Path) -> float:
    """The Fréchet distance of the search's first samples."""
    features = drawn(task, setting, range(samples), work).features
    compared = reference(task.name, is_search=True)
    return frechet_distance(moments_of(features), moments_of(compared))


def chosen(options: argparse.Namespace) -> Iterator[Point]:
    """The points that were asked for, in the order in which they are measured."""
    for point in points():
        if point.task in options.tasks and point.method in options.methods:
            yield point


def main() -> None:
    """Measure what is missing, then write the report."""
    options = parse_arguments()
    missing = [
        point
        for point in chosen(options)
        if results.read(point.name, TASKS[point.task], options.count) is None
    ]
    if missing and not options.report:
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as workers:
            running: dict[Future[None], Point] = {
                workers.submit(measure, point, options.count, options.work): point
                for point in missing
            }
            for done in tqdm(as_completed(running), total=len(running), unit=" points"):
                done.result()
                tqdm.write(running[done].name)
    write_report()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = list(dict.fromkeys(point.method for point in points()))
    for name, known in (("tasks", list(TASKS)), ("methods", methods)):
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=known, help="default: all"
        )
    parser.add_argument("--count", type=int, default=256, help="samples; default: %(default)s")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--work", type=Path, default=Path("out/quality"), help="default: %(default)s"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
