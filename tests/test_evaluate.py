"""The mathematics of `sag evaluate`: against torchmetrics, formulas and counting one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from self_attention_guidance.evaluate import neighbours, resampling, statistics
from tiny_pixels import one_thread

FEATURES = 12


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def normal(count: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(FEATURES) + 0.2 * torch.ones(FEATURES, FEATURES)
    rows = torch.randn(count, FEATURES, generator=generator) @ mixing
    return (scale * rows + 3 + shift).float()


SAMPLES, REFERENCE = normal(150, 0, 1.2, 0.3), normal(180, 1)
WHOLE = resampling.random_halves(150, 0, 0)


class Given(nn.Module):
    """In the place of Inception: the pictures are features already."""

    num_features = FEATURES

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1)


def as_pictures(features: Tensor) -> Tensor:
    return features.reshape(-1, FEATURES // 4, 2, 2)


def frechet(samples: Tensor, reference: Tensor) -> float:
    return statistics.frechet_distance(
        statistics.moments_of(samples), statistics.moments_of(reference)
    )


# Against torchmetrics


def metrics_of(module: str) -> Any:
    """Image metrics of torchmetrics, which it lists by name beside torch-fidelity only."""
    name = f"torchmetrics.image.{module}"
    return pytest.importorskip(name, reason="torchmetrics is not installed")


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    fid = metrics_of("fid")
    theirs = fid.FrechetInceptionDistance(Given(), input_img_size=(3, 2, 2))
    theirs.update(as_pictures(REFERENCE), real=True)
    theirs.update(as_pictures(SAMPLES), real=False)
    assert frechet(SAMPLES, REFERENCE) == pytest.approx(float(theirs.compute()), rel=1e-3)


def test_kid_is_that_of_torchmetrics() -> None:
    kid = metrics_of("kid")
    # It takes as many of both, and all of them make one subset.
    theirs = kid.KernelInceptionDistance(Given(), subsets=1, subset_size=150)
    theirs.update(as_pictures(REFERENCE[:150]), real=True)
    theirs.update(as_pictures(SAMPLES), real=False)
    ours = statistics.kernel_distances(SAMPLES, REFERENCE[:150], WHOLE)
    assert float(ours[0]) == pytest.approx(float(theirs.compute()[0]), rel=1e-3)


def test_inception_score_is_that_of_torchmetrics() -> None:
    inception = metrics_of("inception")
    theirs = inception.InceptionScore(Given(), splits=1)
    theirs.update(as_pictures(SAMPLES))
    ours = statistics.inception_scores(SAMPLES.double().softmax(1), WHOLE)
    assert float(ours[0]) == pytest.approx(float(theirs.compute()[0]), rel=1e-3)


# Against formulas


def test_frechet_distance_of_known_gaussians() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    a = statistics.Moments(torch.tensor([1.0, 0.0], dtype=torch.float64), 4 * eye)
    b = statistics.Moments(torch.tensor([0.0, 2.0], dtype=torch.float64), 9 * eye)
    assert statistics.frechet_distance(a, b) == pytest.approx(5 + 2 * (3 - 2) ** 2)
    assert statistics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_pictures_than_features() -> None:
    few = SAMPLES[:5].double()
    product = few.T.cov() @ REFERENCE.double().T.cov()
    root = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    mean = (few.mean(0) - REFERENCE.double().mean(0)).square().sum()
    traces = few.T.cov().trace() + REFERENCE.double().T.cov().trace()
    assert frechet(few, REFERENCE) == pytest.approx(float(mean + traces - 2 * root), rel=1e-6)


def test_kid_is_the_unbiased_mean_over_pairs() -> None:
    samples, reference = SAMPLES[:9].double(), REFERENCE[:7].double()

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / FEATURES + 1) ** 3)

    def mean(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
        values = [kernel(a, b) for a, b in pairs]
        return sum(values) / len(values)

    expected = (
        mean(itertools.permutations(samples, 2))
        + mean(itertools.permutations(reference, 2))
        - 2 * mean(itertools.product(samples, reference))
    )
    halves = resampling.random_halves(9, 0, 0)
    found = statistics.kernel_distances(samples, reference, halves)
    assert float(found[0]) == pytest.approx(expected, rel=1e-10)


def test_inception_score_ends() -> None:
    certain = torch.eye(4).repeat(3, 1)
    halves = resampling.random_halves(12, 0, 0)
    assert float(statistics.inception_scores(certain, halves)[0]) == pytest.approx(4)
    unsure = torch.full((12, 4), 0.25)
    assert float(statistics.inception_scores(unsure, halves)[0]) == pytest.approx(1)


def brute_force(covering: Tensor, tested: Tensor, k: int = 3) -> float:
    """Share of `tested` within the k-th neighbour's distance of any of `covering`."""
    balls = []
    for index, centre in enumerate(covering):
        others = [row for other, row in enumerate(covering) if other != index]
        distances = sorted(float((centre - row).norm()) for row in others)
        balls.append((centre, distances[k - 1]))
    inside = [any(float((row - c).norm()) <= radius for c, radius in balls) for row in tested]
    return sum(inside) / len(inside)


