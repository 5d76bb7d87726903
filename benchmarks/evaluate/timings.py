"""What the figures of `sag evaluate` cost, on features that are drawn at random.

    OMP_NUM_THREADS=2 python benchmarks/evaluate/timings.py --count 50000
    OMP_NUM_THREADS=1 python benchmarks/evaluate/timings.py --count 2500 --against

It measures everything but encoding: the Fréchet distance from features on, KID with precision and
recall, all figures without and with intervals, and the peak memory of the process. `--against` lets
pytorch-fid's way (numpy's covariance, SciPy's root of the product) take turns with ours and prints
the ratio; it needs SciPy.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from self_attention_guidance.evaluate import FeatureSet, LoadedSet, measure, random_halves
from self_attention_guidance.evaluate.pairs import PairReference
from self_attention_guidance.evaluate.statistics import frechet_distance, moments_of

SIZE = (299, 299)


def features(count: int, width: int, seed: int, spread: float = 1.0) -> Tensor:
    """Correlated and not negative, as Inception's are, (count, width) float32."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    mixing *= torch.arange(1, width + 1).rsqrt()[:, None] / width**0.5
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(count, width)
    for part in rows.split(4096):
        noise = spread * torch.randn(part.shape, generator=generator)
        part.copy_((noise @ mixing + 0.4).relu())
    return rows


@contextmanager
def timed(name: str, seconds: dict[str, list[float]]) -> Iterator[None]:
    """Add to what something took."""
    start = time.perf_counter()
    yield
    seconds.setdefault(name, []).append(time.perf_counter() - start)


def with_scipy(samples: Tensor, reference: Tensor) -> float:
    """The Fréchet distance as pytorch-fid computes it."""
    from scipy import linalg

    a, b = (rows.numpy().astype(np.float64) for rows in (samples, reference))
    first, second = (np.cov(rows, rowvar=False) for rows in (a, b))
    root = linalg.sqrtm(first @ second)
    traces = np.trace(first) + np.trace(second) - 2 * np.trace(root.real)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + traces)


def ours(samples: Tensor, reference: Tensor) -> float:
    """The same."""
    return frechet_distance(moments_of(samples), moments_of(reference))


def loaded(name: str, rows: Tensor) -> LoadedSet:
    """A set of features, as `load_set` gives one."""
    return LoadedSet(Path(name), moments_of(rows), None, FeatureSet("inception", SIZE, rows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2500, help="pictures of each set")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--against", action="store_true", help="pytorch-fid's way, too")
    options = parser.parse_args()
    samples = features(options.count, options.features, 1, spread=1.05)
    reference = features(options.count, options.features, 2)
    print(f"{options.count} x {options.features}, {torch.get_num_threads()} threads")
    seconds: dict[str, list[float]] = {}
    ways: dict[str, Callable[[Tensor, Tensor], float]] = {"Fréchet distance": ours}
    if options.against:
        ways["Fréchet distance, pytorch-fid's way"] = with_scipy
    for _ in range(options.rounds):
        for name, way in ways.items():
            with timed(name, seconds):
                found = way(samples, reference)
            print(f"{name}: {found:.10g}")
        with timed("KID, precision, recall", seconds):
            everything = random_halves(options.count, 0, 0)
            shares = PairReference(reference).figures(samples, everything)
        print(", ".join(f"{name} {float(values[0]):.10g}" for name, values in shares.items()))
        for repetitions in (0, options.bootstrap):
            with timed(f"all figures, --bootstrap {repetitions}", seconds):
                sets = (loaded("samples", samples), loaded("reference", reference))
                measure(*sets, repetitions, seed=0)
    for name, taken in seconds.items():
        print(f"{name}: {median(taken):.1f} s")
    intervals = [
        with_them / without - 1
        for without, with_them in zip(*list(seconds.values())[-2:], strict=True)
    ]
    print(f"intervals take {median(intervals):.2f} times what the figures take")
    if options.against:
        ratios = [a / b for a, b in zip(*(seconds[name] for name in ways), strict=True)]
        print(f"Fréchet distance takes {median(ratios):.2f} times what pytorch-fid's way takes")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
