"""A guided step, and the ways in which a method can weaken the network at it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..checks import GuidanceError
from ..denoiser.attention import why_unseen
from ..denoiser.picture import PictureTokens
from ..denoiser.safety import refuse_recomputing
from ..denoiser.weakening import Change, Weaken, attending_by, changing_block, reordered


@dataclass(frozen=True)
class Step:
    """A guided step as a method sees it, for the pictures of its branch.

    Attributes:
        denoiser: The network.
        x0: The predicted clean sample, clipped or thresholded as the scheduler does,
            (pictures, channels, height, width), at least float32.
        attention: The attention that each position received in the layers that the guidance reads,
            by their dotted paths: (pictures, rows, columns) float32, mean 1.
        index: The step's index among the scheduler's timesteps.
        tokens_at: Maps the dotted path of a layer or block to where the picture's tokens lie in it.
        joined: Number of rows of the weakened network in a joint pass: the last ones of its batch,
            which alone are weakened. 0 if the weakened network has a pass of its own.
        noted: Tensors that the guidance records for its handle, by name.
    """

    denoiser: nn.Module
    x0: Tensor
    attention: dict[str, Tensor]
    index: int
    tokens_at: Callable[[str], PictureTokens]
    joined: int = 0
    noted: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @contextmanager
    def attending(self, layers: Sequence[str], weaken: Weaken) -> Generator[None]:
        """Replace the attention of layers inside the `with` statement; `layers` are dotted paths.

        Raises:
            ValueError: A layer does not see the whole picture.
            RuntimeError: A layer's attention could not be changed, or gradient checkpointing
                would run the layer again without the change.
        """
        refuse_recomputing(self.denoiser)
        with ExitStack() as stack:
            stand_ins = [
                stack.enter_context(
                    attending_by(self.denoiser, n, self.tokens_at(n), weaken, self.joined)
                )
                for n in layers
            ]
            yield
        for layer, stand_in in zip(layers, stand_ins, strict=True):
            if not stand_in.was_called:
                reason = why_unseen(self.denoiser, layer)
                raise GuidanceError(f"no attention was weakened at {layer!r}: {reason}")

    @contextmanager
    def skipping(self, blocks: Sequence[str]) -> Generator[None]:
        """Leave out blocks inside the `with` statement; `blocks` are dotted paths.

        A block that is left out returns its input, including the text beside the picture.

        Raises:
            RuntimeError: A block was not reached.
        """
        with self._changing(dict.fromkeys(blocks)):
            yield

    @contextmanager
    def shuffling(
        self, blocks: Sequence[str], order: Callable[[str, int], Tensor]
    ) -> Generator[None]:
        """Give blocks the picture's tokens in another order, inside the `with` statement.

        Args:
            blocks: Dotted paths of the blocks.
            order: Called with a block's path and its number of picture tokens; returns a
                permutation of their indices.

        Raises:
            ValueError: A block does not see the whole picture.
            RuntimeError: A block was not reached.
        """
        refuse_recomputing(self.denoiser)
        changes: dict[str, Change | None] = {}
        for block in blocks:
            tokens = self.tokens_at(block)
            counts = {rows * columns for rows, columns in tokens.grids}
            orders = {count: order(block, count).to(self.x0.device) for count in counts}
            changes[block] = functools.partial(reordered, tokens=tokens, orders=orders)
        with self._changing(changes):
            yield

    @contextmanager
    def _changing(self, changes: Mapping[str, Change | None]) -> Generator[None]:
        with ExitStack() as stack:
            stand_ins = {
                block: stack.enter_context(
                    changing_block(self.denoiser, block, change, self.joined)
                )
                for block, change in changes.items()
            }
            yield
        for block, stand_in in stand_ins.items():
            if not stand_in.was_called:
                raise GuidanceError(
                    f"no tokens were changed at {block!r}: the block did not run; if the denoiser "
                    "was compiled and run before guidance was attached, call torch.compiler.reset()"
                )
