"""The mathematics of `sag evaluate`: against torchmetrics, formulas and counting one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from self_attention_guidance.evaluate import pairs, resampling, rows, statistics
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


def in_pairs(
    samples: Tensor, reference: Tensor, halves: Tensor | None = None, k: int = 3
) -> dict[str, Tensor]:
    halves = resampling.random_halves(len(samples), 0, 0) if halves is None else halves
    return pairs.PairReference(reference, k).figures(samples, halves)


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
    ours = in_pairs(SAMPLES, REFERENCE[:150])["kid"]
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
    assert float(in_pairs(samples, reference)["kid"]) == pytest.approx(expected, rel=1e-6)


def test_inception_score_ends() -> None:
    certain = torch.eye(4).repeat(3, 1)
    halves = resampling.random_halves(12, 0, 0)
    assert float(statistics.inception_scores(certain, halves)[0]) == pytest.approx(4)
    unsure = torch.full((12, 4), 0.25)
    assert float(statistics.inception_scores(unsure, halves)[0]) == pytest.approx(1)


def squared(a: Tensor, b: Tensor) -> Tensor:
    return (a.double()[:, None] - b.double()).square().sum(2)


def counted(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall by counting: every distance in float64, every ball by itself."""

    def radii(of: Tensor) -> Tensor:
        others = squared(of, of).fill_diagonal_(torch.inf)
        return others.sort(dim=1).values[:, k - 1]

    between = squared(samples, reference)
    precision = (between <= radii(reference)).any(1).double().mean()
    recall = (between <= radii(samples)[:, None]).any(0).double().mean()
    return float(precision), float(recall)


def assert_counted(samples: Tensor, reference: Tensor, repetitions: int = 6) -> dict[str, Tensor]:
    halves = resampling.random_halves(len(samples), repetitions, 0)
    found = in_pairs(samples, reference, halves)
    for half, *shares in zip(halves, found["precision"], found["recall"], strict=True):
        assert tuple(map(float, shares)) == pytest.approx(counted(samples[half], reference))
    return found


def test_precision_and_recall_are_those_of_counting() -> None:
    found = assert_counted(SAMPLES + 0.7, REFERENCE)
    assert 0 < float(found["precision"][0]) < 1
    assert 0 < float(found["recall"][0]) < 1


def drawn(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def far_from_zero() -> tuple[Tensor, Tensor]:
    return SAMPLES + 5e4, REFERENCE + 5e4


def whole_numbers() -> tuple[Tensor, Tensor]:
    # Many distances are equal: balls touch rows.
    return (2 * drawn(150, 4, 0)).round(), (2 * drawn(180, 4, 1)).round()


def copies_of_few() -> tuple[Tensor, Tensor]:
    return drawn(12, 16, 0).repeat(12, 1), torch.cat([drawn(12, 16, 0), drawn(50, 16, 1)])


def two_of_each_and_many_of_one() -> tuple[Tensor, Tensor]:
    # The third neighbour of most is one of 60 at the same distance.
    kinds = torch.cat([drawn(40, 16, 0).repeat(2, 1), torch.zeros(60, 16)])
    return kinds, kinds[::2] + 1e-3


def collapsed() -> tuple[Tensor, Tensor]:
    # Distances among samples are lost in the rounding of float32 products.
    return drawn(1, 256, 0) + 1e-4 * drawn(150, 256, 1), drawn(150, 256, 2)


def both_collapsed() -> tuple[Tensor, Tensor]:
    centre = 100 * drawn(1, 256, 0)
    noise = 1e-3 * drawn(300, 256, 1)
    others = drawn(40, 256, 2)
    return torch.cat([centre + noise[:150], others]), torch.cat([centre + noise[150:], 50 + others])


def wide_balls() -> tuple[Tensor, Tensor]:
    return 5 * drawn(150, 8, 0), 0.1 * drawn(150, 8, 1)


def double_precision() -> tuple[Tensor, Tensor]:
    # Equal but for digits that float32 does not have.
    fine = drawn(150, 8, 0).double()
    return fine, fine + 1e-9 * drawn(150, 8, 1)


def few_rows() -> tuple[Tensor, Tensor]:
    return drawn(10, 3, 0), drawn(10, 3, 1)


@pytest.mark.parametrize("tile", [32, rows.TILE])
@pytest.mark.parametrize(
    "sets",
    [
        far_from_zero,
        whole_numbers,
        copies_of_few,
        two_of_each_and_many_of_one,
        collapsed,
        both_collapsed,
        wide_balls,
        double_precision,
        few_rows,
    ],
)
def test_hard_sets_are_counted(
    sets: Callable[[], tuple[Tensor, Tensor]], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "TILE", tile)
    one, other = sets()
    assert_counted(one, other)
    assert_counted(other, one)


def test_small_parts_are_counted() -> None:
    parts = torch.zeros(3, len(SAMPLES), dtype=torch.bool)
    for number, part in enumerate(parts):
        part[number::30] = True
    found = in_pairs(SAMPLES, REFERENCE, parts)
    for part, *shares in zip(parts, found["precision"], found["recall"], strict=True):
        assert tuple(map(float, shares)) == pytest.approx(counted(SAMPLES[part], REFERENCE))


def test_shares_do_not_depend_on_the_precision_that_networks_are_allowed() -> None:
    samples, reference = collapsed()
    expected = in_pairs(samples, reference)
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = in_pairs(samples, reference)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert found == expected


def test_a_reference_serves_many_samples() -> None:
    reference = pairs.PairReference(REFERENCE)
    done: list[int] = []
    for samples in (SAMPLES, SAMPLES[:40] + 0.5):
        halves = resampling.random_halves(len(samples), 2, 0)
        done.clear()
        found = reference.figures(samples, halves, done.append)
        assert sum(done) == pairs.pair_work(len(samples), len(REFERENCE))
        for key, values in in_pairs(samples, REFERENCE, halves).items():
            assert torch.equal(found[key], values)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e7])
