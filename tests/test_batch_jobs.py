"""Batch jobs with an artist that costs nothing: what is kept, what is lost, what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from self_attention_guidance.batch import (
    BatchJob,
    Defaults,
    Manifest,
    PromptList,
    Storage,
    Summary,
    Task,
)
from self_attention_guidance.generate import GenerationSettings
from stand_in import DEFAULTS, StandIn, picture


def listed(path: Path, rows: Sequence[dict[str, Any] | str]) -> PromptList:
    lines = (json.dumps({"prompt": row} if isinstance(row, str) else row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return PromptList(str(path))


def job(
    source: PromptList | int, out: Path | str, artist: StandIn | None = None, **given: Any
) -> BatchJob:
    return BatchJob(source, str(out), artist or StandIn(), DEFAULTS, **given)


def rows_of(out: Path | str) -> list[dict[str, Any]]:
    rows = Manifest(Storage(str(out))).rows()
    return sorted(rows, key=lambda row: (row["row"], row["image"]))


def counts(summary: Summary) -> tuple[int, int, int, int]:
    return summary.total, summary.done, summary.failed, summary.drawn


def test_each_row_becomes_pictures_and_a_line_in_the_manifest(tmp_path: Path) -> None:
    source = listed(
        tmp_path / "a.jsonl", ["cat", {"prompt": "", "num_images": 2, "seed": 5, "id": "x"}]
    )
    assert counts(job(source, tmp_path / "out").run()) == (3, 3, 0, 3)
    rows = rows_of(tmp_path / "out")
    assert [(r["row"], r["image"], r["id"], r["seed"]) for r in rows] == [
        (0, 0, "0", 0),
        (1, 0, "x", 5),
        (1, 1, "x", 6),
    ]
    for r in rows:
        with Image.open(tmp_path / "out" / r["file"]) as image:
            assert image.tobytes() == picture(r["seed"]).tobytes()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"images", "manifest.parquet", "job.json", ".lock"}


def test_a_bad_row_costs_only_itself(tmp_path: Path) -> None:
    rows: list[dict[str, Any] | str] = ["a", "fail", {"prompt": "b", "seed": -1}, "huge", "c"]
    for together in (1, 2, 5):
        out = tmp_path / str(together)
        source = listed(tmp_path / "a.jsonl", rows)
        assert counts(job(source, out, together=together).run()) == (5, 2, 3, 2)
        errors = [r["error"] for r in rows_of(out)]
        assert errors[0] is None
        assert errors[1] == "the sample is not finite"
        assert "seed=-1" in errors[2]
        assert errors[3] == "out of memory"
        assert errors[4] is None


HALF = "\ud83d"


@pytest.mark.parametrize("name", ["id", "prompt", "negative_prompt", "image", "mask", "seed"])
def test_half_a_surrogate_pair_costs_only_its_row(tmp_path: Path, name: str) -> None:
    source = listed(tmp_path / "a.jsonl", ["a", {"prompt": "b", name: HALF}, "c"])
    for drawn in (2, 0):
        assert counts(job(source, tmp_path / "out").run()) == (3, 2, 1, drawn)
    (error,) = filter(None, (row["error"] for row in rows_of(tmp_path / "out")))
    assert error.startswith(name)


def test_a_start_picture_whose_name_is_no_text_is_recorded(tmp_path: Path) -> None:
    start = tmp_path / "a\udcff.png"
    Image.new("RGB", (8, 8)).save(start)
    settings = GenerationSettings(num_inference_steps=5, image=str(start))
    source = listed(tmp_path / "a.jsonl", ["a", "b"])
    for drawn in (2, 0):
        again = BatchJob(source, str(tmp_path / "out"), StandIn(), Defaults(settings=settings))
        assert counts(again.run()) == (2, 2, 0, drawn)
    assert rows_of(tmp_path / "out")[0]["start_image"] == str(tmp_path / "a?.png")


def test_a_seed_that_a_float_can_not_hold_is_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "seed": seed} for seed in (float(2**60 + 1), float(2**40), 2**60 + 1)]
    job(listed(tmp_path / "a.jsonl", rows), tmp_path / "out").run()
    lost, exact, whole = rows_of(tmp_path / "out")
    assert "may not be the number" in lost["error"]
    assert (exact["seed"], exact["error"]) == (2**40, None)
    assert (whole["seed"], whole["error"]) == (2**60 + 1, None)


def test_what_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    artist = StandIn()
    first = listed(tmp_path / "a.jsonl", ["a", "b", "fail"])
    job(first, tmp_path / "out", artist).run()
    longer = listed(tmp_path / "a.jsonl", ["a", "b", "fail", "c"])
    assert counts(job(longer, tmp_path / "out", artist).run()) == (4, 3, 1, 1)
    assert len(artist.sizes) == 4
    assert counts(job(longer, tmp_path / "out", artist).run()) == (4, 3, 1, 0)
    assert len(artist.sizes) == 4


def test_what_failed_is_tried_again_if_wished_or_mended(tmp_path: Path) -> None:
    artist = StandIn(most=0)
    source = listed(tmp_path / "a.jsonl", ["a", "fail"])
    assert counts(job(source, tmp_path / "out", artist).run()) == (2, 0, 2, 0)
    artist.most = 1
    assert counts(job(source, tmp_path / "out", artist).run()) == (2, 0, 2, 0)
    again = job(source, tmp_path / "out", artist, retry_failed=True)
    assert counts(again.run()) == (2, 1, 1, 1)
    mended = listed(tmp_path / "a.jsonl", ["a", "mended"])
    assert counts(job(mended, tmp_path / "out", artist).run()) == (2, 2, 0, 1)
    assert [r["error"] for r in rows_of(tmp_path / "out")] == [None, None]


def test_a_start_picture_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    start = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(start)
    source = listed(tmp_path / "a.jsonl", ["a", {"prompt": "b", "image": str(start)}])
    job(source, tmp_path / "out").run()
    assert counts(job(source, tmp_path / "out").run()) == (2, 2, 0, 0)
    Image.new("RGB", (8, 8), "red").save(start)
    with pytest.raises(
        ValueError, match=r"row 1 .* drawn with another content of its image or mask"
    ):
        job(source, tmp_path / "out").run()


def test_a_start_picture_that_vanishes_costs_only_its_row(tmp_path: Path) -> None:
    start = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(start)

    class Vanishing(StandIn):
        def draw(self, tasks: Sequence[Task]) -> Any:
            start.unlink(missing_ok=True)
            if tasks[0].prompt == "b":
                raise ValueError(f"image={str(start)!r} does not exist")
            return super().draw(tasks)

    source = listed(tmp_path / "a.jsonl", ["a", {"prompt": "b", "image": str(start)}, "c"])
    assert counts(job(source, tmp_path / "out", Vanishing()).run()) == (3, 2, 1, 2)
    assert [r["error"] is None for r in rows_of(tmp_path / "out")] == [True, False, True]


def test_a_list_opens_its_default_start_picture_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, opened, image_open = tmp_path / "a.png", [0], Image.open
    Image.new("RGB", (8, 8)).save(start)

    def count(*arguments: Any, **options: Any) -> Any:
        opened[0] += 1
        return image_open(*arguments, **options)

    monkeypatch.setattr(Image, "open", count)
    settings = GenerationSettings(num_inference_steps=5, image=str(start))
    source = listed(tmp_path / "a.jsonl", ["a"] * 5)
    BatchJob(source, str(tmp_path / "out"), StandIn(), Defaults(settings=settings)).run()
    assert opened == [1]


def test_pictures_of_other_rows_or_models_are_not_mixed(tmp_path: Path) -> None:
    job(listed(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "out").run()
    before = rows_of(tmp_path / "out")
    start = str(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(start)
    for other, message in (
        ("other", "prompt='b', not 'other'"),
        ({"prompt": "b", "steps": 6}, "steps=5, not 6"),
        (
            {"prompt": "b", "seed": 2, "guidance_scale": 2},
            r"seed=0, not 2; guidance_scale=7\.5, no",
        ),
        ({"prompt": "b", "sag_scale": 2}, r"sag_scale=0\.0, not 2\.0"),
        ({"prompt": "b", "image": start}, "start_image=None, not '.*a.png'"),
        ({"prompt": "b", "image": start, "strength": 0.5}, r"start_.*; strength=None, not 0\.5"),
        ({"prompt": "b", "image": "no.png"}, "other cells, and image='no.png' does not exist"),
        ({"prompt": "b", "seed": -1}, "other cells, and seed=-1 must be"),
    ):
        with pytest.raises(ValueError, match=rf"row 1 \(from 0\) was drawn with {message}"):
            job(listed(tmp_path / "b.jsonl", ["a", other]), tmp_path / "out").run()
    scaled = Defaults(settings=GenerationSettings(num_inference_steps=5, sag_scale=2))
    with pytest.raises(
        ValueError, match=r"sag_scale=0\.0, not 2: go on with the same list and options"
    ):
        BatchJob(
            PromptList(str(tmp_path / "a.jsonl")), str(tmp_path / "out"), StandIn(), scaled
        ).run()
    longer = listed(tmp_path / "a.jsonl", ["a", "b", "c"])
    for other in (
        job(longer, tmp_path / "out", StandIn(name="other")),
        job(longer, tmp_path / "out", together=2),
        job(longer, tmp_path / "out", shard_size=2),
    ):
        with pytest.raises(ValueError, match="go on with the same"):
            other.run()
    assert rows_of(tmp_path / "out") == before
    anew = job(longer, tmp_path / "out", StandIn(name="other"), overwrite=True)
    assert counts(anew.run()) == (3, 3, 0, 3)
    assert {r["model"] for r in rows_of(tmp_path / "out")} == {"other"}


class Unloadable(StandIn):
    def __call__(self) -> StandIn:
        raise ValueError("it cannot be loaded")


@pytest.mark.parametrize(
    ("rows", "artist"),
    [
        ('{"prompt": "a"}\n{"prom', StandIn()),
        ("", StandIn()),
        ('{"prompt": "a"}\n{"prompt": "b", "seed": -1}\n', Unloadable()),
    ],
)
def test_an_earlier_run_is_kept_until_another_can_begin(
    tmp_path: Path, rows: str, artist: StandIn
) -> None:
    out = tmp_path / "out"
    job(2, out).run()
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    source = listed(tmp_path / "a.jsonl", [])
    Path(source.path).write_text(rows)
    with pytest.raises(ValueError, match=r"in the middle|at least one row|cannot be loaded"):
        job(source, out, artist, overwrite=True).run()
    assert {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("prompts", [["b"], [{"prompt": "b", "seed": -1}]])
@pytest.mark.parametrize("deletions", range(4))
def test_a_kill_while_an_earlier_run_is_deleted_leaves_none_of_it_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deletions: int, prompts: list[Any]
) -> None:
    out = tmp_path / "out"
    job(listed(tmp_path / "a.jsonl", ["a"] * 3), out).run()
    Manifest(Storage(str(out))).add(rows_of(out))
    left, delete = [deletions], Storage.remove

    def remove(self: Storage, *names: str) -> None:
        for name in names:
            if not left[0] and name != ".unfinished":
                raise KeyboardInterrupt
            left[0] -= name != ".unfinished"
            delete(self, name)

    source = listed(tmp_path / "a.jsonl", prompts)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Storage, "remove", remove)
        job(source, out, overwrite=True).run()
    job(source, out, overwrite=True).run()
    assert len(rows_of(out)) == 1
    assert len(list(out.rglob("*.png"))) == (prompts == ["b"])


def test_what_began_with_overwrite_goes_on_without(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images").touch()  # so that no picture can be written
    with pytest.raises(OSError, match="the same command without overwrite=True resumes"):
        job(2, tmp_path / "out", overwrite=True).run()


def test_batches_always_have_their_size(tmp_path: Path) -> None:
    artist = StandIn()
    rows = [{"prompt": "a", "seed": n, "steps": 5 + n % 2} for n in range(5)]
    assert (
        job(listed(tmp_path / "a.jsonl", rows), tmp_path / "out", artist, together=3).run().done
        == 5
    )
    assert set(artist.sizes) == {3}
    for r in rows_of(tmp_path / "out"):
        with Image.open(tmp_path / "out" / r["file"]) as image:
            assert image.tobytes() == picture(r["seed"]).tobytes()


def test_without_room_the_batch_is_halved(tmp_path: Path) -> None:
    artist = StandIn(most=2)
    assert counts(job(10, tmp_path / "out", artist, together=8).run()) == (10, 10, 0, 10)
    assert artist.sizes == [8, 4, 2, 2, 2, 2, 2]
    assert {r["together"] for r in rows_of(tmp_path / "out")} == {2}


def test_shards_are_tar_files_as_webdataset_reads_them(tmp_path: Path) -> None:
    source = listed(tmp_path / "a.jsonl", ["a", "b", "fail", "c", "d"])
    job(source, tmp_path / "out", shard_size=2).run()
    job(source, tmp_path / "again", shard_size=2).run()
    shards = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert shards == ["000000.tar", "000001.tar", "000002.tar"]
    rows = [r for r in rows_of(tmp_path / "out") if r["error"] is None]
    for r in rows:
        with tarfile.open(tmp_path / "out" / r["file"]) as archive:
            members = archive.getnames()
            place = members.index(r["member"])
            assert members[place + 1] == r["member"].replace(".png", ".json")
            content = archive.extractfile(r["member"])
            assert content is not None
            with Image.open(io.BytesIO(content.read())) as image:
                assert image.tobytes() == picture(r["seed"]).tobytes()
    for name in shards:
        one, two = ((tmp_path / out / "images" / name).read_bytes() for out in ("out", "again"))
        assert one == two
    # A picture that failed gets a shard of its own, and none is replaced.
    mended = listed(tmp_path / "a.jsonl", ["a", "b", "mended", "c", "d", "e"])
    assert counts(job(mended, tmp_path / "out", shard_size=2).run()) == (6, 6, 0, 2)
    members = []
    for path in (tmp_path / "out" / "images").iterdir():
        with tarfile.open(path) as archive:
            members += [name for name in archive.getnames() if name.endswith(".png")]
    assert sorted(members) == [f"{n:09d}-000.png" for n in range(6)]


@pytest.mark.parametrize("corrected", [[0, 1], [0, 1, 2], [2, 3], [1], [0, 3]])
def test_rows_that_were_corrected_replace_no_shard(tmp_path: Path, corrected: list[int]) -> None:
    """They move the later rows to other numbers."""
    out, rows = tmp_path / "out", [{"prompt": str(number)} for number in range(7)]
    bad = [row | ({"width": 60} if n in corrected else {}) for n, row in enumerate(rows)]
    job(listed(tmp_path / "a.jsonl", bad), out, shard_size=2).run()
    source = listed(tmp_path / "a.jsonl", rows)
    assert job(source, out, shard_size=2).run().drawn == len(corrected)
    for row in rows_of(out):
        with tarfile.open(out / row["file"]) as archive:
            assert row["member"] in archive.getnames()
    assert counts(job(source, out, shard_size=2).run()) == (7, 7, 0, 0)


def test_a_shard_is_written_as_it_is_drawn(tmp_path: Path) -> None:
    """It may hold more pictures than memory has room for."""
    artist = StandIn(watches=True)
    assert job(12, tmp_path / "out", artist, shard_size=12).run().done == 12
    assert max(artist.held) <= 3


@pytest.mark.parametrize("shard_size", [None, 3])
def test_object_stores_hold_the_same(tmp_path: Path, shard_size: int | None) -> None:
    fsspec.filesystem("memory").store.clear()
    for out in (tmp_path / "out", "memory://out"):
        assert counts(job(7, out, shard_size=shard_size).run()) == (7, 7, 0, 7)
        assert counts(job(7, out, shard_size=shard_size).run()) == (7, 7, 0, 0)
    here, there = rows_of(tmp_path / "out"), rows_of("memory://out")
    columns = ("row", "file", "member", "sha256")
    assert [[r[n] for n in columns] for r in here] == [[r[n] for n in columns] for r in there]


def test_a_killed_job_goes_on_where_it_was(tmp_path: Path) -> None:
    source = listed(
        tmp_path / "a.jsonl", [*map(str, range(5)), f"die once {tmp_path / 'mark'}", "c"]
    )
    code = (
        "import sys; from pathlib import Path; from test_batch_jobs import *;"
        "print(job(PromptList(sys.argv[1]), sys.argv[2]).run().drawn)"
    )
    command = [sys.executable, "-c", code, source.path, str(tmp_path / "out")]
    killed = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True)
    assert killed.returncode == -9
    assert (tmp_path / "out" / "images").exists()
    done = job(source, tmp_path / "out").run()
    assert (done.done, done.failed) == (7, 0)
    assert len(rows_of(tmp_path / "out")) == 7


_FULL = """
import resource, signal, sys
from test_batch_jobs import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out = sys.argv[1]
job(2, out).run()
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    job(5, out).run()
except OSError as error:
    print(error)
