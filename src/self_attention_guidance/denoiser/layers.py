"""Layers and blocks of a denoiser by names that people use: "mid", "down.2", "blocks.7"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn

from .attention import self_attention_layers
from .families import uncompiled

# Of the parts of a network at its top, which short names may begin with.
_SHORT = {
    "mid_block": "mid",
    "down_blocks": "down",
    "up_blocks": "up",
    "transformer_blocks": "blocks",
    "single_transformer_blocks": "single",
    "joint_transformer_blocks": "joint",
}

_WITHOUT_PICTURE = ("fuser", "context_refiner", "siglip_refiner")

_found: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], tuple[str, ...]]] = WeakKeyDictionary()


def attention_names(denoiser: nn.Module) -> list[str]:
    """Dotted paths of the self-attention layers that see the picture, compiled or not.

    Layers that ground objects in the picture (GLIGEN) see more, and those that refine the text
    see nothing of it: they are left out.
    """
    layers = self_attention_layers(denoiser)
    return [name for name in layers if not {*_WITHOUT_PICTURE} & {*name.split(".")}]


def block_names(denoiser: nn.Module) -> list[str]:
    """Dotted paths of the blocks: a self-attention layer, and what belongs to it if anything does.

    A block's output has the shape of its input, so it can be left out.
    """
    network = uncompiled(denoiser)
    blocks: dict[str, None] = {}
    for layer in attention_names(denoiser):
        parent = layer.rpartition(".")[0]
        is_alone = isinstance(network.get_submodule(parent), nn.ModuleList)
        blocks[layer if is_alone else parent] = None
    return list(blocks)


def block_of(denoiser: nn.Module, layer: str) -> str:
    """The block that a layer belongs to; the layer's own path if it belongs to none."""
    blocks = block_names(denoiser)
    return next((each for each in blocks if _begins(plain(layer), plain(each))), layer)


def plain(path: str) -> str:
    """A dotted path without what `torch.compile` of a part puts into it."""
    return path.replace("._orig_mod", "")


def short_name(path: str) -> str:
    """A dotted path as `layers=` takes it, too, with the short name of its part in front."""
    part, dot, rest = path.partition(".")
    return f"{_SHORT.get(part, part)}{dot}{rest}"


def resolve(
    denoiser: nn.Module, names: Sequence[str], known: Sequence[str], kind: str
) -> list[str]:
    """Dotted paths of the layers or blocks that names mean.

    A name is a dotted path, or the beginning of some; its first part may be short: "mid", "down",
    "up", "blocks", "single", "joint". Names match whole parts: "blocks.1" is not "blocks.10". Where
    a part is a fraction, "7/24", it is that block in proportion to how many there are.

    Args:
        denoiser: The network, compiled or not.
        names: At least one.
        known: What they may mean.
        kind: What `known` are, for messages: "self-attention layer" or "block".

    Raises:
        ValueError: A name means nothing.
    """
    chosen: dict[str, None] = {}
    for name in names:
        wanted = _in_proportion(denoiser, name)
        found = [path for path in known if _is_meant(path, wanted)]
        if not found:
            raise ValueError(
                f"layer {name!r} is not a {kind} of {type(uncompiled(denoiser)).__name__}; it must "
                f"be one of {', '.join(known) or '(there is none)'}, or the beginning of some, for "
                f"short {', '.join(beginnings(known)) or '(none)'}"
            )
        chosen.update(dict.fromkeys(found))
    return [path for path in known if path in chosen]


def resolved(denoiser: nn.Module, names: Sequence[str], has_blocks: bool) -> tuple[str, ...]:
    """Like `resolve` among all layers, or blocks, of a denoiser; looks them up once."""
    network = uncompiled(denoiser)
    cache, key = _found.setdefault(network, {}), (str(has_blocks), *names)
    if key not in cache:
        known = block_names(network) if has_blocks else attention_names(network)
        kind = "block with self-attention" if has_blocks else "self-attention layer"
        cache[key] = tuple(resolve(network, names, known, kind))
    return cache[key]


def _is_meant(path: str, name: str) -> bool:
    """Whether a name is a path or its beginning, in full or short, compiled in parts or not."""
    return any(_begins(each, name) for each in (path, plain(path), short_name(plain(path))))


def _begins(path: str, beginning: str) -> bool:
    return f"{path}.".startswith(f"{beginning}.")


def _in_proportion(denoiser: nn.Module, name: str) -> str:
    """A name with the number of a block for the fraction in it."""
    match = re.fullmatch(r"(\w+)\.(\d+)/(\d+)", name)
    if match is None or int(match[3]) == 0:
        return name
    stack = getattr(uncompiled(denoiser), match[1], ())
    return f"{match[1]}.{int(match[2]) * len(stack) // int(match[3])}"


def beginnings(known: Sequence[str]) -> list[str]:
    """The short names of what is there, of one or two parts."""
    short = [short_name(path).split(".") for path in known]
    return list(dict.fromkeys(".".join(p[: 1 if p[0] == "mid" else 2]) for p in short))
