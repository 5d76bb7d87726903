"""Distribution of work to actors on Ray, which may die. `workers.distribute` says how."""

from __future__ import annotations

import itertools
import logging
import math
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, cast

from .crew import TRIES, AfterDeath, Crew, Lost, Result, Unit, Worker, check_reachable

_RESTART_SECONDS = 2.0
_PATIENCE_SECONDS = 120.0


class _Station:
    """An actor. Its process may die at any time; then Ray starts another, without the worker."""

    def __init__(self, make_worker: bytes, threads: int) -> None:
        self.make_worker = make_worker
        self.threads = threads
        self.worker: Worker[Any, Any] | None = None

    def prepare(self) -> None:
        """Make the worker. Ray reports errors badly if this happens when the actor is made."""
        try:
            make_worker: Callable[[], Worker[Any, Any]] = pickle.loads(self.make_worker)
        except ImportError as error:
            raise ValueError(
                f"a worker cannot import what it needs ({error}): install the same packages on"
                " every node"
            ) from error
        self.worker = make_worker()
        # A worker without networks starts sooner without torch.
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self.threads)

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


class RayJob(Generic[Unit, Result]):
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
        """Arguments as in `distribute`."""
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
