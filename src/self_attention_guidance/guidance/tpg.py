"""Token Perturbation Guidance: Rajabi et al., NeurIPS 2025, arXiv 2506.10036."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from ..checks import check_count
from .weak_layers import WeakLayers

if TYPE_CHECKING:
    from torch import Tensor

    from .step import Step


@dataclass(frozen=True)
class TokenPerturbationGuidance(WeakLayers, method="tpg"):
    """Guidance away from a network whose tokens are shuffled (arXiv 2506.10036, Algorithm 1).

    The picture's tokens are put into a random order before each chosen block, and are not put back
    afterwards. Each step and block has its own order. It depends neither on the batch nor on the
    device: all pictures of a step have the same order, as in the authors' code.

    Attributes:
        scale: The paper's gamma, any finite number: 0 is off, 3 is the authors' choice.
        branch: "cond" is the authors' choice.
        layers: Blocks whose tokens are shuffled (see `WeakLayers`); `None` is the down blocks
            (encoder) of U-Nets, as in the paper, and the middle block of transformers.
        seed: Seed of the orders, at least 0.

    Raises:
        ValueError: A setting is out of its range or not of its type; when attaching, a name matches
            no block.
    """

    has_blocks: ClassVar[bool] = True
    needs_first_pass: ClassVar[bool] = False

    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_count("seed", self.seed, least=0)

    @property
    def depends_on_step(self) -> bool:
        """Always: each step has its own order of tokens."""
        return True

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Shuffle the picture's tokens before the blocks."""

        def order(block: str, tokens: int) -> Tensor:
            return token_order(self.seed, step.index, block, tokens)

        with step.shuffling(self.chosen(step.denoiser), order):
            yield None


def token_order(seed: int, step: int, block: str, tokens: int) -> Tensor:
    """Return the order of the tokens for a block at a step: (tokens,) int64 indices, on the CPU."""
    import torch

    from ..denoiser.layers import uncompiled_path

    own_seed = random.Random(f"{seed} {step} {uncompiled_path(block)}").getrandbits(63)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(own_seed))
    # Few tokens may keep their order by chance, which would not weaken the network.
    return order.roll(1) if bool((order.diff() == 1).all()) else order
