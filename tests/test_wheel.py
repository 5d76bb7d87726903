"""The wheel is complete: installed in an environment without this repository, it draws."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from self_attention_guidance import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=ROOT)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel)
    (site_packages,) = (folder / "lib").glob("*/site-packages")
    # Files ending in .pth are not read from there, so this repository is not found.
    libraries = sysconfig.get_paths()["purelib"]
    (site_packages / "libraries.pth").write_text(libraries + "\n")
    return folder


def run(*command: object, cwd: Path | None = None, bare: bool = False) -> str:
    """The output of a program, which must succeed; a bare one does not see this repository."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=variables if bare else None,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_this_version_and_no_tests(wheel: Path) -> None:
    assert wheel.name.startswith(f"self_attention_guidance-{__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "self_attention_guidance",
        f"self_attention_guidance-{__version__}.dist-info",
    }
    assert not any("__pycache__" in name for name in names)


def test_the_wheel_draws(environment: Path, tmp_path: Path) -> None:
    program = "import self_attention_guidance as package; print(package.__file__)"
    found = run(environment / "bin" / "python", "-c", program, cwd=tmp_path, bare=True)
    assert Path(found.strip()).is_relative_to(environment)
    drawing = ["generate", "red heart", "--steps", 2, "--out", tmp_path / "out"]
    run(environment / "bin" / "sag", *drawing, cwd=tmp_path, bare=True)
    with Image.open(tmp_path / "out" / "00000-0.png") as picture:
        assert picture.size == (64, 64)
        assert np.asarray(picture).std() > 10
