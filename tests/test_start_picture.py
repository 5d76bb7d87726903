"""`--image`, `--mask` and `--strength`: drawing that begins with a picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image

from command_line import error_of, run
from self_attention_guidance import BlurGuidance
from self_attention_guidance.generate import (
    GenerationSettings,
    generate,
    load_pipeline,
    read_record,
    why_no_start,
)
from self_attention_guidance.generate.start_picture import start_arguments
from test_any_model import pixels, saved  # noqa: F401  # a fixture
from test_batch_jobs import rows_of
from tiny_models import MODELS

Saved = Callable[[str], Path]


TASKS = [
    (name, is_masked)
    for name in MODELS
    for is_masked in (False, True)
    # diffusers has none for PixArt, and inpaints with networks of 16 channels of SD 3 only.
    if name != "pixart" and (name, is_masked) != ("stable_diffusion_3", True)
]


@pytest.mark.parametrize(("name", "is_masked"), TASKS)
def test_it_is_what_diffusers_draws(
    saved: Saved,  # noqa: F811
    start: Path,
    mask: Path,
    name: str,
    is_masked: bool,
) -> None:
    kind: Any = AutoPipelineForInpainting if is_masked else AutoPipelineForImage2Image
    try:
        theirs = kind.from_pretrained(saved(name))
    except ValueError as error:
        if "can't find a pipeline" not in str(error):
            raise
        assert why_no_start(type(load_pipeline(str(saved(name))).pipeline), is_masked)
        pytest.skip("this version of diffusers has no such pipeline")
    theirs.set_progress_bar_config(disable=True)
    loaded = load_pipeline(str(saved(name)))
    masks = {"mask": str(mask)} if is_masked else {}
    given: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.75, "guidance_scale": 3.0}
    if "width" in inspect.signature(theirs.__call__).parameters:
        given |= {"width": 64, "height": 64}
    size = {"width": 64, "height": 64}
    settings = loaded.settings(**given | size, image=str(start), **masks, sag_scale=1.0)
    loaded.pipeline.guidance = BlurGuidance()
    (ours,) = generate(loaded.pipeline, "red heart", settings, seed=5)
    cut = Image.open(start).crop((4, 0, 68, 64))  # the middle, of the shape that is drawn
    asked = {**given, "image": cut}
    if is_masked:
        asked["mask_image"] = Image.open(mask).crop((4, 0, 68, 64))
    drawn = []
    for scale in (0.0, 1.0):
        with BlurGuidance(scale).attach(theirs):
            generator = torch.Generator().manual_seed(5)
            drawn.append(theirs("red heart", **asked, generator=generator).images[0])
    plain, guided = (np.asarray(picture).astype(int) for picture in drawn)
    assert (np.asarray(ours.image) == guided).all()
    assert (plain != guided).any()


def test_sides_are_those_of_the_picture(tmp_path: Path, saved: Saved, start: Path) -> None:  # noqa: F811
    asked = ["generate", "red heart", "--model", saved("stable_diffusion"), "--steps", 4]
    assert run(*asked, "--image", start, "--out", tmp_path / "out") == 0
    assert pixels(tmp_path / "out" / "00000-0.png").shape == (64, 72, 3)


def test_strength_says_how_much_of_it_is_kept(tmp_path: Path, start: Path) -> None:
    before = pixels(start)
    far: list[float] = []
    for strength in (0.2, 0.9):
        out = tmp_path / str(strength)
        asked = ["--image", start, "--strength", strength, "--steps", 10, "--sag-scale", 0]
        assert run("generate", "red heart", *asked, "--out", out) == 0
        far.append(np.abs(pixels(out / "00000-0.png") - before).mean())
    assert far[0] < far[1]


def test_what_is_masked_out_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mask: Path
) -> None:
    assert run("generate", "red heart", "--steps", 10, "--out", tmp_path / "heart") == 0
    heart = tmp_path / "heart" / "00000-0.png"
    # For inpainting, the strength of diffusers is 1.
    asked = ["--image", heart, "--mask", mask, "--steps", 10]
    assert run("generate", "grinning face", *asked, "--out", tmp_path / "face") == 0
    assert f"image {heart}, mask {mask}, strength 1, seed 0" in capsys.readouterr().err
    change = np.abs(pixels(tmp_path / "face" / "00000-0.png") - pixels(heart)).mean(axis=(0, 2))
    assert change[40:].max() < 12 < change[:24].mean()


def test_it_is_drawn_again_from_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], start: Path, mask: Path
) -> None:
    asked = ["--image", start, "--mask", mask, "--strength", 0.6, "--steps", 6, "--seed", 4]
    assert run("generate", "red heart", *asked, "--out", tmp_path / "a") == 0
    assert f"image {start}, mask {mask}, strength 0.6" in capsys.readouterr().err
    path = tmp_path / "a" / "00000-4.png"
    assert run("generate", "--like", path, "--out", tmp_path / "b") == 0
    assert (pixels(tmp_path / "b" / "00000-4.png") == pixels(path)).all()
    assert read_record(path)["settings"]["strength"] == 0.6
    Image.new("RGB", (64, 64)).save(start)
    capsys.readouterr()
    message = error_of(capsys, "generate", "--like", path, "--out", tmp_path / "c")
    assert "is another picture than it was" in message
    assert run("generate", "--like", path, "--image", start, "--out", tmp_path / "c") == 0
    start.unlink()
    capsys.readouterr()
    message = error_of(capsys, "generate", "--like", path, "--out", tmp_path / "d")
    assert message == f"error: --image={str(start)!r} cannot be read: No such file or directory\n"


def test_rows_of_a_list_begin_with_pictures(tmp_path: Path, start: Path) -> None:
    rows = f"prompt,image,strength\nred heart,,\nred heart,{start},0.5\nred heart,none.png,\n"
    large, broken = tmp_path / "large.png", tmp_path / "broken.png"
    Image.new("RGB", (80, 200)).save(large)
    broken.write_bytes(start.read_bytes()[:2000])
    (tmp_path / "list.csv").write_text(f"{rows}x,{large},\nx,{broken},\n")
    asked = ("--steps", 4, "--max-size", 128, "--out", tmp_path / "job")
    assert run("batch", tmp_path / "list.csv", *asked) == 3
    found = rows_of(tmp_path / "job")
    assert [row["error"] for row in found[:3]] == [None, None, "image='none.png' does not exist"]
    assert "has 80x200 pixels, and a side must have at most 128" in found[3]["error"]
    assert "is no picture that can be read" in found[4]["error"]
    assert (found[0]["width"], found[1]["width"]) == (64, 72)
    alike = ["--image", start, "--strength", 0.5, "--steps", 4]
    assert run("generate", "red heart", *alike, "--out", tmp_path / "one") == 0
    in_list, alone = tmp_path / "job" / found[1]["file"], tmp_path / "one" / "00000-0.png"
    assert np.abs(pixels(in_list) - pixels(alone)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "none.png"], "--image='none.png' does not exist"),
        (["--image", __file__], "is no picture that can be read"),
        (["--mask", "START"], "start.png' needs --image\n"),
        (["--strength", 0.5], "--strength=0.5 needs --image\n"),
        (["--image", "START", "--strength", 0], "--strength=0.0 must be above 0 and at most 1"),
        (["--image", "START", "--strength", 1.5], "--strength=1.5 must be above 0 and at most 1"),
        (["--image", "START", "--max-size", 64], "has 72x64 pixels, and a side must have at most"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], start: Path, options: list[object], message: str
) -> None:
    given = [start if option == "START" else option for option in options]
    assert message in error_of(
        capsys, "generate", "red heart", *given, "--out", start.parent / "out"
    )


def test_a_model_without_image_to_image_is_refused(
    capsys: pytest.CaptureFixture[str],
    saved: Saved,  # noqa: F811
    start: Path,
) -> None:
    asked = ("generate", "a", "--model", saved("pixart"), "--image", start, "--steps", 1)
    message = error_of(capsys, *asked, "--out", start.parent / "out")
    assert "image must not be given: diffusers has no image to image for PixArtSigmaP" in message


def test_sixteen_bits_and_transparency_are_read_as_viewers_show_them(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64 * 64).astype(np.uint8).reshape(64, 64)
    alpha = np.full_like(ramp, 255)
    alpha[:, :32] = 0
    on_white = np.where(alpha == 0, 255, ramp).astype(np.uint8)
    same = {
        "sixteen": (Image.fromarray(ramp.astype(np.uint16) * 257), Image.fromarray(ramp)),
        "transparent": (
            Image.fromarray(np.dstack([ramp] * 3 + [alpha]), "RGBA"),
            Image.fromarray(on_white),
        ),
    }
    for name, pictures in same.items():
        found: list[Any] = []
        for number, picture in enumerate(pictures):
            path = str(tmp_path / f"{name}{number}.png")
            picture.save(path)
            settings = GenerationSettings(image=path, mask=path)
            found.append(start_arguments(settings, 8, 1))
        for key in ("image", "mask_image"):
            one, other = (np.asarray(each[key][0]) for each in found)
            assert (one == other).all()
            assert one.std() > 50


def test_what_has_no_white_and_what_is_too_large_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.ones((64, 64), np.float32)).save(tmp_path / "a.tiff")
    asked = ["generate", "a", "--out", tmp_path / "out", "--image"]
    message = error_of(capsys, *asked, tmp_path / "a.tiff")
    assert f"--image={str(tmp_path / 'a.tiff')!r}" in message
    assert "white is not known" in message
    Image.new("L", (64, 64)).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for command in ([*asked, tmp_path / "b.png"], ["info", tmp_path / "b.png"]):
        assert "too large" in error_of(capsys, *command)


def test_a_strength_that_leaves_no_step_is_one_line(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", "a", "--image", start, "--strength", 0.1, "--steps", 4]
    message = error_of(capsys, *asked, "--out", tmp_path)
    assert "--strength=0.1 of 4 steps leaves less than one" in message
