"""The base of methods that weaken layers or blocks of the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from ..checks import check_layer
from .base import Branch, Guidance

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class WeakLayers(Guidance):
    """Settings of guidances that weaken layers, in addition to those of `Guidance`.

    Attributes:
        scale: 3 is what the authors of PAG, SEG and TPG use, and usual for SLG.
        branch: The authors use "cond".
        layers: Dotted paths of self-attention layers, or of blocks for methods that change whole
            blocks; or beginnings of paths: "mid", "down.2", "blocks.7". `None` is the default of
            the method for the denoiser, which `sag layers` shows.

    Raises:
        ValueError: A setting is out of its range or not of its type; when attaching, a name matches
            no layer.
    """

    has_blocks: ClassVar[bool] = False

    scale: float = 3.0
    _: KW_ONLY
    branch: Branch = "cond"
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if self.layers is None:
            return
        if not isinstance(self.layers, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"layers={self.layers!r} must be a layer's name, or several")
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        for layer in layers or (None,):
            check_layer("layers", layer or "")
        object.__setattr__(self, "layers", layers)  # the dataclass is frozen

    def reads(self, denoiser: nn.Module) -> tuple[str, ...]:
        """Read no layers, but check that those to weaken exist."""
        self.chosen(denoiser)
        return ()

    def weakens(self, denoiser: nn.Module) -> tuple[str, ...] | None:
        """The layers or blocks that are weakened."""
        return self.chosen(denoiser)

    def chosen(self, denoiser: nn.Module) -> tuple[str, ...]:
        """Dotted paths of the layers or blocks that are weakened in a denoiser, compiled or not.

        Raises:
            ValueError: A name matches no layer, or the denoiser has none of the default layers.
        """
        from ..denoiser.layers import resolved
        from .default_layers import default_layers

        if self.layers is not None:
            return resolved(denoiser, self.layers, self.has_blocks)
        names = default_layers(self.method, denoiser, self.has_blocks)
        try:
            return resolved(denoiser, names, self.has_blocks)
        except ValueError as error:
            message = f"layers=None: {type(self).__name__} has no default here: {error}"
            raise ValueError(message) from None
