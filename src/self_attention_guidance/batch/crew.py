"""Who does the work: this process, or workers on Ray; and what a worker is."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..checks import check_count, check_number

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Worker = Callable[[Unit], Result]

AfterDeath = Callable[[Unit, int], Sequence[Unit]]

# A unit is given up when this many workers died while they had it.
TRIES = 3
_MOST = 1024


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The number and kind of workers.

    Attributes:
        workers: Number of workers, 1 to 1024. A single one without an address is this process.
        address: Address of a running Ray cluster, for example "auto" or "ray://host:10001"; `None`
            runs Ray on this machine while it is needed.
        threads: CPU threads of each worker, 1 to 1024. The last bits of what a network computes
            can depend on it. `None` leaves this process as it is, and is 1 on Ray.
        gpus: GPUs of each worker on Ray, or a fraction of one; `None` shares all GPUs, at most
            one for each worker.

    Raises:
        ValueError: A setting is out of its range, or Ray is needed and not installed.
    """

    workers: int = 1
    address: str | None = None
    threads: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        """Check every setting."""
        check_count("workers", self.workers, most=_MOST)
        if self.threads is not None:
            check_count("threads", self.threads, most=_MOST)
        if self.gpus is not None:
            check_number("gpus", self.gpus, 0, _MOST)
            if self.is_here:
                raise ValueError(
                    f"gpus={self.gpus} must not be given for a single worker without an address,"
                    " which uses the device of this process"
                )
        if not self.is_here and importlib.util.find_spec("ray") is None:
            raise ValueError("more than one worker needs Ray: pip install ray")

    @property
    def is_here(self) -> bool:
        """Whether the work is done in this process, without Ray."""
        return self.workers == 1 and self.address is None


@dataclass(frozen=True)
class Lost:
    """What replaces a result if every worker that had the unit died.

    Attributes:
        reason: The reason, in one line.
    """

    reason: str


def check_reachable(address: str | None) -> None:
    """Refuse the address of a cluster that does not answer; Ray itself would try for minutes.

    Args:
        address: As in `Crew`.

    Raises:
        ValueError: Nothing answers there.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"address={address!r} cannot be reached: {error}") from error
