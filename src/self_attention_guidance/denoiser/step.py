"""What a guidance sees of a step, and how it can weaken the network."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from .attention import Attend, standing_in, why_unseen


@dataclass(frozen=True)
class Step:
    """One guided step, of the pictures of the guided branch.

    Attributes:
        denoiser: The network.
        x0: The clean sample that was predicted, as the scheduler clips or thresholds it,
            (pictures, channels, height, width), at least float32.
        attention: What each position received in the layers that the guidance reads, by their
            dotted paths: (pictures, rows, columns) float32, mean 1.
        noted: What the guidance notes for its handle to show, by name.
    """

    denoiser: nn.Module
    x0: Tensor
    attention: dict[str, Tensor]
    noted: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @contextmanager
    def attending(self, layers: Sequence[str], attend: Attend) -> Generator[None]:
        """Let layers compute another attention inside the `with` statement.

        Args:
            layers: Dotted paths of self-attention layers.
            attend: What they compute of their queries, keys and values.

        Raises:
            ValueError: There is no self-attention layer of that name.
            RuntimeError: A layer's attention could not be changed.
        """
        with ExitStack() as stack:
            begun = [stack.enter_context(standing_in(self.denoiser, n, attend)) for n in layers]
            yield
        for layer, stand_in in zip(layers, begun, strict=True):
            if not stand_in.was_called:
                reason = why_unseen(self.denoiser, layer)
                raise RuntimeError(f"no attention was weakened at {layer!r}: {reason}")
