"""Files and texts from elsewhere: they are read rightly, or refused in one line."""

from __future__ import annotations

import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.utils import dummy_note_seq_objects
from PIL import Image

from command_line import error_of, run
from self_attention_guidance.checks import GuidanceError
from self_attention_guidance.generate import (
    GenerationSettings,
    check_scheduler_name,
    check_start,
    class_names,
    draw_grid,
    find_model,
    find_pixel_model,
    make_scheduler,
    parse_axis,
    parse_classes,
    parse_parameters,
    read_parameters,
    read_record,
)
from self_attention_guidance.generate.failing import failures_in_one_line
from self_attention_guidance.generate.loras import parse_lora
from self_attention_guidance.generate.record import difference
from self_attention_guidance.generate.single_file import check_single_file
from self_attention_guidance.generate.start_picture import start_arguments
from self_attention_guidance.guidance.text import parse_guidance
from tiny import save_tiny_model, tiny_scheduler


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


# Pictures


def png_with_a_wrong_chunk(path: Path) -> Path:
    """A PNG file whose header can be read, and whose second part can't."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(64 * (1 + 3 * 64)), 0)
    parts = [chunk(b"IDAT", pixels[:100]), b"\0\0\0\5\0\1\2\3", chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(parts))
    return path


def test_a_damaged_start_picture_is_one_line(tmp_path: Path) -> None:
    settings = GenerationSettings(image=str(png_with_a_wrong_chunk(tmp_path / "a.png")))
    check_start(settings)  # which reads its header only
    with pytest.raises(ValueError, match=r"image=.* is no picture that can be read"):
        start_arguments(settings, 8, 1)


def test_formats_that_run_programs_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    with pytest.raises(ValueError, match="is no picture that can be read"):
        check_start(GenerationSettings(image=str(path)))
    with pytest.raises(ValueError, match="is no PNG picture"):
        read_record(path)


@pytest.mark.parametrize(
    ("chosen", "is_drawn"), [({"width": 64}, False), ({"height": 64}, True), ({}, False)]
)
def test_each_side_of_a_start_picture_that_is_not_chosen_has_a_limit(
    tmp_path: Path, chosen: dict[str, int], is_drawn: bool
) -> None:
    Image.new("RGB", (64, 5000)).save(tmp_path / "a.png")
    settings = GenerationSettings(image=str(tmp_path / "a.png"), **chosen)
    if is_drawn:
        check_start(settings, max_size=2048)
        return
    with pytest.raises(ValueError, match="has 64x5000 pixels, and a side must have at most 2048"):
        check_start(settings, max_size=2048)


# Records and parameters


@pytest.mark.parametrize("content", [b"", b"PK", b"array"])
def test_what_is_no_archive_has_no_record(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    if content == b"array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    for read in (read_record, read_parameters):
        with pytest.raises(ValueError, match=r"is no (\.npz file|PNG picture)"):
            read(path)


def test_parameters_of_other_programs_are_read_as_they_are() -> None:
    for value in ('"abc', r'"a\x"'):
        assert parse_parameters(f"cat\nSteps: 4, Model: {value}").settings["Model"] == value
    started = time.monotonic()
    assert parse_parameters("cat\n" + "a" * 100_000).settings == {}
    assert time.monotonic() - started < 5


def test_a_setting_that_was_not_recorded_is_no_difference_from_none() -> None:
    assert difference({}, {"settings": {"image": None}}) is None
    assert difference({}, {"settings": {"image": "a.png"}}) == "image=None, not 'a.png'"


def test_a_grid_without_guidance_is_kept(tmp_path: Path, model: str) -> None:
    for method, switch in (("pag", "PAG Active"), ("sag", "SAG Guidance Enabled")):
        out = tmp_path / f"{method}.png"
        command = ["compare", "red heart", "--model", model, "--steps", 1, "--guidance", method]
        assert run(*command, "--sag-scales", 0, "--out", out, "--quiet") == 0
        assert switch not in read_parameters(out).settings


# Names and numbers


def test_classes_of_one_name_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"134": "crane, bird", "517": "Crane", "3": "fox"}')
    names = class_names(tmp_path)
    assert names == {"crane (134)": 134, "bird": 134, "crane (517)": 517, "fox": 3}
    assert parse_classes("Crane (517),fox", names) == (517, 3)
    with pytest.raises(ValueError, match=r"nearest are crane \("):
        parse_classes("crane", names)


@pytest.mark.parametrize(
    "read",
    [
        lambda: parse_classes("1_0", {}),
        lambda: parse_guidance("sag:scale=1_0"),
        lambda: parse_axis("rows", "seed=1_0"),
        lambda: parse_axis("rows", "window=0-0_1"),
    ],
)
def test_only_python_reads_underscores_in_numbers(read: Any) -> None:
    with pytest.raises(ValueError, match=r"1_0|0_1"):
        read()


@pytest.mark.parametrize("text", [r"C:\style.safetensors", "D:/a/style.safetensors"])
def test_the_colon_of_a_drive_gives_no_scale(text: str) -> None:
    with pytest.raises(ValueError, match=r"style\.safetensors' does not exist"):
        parse_lora(text)


def test_schedulers_of_diffusers_are_taken_by_their_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_scheduler().config
    check_scheduler_name("LCMScheduler")
    assert type(make_scheduler("LCMScheduler", config)).__name__ == "LCMScheduler"
    with pytest.raises(ValueError, match="NoSuchScheduler"):
        make_scheduler("NoSuchScheduler", config)
    # What diffusers has for classes whose library is not installed, as this one's.
    absent = dummy_note_seq_objects.MidiProcessor
    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", absent)
    with pytest.raises(ValueError, match=r"scheduler='lms' is not possible: .* requires the note"):
        make_scheduler("lms", config)


# Models


@pytest.mark.parametrize("find", [find_model, find_pixel_model])
def test_the_home_of_nobody_is_no_model(find: Any) -> None:
    with pytest.raises(ValueError, match=r"model='~nobody-here/x' does not exist"):
        find("~nobody-here/x")


def test_an_index_that_is_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[" * 100_000)
    (tmp_path / "classes.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"model_index\.json cannot be read"):
        find_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"classes\.json cannot be read"):
        class_names(tmp_path)


def test_a_part_that_is_no_list_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": {"a": 1}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    error_of(capsys, "generate", "a", "--model", tmp_path, "--out", tmp_path / "out")


def test_a_header_longer_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"PK\3\4" + b"\xff" * 4 + b"{}")  # as a renamed .ckpt begins
    check_single_file("a", path)  # the loader says what it is


def test_guidance_that_cannot_act_does_not_blame_the_model() -> None:
    with pytest.raises(ValueError, match=r"^step 3: it had no effect$"), failures_in_one_line():
        raise GuidanceError("step 3: it had no effect")
    with pytest.raises(ValueError, match="do its parts fit"), failures_in_one_line():
        raise RuntimeError("mat1 and mat2")


# Grids


def test_long_headings_are_wrapped_above_their_column() -> None:
    pictures = [Image.new("RGB", (192, 192), "red") for _ in range(2)]
    short = draw_grid([pictures], ["1"], ["a", "b"])
    long = draw_grid([pictures], ["1"], ["a fox that jumps over a fence in the snow", "b"])
    assert long.height > short.height
    between = np.asarray(long)[:, long.width - 192 - 16 - 6 : long.width - 192 - 16 - 2]
    assert (between[: long.height - short.height] > 250).all()


def test_compare_says_why_an_option_does_not_fit_a_grid(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("compare", "a", "--rows", "cfg=1,3", "--columns", "seed=1,2")
    error = error_of(capsys, *asked, "--num-images", 2)
    assert error.endswith("with --rows or --columns, which draw one picture a cell\n")
    error = error_of(capsys, *asked, "--seed", 2)
    assert error.endswith("with --rows or --columns that replace it\n")
