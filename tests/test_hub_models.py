"""Models of the hub: what they hold is known, and wrong ids are answered, before any weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import Hub, serving
from self_attention_guidance.models.builtin import builtin_folder
from tiny import save_tiny_model
from tiny_pixels import tiny_unet

WRONG = {
    "generate a --model no/one": "(there is none with this id, or it is private",
    "generate a --model me/gated": "(its page asks for consent",
    "generate a --model me/adm": "is a pixel-space model (ADMPipeline), which takes no prompts",
    "generate a --model me/bare": "is a pixel-space model (UNet2DModel), which takes no prompts",
    "generate a --model me/nothing": "has no model_index.json",
    "sample --num-samples 1 --model me/tiny": "is a Stable Diffusion model: draw from it with",
    "sample --num-samples 1 --model me/adm --classes hart": "the nearest are heart",
    "batch --num-samples 2 --model me/adm --compile": "me/adm takes no prompts",
    "layers no/one": "(there is none with this id",
    "tune no/one --out a.json": "(there is none with this id",
    "demo --model no/one": "(there is none with this id",
}

# Every line of stdin is a command, or an expression.
_CODE = """
import sys
from self_attention_guidance.cli import main
from self_attention_guidance.generate.hub import hub_model
for line in sys.stdin:
    hub_model.cache_clear()
    if line.startswith("sag "):
        print(main(line.split()[1:]), not {"torch", "diffusers"} & set(sys.modules), flush=True)
        continue
    from self_attention_guidance.generate import *
    from self_attention_guidance.generate.finding import *
    from self_attention_guidance.generate.structure import load_structure
    print(eval(line), flush=True)
"""


class User:
    """A process that asks a hub, as a program of a user does."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_ENDPOINT": hub.address}
        environment.pop("HF_HUB_OFFLINE", None)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=folder,
            env=environment,
        )

    def __enter__(self) -> User:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, line: str) -> str:
        """The last line of the answer to `line`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().rstrip("\n")

    def errors(self) -> list[str]:
        """Ends the process; its lines about errors."""
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        return [line for line in errors.splitlines() if line.startswith("error: ")]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    save_tiny_model(tmp_path / "tiny")
    (tmp_path / "tiny/sag_settings.json").write_text('{"guidance": {"scale": 0.375}}')
    tiny_unet().save_pretrained(tmp_path / "bare")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/README.md").write_text("mine")
    models = {f"me/{name}": tmp_path / name for name in ("tiny", "bare", "nothing")}
    models |= {"me/gated": tmp_path / "tiny", "me/adm": builtin_folder("emoji-adm")}
    with serving(Hub(models, gated=("me/gated",))) as hub:
        yield hub


def downloads_of_weights(hub: Hub) -> list[str]:
    return [path for path in hub.requests if path.endswith((".safetensors", ".bin"))]


def test_what_a_model_is_decides_before_weights_are_loaded(hub: Hub, tmp_path: Path) -> None:
    with User(hub, tmp_path) as user:
        for line in WRONG:
            assert user.ask(f"sag {line}") == "2 True", line
        errors = user.errors()
        assert len(errors) == len(WRONG), errors
        for error, (line, message) in zip(errors, WRONG.items(), strict=True):
            assert message in error, (line, error)
        assert hub.requests
        assert not downloads_of_weights(hub)


def test_they_are_downloaded_with_what_they_recommend(hub: Hub, tmp_path: Path) -> None:
    with User(hub, tmp_path) as user:
        assert user.ask("find_model('me/tiny')") == "('me/tiny', False)"
        assert user.ask("find_pixel_model('me/adm')") == "me/adm"
        names = "'me/adm', 'me/bare', 'me/tiny'"
        answer = user.ask(f"[is_pixel_model(name) for name in ({names})]")
        assert answer == "[True, True, False]"
        assert user.ask("recommended_by('me/tiny').guidance") == "{'scale': 0.375}"
        assert not downloads_of_weights(hub)
        assert user.ask("load_pipeline('me/tiny', 'cpu').pipeline.guidance.scale") == "0.375"
        assert user.ask("load_pixel_model('me/bare', 'cpu').name") == "bare"
        assert user.ask("load_structure('me/adm') is not None") == "True"
        assert downloads_of_weights(hub)
        hub.shutdown()
        hub.server_close()
        # What was downloaded needs no network.
        assert user.ask("load_pipeline('me/tiny', 'cpu').pipeline.guidance.scale") == "0.375"
        assert user.ask("sag generate a --model no/one").startswith("2 ")
        (error,) = user.errors()
        assert "could not be loaded from the Hugging Face hub (is the network there? " in error


def test_earlier_downloads_serve_whatever_the_hub_answers(hub: Hub, tmp_path: Path) -> None:
    """diffusers does not download all configs, and a newer one may be damaged or half there."""
    (tmp_path / "tiny/vae_1_0").mkdir()
    (tmp_path / "tiny/vae_1_0/config.json").write_text("{}")
    load = "__import__('diffusers').DiffusionPipeline.from_pretrained('me/tiny')"
    with User(hub, tmp_path) as user:
        assert user.ask(f"{load} is not None") == "True"
        for hub.failure in (500, 429):
            assert user.ask("find_model('me/tiny')") == "('me/tiny', False)"
        assert user.ask("sag generate a --model me/other").startswith("2 ")
        hub.failure = None
        assert user.ask("find_model('me/tiny')") == "('me/tiny', False)"
        (error,) = user.errors()
        assert "(is the network there? HfHubHTTPError: " in error
        assert "429" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sag_settings.json": '{"guidance": {"scael": 1}}'}, "'scael' is not a setting of sag"),
        ({"model_index.json": "<html>"}, "model_index.json cannot be read"),
        ({"unet/diffusion_pytorch_model.safetensors": None}, "its folder 'unet' has no weights"),
        ({"vae": None}, "it has no folder 'vae', which its index names"),
    ],
)
def test_what_is_wrong_with_files_is_said_before_weights_are_loaded(
    hub: Hub, tmp_path: Path, content: dict[str, str | None], message: str
) -> None:
    for name, text in content.items():
        path = tmp_path / "tiny" / name
        if text is not None:
            path.write_text(text)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    with User(hub, tmp_path) as user:
        for model in ("me/tiny", "./tiny"):
            assert user.ask(f"sag generate a --model {model}") == "2 True"
        errors = user.errors()
    assert len(errors) == 2
    assert all(message in error and "--model=" in error for error in errors), errors
    assert not downloads_of_weights(hub)
