"""Whether guidance behaves well on an accelerator: time, memory, waits, graphs, precision.

    python benchmarks/accelerator/check.py --json check.json --markdown check.md
    python benchmarks/accelerator/check.py --tiny --backend eager      # every path, on a CPU

Networks have the sizes of Stable Diffusion 1.5, XL and Flux, and random weights. Results are
printed and written after each case, the most important first.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import diffusers
import torch

import self_attention_guidance
from measures import Record, agreement, compiled, measure, noted_errors, variants_of
from subjects import Subject, make_subject
from tables import has_errors, markdown, summary, write_json


@dataclass(frozen=True)
class Case:
    """A network under one configuration.

    Attributes:
        network: Its name.
        dtype: Name of its type.
        mode: "eager", "compiled", or "agreement" with float32.
    """

    network: str
    dtype: str
    mode: str

    @property
    def name(self) -> str:
        """How it is called on the command line."""
        return f"{self.network}-{self.dtype}-{self.mode}"


CASES = (
    Case("sd15", "float16", "eager"),
    Case("sd15", "half", "agreement"),
    Case("flux", "bfloat16", "eager"),
    Case("sdxl", "float16", "eager"),
    Case("sd15", "float16", "compiled"),
    Case("sd15", "bfloat16", "eager"),
    Case("sdxl", "bfloat16", "eager"),
    Case("sd15", "bfloat16", "compiled"),
    Case("flux", "bfloat16", "compiled"),
    Case("sdxl", "float16", "compiled"),
    Case("sdxl", "bfloat16", "compiled"),
)
"""The most important first: those at the end are left out when time is over."""


class TimeOver(BaseException):
    """The time limit; no `except Exception` on the way catches it."""


def main() -> int:
    """Run the cases; 1 if one of them failed."""
    options = parse_arguments()
    signal.signal(signal.SIGALRM, _stop)
    diffusers.utils.logging.set_verbosity_error()
    report: Record = {"machine": machine(options.device), "options": vars(options), "cases": []}
    end = time.perf_counter() + 60 * options.minutes
    for case in CASES:
        if options.only and not any(each in case.name for each in options.only):
            continue
        record: Record = {"name": case.name, **vars(case), "status": "skipped"}
        report["cases"].append(record)
        left = end - time.perf_counter()
        if left > 1:
            run(case, options, left, record)
        write(options, report)
        print(summary(record), flush=True)
    return int(has_errors(report))


def _stop(signum: int, frame: FrameType | None) -> None:
    raise TimeOver


def run(case: Case, options: argparse.Namespace, limit: float, record: Record) -> None:
    """Run a case for so many seconds at most, and note how it ended."""
    begin = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        with noted_errors(record):
            measure_case(case, options, record)
        signal.setitimer(signal.ITIMER_REAL, 0)
        record["status"] = "failed" if "error" in record else "done"
    except TimeOver:
        record["status"] = "stopped"
    record["took"] = time.perf_counter() - begin
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()


def measure_case(case: Case, options: argparse.Namespace, record: Record) -> None:
    """Fill the record of a case."""

    def make(dtype: torch.dtype) -> Subject:
        return make_subject(case.network, dtype, options.device, options.steps, options.tiny)

    if case.mode == "agreement":
        agreement(make, record)
        return
    subject = make(getattr(torch, case.dtype))
    record["parameters"] = sum(p.numel() for p in subject.denoiser.parameters())
    is_eager = case.mode == "eager"
    draws = variants_of(subject, with_diffusers=case.network == "sd15" and is_eager)
    settings: Any = (draws, options.rounds, options.steps, options.device, record)
    if is_eager:
        measure(*settings)
        return
    with compiled(subject.denoiser, options.backend, record):
        measure(*settings)


def write(options: argparse.Namespace, report: Record) -> None:
    """Write what is known so far."""
    if options.json:
        write_json(options.json, report)
    if options.markdown:
        options.markdown.write_text(markdown(report), encoding="utf-8")


def machine(device: torch.device) -> Record:
    """What the results depend on."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "self_attention_guidance": self_attention_guidance.__version__,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda:0" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, help="time limit; default: %(default)s")
    add("--tiny", action="store_true", help="tiny networks of the same classes, 16 x 16 latents")
    add("--device", type=torch.device, default=torch.device(default), help=f"default: {default}")
    add("--steps", type=int, default=6, help="of a picture; default: %(default)s")
    add("--rounds", type=int, default=3, help="timed runs of each; default: %(default)s")
    add("--backend", default="inductor", help="of torch.compile; default: %(default)s")
    add("--only", nargs="+", metavar="TEXT", help="cases whose names have one of these in them")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--markdown", type=Path, metavar="FILE", help="write tables of the results there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
