"""The classes of the model, and its pictures: 32x32 pixels, one label each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shared import data

SIZE = 32

# class -> the Unicode subgroups it is made of; small subgroups are merged with their like
CLASSES: dict[str, tuple[str, ...]] = {
    "face-smiling": ("face-smiling",),
    "face-affection": ("face-affection",),
    "face-playful": ("face-tongue", "face-hat", "face-glasses"),
    "face-neutral": ("face-neutral-skeptical", "face-hand"),
    "face-unwell": ("face-unwell", "face-sleepy"),
    "face-concerned": ("face-concerned",),
    "face-monster": ("face-negative", "face-costume"),
    "cat-monkey-face": ("cat-face", "monkey-face"),
    "heart": ("heart",),
    "emotion": ("emotion",),
    "animal-mammal": ("animal-mammal",),
    "animal-bird": ("animal-bird",),
    "animal-reptile": ("animal-reptile", "animal-amphibian"),
    "animal-marine": ("animal-marine",),
    "animal-bug": ("animal-bug",),
    "plant-flower": ("plant-flower",),
    "plant-other": ("plant-other",),
    "food-fruit": ("food-fruit",),
    "food-vegetable": ("food-vegetable",),
    "food-prepared": ("food-prepared",),
    "food-asian": ("food-asian",),
    "food-sweet": ("food-sweet",),
    "drink": ("drink",),
}
# The label after the last class: "any of them".
NULL_LABEL = len(CLASSES)
# These hold writing, which must not be mirrored.
_NOT_MIRRORED = ("emotion",)

_LABEL_OF = {
    subgroup: label for label, merged in enumerate(CLASSES.values()) for subgroup in merged
}


def labels_of(pictures: Sequence[data.Picture]) -> Tensor:
    """The class of each picture, as int64."""
    return torch.tensor([_LABEL_OF[picture.subgroup] for picture in pictures])


def load_small(pictures: Sequence[data.Picture]) -> Tensor:
    """The pictures on white, averaged down to (pictures, 3, 32, 32) uint8."""
    pixels = data.load_pixels(list(pictures)).float()
    return F.avg_pool2d(pixels, pixels.shape[-1] // SIZE).round().byte()


def mirrored_half(clean: Tensor, labels: Tensor) -> Tensor:
    """Mirrors each picture of a batch with probability one half, unless its class has writing."""
    names = list(CLASSES)
    kept = torch.tensor([names.index(name) for name in _NOT_MIRRORED])
    chosen = (torch.rand(len(labels)) < 0.5) & ~torch.isin(labels, kept)
    return torch.where(chosen[:, None, None, None], clean.flip(-1), clean)
