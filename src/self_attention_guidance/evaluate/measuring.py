"""The figures of a set of samples against a reference, with their intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .advice import FEWEST_FOR_SHARES
from .features import FeatureSet
from .loading import LoadedSet, SavedStatistics
from .pairs import pair_work
from .resampling import Estimate, estimate, random_halves
from .sources import PictureSource
from .statistics import frechet_distances, inception_scores

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Metric:
    """The name of one figure and how to read it.

    Attributes:
        key: Name in JSON.
        title: Title in tables and plots.
        better: "lower" or "higher".
        least: Its smallest possible value.
        most: Its largest possible value.
    """

    key: str
    title: str
    better: str
    least: float = 0.0
    most: float = float("inf")


METRICS = (
    Metric("frechet_distance", "Fréchet distance", "lower"),
    Metric("sfid", "sFID", "lower"),
    # It is unbiased, so it can be below zero.
    Metric("kid", "KID", "lower", least=-float("inf")),
    Metric("inception_score", "Inception Score", "higher", least=1.0),
    Metric("precision", "precision", "higher", most=1.0),
    Metric("recall", "recall", "higher", most=1.0),
)


def measure(
    samples: LoadedSet,
    reference: LoadedSet,
    repetitions: int,
    seed: int,
    advance: Advance = lambda repetitions: None,
) -> dict[str, Estimate]:
    """All figures that the two sets allow.

    Args:
        samples: A set with features.
        reference: The reference; without features, it allows only Fréchet distances.
        repetitions: Number of halves of the samples for the intervals; 0 for no intervals.
        seed: Seed of the halves.
        advance: Called with shares of `work(samples, reference)`.

    Returns:
        Estimates by `Metric.key`, in the order of `METRICS`; without precision and recall if the
        samples or the reference have fewer than `FEWEST_FOR_SHARES` pictures. A figure that
        is the same for all halves has no interval.

    Raises:
        ValueError: The sets do not fit each other.
    """
    drawn = check_fit(samples, reference)
    # Of the sorted rows: intervals do not depend on the order of the pictures.
    halves = random_halves(len(drawn.features), repetitions, seed)
    values = _values(samples, reference, halves, advance)
    real = reference.features
    few = real is not None and min(len(drawn.features), len(real.features)) < FEWEST_FOR_SHARES
    left_out = {"precision", "recall"} if few else set[str]()
    known = [m for m in METRICS if m.key in values and m.key not in left_out]
    return {m.key: _estimate(values[m.key], m) for m in known}


def _estimate(values: Tensor, metric: Metric) -> Estimate:
    is_constant = bool((values == values[0]).all())
    return estimate(values[:1] if is_constant else values, metric.least, metric.most)


def repeated_values(
    samples: LoadedSet,
    reference: LoadedSet,
    halves: Tensor,
    advance: Advance = lambda repetitions: None,
) -> dict[str, Tensor]:
    """All figures that the two sets allow, for each of the given parts of the samples.

    If two sets of samples hold the same seeds in the same order and are measured on the same parts,
    their values can be subtracted: see `paired_difference`.

    Args:
        samples: A set with features whose order is known.
        reference: The reference; without features, it allows only Fréchet distances.
        halves: (repetitions, samples) bool, as `random_halves` returns them, in the order of the
            samples' source.
        advance: As in `measure`.

    Returns:
        (repetitions,) float64 by `Metric.key`.

    Raises:
        ValueError: The sets do not fit each other, or the order of the samples is not known.
    """
    drawn = check_fit(samples, reference)
    if drawn.order is None:
        raise ValueError(
            f"{str(samples.path)!r}: the order of its features is not known, so other sets can't be"
            " paired with it: load the pictures"
        )
    return _values(samples, reference, halves[:, drawn.order], advance)


def _values(
    samples: LoadedSet, reference: LoadedSet, halves: Tensor, advance: Advance
) -> dict[str, Tensor]:
    """As `repeated_values`, but for parts of the rows."""
    drawn = check_fit(samples, reference)
    values = {
        "frechet_distance": frechet_distances(
            drawn.features, samples.moments, reference.moments, halves
        )
    }
    advance(1)
    if drawn.spatial is not None and samples.spatial_moments and reference.spatial_moments:
        values["sfid"] = frechet_distances(
            drawn.spatial, samples.spatial_moments, reference.spatial_moments, halves
        )
        advance(1)
    if drawn.probabilities is not None:
        values["inception_score"] = inception_scores(drawn.probabilities, halves)
    if reference.pairs is not None:
        values |= reference.pairs.figures(drawn.features, halves, advance)
    return values


def work(samples: LoadedSet, reference: LoadedSet) -> int:
    """The total that `measure` will report to its `advance`, for a progress bar.

    Args:
        samples: As in `measure`.
        reference: As in `measure`.
    """
    distances = 1 + bool(samples.spatial_moments and reference.spatial_moments)
    if samples.features is None or reference.features is None:
        return distances
    return distances + pair_work(len(samples.features.features), len(reference.features.features))


def check_sizes(
    samples: PictureSource | SavedStatistics | LoadedSet,
    reference: PictureSource | SavedStatistics | LoadedSet,
) -> None:
    """Refuse sets that cannot be compared, as far as is known before pictures are encoded.

    Args:
        samples: The samples, or what `open_set` returned for them.
        reference: The reference, likewise.

    Raises:
        ValueError: The samples have no features, or pictures of another size.
    """
    if samples.size is None:
        raise ValueError(
            f"{str(samples.path)!r} holds moments and no features: it can be the reference only"
        )
    if reference.size not in (None, samples.size):
        sizes = "{}x{} and {}x{}".format(*samples.size, *reference.size)
        raise ValueError(
            f"{str(samples.path)!r} and {str(reference.path)!r} hold pictures of {sizes} pixels:"
            " they must be of one size"
        )


def check_fit(samples: LoadedSet, reference: LoadedSet) -> FeatureSet:
    """Refuse sets that cannot be compared.

    Args:
        samples: The samples.
        reference: The reference.

    Returns:
        The features of the samples.

    Raises:
        ValueError: As `check_sizes`, or the sets hold other numbers of features.
    """
    check_sizes(samples, reference)
    drawn: Any = samples.features
    for own, other in (
        (samples.moments, reference.moments),
        (samples.spatial_moments, reference.spatial_moments),
    ):
        if own and other and len(own.mean) != len(other.mean):
            raise ValueError(
                f"{str(reference.path)!r} holds statistics of {len(other.mean)} features,"
                f" {drawn.encoder} has {len(own.mean)}"
            )
    return drawn