def test_features_beyond_measure_are_refused(wrong: float) -> None:
    broken = SAMPLES.clone()
    broken[7, 3] = wrong
    for sets in ((broken, REFERENCE), (SAMPLES, broken)):
        with pytest.raises(ValueError, match="must be finite and of sizes below 1e"):
            in_pairs(*sets)


def test_copies_cover_themselves_only() -> None:
    copies = SAMPLES[:1].repeat(20, 1)
    reference = torch.cat([SAMPLES[:1], REFERENCE[:19]])
    assert in_pairs(copies, reference)["recall"].tolist() == [1 / 20]
    assert in_pairs(copies, copies)["precision"].tolist() == [1]


# Streams


@pytest.mark.parametrize("piece", [1, 7, 149, 150])
def test_streamed_moments_are_those_of_the_whole(piece: int) -> None:
    running = statistics.RunningMoments(FEATURES)
    running.update(SAMPLES[:0])
    for part in SAMPLES.split(piece):
        running.update(part)
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
    moments = [statistics.moments_of(each) for each in (SAMPLES, REFERENCE)]

    def everything() -> dict[str, Tensor]:
        distances = statistics.frechet_distances(SAMPLES, *moments, halves)
        return {"frechet": distances, **in_pairs(SAMPLES, REFERENCE, halves)}

    whole = everything()
    monkeypatch.setattr(statistics, "CHUNK", 32)
    monkeypatch.setattr(rows, "TILE", 32)
    for key, found in everything().items():
        torch.testing.assert_close(found, whole[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 600])
def test_covariance_of_any_width_is_symmetric_and_that_of_torch(width: int) -> None:
    samples = drawn(40, width, 0)
    found = statistics.moments_of(samples).covariance
    assert torch.equal(found, found.T)
    expected = samples.double().T.cov().reshape(width, width)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


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


def values_of(name: str, samples: Tensor, halves: Tensor, reference: Tensor = REFERENCE) -> Tensor:
    if name == "frechet":
        moments = (statistics.moments_of(each) for each in (samples, reference))
        return statistics.frechet_distances(samples, *moments, halves)
    return in_pairs(samples, reference, halves)[name]


@pytest.mark.parametrize("count", [8, 60, 400])
def test_frechet_distances_of_parts_spread_as_exact_ones(count: int) -> None:
    samples = normal(count, 5, 1.3, 0.4)
    halves = resampling.random_halves(count, 200, 0)
    found = values_of("frechet", samples, halves)
    distances = [frechet(samples[half], REFERENCE) for half in halves]
    exact = torch.tensor(distances, dtype=torch.float64)
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-9)
    assert 0.7 < float(found[1:].std() / exact[1:].std()) < 1.5
    together = torch.stack([found[1:], exact[1:]])
    assert float(torch.corrcoef(together)[0, 1]) > 0.8


def test_parts_that_are_the_whole_have_its_frechet_distance() -> None:
    whole = torch.ones(3, 150, dtype=torch.bool)
    found = values_of("frechet", SAMPLES, whole)
    assert found.tolist() == pytest.approx([frechet(SAMPLES, REFERENCE)] * 3, rel=1e-12)


@pytest.mark.parametrize("name", ["frechet", "kid", "precision", "recall"])
def test_intervals_cover(name: str) -> None:
    halves = resampling.random_halves(100, 200, 0)
    trials = [normal(100, 100 + trial, 1.1, 0.2) for trial in range(60)]
    found = [
        resampling.estimate(values_of(name, samples, halves), -float("inf")) for samples in trials
    ]
    expected = sum(each.value for each in found) / len(found)
    covered = sum(each.low <= expected <= each.high for each in found) / len(found)
    assert 0.85 <= covered <= 1.0
    spread = torch.tensor([each.value for each in found]).std()
    width = sum(each.high - each.low for each in found) / len(found)
    assert 0.7 < width / (2 * 1.96 * float(spread)) < 1.4
