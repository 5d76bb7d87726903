"""One call of a denoiser: its arguments by name, what its batch holds, and how to repeat it."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves

from .caller import Caller
from .families import BatchLayout, Family, config_of, family_of, uncompiled
from .outputs import as_given, stacked


@dataclass(frozen=True)
class Call:
    """One call of a denoiser."""

    family: Family
    arguments: dict[str, Any]  # by name; containers are copies, as diffusers' U-Net empties a list
    positional: tuple[str, ...]  # names of those that were given by position
    sample: Tensor  # x_t of the whole batch, also where the argument is a list of pictures
    condition: Tensor | None  # what differs between the halves of classifier-free guidance
    timestep: Any  # a number, or a tensor of any shape
    timestep_scale: float  # what the network is given, less an offset, over what schedulers count

    @property
    def has_one_timestep(self) -> bool:
        """Whether the timestep is one number, maybe repeated without a copy."""
        return not isinstance(self.timestep, Tensor) or not any(self.timestep.stride())

    @functools.cached_property
    def timesteps(self) -> list[float]:
        """The timesteps as the scheduler counts, one, or one a picture; waits for the device."""
        values = torch.as_tensor(self.timestep).flatten()
        numbers = (values[:1] if self.has_one_timestep else values).cpu().tolist()
        numbers = numbers[:1] if len(set(numbers)) == 1 else numbers
        return [self.counted(number) for number in numbers]

    def given(self, timestep: float) -> float:
        """The network's timestep at a timestep of the scheduler."""
        return self.family.timestep_offset + timestep * self.timestep_scale

    def counted(self, given: float) -> float:
        """The scheduler's timestep, of what the network is given."""
        return (given - self.family.timestep_offset) / self.timestep_scale

    def rows(self, rows: slice, sample: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call for part of the batch, whose x_t is given."""
        arguments = _copied(self.arguments)
        batch = len(self.sample)
        if len(range(batch)[rows]) < batch:
            arguments = {name: self._cut(each, name, rows) for name, each in arguments.items()}
        name = self.family.sample_argument
        arguments[name] = as_given(sample, self.arguments[name])
        return tuple(arguments.pop(name) for name in self.positional), arguments

    def _cut(self, argument: Any, name: str, rows: slice) -> Any:
        """`argument` for some rows, if the family lists its name, or that of a container of it."""
        if isinstance(argument, Mapping):
            entries = cast("Mapping[str, Any]", argument)
            return {key: self._cut(each, f"{name}.{key}", rows) for key, each in entries.items()}
        family, batch = self.family, len(self.sample)
        batched = (family.timestep_argument, *family.batched)
        above = itertools.accumulate(name.split("."), "{}.{}".format)
        if not any(each in batched for each in above):
            return argument
        if name in family.batched_second:
            return argument[:, rows]
        if isinstance(argument, list) and isinstance(self.arguments[family.sample_argument], list):
            return cast("list[Any]", argument)[rows]
        if isinstance(argument, list | tuple):
            items = cast("list[Any] | tuple[Any, ...]", argument)
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(items)):
                return type(items)(self._cut(item, name, rows) for item in items)
            return items[rows] if len(items) == batch else items
        if not isinstance(argument, Tensor) or argument.ndim == 0 or len(argument) == 1:
            return argument
        if len(argument) != batch:
            raise ValueError(f"{name} holds {len(argument)} rows for a batch of {batch} pictures")
        return argument[rows]


def call_of(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call of a denoiser, compiled or not; refuses one without a sample or a timestep."""
    network, family = uncompiled(denoiser), family_of(denoiser)
    names = _parameters(type(network), family.sample_argument)
    by_position = dict(zip(names, args, strict=False))
    arguments = _copied({**by_position, **kwargs})
    sample = arguments.get(family.sample_argument)
    timestep = arguments.get(family.timestep_argument)
    if sample is None or timestep is None:
        missing = family.sample_argument if sample is None else family.timestep_argument
        raise ValueError(f"{type(network).__name__} was called without {missing}: give it by name")
    condition = arguments.get(family.condition)
    if isinstance(condition, list):
        condition = pad_sequence(cast("list[Tensor]", condition), batch_first=True)
    condition = condition if isinstance(condition, Tensor) else None
    # Networks that were trained with rescaled timesteps say so in their config; for others, the
    # table says what their pipelines do.
    scale = float(config_of(denoiser).get("timestep_scale", family.timestep_scale))
    positional = tuple(by_position)
    return Call(family, arguments, positional, stacked(sample), condition, timestep, scale)


@functools.cache
def _parameters(denoiser: type[nn.Module], sample_argument: str) -> list[str]:
    """Names of a denoiser's arguments in order, by the first class that spells them out."""
    forwards = [vars(base)["forward"] for base in denoiser.__mro__ if "forward" in vars(base)]
    found = ([*inspect.signature(forward).parameters][1:] for forward in forwards)
    return next((names for names in found if sample_argument in names), [])


def _copied(argument: Any) -> Any:
    """`argument` with its containers copied, and its tensors as they are."""
    if isinstance(argument, Mapping):
        entries = cast("Mapping[str, Any]", argument)
        return {name: _copied(entry) for name, entry in entries.items()}
    if type(argument) in (list, tuple):
        return type(argument)(_copied(item) for item in argument)
    return argument


@dataclass(frozen=True)
class Layout:
    """The layout of a call, and whether the pipeline or the user gave it, not the samples."""

    kind: BatchLayout
    is_given: bool

    @property
    def has_halves(self) -> bool:
        return self.kind in ("uncond_first", "cond_first")

    @property
    def has_two_calls(self) -> bool:
        return self.kind in ("uncond_call_first", "cond_call_first")

    def rows(self, batch: int, branch: str) -> slice:
        """The rows of a batch that are of a branch, "uncond" or "cond"."""
        if not self.has_halves:
            return slice(0, batch)
        if batch % 2:
            raise ValueError(f"a batch of {batch} has no two halves (batch_layout={self.kind!r})")
        is_first = self.kind == f"{branch}_first"
        return slice(0, batch // 2) if is_first else slice(batch // 2, batch)


def layout_of(call: Call, caller: Caller | None, given: BatchLayout | None) -> Layout | None:
    """The layout that the user, a pipeline or the denoiser's family gives; `None` if none does."""
    if given is not None:
        return Layout(given, True)
    if call.arguments.get("skip_layers") is not None:
        raise ValueError(
            "diffusers' skip-layer guidance is not supported: leave out skip_guidance_layers, and "
            "attach SkipLayerGuidance"
        )
    usual = Layout(call.family.cfg_layout, True)
    if usual.has_two_calls or (usual.kind == "single" and caller is not None):
        return usual
    if caller is None or caller.cfg is None:
        return None
    return usual if caller.cfg else Layout("single", True)


def layout_by_samples(
    denoiser: nn.Module, call: Call, caller: Caller | None, is_last_step: bool
) -> Layout:
    """The layout as the samples and conditions of a run's first guided step show it, if they do.

    At a run's last step, no later one can show that pictures of one seed were taken for halves.
    """
    family, condition = call.family, call.condition
    if len(call.sample) < 2 or condition is None or len(condition) != len(call.sample):
        return Layout("single", False)
    repeats = _repeats(call.sample, condition)
    if not repeats.any():
        return Layout("single", False)
    batch = len(repeats)
    has_halves = batch % 2 == 0 and bool(repeats.diagonal(batch // 2).all())
    if has_halves and family.null_label is not None:
        return Layout(_layout_by_labels(denoiser, call), True)
    has_one_twin_each = int(repeats.sum()) == batch
    if has_halves and has_one_twin_each and caller is not None and not is_last_step:
        return Layout(family.cfg_layout, False)
    name = type(denoiser if caller is None else caller.pipeline).__name__
    raise ValueError(
        f"{name} does not tell whether its batch is pictures of one seed or the halves of "
        "classifier-free guidance: attach with batch_layout='single', 'uncond_first' or "
        "'cond_first'"
    )


def halves_agree(rows: Tensor) -> Tensor:
    """Whether both halves of an even number of rows are the same, bool on their device."""
    first, second = rows.chunk(2)
    return ((first == second) | (first.isnan() & second.isnan())).all()


def _repeats(sample: Tensor, condition: Tensor) -> Tensor:
    """Which rows hold one sample with two conditions, bool, (batch, batch), on the CPU."""
    same, alike = (
        (rows[:, None] == rows[None]).flatten(2).all(dim=2)
        for rows in (sample, condition.flatten(1) if condition.ndim > 1 else condition[:, None])
    )
    return (same & ~alike).cpu()


def _layout_by_labels(denoiser: nn.Module, call: Call) -> BatchLayout:
    """Two halves of the same samples, one of them without a class, are those of CFG."""
    labels: Any = call.condition
    null = labels == config_of(denoiser).get(str(call.family.null_label))
    first, second = (half.tolist() for half in null.cpu().chunk(2))
    if all(second) and not any(first):
        return "cond_first"
    return "uncond_first" if all(first) and not any(second) else "single"
