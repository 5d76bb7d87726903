"""Warm-up, rows, memory, time and agreement of one configuration after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from known_networks import NETWORKS, load
from memory import Memory, of_cuda, of_process
from plan import Configuration
from self_attention_guidance.generate.counting import counted_rows
from self_attention_guidance.guidance import Guidance
from timing import Advance, Spread, ratios, spread, time_rounds
from variants import VARIANTS, Subject, Unsuitable, check_theirs, difference_to_diffusers


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """What one variant costs.

    Attributes:
        variant: A key of `VARIANTS`.
        guidance: Its settings; `None` for those that have none of this package's.
        rows_per_image: Rows of all calls of the denoiser for one picture; `None` if it can't run.
        seconds: Of one run, all its pictures; likewise.
        over_none: Its time divided by that without guidance in the same round; likewise.
        over_diffusers: The same by that of diffusers' class; `None` also if that can't run.
        memory: Its peak, or why there is none; `None` was not measured.
        unsuitable: Why it can't run; `None` if it can.
    """

    variant: str
    guidance: Guidance | None = None
    rows_per_image: float | None = None
    seconds: Spread | None = None
    over_none: Spread | None = None
    over_diffusers: Spread | None = None
    memory: Memory | str | None = None
    unsuitable: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one configuration.

    Attributes:
        configuration: What was drawn, and how.
        variants: One result each, in the order of `VARIANTS`.
        difference: Of our latents to those of diffusers' class, relative to the largest value;
            `None` if it can't run.
    """

    configuration: Configuration
    variants: Sequence[VariantResult]
    difference: float | None


def work(configurations: Sequence[Configuration], pairs: int, with_memory: bool) -> int:
    """How much `bench` has to do, in the unit of its `advance`.

    Args:
        configurations: From `plan`.
        pairs: Timed rounds.
        with_memory: Whether memory is measured.
    """
    in_processes = sum(with_memory and _by_process(each) for each in configurations)
    return len(configurations) * (1 + pairs) + in_processes


def bench(
    configurations: Sequence[Configuration],
    pairs: int = 7,
    with_memory: bool = True,
    advance: Advance = lambda share: None,
) -> list[Result]:
    """Measures every configuration.

    Args:
        configurations: From `plan`.
        pairs: Timed rounds, in each of which every variant runs once.
        with_memory: Whether to measure memory.
        advance: Takes how much was done since it was last called.

    Returns:
        A result for each configuration.

    Raises:
        ValueError: The denoiser can't be compiled here.
    """
    results: list[Result] = []
    for _, group in groupby(configurations, lambda each: (each.network, each.dtype, each.mode)):
        results += _bench_group(list(group), pairs, with_memory, advance)
        gc.collect()  # a pipeline and its last handle hold each other, and may be large
    return results


def _bench_group(
    group: Sequence[Configuration], pairs: int, with_memory: bool, advance: Advance
) -> list[Result]:
    """Configurations that share a pipeline."""
    # Processes first: two copies of a large network might not fit.
    memories = [_of_processes(each, advance) if with_memory else {} for each in group]
    network = NETWORKS[group[0].network]
    pipeline = load(network, group[0].dtype, group[0].device)
    return [
        measure(Subject(network, each, pipeline), pairs, with_memory, memory, advance)
        for each, memory in zip(group, memories, strict=True)
    ]


def _by_process(configuration: Configuration) -> bool:
    # A compiled process would tell how much memory the compiler takes.
    return configuration.mode == "eager" and torch.device(configuration.device).type == "cpu"


def _of_processes(configuration: Configuration, advance: Advance) -> dict[str, Memory | str]:
    if not _by_process(configuration):
        return {}
    variants = list(VARIANTS)
    try:
        check_theirs(NETWORKS[configuration.network], configuration.method)
    except Unsuitable:
        variants.remove("diffusers")
    found: dict[str, Memory | str] = {}
    for variant in variants:
        found[variant] = of_process(configuration, variant)
        advance(1 / len(variants))
    return found


def measure(
    subject: Subject,
    pairs: int,
    with_memory: bool = False,
    memories: dict[str, Memory | str] | None = None,
    advance: Advance = lambda share: None,
) -> Result:
    """Measures one configuration in this process.

    Args:
        subject: What draws.
        pairs: Timed rounds.
        with_memory: Whether to measure the memory of a CUDA device.
        memories: Figures of memory by variant that are known already.
        advance: Takes how much was done since it was last called.

    Raises:
        ValueError: The denoiser can't be compiled here.
    """
    rows, unsuitable = _warm_up(subject)
    advance(1)
    device = torch.device(subject.configuration.device)
    runs = {name: partial(subject.draw, name) for name in VARIANTS if name in rows}
    memories = dict(memories or {})
    if with_memory and device.type == "cuda":
        memories |= {name: of_cuda(run, device) for name, run in runs.items()}
    difference = None if unsuitable else difference_to_diffusers(subject)
    seconds = time_rounds(runs, pairs, device, advance)
    return Result(
        configuration=subject.configuration,
        variants=[
            _timed(subject, name, rows[name], seconds, memories.get(name))
            if name in rows
            else VariantResult(variant=name, unsuitable=unsuitable)
            for name in VARIANTS
        ],
        difference=difference,
    )


def _timed(
    subject: Subject,
    name: str,
    rows: int,
    seconds: dict[str, list[float]],
    memory: Memory | str | None,
) -> VariantResult:
    theirs = seconds.get("diffusers")
    return VariantResult(
        variant=name,
        guidance=subject.guidance.get(name),
        rows_per_image=rows / subject.configuration.batch_size,
        seconds=spread(seconds[name]),
        over_none=ratios(seconds[name], seconds["none"]),
        over_diffusers=None if theirs is None else ratios(seconds[name], theirs),
        memory=memory,
    )


def _warm_up(subject: Subject) -> tuple[dict[str, int], str | None]:
    """Rows of every variant's run, and why diffusers' class can't run if it can't."""
    rows: dict[str, int] = {}
    unsuitable = None
    # First, because compiling starts anew for the others if it fails half-way.
    try:
        rows["diffusers"] = _rows_when_warm(subject, "diffusers")
    except Unsuitable as error:
        unsuitable = str(error)
        subject.compile()
    for name in VARIANTS:
        if name != "diffusers":
            rows[name] = _compiling(subject, partial(_rows_when_warm, subject, name))
    return rows, unsuitable


def _compiling(subject: Subject, run: Callable[[], int]) -> int:
    if subject.configuration.mode == "eager":
        return run()
    try:
        return run()
    except Exception as error:  # torch.compile raises every kind, by what the machine lacks
        raise ValueError(
            f"modes='compiled' does not work here: {type(error).__name__}: {error}"
        ) from error


def _rows_when_warm(subject: Subject, variant: str) -> int:
    """Rows of a run, after one or two that compile and fill caches."""
    with counted_rows(subject.denoiser) as rows:
        subject.draw(variant)
    if subject.configuration.mode == "compiled":
        subject.draw(variant)  # what can be compiled once only, or again every time, shows here
    return sum(rows)
