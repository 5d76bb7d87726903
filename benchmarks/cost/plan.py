"""What is measured: every combination of networks, modes, types and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from known_networks import NETWORKS, Network
from self_attention_guidance.checks import check_count
from self_attention_guidance.guidance import METHODS

MODES = ("eager", "compiled")
DTYPES = ("float32", "bfloat16", "float16")
CFG = {"both": (True, False), "on": (True,), "off": (False,)}
"""Whether classifier-free guidance is on, by the name of the choice."""

_MOST_STEPS = 1000
_SIZE_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row of the measurement.

    Attributes:
        network: A key of `NETWORKS`.
        mode: One of `MODES`.
        dtype: One of `DTYPES`.
        cfg: Whether classifier-free guidance is on.
        device: Name of a device, such as "cpu" or "cuda:1".
        size: Side of the picture in pixels.
        steps: Sampling steps of a picture.
        batch_size: Pictures drawn at once.
        method: Short name of the guidance.
    """

    network: str
    mode: str
    dtype: str
    cfg: bool
    device: str
    size: int
    steps: int
    batch_size: int
    method: str = "sag"


def plan(
    networks: Sequence[str] = ("emoji", "emoji-adm"),
    modes: Sequence[str] = ("eager",),
    dtypes: Sequence[str] = ("float32",),
    *,
    device: str,
    cfg: str = "both",
    size: int | None = None,
    steps: int | None = None,
    batch_size: int = 1,
    methods: Sequence[str] = ("sag",),
) -> list[Configuration]:
    """All combinations; those that share a network, mode and type follow each other.

    Args:
        networks: Keys of `NETWORKS`.
        modes: Of `MODES`.
        dtypes: Of `DTYPES`.
        device: Name of a device that exists.
        cfg: A key of `CFG`; networks without classifier-free guidance are measured without.
        size: Side in pixels of pictures of the networks with random weights, a multiple of 64;
            `None` is the network's own, smaller on a CPU.
        steps: Sampling steps, 1 to 1000; `None` is the network's own.
        batch_size: Pictures drawn at once, at least 1.
        methods: Short names of guidances.

    Raises:
        ValueError: An argument is unknown or out of its range, or leaves nothing to measure.
    """
    for name, given, known in (
        ("networks", networks, tuple(NETWORKS)),
        ("modes", modes, MODES),
        ("dtypes", dtypes, DTYPES),
        ("cfg", [cfg], tuple(CFG)),
        ("methods", methods, tuple(METHODS)),
    ):
        _check_names(name, given, known)
    _check_numbers(networks, size, steps, batch_size)
    found = [
        Configuration(
            network=name,
            mode=mode,
            dtype=dtype,
            cfg=is_on,
            device=device,
            size=size if size and NETWORKS[name].takes_size else NETWORKS[name].size_on(device),
            steps=steps or NETWORKS[name].steps,
            batch_size=batch_size,
            method=method,
        )
        for name, dtype, mode in product(networks, dtypes, modes)
        for method in methods
        for is_on in _cfg_of(NETWORKS[name], cfg)
    ]
    if not found:
        raise ValueError(f"cfg='on' leaves nothing to measure: {', '.join(networks)} have no CFG")
    return found


def _cfg_of(network: Network, cfg: str) -> list[bool]:
    return [is_on for is_on in CFG[cfg] if network.has_cfg or not is_on]


def _check_names(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    if not given:
        raise ValueError(f"{name} must name at least one of {', '.join(known)}")
    for value in given:
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
        if given.count(value) > 1:
            raise ValueError(f"{name}: {value!r} must be named once only")


def _check_numbers(
    networks: Sequence[str], size: int | None, steps: int | None, batch_size: int
) -> None:
    check_count("batch_size", batch_size)
    if steps is not None and check_count("steps", steps) > _MOST_STEPS:
        raise ValueError(f"steps={steps} must be at most {_MOST_STEPS}")
    if size is None:
        return
    if check_count("size", size) % _SIZE_MULTIPLE:
        raise ValueError(f"size={size} must be a multiple of {_SIZE_MULTIPLE}")
    if not any(NETWORKS[name].takes_size for name in networks):
        takers = ", ".join(name for name, network in NETWORKS.items() if network.takes_size)
        raise ValueError(f"size={size} is for {takers}: the builtin models have sizes of their own")
