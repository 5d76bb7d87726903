"""One call of a denoiser: its arguments by name, and how to repeat it for part of the batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .families import Family, config_of, family_of, uncompiled


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        arguments: All by name, whole. Containers are copies: diffusers' U-Net empties a list that
            it is given.
        positional: Names of those that were given by position.
        sample: x_t of the whole batch.
        condition: What differs between the halves of classifier-free guidance, if it is a tensor.
        timestep: A number, or a tensor of any shape.
        timestep_scale: What the network is given over what the scheduler counts.
    """

    family: Family
    arguments: dict[str, Any]
    positional: tuple[str, ...]
    sample: Tensor
    condition: Tensor | None
    timestep: Any
    timestep_scale: float

    @property
    def has_one_timestep(self) -> bool:
        """Whether the timestep is one number, maybe repeated without a copy."""
        return not isinstance(self.timestep, Tensor) or not any(self.timestep.stride())

    def timesteps(self) -> list[float]:
        """The timesteps as the scheduler counts, one, or one a picture."""
        values = torch.as_tensor(self.timestep).flatten()
        numbers = (values[:1] if self.has_one_timestep else values).cpu().tolist()
        numbers = numbers[:1] if len(set(numbers)) == 1 else numbers
        return [number / self.timestep_scale for number in numbers]

    def rows(self, rows: slice, sample: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call for part of the batch, whose x_t is given."""
        arguments = _copied(self.arguments)
        batch = len(self.sample)
        if len(range(batch)[rows]) < batch:
            names = ("timestep", *self.family.batched)
            cut = functools.partial(_cut, batched=names, batch=batch, rows=rows)
            arguments = {name: cut(value, name) for name, value in arguments.items()}
        arguments[self.family.sample_argument] = sample
        return tuple(arguments.pop(name) for name in self.positional), arguments


def call_of(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call of a denoiser, compiled or not; refuses one without a sample or a timestep."""
    network, family = uncompiled(denoiser), family_of(denoiser)
    names = _parameters(type(network), family.sample_argument)
    by_position = dict(zip(names, args, strict=False))
    arguments = _copied({**by_position, **kwargs})
    sample, timestep = arguments.get(family.sample_argument), arguments.get("timestep")
    if sample is None or timestep is None:
        missing = family.sample_argument if sample is None else "timestep"
        raise ValueError(
            f"{type(network).__name__} was called without {missing!r}: give it by name"
        )
    condition = arguments.get(family.condition)
    condition = condition if isinstance(condition, Tensor) else None
    # Networks that were trained with rescaled timesteps say so in their config; for others, the
    # table says what their pipelines do.
    scale = float(config_of(denoiser).get("timestep_scale", family.timestep_scale))
    return Call(family, arguments, tuple(by_position), sample, condition, timestep, scale)


@functools.cache
def _parameters(denoiser: type[nn.Module], sample_argument: str) -> list[str]:
    """Names of a denoiser's arguments in order, by the first class that spells them out."""
    for base in denoiser.__mro__:
        if "forward" in vars(base):
            names = list(inspect.signature(vars(base)["forward"]).parameters)[1:]
            if sample_argument in names:
                return names
    return []


def _copied(argument: Any) -> Any:
    """`argument` with its containers copied, and its tensors as they are."""
    if isinstance(argument, Mapping):
        entries = cast("Mapping[str, Any]", argument)
        return {name: _copied(entry) for name, entry in entries.items()}
    if type(argument) in (list, tuple):
        return type(argument)(_copied(item) for item in argument)
    return argument


def _cut(argument: Any, name: str, batched: tuple[str, ...], batch: int, rows: slice) -> Any:
    """`argument` for some rows of the batch, if its name, or one above, says that it holds them."""
    cut = functools.partial(_cut, batched=batched, batch=batch, rows=rows)
    if isinstance(argument, Mapping):
        entries = cast("Mapping[str, Any]", argument)
        return {key: cut(entry, f"{name}.{key}") for key, entry in entries.items()}
    if not any(f"{name}.".startswith(f"{each}.") for each in batched):
        return argument
    if isinstance(argument, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", argument)
        if _holds_tensors(items):
            return type(items)(cut(item, name) for item in items)
        return items[rows] if len(items) == batch else items
    if not isinstance(argument, Tensor) or argument.ndim == 0 or len(argument) == 1:
        return argument
    if len(argument) != batch:
        raise ValueError(f"{name} holds {len(argument)} rows, but the batch holds {batch} pictures")
    return argument[rows]


def _holds_tensors(item: Any) -> bool:
    if isinstance(item, list | tuple):
        return any(_holds_tensors(part) for part in cast("list[Any]", item))
    return isinstance(item, Tensor)
