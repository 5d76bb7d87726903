"""Statistics from sums over pictures: moments, Fréchet distance, Inception Score.

Pure maths on float64 tensors. Rows are pictures, columns are features. `halves` are the parts
of the samples for repeated estimates, (repetitions, rows) bool; see `resampling.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Fixed, so that the rounding of sums does not depend on the batches.
CHUNK = 1024

_BLOCK = 256
# Eigenvalues below this share of the largest come from rounding.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features.

    Attributes:
        mean: (features,) float64.
        covariance: (features, features) float64, the sample covariance: divided by count - 1.
    """

    mean: Tensor
    covariance: Tensor


class RunningMoments:
    """Mean and covariance of features that come in pieces, in float64.

    This is Chan, Golub and LeVeque's updating formula. Unlike sums of squares, it loses no digits
    if the mean is much larger than the deviations.
    """

    def __init__(self, features: int) -> None:
        """Start without rows.

        Args:
            features: Number of columns.
        """
        self.count = 0
        self._mean = torch.zeros(features, dtype=torch.float64)
        self._scatter = torch.zeros(features, features, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Add some rows.

        Args:
            rows: (any number, features), of any floating type.
        """
        if not len(rows):
            return
        rows = rows.double()
        mean = rows.mean(0)
        centred = rows - mean
        count = self.count + len(rows)
        shift = mean - self._mean
        for start in range(0, len(mean), _BLOCK):  # the upper half; the matrix is symmetric
            block = centred[:, start : start + _BLOCK]
            self._scatter[start : start + _BLOCK, start:] += block.T @ centred[:, start:]
        self._scatter += torch.outer(shift, shift) * (self.count * len(rows) / count)
        self._mean = self._mean + shift * (len(rows) / count)
        self.count = count

    def moments(self) -> Moments:
        """The moments of all rows so far.

        Raises:
            ValueError: There are fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"count={self.count} must be at least 2 for a covariance")
        covariance = self._scatter.triu() / (self.count - 1)
        return Moments(self._mean, covariance + covariance.triu(1).T)


def moments_of(rows: Tensor) -> Moments:
    """Mean and covariance of a whole set, a chunk at a time.

    Args:
        rows: (at least 2, features), of any floating type.
    """
    running = RunningMoments(rows.shape[1])
    for chunk in rows.split(CHUNK):
        running.update(chunk)
    return running.moments()


def frechet_distance(samples: Moments, reference: Moments) -> float:
    """Fréchet distance of two sets of features, taken as Gaussians.

    |m - r|^2 + tr(M + R - 2 (M R)^(1/2)), Heusel et al., arXiv 1706.08500, equation 6.

    Args:
        samples: Moments of one set.
        reference: Moments of the other, with as many features.

    Returns:
        At least 0; 0 for equal moments, up to rounding.
    """
    product = _symmetric_product(samples, _factor(reference))
    return _distance(samples, reference, torch.linalg.eigvalsh(product))


def frechet_distances(rows: Tensor, samples: Moments, reference: Moments, halves: Tensor) -> Tensor:
    """Fréchet distances of samples, and to first order of parts of them.

    If M changes by dM, the trace of the root changes by tr(W dM) / 2. W is computed once, so parts
    need no decompositions. Their spread is that of exact distances (Jaeckel 1972, the infinitesimal
    jackknife), without the larger bias of small sets.

    Args:
        rows: (n, features), of any floating type.
        samples: Moments of all rows.
        reference: Moments of the reference, with as many features.
        halves: (repetitions, n) bool, the first row all true.

    Returns:
        (repetitions,) float64.
    """
    if len(halves) == 1:
        return torch.tensor([frechet_distance(samples, reference)], dtype=torch.float64)
    factor = _factor(reference)
    values, vectors = torch.linalg.eigh(_symmetric_product(samples, factor))
    is_positive = values > _NEGLIGIBLE * values[-1]
    # W is bend @ bend.T.
    bend = (factor @ vectors[:, is_positive]) * values[is_positive] ** -0.25
    weights = halves.double()
    counts = weights.sum(1)
    lengths = torch.zeros(len(halves), dtype=torch.float64)
    means = torch.zeros(len(halves), rows.shape[1], dtype=torch.float64)
    for chunk, chosen in zip(rows.split(CHUNK), weights.split(CHUNK, dim=1), strict=True):
        centred = chunk.double() - samples.mean
        lengths += chosen @ (centred.square().sum(1) - (centred @ bend).square().sum(1))
        means += chosen @ centred
    means /= counts[:, None]
    # tr((1 - W) M) of each part, from its rows' lengths and its mean's.
    lengths -= counts * (means.square().sum(1) - (means @ bend).square().sum(1))
    found = lengths / (counts - 1) + (means + samples.mean - reference.mean).square().sum(1)
    return _distance(samples, reference, values) + found - found[0]


def _factor(moments: Moments) -> Tensor:
    """A factor F of the covariance F F^T."""
    factor, info = torch.linalg.cholesky_ex(moments.covariance)
    if int(info) == 0:
        return factor
    # The covariance is singular, for example with fewer pictures than features.
    values, vectors = torch.linalg.eigh(moments.covariance)
    return vectors * values.clamp(min=0).sqrt()


def _symmetric_product(samples: Moments, factor: Tensor) -> Tensor:
    """F^T M F, a symmetric matrix with the eigenvalues of M F F^T."""
    return factor.T @ samples.covariance @ factor


def _distance(samples: Moments, reference: Moments, values: Tensor) -> float:
    root_trace = values.clamp(min=0).sqrt().sum()
    mean = (samples.mean - reference.mean).square().sum()
    traces = samples.covariance.trace() + reference.covariance.trace()
    return max(float(mean + traces - 2 * root_trace), 0.0)


def inception_scores(probabilities: Tensor, halves: Tensor) -> Tensor:
    """Inception Score: exp of the mean divergence of p(class | picture) from p(class).

    Salimans et al., arXiv 1606.03498. It is over the whole set. A mean over splits
    would depend on the order of the pictures.

    Args:
        probabilities: (n, classes), each row sums to 1.
        halves: (repetitions, n) bool.

    Returns:
        (repetitions,) float64, from 1 to the number of classes.
    """
    rows = probabilities.double()
    weights = halves.double()
    weights = weights / weights.sum(1, keepdim=True)
    marginal = weights @ rows
    of_rows = weights @ torch.special.entr(rows).sum(1)
    return (torch.special.entr(marginal).sum(1) - of_rows).exp()
