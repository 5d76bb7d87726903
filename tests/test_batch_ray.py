"""Batch jobs on Ray, with workers and nodes that die."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from dying import die
from self_attention_guidance import builtin_model
from self_attention_guidance.batch import BatchJob, Defaults, Model, SampleJob, on_ray
from self_attention_guidance.batch.workers import Crew, distribute
from self_attention_guidance.generate import SampleSettings
from stand_in import StandIn
from test_batch_jobs import counts, job, listed, rows_of


@pytest.fixture(scope="module")
def cluster() -> Generator[Cluster]:
    """A head that computes nothing and two nodes of one core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        # Ray's own is 15: workers would wait for whatever else the machine does.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setattr(on_ray, "_RESTART_SECONDS", 0.2)
        yield from _running_cluster()


def _running_cluster() -> Generator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_two_workers_draw_what_one_draws(cluster: Cluster, tmp_path: Path) -> None:
    rows = [
        {"prompt": p, "steps": 3, "seed": n} for n, p in enumerate(["red heart", "", "cat"] * 3)
    ]
    source = listed(tmp_path / "a.jsonl", rows)
    model = Model(name="emoji")
    defaults = Defaults(settings=model.settings())
    for name, crew in {"one": Crew(threads=1), "two": Crew(workers=2)}.items():
        batch_size = 8 if name == "one" else 2
        out = str(tmp_path / name)
        BatchJob(source, out, model, defaults, batch_size=batch_size).run(crew)
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert len(one) == 9
    assert len({row["sha256"] for row in one}) == 9
    assert [row["sha256"] for row in one] == [row["sha256"] for row in two]


def test_samples_of_two_workers_are_those_of_one(cluster: Cluster, tmp_path: Path) -> None:
    settings = SampleSettings(num_inference_steps=3)
    for name, crew in {"one": Crew(threads=1), "two": Crew(workers=2)}.items():
        sampled = SampleJob(builtin_model("emoji-adm"), tmp_path / f"{name}.npz", 7, settings)
        sampled.run(2, crew=crew, load=functools.partial(builtin_model, "emoji-adm"))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_dead_workers_cost_only_the_row_that_always_kills(cluster: Cluster, tmp_path: Path) -> None:
    once = f"die once {tmp_path / 'mark'}"
    prompts = ["a", "b", "kill", "c", *map(str, range(20)), once, *map(str, range(10))]
    source = listed(tmp_path / "a.jsonl", prompts)
    crew = Crew(workers=2, address="auto")
    assert counts(job(source, tmp_path / "out").run(crew)) == (35, 34, 1, 34)
    rows = rows_of(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(35))
    (failed,) = (row for row in rows if row["error"] is not None)
    assert failed["row"] == 2
    assert failed["error"].startswith("its worker died 3 times")


def test_a_node_may_go_while_it_works(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    seen = threading.Event()

    def remove_the_node() -> None:
        seen.wait(60)
        cluster.remove_node(node, allow_graceful=False)

    remover = threading.Thread(target=remove_the_node)
    remover.start()
    drawn = job(60, tmp_path / "out", StandIn(seconds=0.05)).run(
        Crew(workers=3), lambda summary: seen.set() if summary.drawn >= 8 else None
    )
    remover.join()
    assert counts(drawn) == (60, 60, 0, 60)
    assert [row["row"] for row in rows_of(tmp_path / "out")] == list(range(60))


def test_errors_of_the_model_and_of_the_disk_come_back_as_they_are(
    cluster: Cluster, tmp_path: Path
) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "ADMPipeline"}')
    model = Model(name=str(broken))
    with pytest.raises(ValueError, match=r"model=.* cannot be loaded"):
        BatchJob(1, str(tmp_path / "out"), model, Defaults(settings=model.settings())).run(
            Crew(workers=2)
        )

    def make_worker() -> Any:
        def work(unit: int) -> int:
            raise OSError(28, "No space left on device")

        return work

    with pytest.raises(OSError, match="No space left"):
        list(distribute(range(4), make_worker, Crew(workers=2)))


