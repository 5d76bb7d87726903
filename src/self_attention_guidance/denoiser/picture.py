"""Where the picture lies in a denoiser's input, output and attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import merged_tokens
from .call import Call
from .families import Joint, config_of, uncompiled


@dataclass(frozen=True)
class PicturePlace:
    """Where the denoised picture lies in the input and output tensors of one call.

    Tensors may hold more: inpainting networks get channels that they do not denoise, editing
    networks get tokens of another picture, and networks with a learned variance return it, too.
    """

    channels: int  # of the picture, or of its tokens
    grid: tuple[int, int] | None = None  # rows and columns of tokens, if latents are packed
    patch: int = 1  # a token is a square of latent pixels with this side
    words: tuple[int, ...] | None = None  # words before each picture's tokens, if this may differ

    def read(self, tensor: Tensor) -> Tensor:
        """Extract the picture, (batch, channels, height, width), from an input or output."""
        if self.grid is None:
            is_whole = tensor.shape[1] == self.channels
            return tensor if is_whole else tensor[:, : self.channels]
        rows, columns = self.grid
        tokens = tensor[:, : rows * columns, : self.channels]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grid), self.patch)

    def written(self, tensor: Tensor, picture: Tensor) -> Tensor:
        """Return a copy of `tensor` with another picture, in the shape that `read` returns."""
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
    """Find where the picture lies in the input and output of one call; refuse several pictures."""
    sample, packing = call.sample, call.family.packing
    if packing is None:
        if sample.shape[-2:] != output.shape[-2:]:
            sides = " x ".join(str(side) for side in sample.shape[-2:])
            raise ValueError(f"latents of {sides} do not fit the patches of the denoiser")
        words = None
        if call.family.joint == "behind_own_text":
            counts = on_cpu(call.arguments["encoder_attention_mask"]).sum(dim=1)
            words = tuple(int(count) for count in counts)
        return PicturePlace(min(sample.shape[1], output.shape[1]), words=words)
    # Editing pipelines append pictures that are not denoised. Two kinds of further pictures are
    # denoised: in-context examples (in networks with conditions beside the latents), and layers
    # (which come with `additional_t_cond`).
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
    """Count rows and columns of the first picture; `ids` holds (picture, row, column) of tokens."""
    ids = ids[ids[:, 0] == ids[0, 0]]
    rows, columns = (int(side) + 1 for side in ids[:, 1:3].max(dim=0).values)
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(ids)
    if not torch.equal(ids[:, 1:3], expected):
        raise ValueError("img_ids does not hold the rows and columns of one picture")
    return rows, columns


@dataclass(frozen=True)
class PictureTokens:
    """The picture's tokens among those that a layer sees, as known before the call runs.

    Attributes:
        layer: Dotted path of the layer, for messages.
        grids: Possible numbers of rows and columns; the first that fits is used, since some kinds
            of blocks round odd sides up, others down.
        pictures: Number of tokens of all pictures in the sequence; `None` if there is only one.
        joint: See `Family`.
        words: Number of words before the picture's tokens in each row; `None` if `joint` determines
            it.
    """

    layer: str
    grids: tuple[tuple[int, int], ...]
    pictures: int | None
    joint: Joint | None
    words: tuple[int, ...] | None = None

    def groups(self) -> list[tuple[slice, PictureTokens]]:
        """Group rows whose picture lies at the same place: all rows together, or each alone."""
        if self.words is None or len(set(self.words)) == 1:
            return [(slice(None), self)]
        rows = enumerate(self.words)
        return [(slice(n, n + 1), replace(self, words=(count,))) for n, count in rows]

    def at(self, positions: int) -> tuple[slice, tuple[int, int]]:
        """Find the picture's positions among all positions of a group of rows, and their grid.

        Raises:
            ValueError: The number of positions does not fit the picture.
        """
        fitting = [grid for grid in self.grids if grid[0] * grid[1] == positions]
        grid = (fitting or self.grids[-1:])[0]
        count = grid[0] * grid[1]
        start = positions - (self.pictures or count) if self.joint == "picture_last" else 0
        if self.words is not None and positions != count:  # some blocks see only the picture
            start = self.words[0]
        if start < 0 or (positions < start + count if self.joint else positions != count):
            given = f"its picture has {grid[0]} x {grid[1]}"
            raise ValueError(merged_tokens(self.layer, positions, given))
        return slice(start, start + count), grid


def tokens_at(
    denoiser: nn.Module, layer: str, call: Call, place: PicturePlace, rows: slice
) -> PictureTokens:
    """Find where the pictures of some rows will lie in a layer of a denoiser, or in a block."""
    family, sample = call.family, call.sample
    pictures = None
    if place.grid is not None:
        grids, pictures = (place.grid,), sample.shape[1]
    elif family.tokens == "levels":
        levels = _levels_above(uncompiled(denoiser), layer)
        height, width = (side / 2**levels for side in sample.shape[-2:])
        # Some kinds of blocks round odd sides up, others down.
        grids = tuple(
            (max(rounded(height), 1), max(rounded(width), 1)) for rounded in (math.ceil, math.floor)
        )
    else:
        config = config_of(denoiser)
        patch = int(config.get("patch_size") or config.get("all_patch_size", [1])[0])
        grids = ((sample.shape[-2] // patch, sample.shape[-1] // patch),)
    words = None if place.words is None else place.words[rows]
    return PictureTokens(layer, grids, pictures, family.joint, words)


def _levels_above(denoiser: Any, layer: str) -> int:
    """Count how often a U-Net halves the picture before a layer sees it."""
    part, index = layer.split(".")[:2]
    down, up = denoiser.down_blocks, denoiser.up_blocks
    down = down[: int(index)] if part == "down_blocks" else down
    up = up[: int(index)] if part == "up_blocks" else ()
    levels = sum(getattr(block, "downsamplers", None) is not None for block in down)
    return levels - sum(getattr(block, "upsamplers", None) is not None for block in up)
