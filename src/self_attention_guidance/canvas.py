"""Where the picture lies in what a denoiser receives, returns and attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .families import Family, Packing


@dataclass(frozen=True)
class Canvas:
    """The picture that is denoised, in the input and output tensors of one call.

    Tensors may hold more: inpainting networks see channels that they do not denoise, editing
    networks see tokens of another picture, and networks that learn their variance return it.

    Attributes:
        channels: Channels of the picture, or of its tokens.
        grid: Rows and columns of the picture's tokens if latents are packed, else `None`.
        patch: Side of the square of latent pixels that makes a packed token.
    """

    channels: int
    grid: tuple[int, int] | None = None
    patch: int = 1

    def read(self, tensor: Tensor) -> Tensor:
        """The picture, (batch, channels, height, width), in an input or output of the denoiser."""
        if self.grid is None:
            return tensor[:, : self.channels]
        rows, columns = self.grid
        tokens = tensor[:, : rows * columns, : self.channels]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grid), self.patch)

    def written(self, tensor: Tensor, picture: Tensor) -> Tensor:
        """A tensor like `tensor` that holds `picture`, as `read` gives it."""
        if self.grid is None and picture.shape == tensor.shape:
            return picture.to(tensor.dtype)
        copy = tensor.clone()
        if self.grid is None:
            copy[:, : self.channels] = picture
            return copy
        tokens = F.pixel_unshuffle(picture, self.patch).flatten(2).transpose(1, 2)
        copy[:, : tokens.shape[1], : self.channels] = tokens
        return copy


def canvas(family: Family, arguments: dict[str, Any], output: Tensor) -> Canvas:
    """The canvas of one call.

    Args:
        family: Of the denoiser.
        arguments: Of the call, by name.
        output: What the denoiser returned first.

    Raises:
        ValueError: The positions of packed tokens do not form a grid, more than one picture is
            denoised, or the denoiser returns another size than it receives.
    """
    sample: Tensor = arguments[family.sample_argument]
    if family.packing is None:
        if sample.shape[-2:] != output.shape[-2:]:
            sides = " x ".join(str(side) for side in sample.shape[-2:])
            raise ValueError(f"latents of {sides} do not fit the patches of the denoiser")
        return Canvas(min(sample.shape[1], output.shape[1]))
    channels = min(sample.shape[2], output.shape[2])
    _refuse_several_pictures(family.packing, arguments, sample.shape[2] > output.shape[2])
    return Canvas(channels, _packed_grid(family.packing, arguments), family.packing.patch)


def picture_tokens(
    family: Family, arguments: dict[str, Any], positions: int, patch: int
) -> tuple[slice, tuple[int, int] | None]:
    """Which positions of an attention layer are the picture's.

    Args:
        family: Of the denoiser.
        arguments: Of the call, by name.
        positions: Positions that the layer attends over.
        patch: Side of the square of latent pixels that makes a token of a joint layer.

    Returns:
        The positions, and their rows and columns; `None` if these are for the layer to tell.
    """
    if family.joint is None:
        return slice(0, positions), None
    sample: Tensor = arguments[family.sample_argument]
    if family.packing is None:
        rows, columns = sample.shape[-2] // patch, sample.shape[-1] // patch
        pictures = rows * columns
    else:
        rows, columns = _packed_grid(family.packing, arguments)
        pictures = sample.shape[1]
    start = positions - pictures if family.joint == "picture_last" else 0
    return slice(start, start + rows * columns), (rows, columns)


def _refuse_several_pictures(
    packing: Packing, arguments: dict[str, Any], sees_conditions: bool
) -> None:
    """Refuse sequences of which more than the first picture is denoised.

    Editing pipelines append pictures that are not. Those of in-context examples (a network that
    sees conditions beside its latents) and of layers (with a condition of their own) are.
    """
    if packing.ids == "img_ids":
        ids: Tensor = arguments["img_ids"]
        several = sees_conditions and bool((ids[..., 0] != ids.flatten()[0]).any())
    else:
        several = arguments.get("additional_t_cond") is not None
    if several:
        raise ValueError("sequences of several pictures that are denoised are not supported")


def _packed_grid(packing: Packing, arguments: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of the first picture's tokens, which is the one that is denoised."""
    places = arguments[packing.ids]
    if packing.ids == "img_shapes":
        while not isinstance(places[0], int):
            places = places[0]
        return int(places[-2]), int(places[-1])
    ids: Tensor = places[0] if places.ndim == 3 else places
    ids = ids[ids[:, 0] == ids[0, 0]]
    rows, columns = (int(side) + 1 for side in ids[:, 1:3].max(dim=0).values)
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(ids)
    if not torch.equal(ids[:, 1:3], expected):
        raise ValueError(f"{packing.ids} does not hold the rows and columns of one picture")
    return rows, columns
