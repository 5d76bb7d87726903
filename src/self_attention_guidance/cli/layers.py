"""The command `layers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from .output import print_line

if TYPE_CHECKING:
    from torch import nn

_KINDS = {False: "self-attention layers", True: "blocks"}


def layers_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A builtin model, a diffusers folder or a hub id."),
    ] = "emoji",
) -> None:
    """List what guidance can read or weaken in a model, without loading its weights.

    Each line is a name for `layers=`, and for `--guidance pag:layers=NAME+NAME`. After it come the
    methods that use it by default. The beginning of a name also works: "mid" or "down.1".

    \b
    Examples:
      sag layers emoji
      sag generate "red heart" --guidance "slg:layers=mid+up.1"
    """
    from ..generate.finding import model_folder, model_index

    model_index(model, model_folder(model))

    from ..generate.structure import load_structure

    denoiser = load_structure(model)
    print_line(f"{type(denoiser).__name__} of {model}")
    for has_blocks, kind in _KINDS.items():
        names, users = _names(denoiser, has_blocks)
        print_line(f"\n{kind}, for {', '.join(_methods(has_blocks))}:")
        for line in _table(names, users) or ["  there are none"]:
            print_line(line)


def _methods(has_blocks: bool) -> list[str]:
    """Short names of the methods that use layers, or whole blocks."""
    from ..guidance import METHODS, SelfAttentionGuidance
    from ..guidance.weak_layers import WeakLayers

    weak = [
        n for n, m in METHODS.items() if issubclass(m, WeakLayers) and m.has_blocks == has_blocks
    ]
    return weak if has_blocks else [SelfAttentionGuidance.method, *weak]


def _names(denoiser: nn.Module, has_blocks: bool) -> tuple[list[str], dict[str, list[str]]]:
    """Dotted paths of the layers or blocks, and the methods that use each by default."""
    from ..denoiser.families import default_layer
    from ..denoiser.layers import attention_names, block_names
    from ..guidance import METHODS
    from ..guidance.weak_layers import WeakLayers

    names = block_names(denoiser) if has_blocks else attention_names(denoiser)
    users: dict[str, list[str]] = {name: [] for name in names}
    for method in _methods(has_blocks) if names else ():
        cls = METHODS[method]
        chosen: Sequence[str] = (default_layer(denoiser),)
        if issubclass(cls, WeakLayers):
            try:
                chosen = cls().chosen(denoiser)
            except ValueError:  # it has no default for this model
                chosen = ()
        for name in chosen:
            users.get(name, []).append(method)
    return names, users


def _table(names: Sequence[str], users: dict[str, list[str]]) -> list[str]:
    from ..denoiser.layers import short_name

    width = max((len(short_name(name)) for name in names), default=0)
    return [f"  {short_name(n):{width}}  {' '.join(users[n])}".rstrip() for n in names]
