"""What sets of features have in common: Fréchet distance, KID, Inception Score.

Pure maths on float64 tensors. Rows are pictures, columns are features. `halves` are the samples
that an estimate is repeated on, (repetitions, rows) bool; see `resampling.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Fixed, so that sums are rounded in the same way whatever the batches were.
CHUNK = 1024


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features.

    Attributes:
        mean: (features,) float64.
        covariance: (features, features) float64, of a sample: divided by the count less one.
    """

    mean: Tensor
    covariance: Tensor


class RunningMoments:
    """Mean and covariance of features that come in pieces, in float64.

    Chan, Golub and LeVeque's updating formula: it does not lose digits where the mean is large
    against the deviations, as sums of squares do.
    """

    def __init__(self, features: int) -> None:
        """Nothing seen yet.

        Args:
            features: How many columns there will be.
        """
        self.count = 0
        self._mean = torch.zeros(features, dtype=torch.float64)
        self._scatter = torch.zeros(features, features, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Adds a piece.

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
        self._scatter += centred.T @ centred
        self._scatter += torch.outer(shift, shift) * (self.count * len(rows) / count)
        self._mean = self._mean + shift * (len(rows) / count)
        self.count = count

    def moments(self) -> Moments:
        """Of all rows so far.

        Raises:
            ValueError: There are fewer than two.
        """
        if self.count < 2:
            raise ValueError(f"count={self.count} must be at least 2 for a covariance")
        return Moments(self._mean, self._scatter / (self.count - 1))


def moments_of(rows: Tensor) -> Moments:
    """Mean and covariance of a whole set, a chunk at a time.

    Args:
        rows: (at least 2, features), of any floating type.
    """
    running = RunningMoments(rows.shape[1])
    for chunk in rows.split(CHUNK):
        running.update(chunk)
    return running.moments()


class FrechetReference:
    """A reference to which Fréchet distances are taken many times.

    |m - r|^2 + tr(M + R - 2 (M R)^(1/2)), Heusel et al., arXiv 1706.08500, equation 6. M R has the
    eigenvalues of R^(1/2) M R^(1/2), which is symmetric: no root of a general matrix is needed.
    """

    def __init__(self, reference: Moments) -> None:
        """Takes the root of the reference's covariance.

        Args:
            reference: Of the reference's features.
        """
        self._reference = reference
        values, vectors = torch.linalg.eigh(reference.covariance)
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, samples: Moments) -> float:
        """Fréchet distance.

        Args:
            samples: Of as many features as the reference's.

        Returns:
            At least 0; 0 for equal moments, up to rounding.
        """
        values = torch.linalg.eigvalsh(self._root @ samples.covariance @ self._root)
        root_trace = values.clamp(min=0).sqrt().sum()
        mean = (samples.mean - self._reference.mean).square().sum()
        traces = samples.covariance.trace() + self._reference.covariance.trace()
        return max(float(mean + traces - 2 * root_trace), 0.0)


def frechet_distance(samples: Moments, reference: Moments) -> float:
    """Fréchet distance of two sets of features, taken as Gaussians.

    Args:
        samples: Of one set.
        reference: Of the other, with as many features.
    """
    return FrechetReference(reference).distance(samples)


def kernel_distances(samples: Tensor, reference: Tensor, halves: Tensor) -> Tensor:
    """KID: the unbiased squared maximum mean discrepancy of the kernel (x y / features + 1)^3.

    Bińkowski et al., arXiv 1801.01401. All pairs are used, not means over small subsets.

    Args:
        samples: (n, features).
        reference: (m, features).
        halves: (repetitions, n) bool.

    Returns:
        (repetitions,) float64.
    """
    weights = halves.double()
    counts = weights.sum(1)
    within = torch.zeros(len(halves), dtype=torch.float64)
    between, own = torch.zeros_like(within), torch.zeros((), dtype=torch.float64)
    for start in range(0, len(samples), CHUNK):
        rows = samples[start : start + CHUNK].double()
        kernel = _kernel(rows, samples)
        _clear_diagonal(kernel, start)
        chosen = weights[:, start : start + CHUNK]
        within += ((kernel @ weights.T).T * chosen).sum(1)
        between += chosen @ _kernel(rows, reference).sum(1)
    for start in range(0, len(reference), CHUNK):
        kernel = _kernel(reference[start : start + CHUNK].double(), reference)
        own += _clear_diagonal(kernel, start).sum()
    total = len(reference)
    pairs = own / (total * (total - 1))
    return within / (counts * (counts - 1)) + pairs - 2 * between / (counts * total)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.double().T / a.shape[1] + 1) ** 3


def _clear_diagonal(kernel: Tensor, start: int) -> Tensor:
    """Drops pairs of a picture with itself from rows that begin at `start`."""
    kernel[:, start : start + len(kernel)].fill_diagonal_(0)
    return kernel


def inception_scores(probabilities: Tensor, halves: Tensor) -> Tensor:
    """Inception Score: exp of the mean divergence of p(class | picture) from p(class).

    Salimans et al., arXiv 1606.03498. Over the whole set, not a mean over splits of it, which
    would depend on the pictures' order.

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
