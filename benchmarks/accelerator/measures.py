"""What is measured of a network: time, memory, waits, graphs, and agreement with float32."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import self_attention_guidance
from self_attention_guidance import Guidance, PerturbedAttentionGuidance, SelfAttentionGuidance
from shared import ratios, spread, time_rounds
from subjects import Subject

Record = dict[str, Any]
Draw = Callable[[], Tensor]

_PACKAGE = Path(self_attention_guidance.__file__).parent
_WAIT = "called a synchronizing CUDA operation"
_MIB = 2**20


def variants_of(subject: Subject, with_diffusers: bool) -> dict[str, Draw]:
    """The ways to draw that are compared, by name.

    Args:
        subject: Whose pictures are drawn.
        with_diffusers: Whether diffusers' own class of the method is one of them.
    """
    found = {
        "none": subject.draw,
        "exact": lambda: _guided(subject, SelfAttentionGuidance()),
        "fast": lambda: _guided(subject, SelfAttentionGuidance.fast()),
        "pag": lambda: _guided(subject, PerturbedAttentionGuidance()),
    }
    if with_diffusers:
        found["diffusers"] = lambda: _theirs(subject)
    return found


def _guided(subject: Subject, guidance: Guidance) -> Tensor:
    with guidance.attach(subject.pipeline):
        return subject.draw()


def _theirs(subject: Subject) -> Tensor:
    before = subject.denoiser.attn_processors
    parts = subject.pipeline.components
    pipeline = diffusers.StableDiffusionSAGPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    try:
        return pipeline(**subject.arguments, sag_scale=SelfAttentionGuidance().scale).images
    finally:
        subject.denoiser.set_attn_processor(before)


def measure(
    draws: dict[str, Draw], rounds: int, steps: int, device: torch.device, record: Record
) -> None:
    """Fill `record["variants"]`; a variant that fails has its error there.

    Args:
        draws: What is compared; the others are compared with "none".
        rounds: How often each is timed, after two runs that are not.
        steps: Of a picture.
        device: Where it is drawn.
        record: Takes what is known so far, should the rest be interrupted.
    """
    found: dict[str, Record] = {name: {} for name in draws}
    record["variants"] = found
    for name, draw in draws.items():
        before = counters["stats"]["unique_graphs"]
        with noted_errors(found[name]):
            draw()  # warm-up
        found[name]["graphs"] = counters["stats"]["unique_graphs"] - before
    record["graphs_first"] = counters["stats"]["unique_graphs"]
    latents: dict[str, Tensor] = {}
    for name in working(found):
        with noted_errors(found[name]):
            latents[name] = _look(draws[name], steps, device, found[name])
            found[name]["change"] = _difference(latents[name], latents.get("none"))
    timed = {name: draws[name] for name in working(found)}
    seconds = time_rounds(timed, rounds, device)
    for name, values in seconds.items():
        found[name]["seconds_a_step"] = spread(values).median / steps
        found[name]["seconds"] = values
        if "none" in seconds:
            found[name]["ratio"] = ratios(values, seconds["none"]).median


def working(variants: dict[str, Record]) -> list[str]:
    """Names of the variants that have not failed."""
    return [name for name, record in variants.items() if "error" not in record]


@contextmanager
def noted_errors(record: Record) -> Generator[None]:
    """Errors inside the `with` statement go into the record, and no further."""
    try:
        yield
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"[:2000]
        record["traceback"] = traceback.format_exc()[-6000:]


def _look(draw: Draw, steps: int, device: torch.device, record: Record) -> Tensor:
    if device.type != "cuda":
        record.update(peak_mib=None, waits_a_step=None)
        latents = draw()
    else:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        with _counted_waits() as waits:
            latents = draw()
        record["peak_mib"] = torch.cuda.max_memory_allocated(device) / _MIB
        record["waits_a_step"] = waits.total() / steps
        record["waits_by_place"] = dict(waits.most_common(12))
    record["is_finite"] = bool(latents.isfinite().all())
    return latents


@contextmanager
def _counted_waits() -> Generator[Counter[str]]:
    """Counts waits for the device by the line that caused them: guidance's own where it is one."""
    waits: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if _WAIT in str(message):
            waits[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    frames = [f for f in traceback.extract_stack() if "warnings.py" not in f.filename]
    frames = frames[:-2]  # without this function and the one that notes
    ours = [f for f in frames if _PACKAGE in Path(f.filename).parents]
    frame = (ours or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"


def _difference(value: Tensor, other: Tensor | None) -> float | None:
    """Norm of the difference, as a share of the other's."""
    if other is None:
        return None
    a, b = value.double(), other.double()
    return float((a - b).norm() / b.norm())


# All blocks of a kind share their code, and here all variants as well. torch's own limit is 8.
RECOMPILE_LIMIT = 32


@contextmanager
def compiled(denoiser: Any, backend: str, record: Record) -> Generator[None]:
    """Compile the repeated blocks of a denoiser, and note what came of it afterwards.

    Args:
        denoiser: Compiled in place.
        backend: Of `torch.compile`.
        record: Takes the number of graphs, breaks and functions that reached the limit.
    """
    torch.compiler.reset()
    counters.clear()
    limit = _LimitCounter()
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(limit)
    denoiser.compile_repeated_blocks(backend=backend)
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            yield
    finally:
        logger.removeHandler(limit)
        record["graphs"] = counters["stats"]["unique_graphs"]
        record["graph_breaks"] = counters["graph_break"].total()
        record["recompile_limit_reached"] = limit.count
        record["recompilations"] = record["graphs"] - record.get("graphs_first", 0)
        torch.compiler.reset()


class _LimitCounter(logging.Handler):
    """Counts the messages that a function is compiled no more, as it was too often."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a message."""
        self.count += "recompile_limit" in record.getMessage()


def agreement(make: Callable[[torch.dtype], Subject], record: Record) -> None:
    """How far half precision is from float32, without guidance and with it.

    Args:
        make: A subject of a type; the weights are the same but for rounding.
        record: Takes the differences, by type and by variant.
    """
    with _exact_products():
        precise = {name: draw() for name, draw in variants_of(make(torch.float32), False).items()}
    record["agreement"] = {}
    record["change"] = {name: _difference(of, precise["none"]) for name, of in precise.items()}
    for dtype in (torch.float16, torch.bfloat16):
        entry: Record = {}
        record["agreement"][str(dtype).removeprefix("torch.")] = entry
        with noted_errors(entry):
            for name, draw in variants_of(make(dtype), False).items():
                entry[name] = _difference(draw(), precise[name])


@contextmanager
def _exact_products() -> Generator[None]:
    """Products of float32 numbers keep all digits inside the `with` statement."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
