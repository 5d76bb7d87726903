"""Lists, tasks, storage and manifest of batch jobs."""

from __future__ import annotations

import csv
import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from caching_store import register_caching_store
from self_attention_guidance.batch import Manifest, PromptList, Storage, Task
from self_attention_guidance.batch import storage as storage_module
from self_attention_guidance.batch.tasks import bad_row, tasks_of, unconditional_tasks
from self_attention_guidance.generate import GenerationSettings
from stand_in import DEFAULTS

register_caching_store()

ROWS = [
    {"prompt": "red heart", "seed": 3, "width": 64, "guidance_scale": 2.5},
    {"prompt": "", "seed": 4, "width": None, "guidance_scale": None},
    {
        "prompt": 'a "quoted", line\nof 中文 and 🙂',
        "seed": None,
        "width": 64,
        "guidance_scale": 1.0,
    },
]


def written(path: Path, rows: list[dict[str, Any]] = ROWS) -> PromptList:
    """A list in the form that its name tells."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return PromptList(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_all_forms_of_lists_hold_the_same(tmp_path: Path, name: str) -> None:
    found = written(tmp_path / name)
    wanted = [tasks_of(number, row, DEFAULTS) for number, row in enumerate(ROWS)]
    for _ in range(2):  # it can be read again
        assert [tasks_of(number, row, DEFAULTS) for number, row in enumerate(found)] == wanted


@pytest.mark.parametrize(
    ("kind", "value", "is_exact"),
    [
        (pa.float16(), 2047, True),
        (pa.float16(), 2049, False),
        (pa.float32(), 2**24 - 1, True),
        (pa.float32(), 2**24 + 1, False),
        (pa.float64(), 2**53 - 1, True),
        (pa.float64(), 2**53 + 1, False),
        (pa.int64(), 2**53 + 1, True),
    ],
)
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_a_seed_that_its_column_could_not_hold_is_refused(
    tmp_path: Path, kind: pa.DataType, value: int, is_exact: bool, is_dictionary: bool
) -> None:
    number = value if kind == pa.int64() else np.dtype(kind.to_pandas_dtype()).type(value)
    column = pa.array([number, None, number], kind)
    if is_dictionary and kind != pa.float16():  # pyarrow has no dictionaries of these
        column = column.dictionary_encode()
    table = pa.table({"prompt": ["a", "b", "c"], "seed": column, "guidance_scale": [1.5, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, empty, _ = PromptList(str(tmp_path / "a.parquet"))
    assert tasks_of(1, empty, DEFAULTS)[0].seed == DEFAULTS.seed
    if is_exact:
        assert tasks_of(0, first, DEFAULTS)[0].seed == value
    else:
        with pytest.raises(ValueError, match=r"^seed=\d+ may not be the number that was written"):
            tasks_of(0, first, DEFAULTS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_a_list_that_is_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    written(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 8])
    with pytest.raises(ValueError, match=r"prompts='.*a\.\w+.*' ") as error:
        list(PromptList(str(path)))
    assert "\n" not in str(error.value)


def test_an_unreadable_row_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    unreadable = [b"oops", b"[1]", b"", b"\xff", b"[" * 100_000]  # the empty line is no row
    path.write_bytes(b"\n".join([b'{"prompt": "1"}', *unreadable, b'{"prompt": "2"}\n']))
    first, *bad, last = PromptList(str(path))
    assert (first, last) == ({"prompt": "1"}, {"prompt": "2"})
    assert len(bad) == 4
    assert all(isinstance(row, ValueError) for row in bad)
    path = tmp_path / "a.csv"
    path.write_text("prompt,seed\n1,1\n2\n3,3,3\n4,4\n")
    kinds = [isinstance(row, ValueError) for row in PromptList(str(path))]
    assert kinds == [False, True, True, False]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.jsonl", '{"prompt": "1\u20282"}\n\ufeff{"prompt": "2\\u0000"}\n', ["1\u20282", "2\0"]),
        ("a.csv", "\ufeffprompt\r\n1\u20282\r\n\ufeff2\x0b\x85\r\n", ["1\u20282", "2\x0b\x85"]),
        ("a.csv", "prompt\n1\n\n2\n", ["1", "2"]),
    ],
)
def test_rows_end_where_their_lines_end(
    tmp_path: Path, name: str, content: str, prompts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    rows = [row for row in PromptList(str(tmp_path / name)) if not isinstance(row, ValueError)]
    assert [row["prompt"] for row in rows] == prompts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "seed": 1, "seed": 2}', "line 2 has several columns seed"),
        ('{"prompt": "a", "id": {"b": 1, "b": 2}}', "line 2 has several columns b"),
        ("[1]", "line 2 must be a JSON object"),
        ("null", "line 2 must be a JSON object"),
        ("oops", "line 2 is not JSON"),
    ],
)
def test_lines_that_are_no_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "1"}}\n{line}\n{{"prompt": "2", "stpes": 3}}\n')
    found = PromptList(str(path))
    _, bad, last = found
    assert message in str(bad)
    assert last == {"prompt": "2", "stpes": 3}
    assert list(found.columns) == ["prompt", "stpes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "must end in .jsonl, .csv or .parquet"),
        ("a.csv", "text\nred heart\n", "has no column prompt"),
        ("a.csv", "prompt,seed,seed\na,1,2\n", "has several columns seed"),
        ("a.csv", 'prompt\n"red', "cannot be read"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.jsonl.gz", "no gzip", "cannot be read"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(PromptList(str(tmp_path / name)))
    with pytest.raises(ValueError, match=r"there is none|must end in"):
        PromptList(str(tmp_path / "missing" / name))


def test_lists_can_be_in_an_object_store() -> None:
    with fsspec.open("memory://lists/a.jsonl", "wt") as file:
        file.write('{"prompt": "1"}\n')
    assert list(PromptList("memory://lists/a.jsonl")) == [{"prompt": "1"}]


def test_cells_decide_and_defaults_fill_up() -> None:
    row = {
        "prompt": "cat",
        "seed": "7",
        "num_images": 2.0,
        "steps": "9",
        "sag_scale": "-1.5",
        "id": 5,
    }
    first, second = tasks_of(3, row, DEFAULTS)
    assert (first.seed, second.seed, second.image, first.row) == (7, 8, 1, 3)
    assert (first.settings.num_inference_steps, first.settings.sag_scale) == (9, -1.5)
    assert first.id == "5"
    (plain,) = tasks_of(4, {"prompt": "", "negative_prompt": "", "steps": None}, DEFAULTS)
    assert (plain.settings, plain.seed, plain.id) == (DEFAULTS.settings, 0, "4")
    assert [task.seed for task in unconditional_tasks(3, DEFAULTS)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "seed": 1.5}, "seed"),
        ({"prompt": "a", "seed": True}, "seed"),
        ({"prompt": "a", "seed": "1e3"}, "seed='1e3' must be a whole number"),
        ({"prompt": "a", "seed": "1_0"}, "seed='1_0' must be a whole number"),
        ({"prompt": "a", "guidance_scale": True}, "guidance_scale"),
        ({"prompt": "a", "guidance_scale": "inf"}, "guidance_scale=inf must be a finite number"),
        ({"prompt": "a", "seed": "9" * 5000}, "seed"),
        ({"prompt": "a", "width": 12}, "width"),
        ({"prompt": "a", "width": 4096}, "max-size"),
        ({"prompt": "a", "steps": 10**9}, "max-steps"),
        ({"prompt": "a", "steps": 0}, "steps=0 must"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "a", "guidance_scale": 10**400}, "guidance_scale"),
        ({"prompt": "a", "sag_scale": "much"}, "sag_scale"),
        ({"prompt": "a", "num_images": 10**9}, "num_images"),
        ({"prompt": "a", "negative_prompt": ["b"]}, "negative_prompt"),
    ],
)
def test_cells_out_of_range_are_refused_in_a_line(cells: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tasks_of(0, cells, DEFAULTS)
    bad = bad_row(0, cells, error.value)
    assert message in bad.error
    assert "\n" not in bad.error
    (bad.error + bad.prompt + bad.id).encode()


def test_digests_tell_tasks_apart_but_not_their_places() -> None:
    (one,) = tasks_of(0, {"prompt": "cat", "seed": 1}, DEFAULTS)
    (same,) = tasks_of(9, {"prompt": "cat", "seed": 1, "id": "x"}, DEFAULTS)
    assert one.digest == same.digest
    others = [{"seed": 2}, {"prompt": "Cat"}, {"steps": 6}, {"sag_scale": 0}, {"width": 64}]
    digests = {
        tasks_of(0, {"prompt": "cat", "seed": 1} | other, DEFAULTS)[0].digest for other in others
    }
    assert len(digests | {one.digest}) == len(others) + 1


def test_a_number_has_one_digest_however_it_is_written() -> None:
    digests = set[int]()
    for scale in (3, 3.0):
        settings = GenerationSettings(guidance_scale=scale, sag_scale=scale)
        digests |= {Task(0, 0, "0", "", 0, settings).digest}
    assert len(digests) == 1


@pytest.fixture(params=["local", "memory", "caching"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "out"))
    fsspec.filesystem("memory").store.clear()
    return Storage(f"{request.param}://out")


def test_a_file_appears_whole_or_not_at_all(storage: Storage) -> None:
    storage.write("a/b.txt", b"old")
    with pytest.raises(KeyError), storage.writing("a/b.txt") as file:
        file.write(b"half of the new")
        raise KeyError
    with pytest.raises(KeyError), storage.writing("a/c.txt"):
        raise KeyError
    assert storage.names("a") == ["a/b.txt"]
    assert storage.read("a/b.txt") == b"old"
    with storage.writing("a/b.txt") as file:
        file.write(b"new")
    assert storage.read("a/b.txt") == b"new"
    storage.remove("a", "not there")
    assert storage.names("a") == []
    assert storage.read("a/b.txt") is None


def test_a_folder_is_for_one_run_at_a_time(storage: Storage) -> None:
    other = Storage(storage.url)
    with storage.locked(), pytest.raises(ValueError, match="in use by another run"):
        other.locked().__enter__()
    with other.locked():
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A folder in an object store, where locks last less than half a second."""
    monkeypatch.setattr(storage_module, "_LOCK_SECONDS", 0.4)
    fsspec.filesystem("memory").store.clear()
    return Storage("memory://out")


