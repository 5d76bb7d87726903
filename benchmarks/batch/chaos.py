"""A batch job whose workers and whole process tree are killed at random, against a quiet one.

    python benchmarks/batch/chaos.py [--rows 2000] [--steps 5] [--worker-kills 10] [--job-kills 3]

It fails unless the manifest holds every row once, every picture decodes, and every pixel is that
of the undisturbed run of one process.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from PIL import Image, ImageChops
from tqdm import tqdm

from self_attention_guidance.batch import Manifest, Storage

PROMPTS = ("red heart", "grinning face", "", "cat", "green apple", "fruit", "happy", "house")


def main() -> None:
    """Run both, compare, and print what happened."""
    options = parse_arguments()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    prompts = options.work / "prompts.jsonl"
    rows = ({"prompt": PROMPTS[n % len(PROMPTS)], "seed": n} for n in range(options.rows))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.monotonic()
    quiet = start(options, prompts, "quiet", workers=1)
    assert quiet.wait() == 0
    between = time.monotonic()
    worker_kills, job_kills = disturbed(options, prompts)
    ended = time.monotonic()
    compare(options)
    print(
        f"{options.rows} rows, two workers: {worker_kills} workers and {job_kills} whole jobs were"
        f" killed. Every row is in the manifest once, every picture decodes, and every pixel is"
        f" that of the undisturbed run. {ended - between:.0f} s; undisturbed, one worker:"
        f" {between - started:.0f} s."
    )


def start(
    options: argparse.Namespace, prompts: Path, out: str, workers: int
) -> subprocess.Popen[bytes]:
    """Start `sag batch`."""
    command = [sys.executable, "-m", "self_attention_guidance.cli", "batch", prompts]
    command += ["--out", options.work / out, "--steps", options.steps, "--workers", workers]
    return subprocess.Popen(list(map(str, command)))


def disturbed(options: argparse.Namespace, prompts: Path) -> tuple[int, int]:
    """Run the job to its end, killing; returns how many workers and how many jobs were killed."""
    chance = random.Random(options.seed)
    kills = ["worker"] * options.worker_kills + ["job"] * options.job_kills
    chance.shuffle(kills)
    done = {"worker": 0, "job": 0}
    job = start(options, prompts, "disturbed", workers=2)
    images = options.work / "disturbed" / "images"
    with tqdm(total=len(kills), unit=" kills") as bar:
        while kills or job.poll() is None:
            time.sleep(chance.uniform(1, 4))
            if job.poll() is not None:
                assert job.returncode == 0, "the job failed"
                break
            if kills and any(images.rglob("*.png")) and kill(job, kills[0], chance):
                done[kills.pop(0)] += 1
                bar.update()
            if job.poll() is not None:
                job = start(options, prompts, "disturbed", workers=2)
    assert not kills, f"the job ended before it was killed often enough: {kills} are left"
    return done["worker"], done["job"]


def kill(job: subprocess.Popen[bytes], what: str, chance: random.Random) -> bool:
    """Kill one of the workers, or the job with all that it started; returns whether it did."""
    family = psutil.Process(job.pid).children(recursive=True)
    workers = [process for process in family if is_worker(process)]
    if not workers:  # they are not there yet
        return False
    if what == "worker":
        chance.choice(workers).kill()
        return True
    job.kill()
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.wait()
    return True


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is a worker that has, or loads, a model."""
    try:
        return "ray::_Station" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def compare(options: argparse.Namespace) -> None:
    """Every row once, every picture whole, every pixel equal."""
    found = {}
    for name in ("quiet", "disturbed"):
        rows = list(Manifest(Storage(str(options.work / name))).rows())
        assert sorted(row["row"] for row in rows) == list(range(options.rows)), name
        assert all(row["error"] is None for row in rows), name
        found[name] = {row["row"]: options.work / name / row["file"] for row in rows}
    files = set((options.work / "disturbed" / "images").rglob("*.*"))
    assert files == set(found["disturbed"].values()), "files that are not in the manifest"
    for number in tqdm(range(options.rows), unit=" pictures"):
        with (
            Image.open(found["quiet"][number]) as quiet,
            Image.open(found["disturbed"][number]) as other,
        ):
            assert ImageChops.difference(quiet, other).getbbox() is None, number


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--worker-kills", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--job-kills", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the kills; default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("out/chaos"), help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
