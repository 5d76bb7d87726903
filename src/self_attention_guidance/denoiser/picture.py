"""Where the picture lies in what a denoiser receives, returns and attends to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Call
from .families import config_of, uncompiled


@dataclass(frozen=True)
class PicturePlace:
    """The picture that is denoised, in the input and output tensors of one call.

    Tensors may hold more: inpainting networks see channels that they do not denoise, editing
    networks see tokens of another picture, and networks that learn their variance return it.
    """

    channels: int  # of the picture, or of its tokens
    grid: tuple[int, int] | None = None  # rows and columns of tokens, if latents are packed
    patch: int = 1  # side of the square of latent pixels that makes a token

    def read(self, tensor: Tensor) -> Tensor:
        """The picture, (batch, channels, height, width), in an input or output of the denoiser."""
        if self.grid is None:
            return tensor[:, : self.channels]
        rows, columns = self.grid
        tokens = tensor[:, : rows * columns, : self.channels]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grid), self.patch)

    def written(self, tensor: Tensor, picture: Tensor) -> Tensor:
        """A tensor like `tensor` that holds `picture`, as `read` gives it."""
        if picture.shape == tensor.shape:
            return picture.to(tensor.dtype)
        copy = tensor.clone()
        if self.grid is None:
            copy[:, : self.channels] = picture
        else:
            tokens = F.pixel_unshuffle(picture, self.patch).flatten(2).transpose(1, 2)
            copy[:, : tokens.shape[1], : self.channels] = tokens
        return copy


def place_of(call: Call, output: Tensor, on_cpu: Callable[[Tensor], Tensor]) -> PicturePlace:
    """Where the picture lies in the input and output of one call; refuses several pictures."""
    sample, packing = call.sample, call.family.packing
    if packing is None:
        if sample.shape[-2:] != output.shape[-2:]:
            sides = " x ".join(str(side) for side in sample.shape[-2:])
            raise ValueError(f"latents of {sides} do not fit the patches of the denoiser")
        return PicturePlace(min(sample.shape[1], output.shape[1]))
    # Editing pipelines append pictures that are not denoised. In-context examples (for a network
    # that sees conditions beside its latents) and layers (with a condition) are denoised, too.
    ids = call.arguments[packing.ids]
    if packing.ids == "img_shapes":
        while not isinstance(ids[0], int):
            ids = ids[0]
        grid = int(ids[-2]), int(ids[-1])
        has_several = call.arguments.get("additional_t_cond") is not None
    else:
        ids = on_cpu(ids)
        grid = _first_grid(ids[0] if ids.ndim == 3 else ids)
        sees_conditions = sample.shape[2] > output.shape[2]
        has_several = sees_conditions and bool((ids[..., 0] != ids.flatten()[0]).any())
    if has_several:
        raise ValueError("sequences of several pictures that are denoised are not supported")
    return PicturePlace(min(sample.shape[2], output.shape[2]), grid, packing.patch)


def _first_grid(ids: Tensor) -> tuple[int, int]:
    """Rows and columns of the first picture, whose tokens have these (picture, row, column)."""
    ids = ids[ids[:, 0] == ids[0, 0]]
    rows, columns = (int(side) + 1 for side in ids[:, 1:3].max(dim=0).values)
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(ids)
    if not torch.equal(ids[:, 1:3], expected):
        raise ValueError("img_ids does not hold the rows and columns of one picture")
    return rows, columns


def picture_tokens(
    denoiser: nn.Module, layer: str, call: Call, positions: int, place: PicturePlace
) -> tuple[slice, tuple[int, int]]:
    """Which of the positions that a layer attends over are the picture's, and their grid."""
    family, (height, width) = call.family, call.sample.shape[-2:]
    if place.grid is not None:
        grid = place.grid
    elif family.tokens == "levels":
        grid = _level_grid(uncompiled(denoiser), layer, positions, (height, width))
    else:
        patch = int(config_of(denoiser).get("patch_size", 1))
        grid = height // patch, width // patch
    count = grid[0] * grid[1]
    pictures = count if place.grid is None else call.sample.shape[1]
    start = positions - pictures if family.joint == "picture_last" else 0
    if start < 0 or (positions < count if family.joint else positions != count):
        raise ValueError(
            f"{layer!r} attends over {positions} positions, but its picture has {grid[0]} x "
            f"{grid[1]}: what merges or leaves out tokens (such as tomesd) is not supported"
        )
    return slice(start, start + count), grid


def _level_grid(
    denoiser: nn.Module, layer: str, positions: int, size: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of a U-Net's layer, which follow from the levels above it.

    Some kinds of blocks round odd sides up, others down.
    """
    part, index = layer.split(".")[:2]
    down, up = (list(denoiser.get_submodule(f"{way}_blocks").children()) for way in ("down", "up"))
    down = down[: int(index)] if part == "down_blocks" else down
    up = up[: int(index)] if part == "up_blocks" else []
    levels = sum(getattr(block, "downsamplers", None) is not None for block in down)
    levels -= sum(getattr(block, "upsamplers", None) is not None for block in up)
    rows, columns = size
    for rounded in (math.ceil, math.floor):
        rows, columns = (max(rounded(side / 2**levels), 1) for side in size)
        if rows * columns == positions:
            break
    return rows, columns