def test_a_long_picture_keeps_its_lock(store: Storage) -> None:
    with store.locked():
        time.sleep(1)
        with pytest.raises(ValueError, match="in use by another run"):
            Storage(store.url).locked().__enter__()


def test_a_network_that_fails_for_a_while_costs_no_lock(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError

    with store.locked():
        with monkeypatch.context() as patch:
            patch.setattr(type(store._files), "_open", fail)
            time.sleep(0.25)
        time.sleep(0.5)
        with pytest.raises(ValueError, match="in use by another run"):
            Storage(store.url).locked().__enter__()


def test_a_run_that_lost_its_lock_writes_nothing_and_leaves_the_other_s(store: Storage) -> None:
    with store.locked():
        store.write("a", b"mine")
        store.write(".lock", b'{"time": 0, "owner": "another"}')
        time.sleep(0.3)
        with pytest.raises(OSError, match="another run took the folder over"):
            store.write("a", b"too late")
    assert (store.read("a"), json.loads(store.read(".lock") or b"")["owner"]) == (
        b"mine",
        "another",
    )


def test_of_runs_that_begin_together_one_has_the_lock(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the second run had looked just before the first one wrote its lock."""
    with store.locked(), monkeypatch.context() as patch:
        patch.setattr(Storage, "read", lambda *_: None)
        with pytest.raises(ValueError, match="in use by another run"):
            Storage(store.url).locked().__enter__()


@pytest.mark.parametrize("error", [-3600, 3600])
def test_a_run_whose_clock_is_wrong_keeps_its_lock(store: Storage, error: float) -> None:
    ended = Event()

    def renew() -> None:
        while not ended.wait(0.05):
            lock = {"time": time.time() + error, "owner": "another"}
            Storage(store.url).write(".lock", json.dumps(lock).encode())

    with ThreadPoolExecutor(1) as other:
        other.submit(renew)
        time.sleep(0.1)
        try:
            with pytest.raises(ValueError, match="in use by another run"):
                store.locked().__enter__()
        finally:
            ended.set()


def test_a_run_that_is_dead_holds_no_lock(store: Storage) -> None:
    """In an object store; here the system frees the lock."""
    for lock in (b'{"time": 0}', b'{"time": 1e11}', b'{"ti', b"[]", b""):
        store.write(".lock", lock)
        with store.locked():
            pass


def row(number: int, error: str | None = None) -> dict[str, Any]:
    return {"row": number, "image": 0, "digest": number + 100, "error": error}


def test_a_manifest_without_the_newest_column_is_read_and_continued(storage: Storage) -> None:
    manifest = Manifest(storage)
    manifest.add([{"row": 0, "image": 0, "digest": 5, "file": "a"}])
    (name,) = storage.names("manifest.parts")
    with storage.open(name) as file:
        table = parquet.read_table(file)
    with storage.writing(name) as file:
        parquet.write_table(table.drop_columns(["weakened_predictions"]), file)
    manifest.add([{"row": 1, "image": 0, "digest": 6, "file": "b", "weakened_predictions": 3}])
    assert manifest.finished() == {(0, 0): (5, False), (1, 0): (6, False)}
    manifest.join()
    assert [row["weakened_predictions"] for row in manifest.rows()] == [None, 3]


def test_the_manifest_holds_each_picture_once_and_its_newest_row(storage: Storage) -> None:
    manifest = Manifest(storage)
    manifest.add([row(0), row(1, "failed")])
    manifest.add([row(2)])
    manifest.join()
    manifest.add([row(1), row(3)])
    copy = {name: storage.read(name) for name in storage.names("manifest.parts")}
    for _ in range(2):
        manifest.join()
        rows = sorted(manifest.rows(), key=lambda r: r["row"])
        assert [(r["row"], r["error"]) for r in rows] == [
            (0, None),
            (1, None),
            (2, None),
            (3, None),
        ]
        assert storage.names("manifest.parts") == []
        # As if it had been killed before the parts were deleted.
        for name, content in copy.items():
            storage.write(name, content or b"")
    found = manifest.finished()
    assert found == {(number, 0): (number + 100, False) for number in range(4)}


@pytest.mark.parametrize("deletions", range(4))
def test_a_kill_while_parts_are_deleted_brings_no_older_row_back(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    manifest = Manifest(storage)
    for error in ("first", "second", None):
        manifest.add([row(0, error)])
    left, delete = [deletions], type(storage._files).rm

    def rm(self: Any, path: str, **options: Any) -> None:
        """Of a folder's files, the newest may be the first that is deleted."""
        is_folder = path.endswith("manifest.parts")
        if not left[0] or is_folder:
            if is_folder and storage.names("manifest.parts"):
                delete(self, f"{path}/00000003.parquet")
            raise KeyboardInterrupt
        left[0] -= 1
        delete(self, path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(storage._files), "rm", rm)
        manifest.join()
    assert Manifest(storage).finished() == {(0, 0): (100, False)}


def test_parts_that_a_listing_does_not_show_yet_are_joined(storage: Storage) -> None:
    manifest = Manifest(storage)
    manifest.add([row(0)])
    other = Manifest(Storage(storage.url))
    assert len(other.finished()) == 1
    other.add([row(1)])
    other.add([row(2)])
    other.join()
    assert [r["row"] for r in Manifest(storage).rows()] == [0, 1, 2]


def test_a_new_run_adds_parts_and_replaces_none(storage: Storage) -> None:
    Manifest(storage).add([row(0)])
    Manifest(storage).add([row(1)])
    assert len(Manifest(storage).finished()) == 2
    storage.write("manifest.parquet", b"PAR1 damaged PAR1")
    with pytest.raises(ValueError, match=r"manifest\.parquet' is damaged .* delete it"):
        Manifest(storage).finished()
