"""Precision and recall: which pictures lie among the others' neighbours.

Kynkäänniemi et al., arXiv 1904.06991: a set of features covers the balls around its rows, each as
large as the distance to its k-th nearest other row. Precision is the share of the samples that the
reference covers; recall is the share of the reference that the samples cover. Pure maths on
float64 tensors; `halves` as in `statistics.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .statistics import CHUNK

NEIGHBOURS = 3

# Float64 products of equal rows differ from their squares by less than this share.
_ROUNDING = 1e-12


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """All squared Euclidean distances; exactly 0 between equal rows.

    Args:
        a: (n, features).
        b: (m, features).

    Returns:
        (n, m) float64.
    """
    a, b = a.double(), b.double()
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = squares - 2 * a @ b.T
    return distances.masked_fill_(distances < _ROUNDING * squares, 0.0)


def neighbour_radii(
    features: Tensor,
    halves: Tensor,
    k: int = NEIGHBOURS,
    advance: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """Squared distance of every row to its k-th nearest other row.

    Args:
        features: (n, features).
        halves: (repetitions, n) bool: the rows that count as neighbours.
        k: At least 1.
        advance: Called with the number of rows whose radii are known.

    Returns:
        (repetitions, n) float64; -1, which covers nothing, for rows outside the half.
    """
    radii = torch.full(halves.shape, -1.0, dtype=torch.float64)
    for start in range(0, len(features), CHUNK):
        rows = slice(start, start + CHUNK)
        distances = squared_distances(features[rows], features)
        distances[:, rows].fill_diagonal_(torch.inf)
        for half, found in zip(halves, radii, strict=True):
            among = distances[half[rows]][:, half]
            found[rows][half[rows]] = among.kthvalue(k, dim=1).values
        advance(len(distances))
    return radii


def precisions(samples: Tensor, reference: Tensor, halves: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Share of the samples among the reference's neighbours.

    Args:
        samples: (n, features).
        reference: (more than k, features).
        halves: (repetitions, n) bool.
        k: Which neighbour sets the radius.

    Returns:
        (repetitions,) float64.
    """
    everything = torch.ones(1, len(reference), dtype=torch.bool)
    radii = neighbour_radii(reference, everything, k)[0]
    inside = torch.cat(
        [(squared_distances(rows, reference) <= radii).any(1) for rows in samples.split(CHUNK)]
    )
    return (halves.double() @ inside.double()) / halves.sum(1)


def recalls(
    samples: Tensor,
    reference: Tensor,
    halves: Tensor,
    k: int = NEIGHBOURS,
    advance: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """Share of the reference among the samples' neighbours.

    Args:
        samples: (n, features), more than k of them in every half.
        reference: (m, features).
        halves: (repetitions, n) bool.
        k: Which neighbour sets the radius.
        advance: Called with the number of pictures, first samples and then the reference's.

    Returns:
        (repetitions,) float64.
    """
    radii = neighbour_radii(samples, halves, k, advance)
    covered = torch.zeros(len(halves), dtype=torch.float64)
    for rows in reference.split(CHUNK):
        distances = squared_distances(rows, samples)
        for index, found in enumerate(radii):
            covered[index] += (distances <= found).any(1).sum()
        advance(len(rows))
    return covered / len(reference)