def test_precision_and_recall_are_those_of_counting() -> None:
    samples, reference = SAMPLES[:60].double() + 0.7, REFERENCE[:70].double()
    halves = resampling.random_halves(60, 3, 0)
    precisions = neighbours.precisions(samples, reference, halves)
    recalls = neighbours.recalls(samples, reference, halves)
    for half, precision, recall in zip(halves, precisions, recalls, strict=True):
        assert float(precision) == pytest.approx(brute_force(reference, samples[half]))
        assert float(recall) == pytest.approx(brute_force(samples[half], reference))
    assert 0 < float(precisions[0]) < 1
    assert 0 < float(recalls[0]) < 1


def test_copies_cover_themselves_only() -> None:
    copies = SAMPLES[:1].repeat(20, 1)
    halves = resampling.random_halves(20, 0, 0)
    reference = torch.cat([SAMPLES[:1], REFERENCE[:19]])
    assert neighbours.recalls(copies, reference, halves).tolist() == [1 / 20]
    assert neighbours.precisions(copies, copies, halves).tolist() == [1]


# Streams


@pytest.mark.parametrize("piece", [1, 7, 149, 150])
def test_streamed_moments_are_those_of_the_whole(piece: int) -> None:
    running = statistics.RunningMoments(FEATURES)
    running.update(SAMPLES[:0])
    for rows in SAMPLES.split(piece):
        running.update(rows)
    found = running.moments()
    torch.testing.assert_close(found.mean, SAMPLES.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.covariance, SAMPLES.double().T.cov(), rtol=1e-10, atol=0)


def test_moments_far_from_zero_lose_no_digits() -> None:
    far = SAMPLES.double() + 1e6
    found = statistics.moments_of(far).covariance
    torch.testing.assert_close(found, SAMPLES.double().T.cov(), rtol=1e-6, atol=1e-6)


def test_one_picture_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="count=1 must be at least 2"):
        statistics.moments_of(SAMPLES[:1])


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = resampling.random_halves(150, 4, 0)

    def everything() -> list[Tensor]:
        return [
            statistics.kernel_distances(SAMPLES, REFERENCE, halves),
            neighbours.precisions(SAMPLES, REFERENCE, halves),
            neighbours.recalls(SAMPLES, REFERENCE, halves),
        ]

    whole = everything()
    for module in (statistics, neighbours):
        monkeypatch.setattr(module, "CHUNK", 32)
    for found, expected in zip(everything(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# Intervals


def test_halves_are_halves_and_seeds_reproduce_them() -> None:
    halves = resampling.random_halves(11, 6, seed=3)
    assert halves.sum(1).tolist() == [11, *[5] * 6]
    assert torch.equal(halves, resampling.random_halves(11, 6, seed=3))
    assert not torch.equal(halves, resampling.random_halves(11, 6, seed=4))


def test_intervals_hold_the_value_and_keep_in_range() -> None:
    found = resampling.estimate(torch.tensor([1.0, 0.7, 0.8, 0.9]), least=0, most=1)
    assert found.value == 1.0
    assert found.high == 1.0
    assert found.low == pytest.approx(0.905)
    assert resampling.estimate(torch.tensor([2.0]), least=0) == resampling.Estimate(2.0)
    assert resampling.estimate(torch.tensor([2.0, 1.0]), least=0) == resampling.Estimate(2.0)


@pytest.mark.parametrize("name", ["frechet", "kid", "precision", "recall"])
def test_intervals_cover(name: str) -> None:
    reference = statistics.FrechetReference(statistics.moments_of(REFERENCE))

    def values(samples: Tensor, halves: Tensor) -> Tensor:
        if name == "frechet":
            moments = [statistics.moments_of(samples[half]) for half in halves]
            return torch.tensor([reference.distance(each) for each in moments])
        functions = {
            "kid": statistics.kernel_distances,
            "precision": neighbours.precisions,
            "recall": neighbours.recalls,
        }
        return functions[name](samples, REFERENCE, halves)

    halves = resampling.random_halves(100, 200, 0)
    found = [
        resampling.estimate(values(normal(100, 100 + trial, 1.1, 0.2), halves), -float("inf"))
        for trial in range(60)
    ]
    expected = sum(each.value for each in found) / len(found)
    covered = sum(each.low <= expected <= each.high for each in found) / len(found)
    assert 0.85 <= covered <= 1.0
    spread = torch.tensor([each.value for each in found]).std()
    width = sum(each.high - each.low for each in found) / len(found)
    assert 0.7 < width / (2 * 1.96 * float(spread)) < 1.4
