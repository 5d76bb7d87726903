"""Short names for layers and blocks of a denoiser: "mid", "down.2", "blocks.7"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn

from .attention import self_attention_layers
from .families import uncompiled

# Short forms of the first part of a dotted path.
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
    """Return dotted paths of the self-attention layers over the picture; compiled or not.

    Two kinds of layers are left out: GLIGEN's, which also attend to grounded objects, and those
    that refine the text, which do not see the picture.
    """
    layers = self_attention_layers(denoiser)
    return [name for name in layers if not {*_WITHOUT_PICTURE} & {*name.split(".")}]


def block_names(denoiser: nn.Module) -> list[str]:
    """Return dotted paths of the blocks: the parents of self-attention layers, or layers alone.

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
    """Return the block that a layer belongs to; the layer's own path if it belongs to none."""
    blocks = block_names(denoiser)
    return next(
        (each for each in blocks if _begins(uncompiled_path(layer), uncompiled_path(each))), layer
    )


def uncompiled_path(path: str) -> str:
    """Return a dotted path without the parts that `torch.compile` adds for a block."""
    return path.replace("._orig_mod", "")


def short_name(path: str) -> str:
    """Shorten the first part of a dotted path; `layers=` takes both forms."""
    part, dot, rest = path.partition(".")
    return f"{_SHORT.get(part, part)}{dot}{rest}"


def resolve(
    denoiser: nn.Module, names: Sequence[str], known: Sequence[str], kind: str
) -> list[str]:
    """Find the dotted paths of the layers or blocks that names stand for.

    A name is a dotted path, or a beginning of paths. Its first part may be short: "mid", "down",
    "up", "blocks", "single", "joint". Names match whole parts: "blocks.1" is not "blocks.10". A
    fraction such as "7/24" stands for block 7 of 24, scaled to the number of blocks.

    Args:
        denoiser: The network, compiled or not.
        names: At least one name.
        known: The paths that names can match.
        kind: The kind of these paths, for messages: "self-attention layer" or "block".

    Raises:
        ValueError: A name matches no path.
    """
    chosen: dict[str, None] = {}
    for name in names:
        wanted = _in_proportion(denoiser, name)
        found = [path for path in known if _is_meant(path, wanted)]
        if not found:
            raise ValueError(
                f"layer {name!r} is not a {kind} of {type(uncompiled(denoiser)).__name__}; it must "
                f"be one of {_listed(known)}, or the beginning of some, for short "
                f"{_listed(beginnings(known))}"
            )
        chosen.update(dict.fromkeys(found))
    return [path for path in known if path in chosen]


def resolved(denoiser: nn.Module, names: Sequence[str], has_blocks: bool) -> tuple[str, ...]:
    """Apply `resolve` to all layers, or blocks, of a denoiser; results are cached."""
    network = uncompiled(denoiser)
    cache, key = _found.setdefault(network, {}), (str(has_blocks), *names)
    if key not in cache:
        known = block_names(network) if has_blocks else attention_names(network)
        kind = "block with self-attention" if has_blocks else "self-attention layer"
        cache[key] = tuple(resolve(network, names, known, kind))
    return cache[key]


def _listed(names: Sequence[str]) -> str:
    """Names for a message; of a large network, the first and the last ones."""
    if len(names) > 12:
        names = [*names[:6], "...", *names[-2:]]
    return ", ".join(names) or "(there is none)"


def _is_meant(path: str, name: str) -> bool:
    """Whether a name is a path or its beginning, in full or short, compiled in parts or not."""
    return any(
        _begins(each, name)
        for each in (path, uncompiled_path(path), short_name(uncompiled_path(path)))
    )


def _begins(path: str, beginning: str) -> bool:
    return f"{path}.".startswith(f"{beginning}.")


def _in_proportion(denoiser: nn.Module, name: str) -> str:
    """Replace the fraction in a name by the number of a block."""
    match = re.fullmatch(r"(\w+)\.(\d+)/(\d+)", name)
    if match is None or int(match[3]) == 0:
        return name
    stack = getattr(uncompiled(denoiser), match[1], ())
    return f"{match[1]}.{int(match[2]) * len(stack) // int(match[3])}"


def beginnings(known: Sequence[str]) -> list[str]:
    """Return the short names of these paths, cut to one or two parts."""
    short = [short_name(path).split(".") for path in known]
    return list(dict.fromkeys(".".join(p[: 1 if p[0] == "mid" else 2]) for p in short))
