"""What was measured, as a table and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch

from measuring import Result, VariantResult
from memory import Memory
from plan import Configuration
from self_attention_guidance import __version__
from timing import Spread
from variants import VARIANTS

_TITLES = (
    "variant",
    "evaluations/image",
    "seconds",
    "time / no guidance",
    "time / diffusers' class",
    "peak MiB",
)
_REASON_LENGTH = 160


@dataclass(frozen=True)
class Report:
    """All that one run measured.

    Attributes:
        pairs: Timed rounds.
        results: One for each configuration.
    """

    pairs: int
    results: Sequence[Result]


def title(configuration: Configuration) -> str:
    """A configuration in a few words.

    Args:
        configuration: What was measured.
    """
    cfg = "CFG" if configuration.cfg else "no CFG"
    words = (configuration.network, configuration.mode, configuration.dtype, cfg)
    return ", ".join((*words, configuration.method.upper()))


def format_ratio(found: Spread | None) -> str:
    """A spread like "1.48 [1.46, 1.51] 1.40-1.60": median, quartiles, range.

    Args:
        found: `None` gives "-".
    """
    if found is None:
        return "-"
    quartiles = f"[{found.lower_quartile:.3f}, {found.upper_quartile:.3f}]"
    return f"{found.median:.3f} {quartiles} {found.low:.3f}-{found.high:.3f}"


def format_table(report: Report) -> str:
    """A block for each configuration with a row for each variant.

    Args:
        report: What was measured.
    """
    blocks = [[_TITLES, *map(_cells, result.variants)] for result in report.results]
    rows = [row for block in blocks for row in block if len(row) == len(_TITLES)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(len(row[0]) for block in blocks for row in block)
    lines: list[str] = []
    for result, block in zip(report.results, blocks, strict=True):
        lines += [_heading(result.configuration), *(_line(row, widths) for row in block)]
        lines += [*_agreement(result), *_failures(result), ""]
    return "\n".join([*lines, _footnote(report)])


def _heading(configuration: Configuration) -> str:
    pictures, side = _counted(configuration.batch_size, "picture"), configuration.size
    steps = _counted(configuration.steps, "step")
    return f"{title(configuration)}; {pictures} of {side}x{side}, {steps}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return ("  " + "  ".join(map(str.ljust, row, widths))).rstrip()


def _cells(found: VariantResult) -> Sequence[str]:
    name = VARIANTS[found.variant]
    if found.rows_per_image is None or found.seconds is None:
        return [name, f"does not run: {_one_line(found.unsuitable or '')}"]
    return [
        name,
        f"{found.rows_per_image:g}",
        f"{found.seconds.median:.4g}",
        "1" if found.variant == "none" else format_ratio(found.over_none),
        "1" if found.variant == "diffusers" else format_ratio(found.over_diffusers),
        f"{found.memory.peak:,.0f}" if isinstance(found.memory, Memory) else "-",
    ]


def _agreement(result: Result) -> list[str]:
    if result.difference is None:
        return []
    return [f"  our result differs from that of diffusers' class by {result.difference:.1e}"]


def _failures(result: Result) -> list[str]:
    return [
        f"  memory of {VARIANTS[found.variant]}: {_one_line(found.memory)}"
        for found in result.variants
        if isinstance(found.memory, str)
    ]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _REASON_LENGTH else line[: _REASON_LENGTH - 1] + "…"


def _footnote(report: Report) -> str:
    machine = _machine(report)
    rounds, threads = _counted(report.pairs, "round"), _counted(machine["threads"], "thread")
    return (
        f"time ratios: median [quartiles] range of {rounds} in which all variants took turns;"
        " latents, no decoding\n"
        "peak: on a CPU that of a process of its own, uncompiled; on CUDA of the tensors\n"
        "difference: largest one of the latents, relative to the largest value, at the settings"
        " that diffusers' class has fixed\n"
        f"{machine['device_name']}, {threads}, torch {machine['torch']},"
        f" diffusers {machine['diffusers']}"
    )


def _machine(report: Report) -> dict[str, Any]:
    device = torch.device(report.results[0].configuration.device)
    is_cuda = device.type == "cuda"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "self_attention_guidance": __version__,
    }


def as_json(report: Report) -> dict[str, Any]:
    """The same as numbers.

    Args:
        report: What was measured.

    Returns:
        What `json.dumps` takes.
    """
    return {
        "machine": _machine(report),
        "pairs": report.pairs,
        "results": [
            {
                "configuration": asdict(result.configuration),
                "difference": result.difference,
                "variants": [asdict(found) for found in result.variants],
            }
            for result in report.results
        ],
    }
