"""Tables of rules that map tensors of an original checkpoint to tensors of a model here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Split = Callable[[Tensor], Sequence[Tensor]]

# Names of a layer's parameters, in both networks.
PARAMETERS = ("weight", "bias")
_SHOWN = 5


def whole(tensor: Tensor) -> Sequence[Tensor]:
    """Return the tensor unchanged, as the only part."""
    return (tensor,)


def without_taps(tensor: Tensor) -> Sequence[Tensor]:
    """Convert the weight of a convolution with one tap to that of a linear layer."""
    return (tensor.squeeze(-1) if tensor.ndim == 3 else tensor,)


def qkv_by_head(heads: int) -> Split:
    """Make a split of rows [head, (q, k, v), channel] into query, key and value."""

    def split(tensor: Tensor) -> Sequence[Tensor]:
        (tensor,) = without_taps(tensor)
        by_head = tensor.unflatten(0, (heads, 3, -1))
        return [by_head[:, part].flatten(0, 1) for part in range(3)]

    return split


def qkv_by_part(tensor: Tensor) -> Sequence[Tensor]:
    """Split rows [(q, k, v), head, channel] into query, key and value."""
    (tensor,) = without_taps(tensor)
    return tensor.chunk(3)


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        source: The layer in the original checkpoint, or one of its tensors.
        targets: The layers here, one for each part that `split` makes, or several for a part.
        split: Splits a tensor into parts.
        parameters: Names of the layer's parameters; ("",) if `source` is a tensor itself.
    """

    source: str
    targets: Sequence[str | Sequence[str]]
    split: Split = whole
    parameters: Sequence[str] = PARAMETERS

    def copies(self, parameter: str) -> list[list[str]]:
        """Return the names, in the model here, for each part of one parameter."""
        groups = [[part] if isinstance(part, str) else list(part) for part in self.targets]
        return [[_joined(name, parameter) for name in group] for group in groups]


def convert(original: Mapping[str, Tensor], model: nn.Module, rules: Iterable[Rule]) -> None:
    """Load an original checkpoint into a model, in place.

    Args:
        original: The checkpoint's tensors.
        model: The model to load them into, as float32.
        rules: The table; it must cover every tensor of the checkpoint and of the model.

    Raises:
        ValueError: Tensors are missing, left over or of another shape; the message lists the first
            few.
    """
    wanted = model.state_dict()
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    problems: list[str] = []
    for rule in rules:
        for parameter in rule.parameters:
            source, copies = _joined(rule.source, parameter), rule.copies(parameter)
            if not any(name in wanted for group in copies for name in group):
                continue
            used.add(source)
            if source not in original:
                problems.append(f"{source} is missing")
                continue
            parts = _parts(rule, original[source], len(copies))
            for part, group in zip(parts, copies, strict=True):
                converted |= dict.fromkeys(group, part)
                problems += _wrong_shapes(source, original[source], part, group, wanted)
    problems += [f"{name} is left over" for name in original if name not in used]
    problems += [f"{name} has no tensor to load" for name in wanted if name not in converted]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            "the checkpoint does not fit the config: " + "; ".join(problems[:_SHOWN]) + more
        )
    model.load_state_dict({name: tensor.float() for name, tensor in converted.items()})


def _parts(rule: Rule, tensor: Tensor, count: int) -> Sequence[Tensor]:
    """Split a tensor; if that fails, repeat it whole, so that its shape is reported."""
    try:
        parts = rule.split(tensor)
    except (RuntimeError, ValueError):
        parts = ()
    return parts if len(parts) == count else [tensor] * count


def _wrong_shapes(
    source: str,
    tensor: Tensor,
    part: Tensor,
    group: Iterable[str],
    wanted: Mapping[str, Tensor],
) -> list[str]:
    for name in group:
        expected = wanted[name].shape if name in wanted else torch.Size()
        if part.shape != expected:
            return [
                f"{source} has shape {tuple(tensor.shape)}, which does not give the "
                f"{tuple(expected)} of {name}"
            ]
    return []


def _joined(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if parameter else layer
