"""How much faster several workers are than one, each with one thread, on the builtin model.

    python benchmarks/batch/throughput.py [--rows 400] [--steps 8] [--workers 2] [--rounds 2]

Runs alternate, so that what else the machine does meets both. Starting Ray and loading the model
in each worker is part of the time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run both in turn and print the rates."""
    options = parse_arguments()
    rates: dict[int, list[float]] = {1: [], options.workers: []}
    for _ in range(options.rounds):
        for workers, found in rates.items():
            found.append(rate(options, workers))
            print(f"{workers} workers: {found[-1]:.2f} pictures a second", flush=True)
    ratios = [many / one for one, many in zip(*rates.values(), strict=True)]
    print(f"{options.workers} workers against 1: {statistics.median(ratios):.2f} times", ratios)


def rate(options: argparse.Namespace, workers: int) -> float:
    """Pictures a second of a job in a folder of its own."""
    shutil.rmtree(options.work, ignore_errors=True)
    command = [sys.executable, "-m", "self_attention_guidance.cli", "batch", "--json"]
    command += ["--num-samples", options.rows, "--steps", options.steps, "--out", options.work]
    command += ["--workers", workers]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["drawn"] == options.rows
    return summary["drawn"] / summary["seconds"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("out/throughput"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