def test_units_are_asked_for_when_someone_can_take_them(cluster: Cluster) -> None:
    asked = 0

    def units() -> Generator[int]:
        nonlocal asked
        while True:
            asked += 1
            yield asked

    def make_worker() -> Any:
        return lambda unit: unit * 2

    ready: list[int] = []
    results = distribute(
        units(), make_worker, Crew(workers=2), on_ready=lambda: ready.append(asked)
    )
    for _ in range(10):
        unit, result = next(results)
        assert result == unit * 2
        assert asked < 20
    results.close()
    assert ready == [1]
    time.sleep(0.1)


def test_workers_have_their_number_of_threads_and_torch_only_for_networks(cluster: Cluster) -> None:
    def make_idle() -> Any:
        return lambda unit: "torch" in sys.modules

    def make_drawing() -> Any:
        import torch

        torch.set_num_threads(3)
        return lambda unit: torch.get_num_threads()

    crew = Crew(workers=1, address="auto")
    assert list(distribute(range(1), make_idle, crew)) == [(0, False)]
    assert list(distribute(range(1), make_drawing, crew)) == [(0, 1)]


def test_workers_that_die_before_they_can_start_end_the_work(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_PATIENCE_SECONDS", 1.0)
    with pytest.raises(ChildProcessError, match="workers die before they can start"):
        list(distribute(range(4), die, Crew(workers=1, address="auto")))


@pytest.mark.parametrize(
    ("asked", "room"),
    [({"threads": 2}, "0 of 2 workers with 2 CPUs and 0 GPUs"), ({"gpus": 1.0}, "0 of 2 workers")],
)
def test_workers_that_no_node_has_room_for_are_named(
    cluster: Cluster, asked: dict[str, Any], room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_PATIENCE_SECONDS", 1.0)
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        if line.startswith("no worker is ready after 1 s"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(distribute(range(4), die, Crew(workers=2, **asked), note=note))
    assert lines[0].startswith(f"the cluster has room for {room}")


@pytest.mark.parametrize(
    ("node", "threads", "gpus", "room"),
    [
        ({"CPU": 4.0}, 1, 0.0, 4),
        ({"CPU": 4.0}, 3, 0.0, 1),
        ({"CPU": 4.0}, 5, 0.0, 0),
        ({"CPU": 4.0}, 1, 0.5, 0),
        ({"CPU": 9.0, "GPU": 2.0}, 1, 1.0, 2),
        ({"CPU": 9.0, "GPU": 2.0}, 1, 2.0, 1),
        ({"CPU": 9.0, "GPU": 2.0}, 1, 0.5, 4),
        ({"CPU": 9.0, "GPU": 2.0}, 1, 0.6, 2),
        ({"CPU": 99.0, "GPU": 1.0}, 1, 1 / 93, 93),
        ({}, 1, 0.0, 0),
    ],
)
def test_the_room_of_a_node(node: dict[str, float], threads: int, gpus: float, room: int) -> None:
    assert on_ray._room(node, threads, gpus) == room


def test_a_cluster_that_is_not_there_is_one_line_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from self_attention_guidance.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "assert not {'torch', 'ray', 'diffusers'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    asked = ["batch", "--num-samples", "1", "--address", "127.0.0.1:1", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --address=")


def test_more_gpus_than_this_machine_has_are_refused(tmp_path: Path) -> None:
    code = "import sys; from self_attention_guidance.cli import main; sys.exit(main(sys.argv[1:]))"
    asked = ["batch", "--num-samples", "1", "--workers", "2", "--gpus", "64", "--out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *asked, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    line = "error: --gpus=64 for each of 2 workers: this machine has GPUs for 0 of them"
    assert done.stderr.strip().splitlines()[-1] == line
