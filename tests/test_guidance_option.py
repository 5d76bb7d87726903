"""`--guidance`: one text for every method, in every command that draws."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from command_line import error_of, help_without_torch, run
from self_attention_guidance import (
    BlurGuidance,
    Guidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
)
from self_attention_guidance.generate import generate, load_pipeline, read_parameters, read_record
from self_attention_guidance.guidance import GuidanceSum, guidance_of
from self_attention_guidance.guidance.text import parse_guidance
from test_batch_jobs import rows_of
from tiny import save_tiny_model
from tiny_pixels import arrays_of, interrupt, one_thread, save_tiny_pixels, tiny_pipeline

RECOMMENDED = {
    "guidance": {"method": "sag", "scale": 1.5, "blur_sigma": 2.0},
    "generation": {"guidance_scale": 3.0, "num_inference_steps": 4},
    "compare": {"sag_scales": [0, 1, 2]},
}


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("option") / "tiny", RECOMMENDED))


@pytest.fixture(scope="module")
def pixel_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_pixels(tmp_path_factory.mktemp("option") / "pixels")


def drawn(model: str, out: Path, *options: object) -> np.ndarray:
    """What `sag generate` draws."""
    assert run("generate", "a", "--model", model, "--out", out, "--overwrite", *options) == 0
    with Image.open(out / "00000-0.png") as image:
        return np.asarray(image)


def of_library(model: str, guidance: Guidance | GuidanceSum) -> np.ndarray:
    loaded = load_pipeline(model, "cpu")
    loaded.pipeline.set_progress_bar_config(disable=True)
    loaded.pipeline.guidance = guidance
    return np.asarray(next(generate(loaded.pipeline, "a", loaded.settings())).image)


@pytest.mark.parametrize(
    ("options", "guidance"),
    [
        (["--guidance", "pag"], PerturbedAttentionGuidance()),
        (["--guidance", "pag:scale=1.5"], PerturbedAttentionGuidance(1.5)),
        (["--guidance", "pag", "--sag-scale", 1.5], PerturbedAttentionGuidance(1.5)),
        (["--guidance", "pag", "--start", 0.5], PerturbedAttentionGuidance(start=0.5)),
        (["--guidance", "pag", "--fast"], PerturbedAttentionGuidance.fast()),
        (["--guidance", "blur:blur_sigma=3"], BlurGuidance(blur_sigma=3.0)),
        (["--guidance", "pag:noise_from=9,noise_to=0.2"],
         PerturbedAttentionGuidance(noise_from=9.0, noise_to=0.2)),
        # The model's, where it recommends the same method.
        (["--guidance", "sag"], SelfAttentionGuidance(1.5, blur_sigma=2.0)),
        (["--guidance", "SAG:scale=0.5"], SelfAttentionGuidance(0.5, blur_sigma=2.0)),
        (["--guidance", "sag:blur_sigma=3"], SelfAttentionGuidance(1.5, blur_sigma=3.0)),
        (["--blur-sigma", 3], SelfAttentionGuidance(1.5, blur_sigma=3.0)),
        (["--guidance", "sag:threshold=0.9", "--fast"],
         SelfAttentionGuidance.fast(blur_sigma=2.0, threshold=0.9)),
    ],
)  # fmt: skip
def test_it_draws_what_the_library_draws(
    tmp_path: Path, model: str, options: list[object], guidance: Guidance
) -> None:
    assert (drawn(model, tmp_path, *options) == of_library(model, guidance)).all()
    assert read_record(tmp_path / "00000-0.png")["guidance"] == guidance.to_dict()


@pytest.mark.parametrize(
    "options",
    [
        ["--guidance", "sag:scale=0.5", "--guidance", "pag:scale=2"],
        ["--guidance", "sag:scale=0.5 + pag:scale=2"],
        ["--guidance", "sag:scale=1 + pag:scale=4", "--sag-scale", 0.5],
    ],
)
def test_several_act_together(tmp_path: Path, model: str, options: list[object]) -> None:
    together = SelfAttentionGuidance(0.5, blur_sigma=2.0) + PerturbedAttentionGuidance(2.0)
    wanted = of_library(model, together)
    path = tmp_path / "00000-0.png"
    assert (drawn(model, tmp_path, *options) == wanted).all()
    for one in together.parts:
        assert (of_library(model, one) != wanted).any()
    parameters = read_parameters(path).settings
    assert parameters["Guidance Method"] == "sag+pag"
    again = ("generate", "--like", path, "--model", model, "--out", tmp_path / "again")
    assert run(*again) == 0
    with Image.open(tmp_path / "again" / "00000-0.png") as image:
        assert (np.asarray(image) == wanted).all()


def test_compare_has_several_as_one_column(tmp_path: Path, model: str) -> None:
    out = tmp_path / "grid.png"
    columns = ("--columns", "guidance=none,sag,pag,sag + pag:scale=2", "--out", out)
    assert run("compare", "a", "--model", model, *columns) == 0
    assert read_parameters(out).settings["Columns"] == "guidance=none,sag,pag,sag + pag:scale=2"
    assert run("compare", "a", "--model", model, "--guidance", "sag+pag", "--out", out) == 2
    command = ("compare", "a", "--model", model, "--guidance", "sag+pag", "--out", out)
    assert run(*command, "--overwrite") == 0
    assert read_parameters(out).settings["Guidance Scale"] == "0, 1"


@pytest.mark.parametrize("method", ["pag", "seg"])
def test_metadata_has_what_extensions_of_web_interfaces_read(
    tmp_path: Path, model: str, method: str
) -> None:
    drawn(model, tmp_path, "--guidance", f"{method}:scale=2,start=0.25,stop=0.75", "--steps", 8)
    parameters = read_parameters(tmp_path / "00000-0.png").settings
    name = method.upper()
    assert parameters[f"{name} Active"] == "True"
    assert parameters[f"{name} Scale"] == "2"
    assert (parameters[f"{name} Start Step"], parameters[f"{name} End Step"]) == ("2", "5")
    drawn(model, tmp_path, "--guidance", f"{method}:scale=0")
    assert f"{name} Active" not in read_parameters(tmp_path / "00000-0.png").settings


def test_methods_draw_different_pictures(tmp_path: Path, model: str) -> None:
    texts = ("sag", "blur", "pag", "sag:scale=0", "pag:scale=0")
    pictures = [drawn(model, tmp_path, "--guidance", text).tobytes() for text in texts]
    assert len(set(pictures)) == 4
    assert pictures[3] == pictures[4]


def test_compare_draws_scales_of_it(tmp_path: Path, model: str) -> None:
    arguments = ("compare", "a", "--model", model, "--guidance")
    for text, options, scales in (
        ("pag", [], "0, 3"),
        ("pag:scale=2", [], "0, 2"),
        ("pag", ["--sag-scales", "1,2,4"], "1, 2, 4"),
    ):
        out = tmp_path / "grid.png"
        assert run(*arguments, text, *options, "--out", out, "--overwrite") == 0
        assert read_parameters(out).settings["PAG Scale"] == scales
    for text, scales in (("sag", "0, 1, 2"), ("sag:scale=3", "0, 3")):
        assert run(*arguments, text, "--out", out, "--overwrite") == 0
        assert read_parameters(out).settings["SAG Guidance Scale"] == scales


def test_compare_shows_attention_of_guidances_that_blur(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    arguments = ("compare", "a", "--model", model, "--show-attention", "--out", tmp_path / "a.png")
    message = error_of(capsys, *arguments, "--guidance", "pag")
    assert "show_attention shows where pictures were blurred: pag blurs none" in message
    assert not (tmp_path / "a.png").exists()
    assert run(*arguments, "--guidance", "blur") == 0


def test_sample_and_batch_draw_the_same_with_it(tmp_path: Path, pixel_model: str) -> None:
    shared = ("--model", pixel_model, "--num-samples", 1, "--seed", 5, "--guidance")
    pictures: list[bytes] = []
    for text in ("pag", "pag:layers=up_blocks.0.attentions.0", "sag"):
        out = tmp_path / str(len(pictures))
        assert run("sample", *shared, text, "--batch-size", 1, "--out", out / "a.npz") == 0
        assert run("batch", *shared, text, "--out", out / "list") == 0
        (row,) = rows_of(out / "list")
        with Image.open(out / "list" / row["file"]) as image:
            pictures.append(image.tobytes())
        assert arrays_of(out / "a.npz")["arr_0"].tobytes() == pictures[-1]
    assert len(set(pictures)) == 3


def test_runs_that_go_on_name_the_setting_that_differs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pixel_model: str
) -> None:
    out = tmp_path / "a.npz"
    pipe: Any = tiny_pipeline(num_class_embeds=7)
    pipe.guidance = PerturbedAttentionGuidance(every=2)
    interrupt(pipe, out, 2)
    shared = ("--model", pixel_model, "--guidance")
    sample = ("sample", "--num-samples", 5, "--batch-size", 1, "--out", out, *shared)
    assert "with guidance.every=2, not 3: go on" in error_of(capsys, *sample, "pag:every=3")
    message = error_of(capsys, *sample, "sag")
    assert "guidance.method='pag', not 'sag'; guidance.scale=3.0, not 1.5" in message
    assert run(*sample, "pag:every=2") == 0
    assert "2 of them drawn before, 3 now" in capsys.readouterr().out
    batch = ("batch", "--num-samples", 2, "--out", tmp_path / "list", *shared)
    assert run(*batch, "pag:every=2") == 0
    capsys.readouterr()
    longer = (*batch[:2], 3, *batch[3:])
    message = error_of(capsys, *longer, "pag:every=3")
    assert "out holds pictures with guidance.every=2, not 3: go on with the same" in message
    assert run(*longer, "pag:every=2") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pagg"], "'pagg' is no guidance; did you mean pag? There are "),
        ([""], "'' is no guidance; there are"),
        (["sag:blur_sgima=1"], "'blur_sgima' is no setting of sag; did you mean blur_sigma?"),
        (["pag:threshold=1"], "'threshold' is no setting of pag; "),
        (["sag:method=pag"], "'method' is no setting of sag"),
        (["sag:scale"], "'scale' must be NAME=VALUE"),
        (["sag:"], "'' must be NAME=VALUE"),
        (["sag:0.5"], "'0.5' must be NAME=VALUE, such as scale=0.5\n"),
        (["sag:scale=0.5;blur_sigma=2"], "its settings must be separated by commas"),
        (["sag:scale=0.5 blur_sigma=2"], "its settings must be separated by commas"),
        (["none", "--stop", "0.5"], "--stop must not be given with --guidance none"),
        (["none", "--sag-scale", "1"], "--sag-scale must not be given with --guidance none"),
        (["none + sag"], "--guidance='none': 'none' is no guidance; there are "),
        (["sag:scale=1,scale=2"], "scale was given twice"),
        (["sag:scale=x"], "scale='x' must be a number"),
        (["sag:scale=nan"], "scale=nan must be a finite number"),
        (["sag:every=1.5"], "every='1.5' must be a whole number"),
        (["sag:every=0"], "every=0 must be a whole number, at least 1"),
        (["sag:scale=none"], "scale='none' must be a number"),
        (["pag:branch=both"], "branch='both' must be 'uncond' or 'cond'"),
        (["pag:layers=nowhere"], "layers='nowhere' is no self-attention layer of UNet2D"),
        (["pag:layers=mid+nowhere"], "error: layers='nowhere' is no self-attention layer of"),
        (["slg:layers=nowhere"], "layers='nowhere' is no block with self-attention of UNet2D"),
        (["pag:layers="], "layers='' must be a dotted module path"),
        (["pag + sagg"], "'sagg' is no guidance; did you mean sag?"),
        (["pag", "--guidance", "sag:scale=x"], "scale='x' must be a number"),
        (["pag + sag", "--start", "0"], "--start of which guidance? Give it inside --guidance"),
        (["pag", "--threshold", "1"], "--threshold=1.0: 'threshold' is no setting of pag"),
        (["pag:start=0.2", "--start", "0"], "--start was given twice: by --guidance and by"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "sample"])
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: str,
    pixel_model: str,
    command: str,
    arguments: list[str],
    message: str,
) -> None:
    start = {
        "generate": ["a", "--model", model, "--out", tmp_path / "out"],
        "sample": ["--num-samples", 1, "--model", pixel_model, "--out", tmp_path / "a.npz"],
    }[command]
    assert message in error_of(capsys, command, *start, "--guidance", *arguments)
    assert not list(tmp_path.rglob("*.*"))


def test_none_is_no_guidance(
    tmp_path: Path, model: str, pixel_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ("generate", "a", "--model", model, "--out")
    sample = ("sample", "--num-samples", 1, "--model", pixel_model, "--out")
    batch = ("batch", "--num-samples", 1, "--model", pixel_model, "--out")
    for number, options in enumerate((["--guidance", "None"], ["--sag-scale", 0])):
        assert run(*generate, tmp_path / f"heart{number}.png", *options) == 0
        assert run(*sample, tmp_path / f"{number}.npz", *options) == 0
        assert run(*batch, tmp_path / f"list{number}", *options) == 0
    for name in ("heart{}.png", "{}.npz", "list{}/images/000000/000000000-000.png"):
        first, second = (read_record(tmp_path / name.format(number)) for number in range(2))
        assert first["guidance"] == second["guidance"]
        assert first["guidance"]["scale"] == 0
    grid = tmp_path / "grid.png"
    assert run("compare", "a", "--model", model, "--guidance", "none", "--out", grid) == 0
    assert read_record(grid)["sag_scales"] == [0]
    assert "note: sag: no guidance\n" in capsys.readouterr().err


def test_two_scales_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = ("--guidance", "sag:scale=1", "--out", tmp_path / "out.npz")
    for command in (
        ("generate", "a", "--sag-scale", 0),
        ("compare", "a", "--sag-scales", "0,1"),
        ("sample", "--num-samples", 1, "--sag-scale", 0),
        ("batch", "--num-samples", 1, "--sag-scale", 0),
    ):
        assert "scale was given twice" in error_of(capsys, *command, *text)
    both = ("sample", "--num-samples", 1, "--blur-guidance", "--guidance", "sag")
    assert "must not be given with --blur-guidance" in error_of(capsys, *both)


def test_values_have_the_types_of_the_fields() -> None:
    text = "sag: scale = 2, every=3, layer=none, branch=cond"
    wanted = {"method": "sag", "scale": 2.0, "every": 3, "layer": None, "branch": "cond"}
    found = parse_guidance(text)
    assert found == wanted
    assert [type(value) for value in found.values()] == [type(v) for v in wanted.values()]
    assert parse_guidance("pag:layers=a.b+c")["layers"] == ["a.b", "c"]
    assert parse_guidance("pag:layers=none")["layers"] is None


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.text(), st.from_regex(r"(sag|pag|blur|SAG):([a-z_]{1,9}=[a-z0-9.+-]{0,9},?){1,3}"))
)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_guidance(text)
        assert guidance_of(found).method == found["method"]
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("command", ["generate", "compare", "sample", "batch"])
def test_help_describes_it_without_importing_torch(command: str) -> None:
    assert "--guidance METHOD[:NAME=VALUE,...]" in help_without_torch(command)


def test_settings_of_every_method_are_checked_without_torch() -> None:
    code = (
        "import sys; from self_attention_guidance.guidance import METHODS, text\n"
        "assert all(text.parse_guidance(name)['method'] == name for name in METHODS)\n"
        "try: text.parse_guidance('seg:blur_sigma=0')\n"
        "except ValueError as error: print(error)\n"
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "blur_sigma=0.0 must be above 0" in done.stdout
