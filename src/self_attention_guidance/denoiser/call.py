"""One call of a denoiser: its arguments by name, its batch layout, and how to repeat it."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Mapping, Sequence
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
    arguments: dict[str, Any]  # by name; containers are copied: diffusers' U-Net empties a list
    positional: tuple[str, ...]  # names of the arguments given by position
    sample: Tensor  # x_t of the whole batch, also if the argument is a list of pictures
    denoised: Tensor  # without channels beside it, such as those of a mask
    condition: Tensor | None  # the argument that differs between the halves of CFG
    timestep: Any  # a number, or a tensor of any shape
    timestep_scale: float  # (network's timestep - offset) / scheduler's timestep

    @property
    def has_one_timestep(self) -> bool:
        """Whether the timestep is one number, or an expanded view of one."""
        return not isinstance(self.timestep, Tensor) or not any(self.timestep.stride())

    def timesteps(self, flags: Sequence[Tensor] = ()) -> tuple[list[float], list[bool]]:
        """Read the scheduler's timesteps, one, or one for each picture; waits for the device.

        The same wait reads other tensors of one bool each.
        """
        values = torch.as_tensor(self.timestep).flatten()
        values = values[:1] if self.has_one_timestep else values
        flags = [flag.reshape(1).to(values) for flag in flags]
        numbers = torch.cat([values, *flags]).cpu().tolist()
        numbers, found = numbers[: len(values)], numbers[len(values) :]
        numbers = numbers[:1] if len(set(numbers)) == 1 else numbers
        return [self.counted(number) for number in numbers], [bool(each) for each in found]

    @functools.cached_property
    def conditions(self) -> list[Tensor]:
        """All that may differ between the halves of CFG, with a row for each picture."""
        family, beside = self.family, self.sample[:, self.denoised.shape[1] :]
        found = [each for each in (self.condition, beside) if each is not None and each.numel()]
        for name in family.batched:
            if name == family.condition and self.condition is not None:
                continue
            held: Any = self.arguments
            for part in name.split("."):
                held = held.get(part) if isinstance(held, Mapping) else None
            leaves: list[Any] = tree_leaves(held)
            second = name in family.batched_second
            tensors = [each for each in leaves if isinstance(each, Tensor) and each.ndim > second]
            found += [each.transpose(0, 1) for each in tensors] if second else tensors
        return found

    def given(self, timestep: float) -> float:
        """Convert a timestep of the scheduler to the network's."""
        return self.family.timestep_offset + timestep * self.timestep_scale

    def counted(self, given: float) -> float:
        """Convert a timestep of the network to the scheduler's."""
        return (given - self.family.timestep_offset) / self.timestep_scale

    def rows(self, rows: slice, sample: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make positional and keyword arguments of a call for some rows, whose x_t is `sample`."""
        arguments = _copied(self.arguments)
        batch = len(self.sample)
        if len(range(batch)[rows]) < batch:
            arguments = {name: self._cut(each, name, rows) for name, each in arguments.items()}
        name = self.family.sample_argument
        arguments[name] = as_given(sample, self.arguments[name])
        return tuple(arguments.pop(name) for name in self.positional), arguments

    def _cut(self, argument: Any, name: str, rows: slice) -> Any:
        """Cut an argument to some rows, if the family lists its name or that of its container."""
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
    """Describe a call of a denoiser, compiled or not; refuse it without a sample or timestep."""
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
    # Networks trained with rescaled timesteps have the scale in their config. For others, the table
    # has the scale that their pipelines use.
    scale = float(config_of(denoiser).get("timestep_scale", family.timestep_scale))
    positional, sample = tuple(by_position), stacked(sample)
    channels: Any = config_of(denoiser).get("out_channels") if family.packing is None else None
    denoised = sample[:, :channels]
    return Call(family, arguments, positional, sample, denoised, condition, timestep, scale)


@functools.cache
def _parameters(denoiser: type[nn.Module], sample_argument: str) -> list[str]:
    """Return a denoiser's argument names in order, from the first class that spells them out."""
    forwards = [vars(base)["forward"] for base in denoiser.__mro__ if "forward" in vars(base)]
    found = ([*inspect.signature(forward).parameters][1:] for forward in forwards)
    return next((names for names in found if sample_argument in names), [])


def _copied(argument: Any) -> Any:
    """Copy the containers of an argument, but not its tensors."""
    if isinstance(argument, Mapping):
        entries = cast("Mapping[str, Any]", argument)
        return {name: _copied(entry) for name, entry in entries.items()}
    if type(argument) in (list, tuple):
        return type(argument)(_copied(item) for item in argument)
    return argument


@dataclass(frozen=True)
class Layout:
    """The layout of a call; `is_given` is false if only the samples suggest it."""

    kind: BatchLayout
    is_given: bool

    @property
    def has_halves(self) -> bool:
        return self.kind in ("uncond_first", "cond_first")

    @property
    def has_two_calls(self) -> bool:
        return self.kind in ("uncond_call_first", "cond_call_first")

    def rows(self, batch: int, branch: str) -> slice:
        """Return the rows of a batch that belong to a branch, "uncond" or "cond"."""
        if not self.has_halves:
            return slice(0, batch)
        if batch % 2:
            raise ValueError(f"a batch of {batch} has no halves (batch_layout={self.kind!r})")
        is_first = self.kind == f"{branch}_first"
        return slice(0, batch // 2) if is_first else slice(batch // 2, batch)


def layout_of(call: Call, caller: Caller | None, given: BatchLayout | None) -> Layout | None:
    """Return the layout that the user, the pipeline or the family gives; `None` if none does."""
    if given is not None:
        return Layout(given, True)
    if call.arguments.get("skip_layers") is not None:
        raise ValueError(
            "diffusers' skip-layer guidance is not supported: leave out skip_guidance_layers, and "
            "attach SkipLayerGuidance"
        )
    usual = Layout(call.family.cfg_layout, True)
    is_known = caller is not None and caller.is_known
    if usual.has_two_calls or (usual.kind == "single" and is_known):
        return usual
    if caller is None or caller.cfg is None:
        return None
    return usual if caller.cfg else Layout("single", True)


def layout_by_samples(
    denoiser: nn.Module, call: Call, caller: Caller | None, is_last_step: bool
) -> Layout:
    """Find the layout from the samples and conditions of a run's first guided step.

    Pictures of one seed look like two halves, and only a later step can show the difference. So two
    halves are not assumed at a run's last step. In code that is not diffusers', their order is not
    known either.

    Raises:
        ValueError: The samples do not decide it.
    """
    family, conditions = call.family, [c for c in call.conditions if len(c) == len(call.sample)]
    if len(call.sample) < 2 or not conditions:
        return Layout("single", False)
    repeats = _repeats(call.denoised, conditions)
    if not repeats.any():
        return Layout("single", False)
    batch = len(repeats)
    has_halves = batch % 2 == 0 and bool(repeats.diagonal(batch // 2).all())
    if has_halves and family.null_label is not None:
        return Layout(_layout_by_labels(denoiser, call), True)
    has_one_twin_each = int(repeats.sum()) == batch
    is_known = caller is not None and caller.is_known
    if has_halves and has_one_twin_each and is_known and not is_last_step:
        return Layout(family.cfg_layout, False)
    name = type(denoiser if caller is None else caller.pipeline).__name__
    raise ValueError(
        f"{name} does not say whether its batch holds pictures of one seed or the halves of "
        "classifier-free guidance: attach with batch_layout='single', 'uncond_first' or "
        "'cond_first'"
    )


def halves_agree(rows: Tensor) -> Tensor:
    """Whether both halves of an even number of rows are equal: a bool tensor on their device."""
    first, second = rows.chunk(2)
    return ((first == second) | (first.isnan() & second.isnan())).all()


def have_other_conditions(call: Call, other: Call) -> Tensor | bool:
    """Whether two calls differ in more than x_t; a tensor is on their device."""
    shapes = ([each.shape for each in one.conditions] for one in (call, other))
    if next(shapes) != next(shapes):
        return True
    pairs = zip(call.conditions, other.conditions, strict=True)
    found = ((a != b).any().to(call.sample.device) for a, b in pairs if a is not b)
    return functools.reduce(operator.or_, found, False)


def _repeats(sample: Tensor, conditions: list[Tensor]) -> Tensor:
    """Find rows with equal samples but different conditions: (batch, batch) bool, on the CPU."""
    alike = (_equal_rows(each).to(sample.device) for each in conditions)
    return (_equal_rows(sample) & ~functools.reduce(operator.and_, alike)).cpu()


def _equal_rows(rows: Tensor) -> Tensor:
    return torch.stack([(rows == row).reshape(len(rows), -1).all(dim=1) for row in rows])


def _layout_by_labels(denoiser: nn.Module, call: Call) -> BatchLayout:
    """Find the layout of two halves of equal samples: with CFG, one half has no class."""
    labels: Any = call.condition
    null = labels == config_of(denoiser).get(str(call.family.null_label))
    first, second = (half.tolist() for half in null.cpu().chunk(2))
    if all(second) and not any(first):
        return "cond_first"
    return "uncond_first" if all(first) and not any(second) else "single"
