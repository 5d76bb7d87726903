"""What makes the command line pleasant: quiet runs, prompts from files, errors in plain words."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from PIL import Image

from command_line import error_of, run
from self_attention_guidance.generate import read_parameters, read_record
from self_attention_guidance.guidance.text import parse_guidance
from tiny import save_tiny_model

SETTINGS = {
    "guidance": {"scale": 1.5, "blur_sigma": 2.0},
    "generation": {"guidance_scale": 3.0, "num_inference_steps": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("comforts") / "tiny", SETTINGS))


LONG = "red heart, " * 60 + "green apple"


@pytest.mark.parametrize(
    ("prompt", "negative", "cut"),
    [
        ("red", "", []),
        (LONG, "blue", ["prompt"]),
        ("red", LONG, ["negative prompt"]),
        (LONG, LONG, ["prompt", "negative prompt"]),
    ],
)
def test_what_is_cut_of_both_prompts_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    prompt: str,
    negative: str,
    cut: list[str],
) -> None:
    asked = [prompt, "--negative-prompt", negative, "--model", model, "--steps", 1, "--quiet"]
    compared = ["--sag-scales", "0,1", "--out", tmp_path / "grid.png"]
    for command in (["generate", "--out", tmp_path / "out"], ["compare", *compared]):
        assert run(command[0], *asked, *command[1:]) == 0
        printed = capsys.readouterr().err.splitlines()
        assert [line.split(" is too long")[0] for line in printed] == [
            f"warning: the {kind}" for kind in cut
        ]
        assert all(line.endswith("apple'") for line in printed)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": prompt, "negative_prompt": negative}))
    listed = [tmp_path / "a.jsonl", "--model", model, "--steps", 1, "--out", tmp_path / "job"]
    capsys.readouterr()
    assert run("batch", *listed, "--quiet") == 0
    assert ("too long prompts: 1 " in capsys.readouterr().out) == bool(cut)
    (row,) = parquet.read_table(tmp_path / "job/manifest.parquet").to_pylist()
    assert ((row["unread"] or "").count("apple")) == len(cut)
    assert ("negative_prompt: " in (row["unread"] or "")) == ("negative prompt" in cut)


def test_a_negative_prompt_without_effect_gives_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    asked = ["red", "--negative-prompt", "blue", "--model", model, "--steps", 1, "--quiet"]
    printed = "warning: the negative prompt has no effect: classifier-free guidance is off\n"
    for cfg, expected in ((1, printed), (3, "")):
        command = ["--guidance-scale", cfg, "--num-images", 2, "--out", tmp_path / str(cfg)]
        assert run("generate", *asked, *command) == 0
        assert capsys.readouterr().err == expected


def test_a_layer_that_the_model_lacks_ends_a_job_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(3)))
    asked = [tmp_path / "a.jsonl", "--model", model, "--out", tmp_path / "job", "--quiet"]
    assert run("batch", *asked, "--layer", "down.9") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --layer='down.9' is no self-attention layer of UNet2D")
    assert error.endswith(
        ": there are, for short, down.0, up.1, mid; `sag layers MODEL` lists all\n"
    )
    assert not (tmp_path / "job/manifest.parquet").exists()


@pytest.mark.parametrize("command", [[], ["generate"], ["info"]])
def test_h_is_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    texts: list[str] = []
    for option in ("-h", "--help"):
        assert run(*command, option) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "Usage: sag" in texts[0]


def test_shells_complete_options() -> None:
    code = "import sys; from self_attention_guidance.cli import main; main()"
    asked = {
        "_SAG_COMPLETE": "complete_bash",
        "COMP_WORDS": "sag generate --guid",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.stdout.split() == ["--guidance", "--guidance-scale"]


def test_prompts_come_from_a_file_or_stdin(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
) -> None:
    text = "\ufeffred\u2028heart\x85\r\n\r\n  Füchse \n".encode()
    (tmp_path / "prompts.txt").write_bytes(text)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    for number, source in enumerate((tmp_path / "prompts.txt", "-")):
        out = tmp_path / str(number)
        assert run("generate", "first", "--prompts", source, "--model", model, "--out", out) == 0
        drawn = [read_parameters(path).prompt for path in sorted(out.iterdir())]
        assert drawn == ["first", "red\u2028heart", "Füchse"]
    capsys.readouterr()
    (tmp_path / "prompts.txt").write_bytes("füchse".encode("utf-16"))
    message = error_of(capsys, "generate", "--prompts", tmp_path / "prompts.txt", "--model", model)
    assert "prompts.txt' is no text in UTF-8" in message


def test_the_settings_that_were_used_are_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    shared = ("generate", "a", "--model", model, "--out", tmp_path)
    for options, message in (
        ([], "64x64, 2 steps, DDIM, CFG 3, sag:scale=1.5,blur_sigma=2, seed 0"),
        (["--sag-scale", 0, "--seed", 5], "64x64, 2 steps, DDIM, CFG 3, no guidance, seed 5"),
        (["--guidance", "pag:layers=mid+up", "--size", "48x40", "--scheduler", "euler-a"],
         "48x40, 2 steps, Euler a, CFG 3, pag:scale=3,layers=mid+up, seed 0"),
        (["--guidance", "sag:blur_sigma=1", "--negative-prompt", "x y", "--dtype", "bfloat16"],
         "64x64, 2 steps, DDIM, CFG 3, sag:scale=1.5,blur_sigma=1, negative prompt 'x y', bfloat16,"
         " seed 0"),
    ):  # fmt: skip
        assert run(*shared, *options) == 0
        assert capsys.readouterr().err == f"note: drawn by tiny: {message}\n"
    # The guidance is written as the option reads it.
    assert parse_guidance("pag:scale=3,layers=mid+up")["layers"] == ["mid", "up"]
    assert run(*shared, "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.endswith(".png\n")


def test_fast_says_when_it_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    shared = ("generate", "a", "--model", model, "--out", tmp_path, "--fast")
    nothing = "note: --fast changes nothing"
    assert run(*shared) == 0
    assert nothing not in capsys.readouterr().err
    (first, *_) = tmp_path.iterdir()
    all_given = ("--start", 0, "--stop", 1, "--every", 1, "--guidance", "sag:scale=1.5")
    decide = "other options decide all of the guidance"
    recommended = "what the model recommends is its fast preset already"
    for options, reason in (
        (all_given, decide),
        (("--sag-scale", 0), "guidance is off"),
        (("--guidance", "none"), "guidance is off"),
        (("--model", "emoji"), recommended),
        (("--model", "emoji", "--start", 0.3), recommended),
        (("--like", first), "the picture was drawn with the fast preset already"),
    ):
        assert run(*shared, "--steps", 2, *options) == 0
        assert f"{nothing}: {reason}\n" in capsys.readouterr().err
    sample = ("sample", "--num-samples", 1, "--steps", 2, "--out", tmp_path / "a.npz", "--fast")
    assert run(*sample) == 0
    assert f"{nothing}: {recommended}\n" in capsys.readouterr().err


def test_failures_of_the_machine_are_one_sentence(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
) -> None:
    from self_attention_guidance.cli import generate

    memory = "out of memory: try smaller pictures (--size) or fewer"
    for error, expected in (
        (MemoryError(), memory),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), memory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), memory),
        (RuntimeError("CUDA error: unknown\nCompile with"), "the device does not respond: CUDA"),
    ):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(generate, "load_pipeline_of", fail)
        message = error_of(capsys, "generate", "a", "--model", model, "--out", tmp_path)
        assert message.startswith(f"error: {expected}")


def test_sizes_have_a_limit_that_can_be_raised(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    shared = ("--model", model, "--size", "64x72", "--out")
    for command, out in (("generate", tmp_path / "out"), ("compare", tmp_path / "grid.png")):
        message = error_of(capsys, command, "a", *shared, out, "--max-size", 64)
        assert "--size: height=72 must be at most 64 (--max-size)" in message
        assert run(command, "a", *shared, out, "--max-size", 72) == 0
        capsys.readouterr()
        own = ("a", "--model", model, "--out", tmp_path / "own.png")
        message = error_of(capsys, command, *own, "--max-size", 32)
        assert "--size: the model's own size is 64, and a side must have at most 32" in message


def test_the_traceback_is_there_for_those_who_ask(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error_of(capsys, "generate", "a", "--steps", 0)
    monkeypatch.setenv("SAG_DEBUG", "1")
    assert run("generate", "a", "--steps", 0) == 2
    message = capsys.readouterr().err
    assert message.startswith("Traceback (most recent call last):")
    assert message.endswith("error: --steps=0 must be a whole number, at least 1\n")


def test_a_setting_that_the_recommended_method_lacks_is_refused_with_one_that_has_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sample = ("sample", "--num-samples", 1, "--steps", 2, "--out", tmp_path / "a.npz")
    for option, value, shown in (
        ("--layer", "nope", "'nope'"),
        ("--blur-sigma", 2, "2.0"),
        ("--threshold", 1, "1.0"),
    ):
        for fast in ([], ["--fast"]):
            assert error_of(capsys, *sample, option, value, *fast) == (
                f"error: {option}={shown} is no setting of tpg, which this model recommends:"
                " --guidance sag has it\n"
            )
    assert run(*sample, "--blur-sigma", 2, "--guidance", "sag") == 0
    like = tmp_path / "like.png"
    asked = ("generate", "a", "--steps", 2, "--guidance", "pag", "--out", like)
    assert run(*asked) == 0
    capsys.readouterr()
    message = error_of(capsys, "generate", "--like", like, "--threshold", 1, "--out", tmp_path)
    assert "--threshold=1.0 is no setting of pag, which is set: --guidance sag has it" in message


def test_settings_in_the_text_of_guidance_keep_their_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    shared = ("generate", "a", "--model", model, "--out", tmp_path)
    assert ": start=2.0 must be" in error_of(capsys, *shared, "--guidance", "sag:start=2")
    message = error_of(capsys, *shared, "--start", 0.5, "--stop", 0.25)
    assert message == "error: --start=0.5 must be below --stop=0.25\n"


def test_the_first_bad_rows_of_a_list_are_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    rows = [json.dumps({"prompt": f"bad {n}", "steps": 0}) for n in range(7)]
    (tmp_path / "list.jsonl").write_text("\n".join([json.dumps({"prompt": "good"}), *rows]))
    asked = ("batch", tmp_path / "list.jsonl", "--model", model, "--out", tmp_path / "job")
    assert run(*asked, "--quiet") == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("row 1 (from 0), 'bad 0': steps=0 must be a whole number")
    assert lines[-1] == "and 2 more: see the column error of manifest.parquet"


class TestConfig:
    def test_a_file_gives_options_and_the_command_line_goes_first(self, tmp_path: Path) -> None:
        config = tmp_path / "mine.toml"
        config.write_text(
            'steps = 3\nseed = 7\nsag_scale = 0.5\nguidance = ["pag"]\nquiet = true\n'
        )
        assert run("generate", "cat", "--config", config, "--seed", 8, "--out", tmp_path) == 0
        record = read_record(tmp_path / "00000-8.png")
        assert record["settings"]["num_inference_steps"] == 3
        assert (record["guidance"]["method"], record["guidance"]["scale"]) == ("pag", 0.5)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("stepz = 3", "'stepz' is no option; there are "),
            ("steps = ", "is no TOML: "),
            ("steps = 'many'", 'steps="many" must be a whole number'),
            ("steps = true", "steps=true must be a whole number"),
            ("steps = 2.0", "steps=2.0 must be a whole number"),
            ("sag-scale = '1'", 'sag-scale="1" must be a number'),
            ("sag-scale = false", "sag-scale=false must be a number"),
            ("size = 64", "size=64 must be a text in quotes"),
            ("out = 5", "out=5 must be a text in quotes"),
            ("guidance = ['sag', 1]", "guidance=1 must be a text in quotes"),
            ("quiet = 'yes'", 'quiet="yes" must be true or false'),
            ("quiet = 1", "quiet=1 must be true or false"),
            ("seed = 2024-01-01", 'seed="2024-01-01" must be a whole number'),
            ("sag_scale = 1\nsag-scale = 2", "sag-scale was given twice"),
            ("help = true", "'help' is no option"),
            (f"seed = {'9' * 5000}", "is no TOML: "),
            ("steps = 0", "steps=0 must be"),
            ("config = 'other.toml'", "'config' is no option"),
            (None, "cannot be read: No such file or directory"),
        ],
    )
    def test_mistakes_are_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
    ) -> None:
        config = tmp_path / "mine.toml"
        if content is not None:
            config.write_text(content)
        assert message in error_of(capsys, "generate", "cat", "--config", config, "--out", tmp_path)

    def test_a_single_text_may_stand_for_a_list(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = tmp_path / "mine.toml"
        config.write_text("guidance = 'pagg'\n")
        assert "did you mean pag?" in error_of(capsys, "generate", "cat", "--config", config)


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("generate a", "model", "~/none"),
        ("generate a", "image", "~/none.png"),
        ("generate a --image a.png", "mask", "~/none.png"),
        ("generate a", "lora", "~/none.safetensors:0.5"),
        ("generate", "prompts", "~/none.txt"),
        ("generate", "like", "~/none.png"),
        ("generate a", "out", "~/none.jpg"),
        ("compare a", "out", "~/none.jpg"),
        ("sample --num-samples 1", "out", "~/none.zip"),
        ("sample --num-samples 1", "classifier", "~/none"),
        ("tune emoji --out a.json", "reference", "~/none"),
    ],
)
def test_paths_begin_at_home(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    option: str,
    value: str,
    by_file: bool,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    Image.new("RGB", (64, 64)).save("a.png")
    (home / "mine.toml").write_text(f"{option} = '{value}'\n")
    given = "--config=~/mine.toml" if by_file else f"--{option}={value}"
    message = error_of(capsys, *command.split(), given)
    assert str(home / "none") in message
    assert "~" not in message


def test_a_run_without_a_guided_step_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("generate", "cat", "--steps", 2, "--start", 0.6, "--stop", 0.9, "--out", tmp_path)
    assert run(*asked) == 0
    assert "warning: no step is guided by SelfAttentionGuidance" in capsys.readouterr().err
    assert run(*asked, "--start", 0.1) == 0
    assert "warning" not in capsys.readouterr().err
    unguided, guided = (read_record(path) for path in sorted(tmp_path.glob("*.png")))
    assert (unguided["weakened_predictions"], guided["weakened_predictions"]) == (0, 1)
    texts = [path.read_bytes() for path in sorted(tmp_path.glob("*.png"))]
    assert [b"SAG Guidance Enabled: True" in text for text in texts] == [False, True]


def test_the_largest_seed(tmp_path: Path) -> None:
    asked = ("generate", "cat", "--steps", 2, "--seed", 2**64 - 1, "--out", tmp_path)
    assert run(*asked) == 0
    assert read_record(tmp_path / f"00000-{2**64 - 1}.png")["seed"] == 2**64 - 1
    again = ("generate", "--like", tmp_path / f"00000-{2**64 - 1}.png", "--out", tmp_path / "again")
    assert run(*again) == 0
    (tmp_path / "list.csv").write_text(f"prompt,seed\ncat,{2**64 - 1}\n")
    assert run("batch", tmp_path / "list.csv", "--steps", 2, "--out", tmp_path / "job") == 0


def test_out_may_be_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("generate", "cat", "--steps", 2, "--out")
    out = tmp_path / "new" / "cat.png"
    assert run(*asked, out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert read_record(out)["prompt"] == "cat"
    assert "exists" in error_of(capsys, *asked, out)
    assert run(*asked, out, "--overwrite", "--seed", 3) == 0
    assert read_record(out)["seed"] == 3
    capsys.readouterr()
    message = error_of(capsys, *asked, tmp_path / "two.png", "--num-images", 2)
    assert "is one file, for 2 pictures: name a folder" in message
    assert "must end in .png" in error_of(capsys, *asked, tmp_path / "cat.jpg")
    assert not (tmp_path / "cat.jpg").exists()
