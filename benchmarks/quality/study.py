"""Measure how much guidance helps the builtin models, and write the table and plots of docs.

    python benchmarks/quality/study.py [--count 2000] [--only headline controls] [--models emoji]
    python benchmarks/quality/study.py --report

Points that are in `results/` with the same settings are not measured again, and an interrupted
point goes on where it was. Sample i of every point has the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

import results
from drawing import FIRST_SEED, Drawn, draw, matched
from points import MODELS, Point, points
from report import write_report
from self_attention_guidance.batch.workers import Crew, Lost, distribute

HERE = Path(__file__).parent
CHUNK = 50


@dataclass(frozen=True)
class Job:
    """Some samples of a point.

    Attributes:
        point: The point.
        scale: Of its guidance.
        seeds: Of the samples.
        path: Where they are kept until the point is complete.
    """

    point: Point
    scale: float
    seeds: range
    path: Path


def run(job: Job) -> Path:
    """Draw the samples of a job, unless they are there."""
    if not job.path.is_file():
        guidance = dataclasses.replace(job.point.guidance, scale=job.scale)
        drawn = draw(job.point, guidance, job.seeds)
        partial = job.path.with_suffix(".partial")
        torch.save(vars(drawn), partial)
        os.replace(partial, job.path)
    return job.path


def jobs_of(point: Point, options: argparse.Namespace, scale: float) -> list[Job]:
    """The jobs of a point."""
    settings = json.dumps(point.description(), sort_keys=True)
    folder: Path = options.work / point.name
    note = folder / "settings.json"
    if not note.is_file() or note.read_text(encoding="utf-8") != settings:
        for old in folder.glob("*"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(settings, encoding="utf-8")
    count = options.count * point.times
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    starts = range(0, count, CHUNK)
    return [
        Job(point, scale, seeds[start : start + CHUNK], folder / f"{start}.pt") for start in starts
    ]


def scale_of(point: Point) -> float:
    """The scale of a point's guidance, searched for if it depends on another point's."""
    return matched(point).scale


def measure(options: argparse.Namespace, missing: Sequence[Point]) -> Iterator[Point]:
    """Draw and measure points; yields each when its figures are written."""
    # Workers on Ray import this folder's modules.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    crew = Crew(workers=options.workers, threads=1)
    numbers = range(len(missing))
    searched = distribute(numbers, lambda: lambda number: scale_of(missing[number]), crew)
    scales = dict(cast("Iterator[tuple[int, float]]", searched))
    jobs = {number: jobs_of(missing[number], options, scales[number]) for number in numbers}
    units = [(number, job) for number in numbers for job in jobs[number]]
    waiting = {number: len(jobs[number]) for number in numbers}
    with tqdm(total=len(units) * CHUNK, unit=" samples", smoothing=0.02) as bar:
        for (number, job), done in distribute(units, lambda: lambda unit: run(unit[1]), crew):
            if isinstance(done, Lost):
                raise RuntimeError(f"{job.point.name}: {done.reason}")
            bar.update(CHUNK)
            waiting[number] -= 1
            if waiting[number] == 0:
                point = missing[number]
                parts = (torch.load(job.path, weights_only=True) for job in jobs[number])
                drawn = [Drawn(**part) for part in parts]
                results.write(point, results.measured(point, scales[number], drawn))
                bar.set_description(point.name)
                yield point


def main() -> None:
    """Measure what is missing, then write the report."""
    options = parse_arguments()
    chosen = [
        point
        for point in points()
        if point.model in options.models and point.group in (options.only or point.group)
    ]
    missing = [p for p in chosen if results.read(p, options.count * p.times) is None]
    if not options.report:
        for point in measure(options, missing):
            for path in (options.work / point.name).glob("*"):
                path.unlink()
    write_report()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = list(dict.fromkeys(point.group for point in points()))
    parser.add_argument("--count", type=int, default=2000, help="samples; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=groups, help="groups; default: all")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; on Ray")
    parser.add_argument(
        "--work", type=Path, default=Path("out/quality"), help="default: %(default)s"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
