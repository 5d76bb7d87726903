"""What a batch job costs beside the drawing: time, memory, resuming; with an artist that is free.

python benchmarks/batch/bookkeeping.py [--rows 10000 100000] [--workers 1 2]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from self_attention_guidance.batch import BatchJob, Defaults, PromptList, Task
from self_attention_guidance.batch.workers import Crew
from self_attention_guidance.generate import GeneratedImage, GenerationSettings

RECORD = {
    "version": "",
    "model": "free",
    "prompt": "",
    "seed": 0,
    "size": [8, 8],
    "settings": {"num_inference_steps": 1},
    "guidance": {"method": "sag", "scale": 0.0},
    "scheduler": "",
    "scheduler_config": {},
    "dtype": "",
}


class FreeArtist:
    """Draws the same small picture for every task."""

    identity = {"name": "free"}  # noqa: RUF012  # as `Artist` has it

    def __init__(self) -> None:
        """Makes the picture."""
        self.image = Image.new("RGB", (8, 8), "white")

    def draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
        """Costs nothing."""
        return [GeneratedImage(image=self.image, index=0, record=RECORD) for _ in tasks]


def run(prompts: Path, out: Path, workers: int) -> dict[str, float]:
    """Run a job in this process, and tell its seconds and the peak of this process's memory."""
    started = time.monotonic()
    defaults = Defaults(settings=GenerationSettings())
    job = BatchJob(PromptList(str(prompts)), str(out), FreeArtist, defaults)
    summary = job.run(Crew(workers=workers))
    assert summary.failed == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.monotonic() - started, "drawn": summary.drawn, "peak": peak}


def main() -> None:
    """Measure each number of rows and workers in a process of its own, and print a table."""
    options = parse_arguments()
    if options.measure:
        print(
            json.dumps(run(options.work / "prompts.jsonl", options.work / "out", options.measure))
        )
        return
    print("| Rows | Workers | ms a row | Peak memory of the driver, MB | Resuming when done, s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for workers in options.workers:
        for rows in options.rows:
            shutil.rmtree(options.work, ignore_errors=True)
            options.work.mkdir(parents=True)
            line = json.dumps({"prompt": "a red apple on a table"}) + "\n"
            (options.work / "prompts.jsonl").write_text(line * rows)
            first, second = (measured(options, workers) for _ in range(2))
            assert (first["drawn"], second["drawn"]) == (rows, 0)
            milliseconds = 1000 * first["seconds"] / rows
            figures = f"{milliseconds:.2f} | {first['peak']:.0f} | {second['seconds']:.1f}"
            print(f"| {rows} | {workers} | {figures} |", flush=True)


def measured(options: argparse.Namespace, workers: int) -> dict[str, float]:
    """The figures of a run in a fresh process."""
    command = [sys.executable, __file__, "--work", str(options.work), "--measure", str(workers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, default=Path("out/bookkeeping"))
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
