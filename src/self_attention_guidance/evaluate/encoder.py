"""The small network whose features compare pictures like those of the builtin models."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
KNOWN_FILE = "known_art.safetensors"
ENCODER_FOLDER = Path(__file__).parent / "emoji_encoder"

_SPATIAL_CHANNELS = 8
_SPATIAL_GRID = 4


class Encoded(NamedTuple):
    """The outputs of an encoder for a batch of pictures.

    Attributes:
        features: (batch, features), averaged over the picture.
        spatial: (batch, spatial features), which keep positions in the picture, or `None`.
        logits: (batch, classes), or `None`.
    """

    features: Tensor
    spatial: Tensor | None
    logits: Tensor | None


class EmojiEncoder(nn.Module):
    """Five convolutions, features averaged over the picture, and a linear head for classes.

    Made by `training/encoder/train.py`.
    """

    def __init__(self, *, size: int, widths: tuple[int, ...], classes: int) -> None:
        """Make the network with random weights.

        Args:
            size: Side of the input pictures, in pixels.
            widths: Channels of the convolutions; all but the last halve the resolution.
            classes: Number of classes of the head.
        """
        super().__init__()
        self.config = {"size": size, "widths": list(widths), "classes": classes}
        last = len(widths) - 1
        self.blocks = nn.ModuleList(
            _block(narrow, wide, stride=1 if index == last else 2)
            for index, (narrow, wide) in enumerate(pairwise((3, *widths)))
        )
        self.head = nn.Linear(widths[-1], classes)

    def feature_maps(self, pictures: Tensor) -> list[Tensor]:
        """Output of every convolution.

        Args:
            pictures: (batch, 3, size, size) in [-1, 1].

        Returns:
            Tensors (batch, channels, height, width), from fine to coarse.
        """
        maps = [pictures]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

    def forward(self, pictures: Tensor) -> Encoded:
        """Features, spatial features and logits.

        Args:
            pictures: (batch, 3, height, width) in [-1, 1], of any size; others than `size` are
                resized with bilinear interpolation, antialiased.
        """
        size: Any = self.config["size"]
        if pictures.shape[-2:] != (size, size):
            pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
        maps = self.feature_maps(pictures)
        features = maps[-1].mean((2, 3))
        # Like ADM's evaluator for sFID: the first few channels of a middle layer, with positions.
        middle = F.adaptive_avg_pool2d(maps[-3][:, :_SPATIAL_CHANNELS], _SPATIAL_GRID)
        return Encoded(features, middle.flatten(1), self.head(features))


def _block(narrow: int, wide: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(narrow, wide, 3, stride, 1), nn.GroupNorm(8, wide), nn.SiLU())


def load_emoji_encoder(folder: Path = ENCODER_FOLDER) -> EmojiEncoder:
    """Load the encoder that ships with the package.

    Args:
        folder: A folder with `config.json` and `model.safetensors`.

    Returns:
        The network in evaluation mode, in float64: float32 would round differently in batches of
        different sizes.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    encoder = EmojiEncoder(
        size=config["size"], widths=tuple(config["widths"]), classes=config["classes"]
    )
    encoder.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return encoder.double().eval().requires_grad_(False)


def farther_than_art(features: Tensor, folder: Path = ENCODER_FOLDER) -> float:
    """Share of pictures that are farther from the encoder's art than any of that art itself.

    Args:
        features: (pictures, features) of the encoder that ships with the package.
        folder: A folder with `known_art.safetensors`.

    Returns:
        The share, 0 to 1, by Mahalanobis distances from the art's mean.

    Raises:
        ValueError: The features are not from that encoder.
    """
    from safetensors.torch import load_file

    known = load_file(folder / KNOWN_FILE)
    width, right = features.shape[1], len(known["mean"])
    if width != right:
        raise ValueError(f"features must be {right} for each picture, as emoji has, not {width}")
    distances = ((features.float() - known["mean"]) @ known["whitening"]).norm(dim=1)
    return float((distances > known["radius"]).double().mean())
