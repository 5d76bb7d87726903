"""From pictures to features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .encoder import ENCODER_FOLDER, Encoded, load_emoji_encoder
from .sources import PictureSource

ENCODERS = ("emoji", "inception")

# Columns that rows are sorted by; rows that are equal in these are equal pictures.
_ORDERING_COLUMNS = 8


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of pictures, in an order that depends on the features alone.

    Attributes:
        encoder: Name of the encoder.
        size: Width and height of the pictures.
        features: (pictures, features) float32.
        spatial: (pictures, spatial features) float32, or `None`.
        probabilities: (pictures, classes) float32, or `None`.
        order: (pictures,) int64, the place of each row in the source: that of its seed, or of its
            file's name. `None` means it is not known, as for saved statistics.
    """

    encoder: str
    size: tuple[int, int]
    features: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None
    order: Tensor | None = None


class Encoder(Protocol):
    """A network that turns pictures into features.

    Attributes:
        name: One of `ENCODERS`.
    """

    name: str

    def encode(self, pictures: Tensor) -> Encoded:
        """Features of a batch.

        Args:
            pictures: (batch, 3, height, width) uint8.

        Returns:
            Tensors on the CPU.
        """
        ...


class Emoji:
    """The encoder that ships with the package, for pictures like those of the builtin models.

    It runs on the CPU in float64 and its features are rounded to float32, so they do not depend
    on the batch size.
    """

    name = "emoji"

    def __init__(self, folder: Path = ENCODER_FOLDER) -> None:
        """Load the network.

        Args:
            folder: As in `load_emoji_encoder`.
        """
        self._network = load_emoji_encoder(folder)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Encoded:
        """Features as in `Encoder`."""
        return self._network(pictures.double() / 127.5 - 1)


def load_encoder(name: str) -> Encoder:
    """Load an encoder.

    Args:
        name: "emoji", or "inception", which needs the extra `evaluate` and fetches its weights.

    Raises:
        ValueError: The name is unknown, or the encoder is not available.
    """
    check_encoder(name)
    if name == "emoji":
        return Emoji()
    from .inception import Inception

    return Inception()


def check_encoder(name: str) -> None:
    """Refuse unknown encoders.

    Args:
        name: Name of an encoder.

    Raises:
        ValueError: It is not one of `ENCODERS`.
    """
    if name not in ENCODERS:
        raise ValueError(f"features={name!r} must be one of {', '.join(ENCODERS)}")


def extract(
    source: PictureSource,
    encoder: Encoder,
    batch_size: int,
    advance: Callable[[int], object] = lambda pictures: None,
) -> FeatureSet:
    """Features of all pictures of a source.

    Args:
        source: The pictures.
        encoder: The encoder of the features.
        batch_size: Pictures encoded at once.
        advance: Called with the number of pictures after each batch.

    Returns:
        The features; they do not depend on the order of the pictures.
    """
    parts: list[Encoded] = []
    for batch in source.batches(batch_size):
        # A copy, because arrays of files are read-only and torch can't handle that.
        encoded = encoder.encode(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()))
        parts.append(_as_float32(encoded))
        advance(len(batch))
    features = torch.cat([part.features for part in parts])
    order = _order_of(features)
    return FeatureSet(
        encoder.name,
        source.size,
        features[order],
        _gathered([part.spatial for part in parts], order),
        _gathered([part.logits for part in parts], order),
        order,
    )


def _as_float32(encoded: Encoded) -> Encoded:
    """Round to float32, and turn logits into probabilities."""
    logits, spatial = encoded.logits, encoded.spatial
    return Encoded(
        encoded.features.float(),
        None if spatial is None else spatial.float(),
        None if logits is None else logits.double().softmax(1).float(),
    )


def _order_of(features: Tensor) -> Tensor:
    columns = features[:, :_ORDERING_COLUMNS].numpy()
    return torch.from_numpy(np.lexsort(columns.T))


def _gathered(parts: Sequence[Tensor | None], order: Tensor) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present)[order] if present else None
