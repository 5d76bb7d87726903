"""Distribution of work to this process, or to actors on Ray, which may die.

Example:
    ```python
    from self_attention_guidance.batch.workers import Crew, distribute

    for unit, result in distribute(range(100), make_worker, Crew(workers=4)):
        ...
    ```
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import os
import pickle
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from ..checks import check_count, check_number

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Worker = Callable[[Unit], Result]

AfterDeath = Callable[[Unit, int], Sequence[Unit]]

# A unit is given up when this many workers died while they had it.
TRIES = 3
_MOST = 1024
_RESTART_SECONDS = 2.0
_PATIENCE_SECONDS = 120.0


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


def distribute(
    units: Iterable[Unit],
    make_worker: Callable[[], Worker[Unit, Result]],
    crew: Crew | None = None,
    after_death: AfterDeath[Unit] | None = None,
    on_ready: Callable[[], object] = lambda: None,
    note: Callable[[str], object] = lambda line: None,
) -> Generator[tuple[Unit, Result | Lost]]:
    """Distribute units of work, and yield each unit with its result when it is finished.

    A worker that dies, with its node or alone, is replaced, and its unit is done again. So doing
    a unit twice must do no harm. The next unit is read only when a worker is free. Closing the
    iterator ends the workers.

    Args:
        units: Units of work; with more than one worker, units and results must be picklable.
        make_worker: Called once in each worker's process; it may take long.
        crew: The workers; `None` is this process.
        after_death: Called with a unit whose worker died, and the number of workers that died with
            it. Returns what to do instead: the unit itself to try it again, its parts to find
            the cause, or nothing to give it up. `None` tries each unit three times.
        on_ready: Called once, when the first worker is made, before it gets a unit.
        note: Called with a line if workers wait for CPUs or GPUs of a cluster.

    Raises:
        ValueError: This machine has too few GPUs.
        Exception: What `make_worker` or a worker raised.
        ChildProcessError: Workers die before they can start, or Ray itself fails.
    """
    crew = crew or Crew()
    if crew.is_here:
        return _here(units, make_worker, crew, on_ready)
    return _OnRay(units, make_worker, crew, after_death or _again, on_ready, note).run()


def _again(unit: Unit, deaths: int) -> Sequence[Unit]:
    return [unit] if deaths < TRIES else []


def _here(
    units: Iterable[Unit],
    make_worker: Callable[[], Worker[Unit, Result]],
    crew: Crew,
    on_ready: Callable[[], object],
) -> Generator[tuple[Unit, Result | Lost]]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(crew.threads or threads)
    try:
        worker = None
        for unit in units:
            # Loading a model takes long, and there may be nothing to do.
            if worker is None:
                worker = make_worker()
                on_ready()
            yield unit, worker(unit)
    finally:
        torch.set_num_threads(threads)


class _Station:
    """An actor. Its process may die at any time; then Ray starts another, without the worker."""

    def __init__(self, make_worker: bytes, threads: int) -> None:
        self.make_worker = make_worker
        self.threads = threads
        self.worker: Worker[Any, Any] | None = None

    def prepare(self) -> None:
        """Make the worker. Ray reports errors badly if this happens when the actor is made."""
        import torch

        torch.set_num_threads(self.threads)
        try:
            make_worker: Callable[[], Worker[Any, Any]] = pickle.loads(self.make_worker)
        except ImportError as error:
            raise ValueError(
                f"a worker cannot import what it needs ({error}): install the same packages on"
                " every node"
            ) from error
        self.worker = make_worker()

    def work(self, unit: Any) -> Any:
        """Do a unit of work."""
        if self.worker is None:
            self.prepare()
        assert self.worker is not None
        return self.worker(unit)


@dataclass
class _Piece(Generic[Unit]):
    """A unit, and how many workers died while they had it."""

    unit: Unit
    deaths: int = 0


class _OnRay(Generic[Unit, Result]):
    """One call of `distribute` on Ray. An actor does one unit at a time: a death has one cause."""

    def __init__(
        self,
        units: Iterable[Unit],
        make_worker: Callable[[], Worker[Unit, Result]],
        crew: Crew,
        after_death: AfterDeath[Unit],
        on_ready: Callable[[], object],
        note: Callable[[str], object],
    ) -> None:
        self.units = iter(units)
        self.make_worker = make_worker
        self.crew = crew
        self.after_death = after_death
        self.on_ready: Callable[[], object] | None = on_ready
        self.note = note
        self.patience: float | None = _PATIENCE_SECONDS
        self.waiting: deque[_Piece[Unit]] = deque()
        self.idle: list[Any] = []
        # Running calls: an actor with its piece, or with `None` while it makes its worker.
        self.running: dict[Any, tuple[Any, _Piece[Unit] | None]] = {}
        self._succeeded()

    def run(self) -> Generator[tuple[Unit, Result | Lost]]:
        """Yield what `distribute` yields."""
        from ray.exceptions import RayError

        try:
            yield from self._run()
        except RayError as error:
            cause = " ".join(str(error).split())[:200]
            raise ChildProcessError(f"Ray failed: {cause}") from error

    def _run(self) -> Generator[tuple[Unit, Result | Lost]]:
        import ray

        with _running_ray(self.crew) as is_own:
            actors = self._actors(is_own)
            try:
                for actor in actors:
                    self._prepare(actor)
                while self._assign() or any(piece for _, piece in self.running.values()):
                    found, _ = ray.wait(list(self.running), num_returns=1, timeout=self.patience)
                    if not found:
                        self.note(
                            f"no worker is ready after {self.patience:.0f} s: they load the model,"
                            " or wait for CPUs or GPUs that others use"
                        )
                    self.patience = None
                    for done in found:
                        yield from self._finished(done)
            finally:
                for actor in actors:
                    ray.kill(actor)

    def _actors(self, is_own: bool) -> list[Any]:
        import ray
        from ray import cloudpickle

        gpus = self.crew.gpus
        if gpus is None:
            # A worker's share must be on one GPU.
            available = int(ray.cluster_resources().get("GPU", 0))
            gpus = 1 / math.ceil(self.crew.workers / available) if available else 0.0
        threads = self.crew.threads or 1
        self._check_room(threads, gpus, is_own)
        kind: Any = ray.remote(
            num_cpus=threads, num_gpus=gpus, max_restarts=-1, max_task_retries=0
        )(_Station)
        make_worker = cloudpickle.dumps(self.make_worker)
        return [kind.remote(make_worker, threads) for _ in range(self.crew.workers)]

    def _check_room(self, threads: int, gpus: float, is_own: bool) -> None:
        """Say which workers would wait for ever, or until a cluster has more nodes."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(_room(node, threads, gpus) for node in nodes)
        if room >= self.crew.workers:
            return
        if is_own:  # there are CPUs for all
            raise ValueError(
                f"gpus={gpus:g} for each of {self.crew.workers} workers: this machine has GPUs for"
                f" {room} of them"
            )
        self.note(
            f"the cluster has room for {room} of {self.crew.workers} workers with {threads} CPUs"
            f" and {gpus:g} GPUs each: the others wait for more nodes"
        )

    def _prepare(self, actor: Any) -> None:
        self.running[actor.prepare.remote()] = (actor, None)

    def _assign(self) -> bool:
        """Give pieces to idle actors; return whether any is left."""
        while True:
            if not self.waiting:
                self.waiting.extend(_Piece(unit) for unit in itertools.islice(self.units, 1))
            if not self.waiting or not self.idle:
                return bool(self.waiting)
            actor, piece = self.idle.pop(), self.waiting.popleft()
            self.running[actor.work.remote(piece.unit)] = (actor, piece)

    def _finished(self, done: Any) -> Iterator[tuple[Unit, Result | Lost]]:
        import ray
        from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

        actor, piece = self.running.pop(done)
        try:
            result = cast("Result", ray.get(done))
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:  # the actor or its node is gone
            restarts = isinstance(error, ActorUnavailableError)
            if restarts:
                time.sleep(_RESTART_SECONDS)
            self._prepare(actor)
            # A busy machine is slow to restart an actor; that is not a death.
            if not (restarts and piece is None and time.monotonic() < self.patience_ends):
                yield from self._died(piece, error)
            return
        self._succeeded()
        if self.on_ready is not None:
            self.on_ready()
            self.on_ready = None
        self.idle.append(actor)
        if piece is not None:
            yield piece.unit, result

    def _succeeded(self) -> None:
        self.failed_preparations = 0
        self.patience_ends = time.monotonic() + _PATIENCE_SECONDS

    def _died(self, piece: _Piece[Unit] | None, error: Exception) -> Iterator[tuple[Unit, Lost]]:
        if piece is None:
            self.failed_preparations += 1
            if self.failed_preparations > TRIES * self.crew.workers:
                cause = " ".join(str(error).split())[:200]
                raise ChildProcessError(
                    f"workers die before they can start: is there enough memory? ({cause})"
                )
            return
        piece.deaths += 1
        instead = self.after_death(piece.unit, piece.deaths)
        for unit in reversed(instead):
            self.waiting.appendleft(piece if unit is piece.unit else _Piece(unit))
        if not instead:
            reason = f"its worker died {piece.deaths} times ({type(error).__name__})"
            yield piece.unit, Lost(reason)


def _room(node: Mapping[str, float], threads: int, gpus: float) -> int:
    """Number of workers that a node has room for."""
    cpus = int(node.get("CPU", 0) // threads)
    if not gpus:
        return cpus
    number = node.get("GPU", 0)
    # A GPU is not shared in part with another one.
    of_gpus = int(number // gpus) if gpus >= 1 else int(number) * int(1 / gpus + 1e-9)
    return min(cpus, of_gpus)


@contextmanager
def _running_ray(crew: Crew) -> Generator[bool]:
    """Run Ray while it is needed, unless it runs already; yield whether it is for this job only."""
    import ray

    if ray.is_initialized():
        yield False
        return
    check_reachable(crew.address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": crew.address or "local"}
    if crew.address is None:
        cpus = max(os.cpu_count() or 1, crew.workers * (crew.threads or 1))
        options |= {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"address={crew.address!r} cannot be used: {cause}") from error
    try:
        yield crew.address is None
    finally:
        ray.shutdown()


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
