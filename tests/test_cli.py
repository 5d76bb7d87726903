"""The command line, run as a user runs it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from command_line import error_of, in_a_process, interrupted, run
from self_attention_guidance.cli import main
from self_attention_guidance.generate import read_parameters, read_record, save_png
from tiny import save_tiny_model

RECORD: dict[str, Any] = {
    "version": "self-attention-guidance 0.2.0",
    "model": "emoji",
    "prompt": "ein Füchs",
    "seed": 5,
    "size": [64, 64],
    "dtype": "float32",
    "settings": {"negative_prompt": "", "guidance_scale": 3.0, "num_inference_steps": 2},
    "guidance": {"method": "sag", "scale": 1.0},
    "scheduler": "DDIMScheduler",
    "scheduler_config": {"num_train_timesteps": 1000},
}

SETTINGS = {
    "guidance": {"scale": 1.5, "blur_sigma": 2.0},
    "generation": {"guidance_scale": 3.0, "num_inference_steps": 2},
    "compare": {"prompts": ["a", "b", "c"], "sag_scales": [0, 1, 2]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("cli") / "tiny", SETTINGS))


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.int16)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


# generate


def test_compare_draws_a_row_for_every_seed(model: str, tmp_path: Path) -> None:
    heights = []
    for count in ("1", "3"):
        out = tmp_path / f"{count}.png"
        arguments = ["compare", "", "--num-images", count, "--out", str(out)]
        assert main([*arguments, "--model", model, "--sag-scales", "0", "--steps", "1"]) == 0
        heights.append(pixels(out).shape[0])
    assert heights[1] > 2 * heights[0]


def test_generate_writes_named_pictures_and_prints_their_paths(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    out = tmp_path / "pictures"
    assert (
        run(
            "generate",
            "a",
            "b",
            "--model",
            model,
            "--num-images",
            2,
            "--seed",
            7,
            "--batch-size",
            3,
            "--out",
            out,
        )
        == 0
    )
    names = ["00000-7.png", "00001-8.png", "00002-7.png", "00003-8.png"]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(out / name) for name in names]
    assert captured.err == (
        "note: drawn by tiny: 64x64, 2 steps, DDIM, CFG 3, sag:scale=1.5,blur_sigma=2, seeds 7 to"
        " 8\n"
    )
    assert sorted(path.name for path in out.iterdir()) == names
    assert size_of(out / names[0]) == (64, 64)


def test_generate_uses_the_models_recommendation_and_says_so(tmp_path: Path, model: str) -> None:
    assert run("generate", "", "--model", model, "--out", tmp_path) == 0
    read = read_parameters(tmp_path / "00000-0.png")
    assert read.prompt == ""
    expected = {
        "Steps": "2",
        "Sampler": "DDIM",
        "CFG scale": "3",
        "Seed": "0",
        "Size": "64x64",
        "Model": "tiny",
        "SAG Guidance Scale": "1.5",
        "SAG Blur Sigma": "2",
    }
    assert expected.items() <= read.settings.items()


def test_generate_options_reach_the_picture(tmp_path: Path, model: str) -> None:
    assert (
        run(
            "generate",
            "a",
            "--model",
            model,
            "--out",
            tmp_path,
            "--size",
            "48x40",
            "--scheduler",
            "dpm++ 2m karras",
            "--steps",
            3,
            "--guidance-scale",
            2,
            "--negative-prompt",
            "b, c",
            "--sag-scale",
            0.5,
            "--blur-sigma",
            1.5,
            "--blur-kernel-size",
            5,
            "--threshold",
            0.9,
            "--branch",
            "cond",
            "--start",
            0.25,
            "--stop",
            0.75,
            "--dtype",
            "float32",
            "--device",
            "cpu",
        )
        == 0
    )
    read = read_parameters(tmp_path / "00000-0.png")
    assert read.negative_prompt == "b, c"
    expected = {
        "Steps": "3",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "2",
        "Size": "48x40",
        "SAG Guidance Scale": "0.5",
        "SAG Blur Sigma": "1.5",
        "SAG Blur Kernel Size": "5",
        "SAG Mask Threshold": "0.9",
        "SAG Branch": "cond",
        "SAG Start": "0.25",
        "SAG Stop": "0.75",
    }
    assert expected.items() <= read.settings.items()


def test_generate_fast_is_the_preset_with_the_models_blur(tmp_path: Path) -> None:
    settings = SETTINGS | {"fast": {"scale": 4.0}}
    model = str(save_tiny_model(tmp_path / "model", settings))
    for folder, options in (
        ("fast", ["--fast"]),
        ("by-hand", ["--sag-scale", "4", "--start", "0.2", "--stop", "0.65", "--every", "3"]),
        ("usual", []),
    ):
        out = ["--out", str(tmp_path / folder), "--steps", "8"]
        assert main(["generate", "a", "--model", model, *options, *out]) == 0
    fast, by_hand, usual = (
        pixels(tmp_path / folder / "00000-0.png") for folder in ("fast", "by-hand", "usual")
    )
    assert (fast == by_hand).all()
    assert (fast != usual).any()


def test_generate_is_reproducible_and_scale_0_differs(tmp_path: Path, model: str) -> None:
    arguments = ["generate", "a", "--model", model]
    for name, scale in {"one": 1, "two": 1, "off": 0}.items():
        assert run(*arguments, "--sag-scale", scale, "--out", tmp_path / name) == 0
    one, two, off = (pixels(tmp_path / name / "00000-0.png") for name in ("one", "two", "off"))
    assert (one == two).all()
    assert (one != off).any()


def test_generate_overwrites_only_when_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    taken = tmp_path / "00001-1.png"
    taken.write_bytes(b"mine")
    arguments = ("generate", "a", "--num-images", 2, "--model", model, "--out", tmp_path)
    assert run(*arguments) == 0
    assert taken.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {
        "00001-1.png",
        "00002-0.png",
        "00003-1.png",
    }
    assert run(*arguments, "--overwrite") == 0
    assert pixels(taken).shape == (64, 64, 3)


def test_generate_draws_like_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    asked = ["--model", model, "--steps", 3, "--guidance", "pag:scale=2", "--seed", 9]
    asked += ["--scheduler", "euler", "--guidance-scale", 3, "--negative-prompt", "blue"]
    assert run("generate", "red heart", *asked, "--out", tmp_path / "first") == 0
    first = tmp_path / "first" / "00000-9.png"
    like = ["generate", "--like", first, "--model", model]
    assert run(*like, "--out", tmp_path / "again") == 0
    assert (pixels(tmp_path / "again" / "00000-9.png") == pixels(first)).all()

    changed = {"--steps": 4, "--guidance": "pag:scale=3", "--sag-scale": 0, "--scheduler": "heun"}
    for option, value in {**changed, "--guidance-scale": 1, "--negative-prompt": "fox"}.items():
        assert run(*like, option, value, "--out", tmp_path / option) == 0
        assert (pixels(tmp_path / option / "00000-9.png") != pixels(first)).any(), option
    assert run(*like, "blue fox", "--seed", 4, "--out", tmp_path / "other") == 0
    assert read_parameters(tmp_path / "other" / "00000-4.png").prompt == "blue fox"

    capsys.readouterr()
    assert "say where it is" in error_of(capsys, "generate", "--like", first)
    assert "does not exist" in error_of(capsys, "generate", "--like", tmp_path / "none.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert "has no" in error_of(capsys, "generate", "--like", tmp_path / "plain.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": None}, "is no single picture of a prompt"),
        ({"settings": {"guidance_scale": "x"}}, "guidance_scale='x' must be a finite number"),
        ({"settings": {"guidance_scale": 1, "foo": 1}}, "settings: 'foo' is unknown"),
        ({"settings": {"guidance_scale": 1, "num_inference_steps": True}}, "num_inference_steps="),
        ({"settings": {"guidance_scale": 1, "image": 5}}, "image: 5 must be a text"),
        ({"settings": {"guidance_scale": 1, "mask": "a.png"}}, "mask='a.png' needs image"),
        ({"guidance": ["sag"]}, "guidance=['sag'] must be an object"),
        ({"seed": "5"}, "seed='5' must be a whole number"),
        ({"seed": 5.0}, "seed=5.0 must be a whole number"),
        ({"seed": 2**70}, "is too large: seeds must be below 2**64"),
        ({"prompt": None}, "prompt: None must be a text"),
        ({"model": 5}, "model: 5 must be a text"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
        ({"loras": 5}, "loras=5 must hold pairs"),
        ({"loras": [["a.safetensors"]]}, "loras=[['a.safetensors']] must hold pairs"),
        ({"loras": [[5, 1]]}, "loras: 5 must be a text"),
        ({"loras": [["a.safetensors", "x"]]}, "loras='x' must be a finite number"),
        ({"scheduler": 5}, "scheduler: 5 must be a text"),
        ({"scheduler_config": [1]}, "scheduler_config=[1] must be an object"),
        ({"size": "64x64"}, "size='64x64' must hold pairs"),
        ({"size": [64, "a"]}, "size='a' must be a whole number"),
        ({"start": 5}, "start=5 must be an object"),
        # These are known only once the model is loaded.
        ({"guidance": {"method": "sag", "foo": 1}}, "guidance: 'foo' is not a setting of sag"),
        ({"guidance": {"method": "sag+pag", "guidances": 5}}, "guidance: guidances=5 must be"),
        ({"scheduler": "Foo"}, "scheduler_config of Foo: scheduler='Foo' is unknown"),
        ({"scheduler_config": {"num_train_timesteps": "x"}}, "scheduler_config of DDIMScheduler: "),
    ],
    ids=str,
)
def test_a_record_of_another_shape_is_refused_by_its_entry(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: str,
    change: dict[str, Any],
    message: str,
) -> None:
    info = PngInfo()
    info.add_text("sag_settings", json.dumps({**RECORD, **change}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    arguments = ("generate", "--like", tmp_path / "a.png", "--model", model, "--out", tmp_path)
    answer = error_of(capsys, *arguments)
    assert answer.startswith(f"error: --like='{tmp_path / 'a.png'}'")
    assert message in answer


@pytest.mark.parametrize("text", ["5", "[1]", "null", "{", "[" * 100_000])
def test_a_record_that_is_no_object_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    info = PngInfo()
    info.add_text("sag_settings", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    message = error_of(capsys, "generate", "--like", tmp_path / "a.png")
    assert "a.png': its 'sag_settings' text " in message


def test_the_size_of_a_record_has_the_limit_of_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = {**RECORD, "settings": {**RECORD["settings"], "width": 80, "height": 72}}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", record)
    arguments = ("generate", "--like", tmp_path / "a.png", "--max-size", 72, "--out", tmp_path)
    message = "error: --size: width=80 must be at most 72 (--max-size)\n"
    assert error_of(capsys, *arguments) == message


def test_options_of_like_are_kept_even_with_their_default_values(
    tmp_path: Path, model: Path
) -> None:
    drawn = ["generate", "a", "--model", model, "--steps", 2, "--dtype", "bfloat16", "--seed", 5]
    assert run(*drawn, "--negative-prompt", "dog", "--out", tmp_path / "a.png") == 0
    again = ["generate", "--like", tmp_path / "a.png", "--model", model, "--out"]
    assert run(*again, tmp_path / "b.png") == 0
    asked = ["--seed", 0, "--negative-prompt", "", "--dtype", "auto"]
    assert run(*again, tmp_path / "c.png", *asked) == 0
    first, same, record = (read_record(tmp_path / f"{name}.png") for name in "abc")
    assert same == first
    assert (record["seed"], record["dtype"]) == (0, "float32")
    assert record["settings"]["negative_prompt"] == ""


def test_info_shows_how_a_picture_was_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    assert run("generate", "red heart", "--model", model, "--steps", 3, "--out", tmp_path) == 0
    capsys.readouterr()
    picture = tmp_path / "00000-0.png"
    assert run("info", picture) == 0
    assert capsys.readouterr().out.startswith("red heart\nSteps: 3, ")
    assert run("info", picture, picture, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["settings"]["num_inference_steps"] for record in records] == [3, 3]
    assert "does not exist" in error_of(capsys, "info", tmp_path / "none.png")
    (tmp_path / "plain.txt").write_text("mine")
    for options in ([], ["--json"]):
        message = error_of(capsys, "info", tmp_path / "plain.txt", *options)
        assert message.endswith("plain.txt' is no PNG picture\n")


def test_info_shows_how_samples_were_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "a.npz"
    sample = ("sample", "--num-samples", 2, "--steps", 2, "--classes", "heart,3", "--out", out)
    assert run(*sample) == 0
    assert "classes heart face-neutral" in capsys.readouterr().err
    assert run("info", out) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Steps: 2, ")
    assert run("info", tmp_path / "a.png") == 0
    assert capsys.readouterr().out.strip() == shown.strip()
    assert run("info", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["class_names"][0] == "heart"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_info_goes_on_after_a_file_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str]
) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", RECORD)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    names = ("none.png", "a.png", "b.png", "a.png", "n" * 300)
    assert run("info", *(tmp_path / name for name in names), *options) == 2
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") and "Errno" not in line for line in errors)
    assert captured.out.count("ein Füchs") == (0 if options else 2)
    if options:
        assert [json.loads(line)["prompt"] for line in captured.out.splitlines()] == [
            "ein Füchs"
        ] * 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_a_character_gets_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str
) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {**RECORD, "prompt": "Füchs \u2192"})
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run("info", tmp_path / "a.png") == 0
    expected = {"ascii": "F\\xfcchs \\u2192", "latin-1": "Füchs \\u2192", "utf-8": "Füchs \u2192"}
    stdout.seek(0)
    assert stdout.readline().rstrip() == expected[encoding]


@pytest.mark.parametrize("option", ["--size", "--image", "--guidance", "--lora", "--like", "--out"])
def test_long_values_are_shortened(capsys: pytest.CaptureFixture[str], option: str) -> None:
    message = error_of(capsys, "generate", "a", option, "9 x" * 3000 + ".jpg")
    assert len(message) < 600
    assert "..." in message
    assert "Errno" not in message


# compare


def test_compare_draws_the_models_own_suggestions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    out = tmp_path / "new" / "grid.png"
    assert run("compare", "--model", model, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    read = read_parameters(out)
    assert read.prompt == "a\nb\nc"
    assert read.settings["SAG Guidance Scale"] == "0, 1, 2"
    width, height = size_of(out)
    assert width > 3 * 192
    assert height > 3 * 192


def test_compare_shows_attention_in_columns_of_their_own(tmp_path: Path, model: str) -> None:
    arguments = ("compare", "a", "", "--model", model, "--sag-scales", "0,1")
    assert run(*arguments, "--out", tmp_path / "plain.png") == 0
    assert run(*arguments, "--show-attention", "--out", tmp_path / "shown.png") == 0
    plain, shown = (size_of(tmp_path / name) for name in ("plain.png", "shown.png"))
    assert shown[0] > plain[0] + 190
    assert shown[1] == plain[1]


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "PROMPT is missing"),
        (["generate", "a", "--sag-scale", "nan"], "--sag-scale=nan must be a finite number"),
        (["generate", "a", "--sag-scale", "x"], "--sag-scale"),
        (["generate", "a", "--guidance-scale", "inf"], "--guidance-scale=inf must be a finite"),
        (["generate", "a", "--steps", "0"], "--steps=0 must be a whole number"),
        (["generate", "a", "--size", "64"], "size='64' must be WIDTHxHEIGHT"),
        (["generate", "a", "--size", "60x64"], "width=60 must be a multiple of 8"),
        (["generate", "a", "--size", "0x64"], "width=0 must be a whole number, at least 1"),
        (["generate", "a", "--blur-sigma", "-1"], "--blur-sigma"),
        (["generate", "a", "--branch", "both"], "branch"),
        (["generate", "a", "--scheduler", "eular"], "scheduler='eular' is unknown: the nearest"),
        (["generate", "a", "--batch-size", "0"], "--batch-size=0 must be a whole number"),
        (["generate", "a", "--num-images", "0"], "--num-images=0 must be a whole number"),
        (["generate", "a", "--seed", "-1"], "seed=-1 must be a whole number, at least 0"),
        (["generate", "a", "--device", "cuda:63"], "device='cuda:63' is not available here"),
        (["generate", "a", "--dtype", "int8"], "dtype='int8' must be one of auto, float32"),
        (["generate", "a", "--model", "./none"], "model='./none' does not exist: give a folder"),
        (["generate", "a", "--model", "nobody/none"], "could not be loaded from the Hugging Face"),
        (["generate", "a", "--layer", "no.such.layer"], "no.such.layer"),
        (["generate", "a", "--nonsense"], "--nonsense"),
        (
            ["compare", "a", "--sag-scales", "0;1"],
            "--sag-scales='0;1' must be numbers separated by",
        ),
        (["compare", "a", "--sag-scales", "0,nan"], "--sag-scales=nan must be a finite number"),
        (["paint"], "paint"),
    ],
)
def test_user_errors_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--model" not in arguments and arguments[-1] != "paint":
        arguments = [*arguments, "--model", model]
    assert message in error_of(capsys, *arguments)
    assert not list(tmp_path.glob("**/*.*"))


def test_output_that_is_no_folder_is_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    (tmp_path / "file").write_text("mine")
    generated = error_of(capsys, "generate", "a", "--model", model, "--out", tmp_path / "file")
    assert "is or lies below a file: name a folder" in generated
    compared = error_of(capsys, "compare", "a", "--model", model, "--out", tmp_path)
    assert "is a folder: name a file" in compared
    taken = error_of(capsys, "compare", "a", "--model", model, "--out", tmp_path / "file")
    assert "exists" in taken
    assert (tmp_path / "file").read_text() == "mine"


# Processes


def test_help_and_version_need_no_heavy_library() -> None:
    script = (
        "import sys; from self_attention_guidance.cli import main\n"
        "assert main([]) == 0 and main(['--version']) == 0\n"
        "commands = ('generate', 'compare', 'sample', 'convert')\n"
        "assert not any([main([command, '--help']) for command in commands])\n"
        "print('heavy:', {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: set()\n")
    assert "Examples:" in done.stdout
    assert "self-attention-guidance" in done.stdout


def test_a_quiet_process_says_nothing_but_the_path(tmp_path: Path, model: str) -> None:
    process = in_a_process("generate", "a", "--model", model, "--out", tmp_path, "--quiet")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert (out, err) == (f"{tmp_path / '00000-0.png'}\n", "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for other processes")
def test_interrupt_leaves_whole_files_and_one_line(tmp_path: Path, model: str) -> None:
    arguments = ("generate", "a", "--model", model, "--num-images", 4000, "--batch-size", 1)
    process = in_a_process(*arguments, "--out", tmp_path)
    err = interrupted(process, tmp_path)
    assert process.returncode == 130
    assert err == "error: interrupted\n"
    files = list(tmp_path.iterdir())
    assert files
    assert {path.suffix for path in files} == {".png"}
    assert all(pixels(path).shape == (64, 64, 3) for path in files)


def test_a_file_that_is_cut_off_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.npz").touch()
    assert "is no .npz file" in error_of(capsys, "info", tmp_path / "a.npz")

    def cut_off(path: object) -> dict[str, object]:
        raise EOFError("no data left in file")

    monkeypatch.setattr("self_attention_guidance.generate.read_record", cut_off)
    assert run("info", tmp_path / "a.npz", "--json") == 2
    assert "error: a file ends too early: no data left in file" in capsys.readouterr().err
