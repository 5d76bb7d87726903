"""KID, precision and recall: statistics of all pairs of pictures, with each pair computed once.

KID is the unbiased squared maximum mean discrepancy of the kernel (x y / features + 1)^3, over all
pairs (Bińkowski et al., arXiv 1801.01401). Precision and recall (Kynkäänniemi et al., arXiv
1904.06991): a set covers the balls around its rows, each as large as the distance to its k-th
nearest other row; precision is the share of the samples that the reference covers, recall the share
of the reference that the samples cover. On a part of the samples (`halves`, see `resampling.py`)
balls are larger; all parts share the products of rows.

Bounds of distances decide first. Where they leave open which row is nearer, or whether a ball holds
a row, the distances themselves decide. So the shares are exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .rows import TILE, Rows, distances, full_precision, tiles

NEIGHBOURS = 3
# Nearest rows to keep at first. Fewer than three of these are in a half once in ten million times.
_CANDIDATES = 32
# Numbers in memory at once when pairs are computed one by one.
_MOST_NUMBERS = 2**22
# Above this share of a tile's pairs, computing the whole tile in float64 is cheaper.
_FEW = 1 / 32

Advance = Callable[[int], object]


class PairReference:
    """A reference to compare samples with, pair by pair."""

    def __init__(self, features: Tensor, k: int = NEIGHBOURS) -> None:
        """Store the reference; compare nothing yet.

        Args:
            features: (more than k, features), of any floating type.
            k: The neighbour whose distance is the radius of a ball, at least 1.
        """
        self._features = features
        self._k = k
        self._known: tuple[Rows, Tensor, Tensor] | None = None

    def figures(
        self, samples: Tensor, halves: Tensor, advance: Advance = lambda tiles: None
    ) -> dict[str, Tensor]:
        """KID, precision and recall of samples, and of parts of them.

        Args:
            samples: (n, features), of any floating type.
            halves: (repetitions, n) bool, more than k of each row.
            advance: Called with shares of `pair_work(n, len(reference))`.

        Returns:
            (repetitions,) float64, by "kid", "precision" and "recall".

        Raises:
            ValueError: A feature is not finite, or larger than 1e6.
        """
        with full_precision():
            reference, own, radii = self._own(advance)
            drawn = Rows(samples, reference.mean)
            within, sample_radii = _within(drawn, halves, self._k, advance)
            precision = _Coverage(reference, drawn, radii)
            recall = _Coverage(drawn, reference, sample_radii)
            between = torch.zeros(len(samples), dtype=torch.float64)
            for part in tiles(len(samples)):
                for other in tiles(len(self._features)):
                    products = drawn.products(part, reference, other)
                    between[part] += drawn.kernel(products, part, reference, other).sum(1)
                    least, slack = drawn.bounds(products, part, reference, other)
                    recall.look(part, other, least, slack)
                    precision.look(other, part, least.T, slack.T)
                    advance(1)
        weights, total = halves.double(), len(self._features)
        counts = weights.sum(1)
        within = within / (counts * (counts - 1))
        pairs = own / (total * (total - 1))
        return {
            "kid": within + pairs - 2 * (weights @ between) / (counts * total),
            "precision": (weights @ precision.covered()[0]) / counts,
            "recall": recall.covered().mean(1),
        }

    def _own(self, advance: Advance) -> tuple[Rows, Tensor, Tensor]:
        """The rows, sum over pairs and radii of the reference, computed once for all samples."""
        count = len(self._features)
        if self._known is None:
            sums = [part.double().sum(0) for part in self._features.split(TILE)]
            rows = Rows(self._features, torch.stack(sums).sum(0) / count)
            everything = torch.ones(1, count, dtype=torch.bool)
            self._known = rows, *_within(rows, everything, self._k, advance)
        else:
            advance(_triangle(count))
        return self._known


def pair_work(samples: int, reference: int) -> int:
    """The total that `PairReference.figures` will report to its `advance`.

    Args:
        samples: Number of rows of the samples.
        reference: Number of rows of the reference.
    """
    between = len(tiles(samples)) * len(tiles(reference))
    return _triangle(samples) + _triangle(reference) + between


def _triangle(count: int) -> int:
    along = len(tiles(count))
    return along * (along + 1) // 2


def _within(rows: Rows, halves: Tensor, k: int, advance: Advance) -> tuple[Tensor, Tensor]:
    """Sums of the kernel over all ordered pairs of each half, and the radii of its balls."""
    weights = halves.double().T.contiguous()
    sums = torch.zeros(len(halves), dtype=torch.float64)
    count = len(rows.features)
    nearest = _Nearest(count, count, _CANDIDATES, torch.float32)
    parts = tiles(count)
    for number, part in enumerate(parts):
        for other in parts[number:]:
            products = rows.products(part, rows, other)
            kernel = rows.kernel(products, part, rows, other)
            least, _ = rows.bounds(products, part, rows, other)
            if part == other:
                kernel.fill_diagonal_(0)
                least.fill_diagonal_(torch.inf)
            else:
                kernel *= 2
                nearest.look(other, part, least.T)
            nearest.look(part, other, least)
            sums += ((kernel @ weights[other]) * weights[part]).sum(0)
            advance(1)
    return sums, _radii(rows, nearest, halves, k)


class _Nearest:
    """The rows that may be nearest to others, by lower bounds of squared distances."""

    def __init__(self, count: int, others: int, kept: int, dtype: torch.dtype) -> None:
        self.least = torch.full((count, min(kept, others)), torch.inf, dtype=dtype)
        self.index = torch.zeros(self.least.shape, dtype=torch.int64)

    def look(self, part: slice, others: slice, least: Tensor) -> None:
        """Add the bounds of some rows."""
        kept = self.least.shape[1]
        near = least.topk(min(kept, least.shape[1]), dim=1, largest=False, sorted=False)
        joint = torch.cat([self.least[part], near.values], dim=1)
        index = torch.cat([self.index[part], near.indices + others.start], dim=1)
        self.least[part], order = joint.topk(kept, dim=1, largest=False, sorted=False)
        self.index[part] = index.gather(1, order)


def _radii(rows: Rows, nearest: _Nearest, halves: Tensor, k: int) -> Tensor:
    """Squared distance of every row to its k-th nearest other row in each half.

    Returns:
        (repetitions, rows) float64; -1, which covers nothing, for rows outside the half.
    """
    count, width = rows.features.shape
    radii = torch.empty(halves.shape, dtype=torch.float64)
    kept = nearest.index.shape[1]
    size = max(1, _MOST_NUMBERS // (kept * max(width, len(halves))))
    doubtful = torch.cat(
        [
            _settle(rows, part, nearest.index[part], nearest.least[part], halves, k, radii)
            for part in torch.arange(count).split(size)
        ]
    )
    # The rest in float64, first with as many candidates, then with all rows.
    for kept in (_CANDIDATES, count):
        size = max(1, min(TILE, _MOST_NUMBERS // (kept * len(halves))))
        parts = doubtful.split(size) if len(doubtful) else ()
        doubtful = torch.cat(
            [doubtful[:0], *(_settle_exactly(rows, part, halves, k, radii, kept) for part in parts)]
        )
    return radii.masked_fill_(~halves, -1.0)


def _settle_exactly(
    rows: Rows, part: Tensor, halves: Tensor, k: int, radii: Tensor, kept: int
) -> Tensor:
    """Like `_settle`, with candidates from bounds in float64."""
    count = len(rows.features)
    nearest = _Nearest(len(part), count, kept, torch.float64)
    for others in tiles(count):
        products = rows.products(part, rows, others, torch.float64)
        least, slack = rows.bounds(products, part, rows, others)
        # Rows whose distances differ by less than rounding count as equally near.
        most = least + slack
        itself = part[:, None] == torch.arange(others.start, others.stop)
        nearest.look(slice(None), others, most.masked_fill_(itself, torch.inf))
    return _settle(rows, part, nearest.index, nearest.least, halves, k, radii)


def _settle(
    rows: Rows, part: Tensor, index: Tensor, least: Tensor, halves: Tensor, k: int, radii: Tensor
) -> Tensor:
    """Find radii among candidates.

    Args:
        rows: All rows.
        part: (some,) indices of the rows to settle.
        index: (some, candidates) indices of the candidates.
        least: (some, candidates) bounds of their distances; those of all other rows are no smaller.
        halves: (repetitions, rows).
        k: The neighbour whose distance is the radius.
        radii: (repetitions, rows), changed in place.

    Returns:
        The rows of `part` for which a row that is no candidate may be nearer.
    """
    found = distances(rows, part.repeat_interleave(index.shape[1]), rows, index.flatten())
    found = found.view(index.shape).masked_fill_(least.isinf(), torch.inf)
    found, order = found.sort(1)
    rank = halves[:, index.gather(1, order)].cumsum(2, dtype=torch.int32)
    found = found.masked_fill(rank < k, torch.inf).amin(2)
    radii[:, part] = found
    # No distance is below 0, that of a copy.
    nearer = found > least.amax(1).clamp(min=0)
    return part[(nearer & halves[:, part]).any(0)]


class _Coverage:
    """The targets that lie in balls, for each of several sets of balls."""

    def __init__(self, balls: Rows, targets: Rows, radii: Tensor) -> None:
        self._balls, self._targets, self._radii = balls, targets, radii
        is_ball = radii >= 0
        self._member = is_ball.float()
        self._smallest = radii.masked_fill(~is_ball, torch.inf).amin(0)
        self._smallest[~is_ball.any(0)] = -1.0
        self._largest = radii.amax(0)
        # The number of balls found to hold a target; not all balls are searched.
        self._counts = torch.zeros(len(radii), len(targets.features), dtype=torch.float32)

    def covered(self) -> Tensor:
        """(sets of balls, targets) float64: 1 where one of the balls so far holds a target."""
        return (self._counts > 0).double()

    def look(self, balls: slice, targets: slice, least: Tensor, slack: Tensor) -> None:
        """Add some balls and targets.

        Args:
            balls: Slice of the balls.
            targets: Slice of the targets.
            least: (balls, targets) lower bounds of squared distances.
            slack: (balls, targets) differences of upper and lower bounds.
        """
        if (self._counts[:, targets] > 0).all():
            return
        may_be = self._decide(balls, targets, least, slack)
        if may_be.sum() > _FEW * may_be.numel():
            products = self._balls.products(balls, self._targets, targets, torch.float64)
            bounds = self._balls.bounds(products, balls, self._targets, targets)
            may_be = self._decide(balls, targets, *bounds)
        size = max(1, _MOST_NUMBERS // max(self._balls.features.shape[1], len(self._counts)))
        # In the order of balls: targets that one ball covers are skipped for the next.
        for pairs in may_be.nonzero().split(size):
            self._settle(pairs + torch.tensor([balls.start, targets.start]))

    def _decide(self, balls: slice, targets: slice, least: Tensor, slack: Tensor) -> Tensor:
        """Count targets certainly in balls; return (balls, targets) bool, which may be in them."""
        smallest, largest = (
            radii[balls, None].to(least.dtype) for radii in (self._smallest, self._largest)
        )
        counts = self._counts[:, targets]
        is_inside = least + slack <= smallest
        counts.addmm_(self._member[:, balls], is_inside.float())
        may_be = least <= largest
        may_be &= ~is_inside
        may_be &= (counts == 0).any(0)
        return may_be

    def _settle(self, pairs: Tensor) -> None:
        """Decide some pairs of a ball and a target by their distances."""
        is_open = (self._counts[:, pairs[:, 1]] == 0).any(0)
        ball, target = pairs[is_open].T
        inside = distances(self._balls, ball, self._targets, target) <= self._radii[:, ball]
        self._counts.index_add_(1, target, inside.float())
