"""The benchmark of cost, run as a developer runs it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import measuring
from bench import main
from memory import Memory, of_process
from plan import plan
from tiny_pixels import one_thread
from variants import VARIANTS

QUICK = ("--pairs", 1, "--steps", 2, "--no-memory")


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@dataclass(frozen=True)
class Measured:
    folder: Path
    table: str
    content: dict[str, Any]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What one run on both builtin models wrote and printed."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder, output = tmp_path_factory.mktemp("bench"), io.StringIO()
    files = ("--json", folder / "a.json", "--plot", folder / "a.png")
    with redirect_stdout(output):
        assert run("--pairs", 2, "--steps", 3, "--no-memory", *files) == 0
    content = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    return Measured(folder, output.getvalue(), content)


def named(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {found["variant"]: found for found in result["variants"]}


# Outputs


def test_rows_of_builtin_models(measured: Measured) -> None:
    expected = {("emoji", True): (6, 9), ("emoji", False): (3, 6), ("emoji-adm", False): (3, 6)}
    found = {}
    for result in measured.content["results"]:
        shape = result["configuration"]
        variants = named(result)
        rows = {name: each["rows_per_image"] for name, each in variants.items()}
        found[shape["network"], shape["cfg"]] = (rows["none"], rows["exact"])
        assert rows["none"] < rows["fast"] < rows["exact"]
        assert rows["diffusers"] == (rows["exact"] if shape["network"] == "emoji" else None)
    assert found == expected


def test_json_has_times_ratios_and_agreement(measured: Measured) -> None:
    assert measured.content["pairs"] == 2
    for result in measured.content["results"]:
        suits = result["configuration"]["network"] == "emoji"
        assert (result["difference"] is not None) == suits
        assert not suits or 0 <= result["difference"] < 1e-4
        for name, found in named(result).items():
            if name == "diffusers" and not suits:
                assert found["unsuitable"]
                continue
            for key in ("seconds", "over_none", "over_diffusers")[: 3 if suits else 2]:
                values = found[key]
                assert 0 < values["low"] <= values["lower_quartile"] <= values["median"]
                assert values["median"] <= values["upper_quartile"] <= values["high"]
            assert found["memory"] is None
        assert named(result)["none"]["over_none"]["low"] == 1


def test_table_names_every_variant(measured: Measured) -> None:
    blocks = measured.table.strip().split("\n\n")
    assert len(blocks) == 4
    assert blocks[0].startswith("emoji, eager, float32, CFG, SAG; 1 picture of 64x64, 3 steps\n")
    for block in blocks[:3]:
        _, titles, *rows = block.splitlines()
        assert titles.split()[:2] == ["variant", "evaluations/image"]
        assert [row.split("  ")[1] for row in rows[:4]] == [
            "no guidance",
            "exact",
            "fast",
            "diffusers' class",
        ]
    assert "does not run: it is for Stable Diffusion 1 and 2" in blocks[2]
    assert "our result differs" in blocks[0]
    assert "2 rounds" in blocks[3]


def test_plot_is_a_picture(measured: Measured) -> None:
    with Image.open(measured.folder / "a.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10


def test_memory_grows_with_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: VARIANTS[name] for name in ("none", "diffusers")}
    monkeypatch.setattr(measuring, "VARIANTS", few)  # every process takes seconds to start
    out = tmp_path / "a.json"
    sizes = ("--steps", 1, "--batch-size", 8)
    networks = ("--networks", "emoji-adm", "--cfg", "off")
    assert run(*networks, *sizes, "--pairs", 1, "--json", out) == 0
    (result,) = json.loads(out.read_text(encoding="utf-8"))["results"]
    variants = named(result)
    (single,) = plan(["emoji-adm"], device="cpu", steps=1)
    of_one = of_process(single, "none")
    assert isinstance(of_one, Memory)
    memory = variants["none"]["memory"]
    assert 0 < memory["before"] < memory["peak"]
    assert memory["peak"] > of_one.peak + 10
    assert variants["diffusers"]["memory"] is None


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--networks", "sd3"), "networks='sd3' must be one of emoji, emoji-adm, sd15, sdxl"),
        (("--networks", ""), "networks='' must be one of"),
        (("--networks", "emoji,emoji"), "networks: 'emoji' must be named once only"),
        (("--modes", "eager,fast"), "modes='fast' must be one of eager, compiled"),
        (("--dtypes", "int8"), "dtypes='int8' must be one of float32, bfloat16, float16"),
        (("--methods", "sag,cfg"), "methods='cfg' must be one of "),
        (("--cfg", "maybe"), "cfg='maybe' must be one of both, on, off"),
        (("--networks", "emoji-adm", "--cfg", "on"), "cfg='on' leaves nothing to measure"),
        (("--pairs", 0), "pairs=0 must be a whole number, at least 1"),
        (("--steps", 0), "steps=0 must be a whole number, at least 1"),
        (("--steps", 1001), "steps=1001 must be at most 1000"),
        (("--batch-size", -1), "batch_size=-1 must be a whole number, at least 1"),
        (("--size", 128), "size=128 is for sd15, sdxl"),
        (("--networks", "sd15", "--size", 100), "size=100 must be a multiple of 64"),
        (("--networks", "sd15", "--size", 0), "size=0 must be a whole number, at least 1"),
        (("--device", "abacus"), "device='abacus' is not available here"),
        (("--json", "a.txt"), "json='a.txt' must end in .json"),
        (("--plot", "a.jpg"), "plot='a.jpg' must end in .png"),
        (("--plot", "missing/a.png"), "there is no folder 'missing'"),
    ],
)
def test_nonsense_is_refused(
    arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, *arguments)


def test_files_are_replaced_when_asked_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    out.write_text("mine")
    arguments = ("--networks", "emoji-adm", *QUICK, "--json", out)
    assert "exists: replace it with --overwrite" in error_of(capsys, *arguments)
    assert out.read_text() == "mine"
    assert run(*arguments, "--overwrite") == 0
    assert capsys.readouterr().err == ""
    assert json.loads(out.read_text())["pairs"] == 1


def test_plots_need_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = error_of(capsys, "--plot", tmp_path / "a.png")
    assert "plot needs matplotlib" in message


@pytest.mark.parametrize("arguments", [("--pairs", "many"), ("--rows", 1), ("emoji",)])
def test_options_are_checked(
    arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert ": error: " in capsys.readouterr().err


def test_its_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    assert "bench.py --networks emoji --modes eager,compiled" in capsys.readouterr().out
