"""Rows of features, and bounds of the distances between them.

Products of centred rows in float32 are fast, and give bounds of squared distances. Where these are
not enough, there are bounds from float64, and the distances themselves.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Rows and columns of a tile, which is in memory at once: 16 MiB of float32.
TILE = 2048

Part = slice | Tensor

# Largest size of features; kernels of larger ones do not fit into float32.
_LARGEST = 1e6
# Numbers that fit into a cache.
_CACHED_NUMBERS = 2**18


def tiles(count: int) -> list[slice]:
    """Slices of rows that are processed together.

    Args:
        count: Number of rows.
    """
    return [slice(start, min(start + TILE, count)) for start in range(0, count, TILE)]


class Rows:
    """Features, with their products, kernels and bounds of distances."""

    def __init__(self, features: Tensor, mean: Tensor) -> None:
        """Store the features and their centred values.

        Args:
            features: (rows, features), of any floating type.
            mean: (features,) float64 to subtract; the same for all rows that are compared.

        Raises:
            ValueError: A feature is not finite, or larger than 1e6.
        """
        count, self._width = features.shape
        self.features, self.mean = features, mean
        self._centred = torch.empty(count, self._width, dtype=torch.float32)
        self._squares = torch.empty(count, dtype=torch.float64)
        self._lean = torch.empty(count, dtype=torch.float64)
        for tile in tiles(count):
            centred = features[tile].double() - mean
            self._centred[tile] = centred
            self._squares[tile] = centred.square().sum(1)
            self._lean[tile] = centred @ mean / self._width
        largest = max(float(self._squares.max()), float(mean.square().sum())) / self._width
        if not largest <= _LARGEST**2:
            raise ValueError(f"features must be finite and of sizes below {_LARGEST:g}")

    def products(
        self, part: Part, other: Rows, columns: slice, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Products of some rows with some other rows, all centred.

        Args:
            part: Indices of n rows.
            other: The other rows, with the same mean.
            columns: Slice of m of the other rows.
            dtype: float32 or float64.

        Returns:
            (n, m).
        """
        if dtype == torch.float32:
            return self._centred[part] @ other._centred[columns].T
        left = self.features[part].double() - self.mean
        return left @ (other.features[columns].double() - self.mean).T

    def kernel(self, products: Tensor, part: slice, other: Rows, columns: slice) -> Tensor:
        """The kernel (x y / features + 1)^3 minus a constant that does not affect KID.

        With the mean m, x = m + u and y = m + v, x y / features + 1 is c + z, where c is the value
        for m with itself. (c + z)^3 - c^3 keeps the digits of z.
        """
        c = float(1 + self.mean.square().sum() / self._width)
        z = products.double().div_(self._width)
        z += self._lean[part, None]
        z += other._lean[columns]
        return (z + 3 * c).mul_(z).add_(3 * c**2).mul_(z)

    def bounds(
        self, products: Tensor, part: Part, other: Rows, columns: slice
    ) -> tuple[Tensor, Tensor]:
        """Lower bounds of squared distances, and how far upper bounds are above them, each (n, m).

        The error of a product is below features * eps / 2 times its rows' lengths. 16 is added to
        the number of features for the rounding of rows, squares, sums and radii.
        """
        error = (self._width + 16) * torch.finfo(products.dtype).eps / 2
        squares, others = (
            values.to(products.dtype) for values in (self._squares[part], other._squares[columns])
        )
        sizes = squares[:, None] + others
        slack = sizes * (2 * error)
        return sizes.mul_(1 - error).sub_(products, alpha=2), slack


def distances(rows: Rows, these: Tensor, others: Rows, those: Tensor) -> Tensor:
    """Squared distances, one for each pair of indices.

    Args:
        rows: The first rows.
        these: (pairs,) indices of the first rows.
        others: The second rows.
        those: (pairs,) indices of the second rows.

    Returns:
        (pairs,) float64; exactly 0 between equal rows.
    """
    a, b = rows.features, others.features
    size = max(1, _CACHED_NUMBERS // a.shape[1])
    pairs = zip(these.split(size), those.split(size), strict=True)
    return torch.cat([a[i].double().sub_(b[j]).square_().sum(1) for i, j in pairs])


@contextmanager
def full_precision() -> Generator[None]:
    """Compute float32 products in float32, even if the program allows bfloat16 for its networks."""
    # Before torch 2.9 there is one setting for all devices.
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    allowed = matmul.fp32_precision if matmul else torch.get_float32_matmul_precision()

    def allow(precision: str) -> None:
        if matmul:
            matmul.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    allow("ieee" if matmul else "highest")
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        allow(allowed)