"""


def test_a_full_disk_ends_the_job_with_a_line_and_no_half_file(tmp_path: Path) -> None:
    """The system refuses to write more than 100 bytes to a file, as it does on a full disk."""
    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", _FULL, str(out)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert ended.stdout.startswith(f"out={str(out)!r}: "), ended.stderr
    assert "2 of 5 pictures are done, and the same command resumes" in ended.stdout
    assert len(list((out / "images").rglob("*.png"))) == 2
    assert not (out / ".unfinished").exists()
    assert counts(job(5, out).run()) == (5, 5, 0, 3)


@pytest.mark.parametrize("broken", ["draw", "__call__"])
def test_a_broken_device_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """It would fail for every row that follows."""

    def fail(*_: object) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with DSA")

    monkeypatch.setattr(StandIn, broken, fail)
    message = (
        "the device no longer responds: RuntimeError: CUDA error: device-side assert triggered"
        " Compile with DSA; 0 of 2 pictures are done, and the same command resumes"
    )
    with pytest.raises(ChildProcessError, match=f"^{message}$"):
        job(2, tmp_path / "out").run()
    assert rows_of(tmp_path / "out") == []


@pytest.mark.parametrize("shard_size", [None, 2])
@pytest.mark.parametrize("out", ["here", "memory://out"])
def test_a_picture_that_is_gone_is_drawn_again(
    tmp_path: Path, out: str, shard_size: int | None
) -> None:
    fsspec.filesystem("memory").store.clear()
    out = out if out.startswith("memory") else str(tmp_path / out)
    job(6, out, shard_size=shard_size).run()
    before, storage = rows_of(out), Storage(out)
    contents = {row["file"]: storage.read(row["file"]) for row in before}
    deleted, emptied, *_ = contents
    storage.remove(deleted)
    storage.write(emptied, b"")
    lines: list[str] = []
    again = job(6, out, shard_size=shard_size).run(note=lines.append)
    pictures = 2 * (shard_size or 1)
    assert counts(again) == (6, 6, 0, pictures)
    assert lines == [f"{pictures} of 6 pictures are gone or empty, and are drawn again"]
    assert {name: storage.read(name) for name in contents} == contents
    columns = ("row", "file", "member", "sha256")
    assert [[r[n] for n in columns] for r in rows_of(out)] == [
        [r[n] for n in columns] for r in before
    ]
    assert counts(job(6, out, shard_size=shard_size).run()) == (6, 6, 0, 0)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, None])
def test_a_folder_whose_state_is_damaged_keeps_its_pictures(
    tmp_path: Path, content: bytes | None
) -> None:
    out = tmp_path / "out"
    job(2, out).run()
    storage, before = Storage(str(out)), rows_of(out)
    for file in ("job.json", "manifest.parquet") if content is not None else ("job.json",):
        kept = storage.read(file) or b""
        storage.remove(file)
        if content is not None:
            storage.write(file, content)
        for count in (2, 3):
            with pytest.raises(ValueError, match=rf"^out: '.*{file}' is damaged \(.+\): ") as error:
                job(count, out).run()
            assert "\n" not in str(error.value)
        storage.write(file, kept)
    assert rows_of(out) == before
    storage.write("job.json", content or b"")
    assert counts(job(2, out, overwrite=True).run()) == (2, 2, 0, 2)


def test_folders_of_others_are_not_deleted(tmp_path: Path) -> None:
    mine = tmp_path / "out" / "images" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.touch()
    job(1, tmp_path / "out", overwrite=True).run()
    assert mine.exists()


def test_progress_tells_everything_that_is_there(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int, int]] = []
    job(2, tmp_path / "out").run()
    job(4, tmp_path / "out").run(on_progress=lambda summary: seen.append(counts(summary)))
    assert seen == [(4, 2, 0, 0), (4, 3, 0, 1), (4, 4, 0, 2)]


def test_an_empty_list_and_a_file_in_the_place_of_a_folder_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "a.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="at least one row"):
        job(PromptList(str(empty)), tmp_path / "out").run()
    with pytest.raises(ValueError, match="cannot be made"):
        job(1, empty)
