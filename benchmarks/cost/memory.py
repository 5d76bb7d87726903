"""How much memory a picture takes at its peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from plan import Configuration

_MIB = 2**20
_STATUS = Path("/proc/self/status")
_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Memory:
    """What a variant took, in MiB.

    On a CPU this is a process of its own with all that it loaded, on CUDA what tensors took.

    Attributes:
        before: With the weights, before the first picture.
        peak: The most until the picture was drawn.
    """

    before: float
    peak: float


def of_process(configuration: Configuration, variant: str) -> Memory | str:
    """Peak of a fresh process that draws what one variant draws, uncompiled and on the CPU.

    Args:
        configuration: What is measured.
        variant: A key of `VARIANTS`.

    Returns:
        The figures, or why there are none.
    """
    task = json.dumps({"configuration": asdict(configuration), "variant": variant})
    quiet = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", _CHILD, task],
        capture_output=True,
        text=True,
        env=os.environ | quiet,
    )
    if done.returncode == 0:
        return Memory(**json.loads(done.stdout))
    lines = done.stderr.strip().splitlines()
    return f"process ended with {done.returncode}" + (f": {lines[-1]}" if lines else "")


def of_cuda(run: Callable[[], object], device: torch.device) -> Memory:
    """Peak of what tensors take on a CUDA device.

    Args:
        run: Draws a picture.
        device: Where.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return Memory(before / _MIB, torch.cuda.max_memory_allocated(device) / _MIB)


def peak_of_this_process() -> float:
    """The most memory that this process has had, in MiB.

    Raises:
        OSError: The system does not tell.
    """
    # Not getrusage where it can be helped: its peak of a new process on Linux starts with the
    # one of the process that started it.
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        raise OSError(f"{sys.platform} does not tell the memory of a process") from None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB
