"""Perturbed-Attention Guidance: Ahn et al., ECCV 2024, arXiv 2403.17377."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

from torch import Tensor, nn

from ..checks import check_layer
from ..denoiser.attention import Operands, self_attention, self_attention_layers
from ..denoiser.families import family_of
from .base import Branch, Guidance, Step


@dataclass(frozen=True)
class PerturbedAttentionGuidance(Guidance, method="pag"):
    """Guidance away from a network whose self-attention is the identity (arXiv 2403.17377, Eq. 12).

    Each position of the perturbed layers sees itself alone. For U-Nets.

    Attributes:
        scale: The paper's s, any finite number: 0 is off, 3 is usual, with classifier-free guidance
            of about 4.
        branch: "cond" is the authors'.
        layers: Dotted paths of the self-attention layers to perturb; `None` is those of the mid
            block, as in the authors' experiments (Sec. 5).
    """

    scale: float = 3.0
    _: KW_ONLY
    branch: Branch = "cond"
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check every setting once, here."""
        super().__post_init__()
        if self.layers is None:
            return
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        for layer in layers or (None,):
            check_layer("layers", layer or "")
        object.__setattr__(self, "layers", layers)  # the dataclass is frozen

    def reads(self, denoiser: nn.Module) -> tuple[str, ...]:
        """None; refuses layers that are not there."""
        for layer in self._layers(denoiser):
            self_attention(denoiser, layer)
        return ()

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Let every position of the layers attend to itself alone."""
        with step.attending(self._layers(step.denoiser), identity):
            yield None

    def _layers(self, denoiser: nn.Module) -> tuple[str, ...]:
        if family_of(denoiser).tokens != "levels":
            name = type(denoiser).__name__
            raise ValueError(f"PerturbedAttentionGuidance is for U-Nets, and not for {name}")
        if self.layers is not None:
            return tuple(self.layers)
        every = self_attention_layers(denoiser)
        layers = tuple(layer for layer in every if layer.startswith("mid_block."))
        if not layers:
            raise ValueError(
                "layers=None: there is no self-attention in the mid block; name some of "
                f"{', '.join(every) or '(there is none)'}"
            )
        return layers


def identity(operands: Operands, kernel: Callable[[], Tensor]) -> Tensor:
    """Attention whose map is the identity matrix."""
    return operands.value
