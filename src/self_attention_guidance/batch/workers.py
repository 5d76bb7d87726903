"""Distribution of work to this process, or to actors on Ray, which may die.

Example:
    ```python
    from self_attention_guidance.batch.workers import Crew, distribute

    for unit, result in distribute(range(100), make_worker, Crew(workers=4)):
        ...
    ```
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

from .crew import TRIES, AfterDeath, Crew, Lost, Result, Unit, Worker
from .on_ray import RayJob


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
    return RayJob(units, make_worker, crew, after_death or _again, on_ready, note).run()


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
