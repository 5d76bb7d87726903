"""What the figures of `sag evaluate` cost, on features that are drawn at random.

    OMP_NUM_THREADS=2 python benchmarks/evaluate/timings.py --count 50000
    OMP_NUM_THREADS=1 python benchmarks/evaluate/timings.py figures intervals --rounds 5
    OMP_NUM_THREADS=1 python benchmarks/evaluate/timings.py pytorch-fid frechet --rounds 5

What is named takes turns, and encoding is in none of it: `frechet` is the Fréchet distance from
features on, `pytorch-fid` the same as pytorch-fid computes it (numpy's covariance, SciPy's root of
the product), `pairs` KID with precision and recall, `figures` all of them and `intervals` all with
intervals.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from self_attention_guidance.evaluate import FeatureSet, LoadedSet, measure, random_halves
from self_attention_guidance.evaluate.pairs import PairReference
from self_attention_guidance.evaluate.report import format_estimate
from self_attention_guidance.evaluate.statistics import frechet_distance, moments_of

SIZE = (299, 299)


def features(count: int, width: int, seed: int, spread: float = 1.0) -> Tensor:
    """Correlated and not negative, as Inception's are, (count, width) float32."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    mixing *= 0.15 * torch.arange(1, width + 1).rsqrt()[:, None]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(count, width)
    for part in rows.split(4096):
        noise = spread * torch.randn(part.shape, generator=generator)
        part.copy_((noise @ mixing + 0.4).relu())
    return rows


def with_scipy(samples: Tensor, reference: Tensor) -> float:
    """The Fréchet distance as pytorch-fid computes it."""
    from scipy import linalg

    a, b = (rows.numpy().astype(np.float64) for rows in (samples, reference))
    first, second = (np.cov(rows, rowvar=False) for rows in (a, b))
    root = linalg.sqrtm(first @ second)
    traces = np.trace(first) + np.trace(second) - 2 * np.trace(root.real)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + traces)


def loaded(name: str, rows: Tensor) -> LoadedSet:
    """A set of features, as `load_set` gives one."""
    return LoadedSet(Path(name), moments_of(rows), None, FeatureSet("inception", SIZE, rows))


def ways(samples: Tensor, reference: Tensor, repetitions: int) -> dict[str, Callable[[], str]]:
    """What can be measured; each computes something from features on and tells what it found."""

    def shares() -> str:
        everything = random_halves(len(samples), 0, 0)
        found = PairReference(reference).figures(samples, everything)
        return ", ".join(f"{name} {float(values[0]):.6g}" for name, values in found.items())

    def figures(repetitions: int) -> str:
        sets = loaded("samples", samples), loaded("reference", reference)
        found = measure(*sets, repetitions, seed=0)
        return ", ".join(f"{name} {format_estimate(each)}" for name, each in found.items())

    return {
        "frechet": lambda: str(frechet_distance(moments_of(samples), moments_of(reference))),
        "pytorch-fid": lambda: str(with_scipy(samples, reference)),
        "pairs": shares,
        "figures": lambda: figures(0),
        "intervals": lambda: figures(repetitions),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ways", nargs="*", default=["frechet", "pairs", "figures", "intervals"])
    parser.add_argument("--count", type=int, default=2500, help="pictures of each set")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    samples = features(options.count, options.features, 1, spread=1.1)
    known = ways(samples, features(options.count, options.features, 2), options.bootstrap)
    print(f"{options.count} x {options.features}, {torch.get_num_threads()} threads")
    cores: dict[str, list[float]] = {name: [] for name in options.ways}
    for _ in range(options.rounds):
        for name in options.ways:
            clock, start = time.perf_counter(), time.process_time()
            found = known[name]()
            cores[name].append(time.process_time() - start)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{name}: {time.perf_counter() - clock:.1f} s, {cores[name][-1]:.1f} s of cores,"
                f" load {os.getloadavg()[0]:.1f}, peak memory so far {peak:.2f} GiB; {found}",
                flush=True,
            )
    first, *others = options.ways
    for name in others:
        ratios = [b / a for a, b in zip(cores[first], cores[name], strict=True)]
        print(f"{name} takes {median(ratios):.2f} times the cores that {first} takes")


if __name__ == "__main__":
    main()
