"""What the documentation says can be done, and its links have ends."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image

from command_line import run
from self_attention_guidance import builtin_model
from self_attention_guidance.batch.manifest import SCHEMA
from self_attention_guidance.cli import app
from self_attention_guidance.denoiser import families
from self_attention_guidance.generate.metadata import png_text
from self_attention_guidance.guidance import base
from self_attention_guidance.models.builtin import builtin_folder, builtin_names
from test_batch_jobs import StandIn, job, listed

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "src").rglob("README.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

# What names in the pages stand for in the tests: there is no hub.
REPLACED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": str(builtin_folder("emoji")),
    "imagenet256": str(builtin_folder("emoji-adm")),
    "path/to/this/folder": str(builtin_folder("emoji")),
    "num_inference_steps=250": "num_inference_steps=2",
    # Fewer steps than by default: what is tested is that it runs.
    '("a red apple on a table")': '("a red apple on a table", num_inference_steps=4)',
    '("a red apple on a table", sag': '("a red apple on a table", num_inference_steps=4, sag',
    'dit = load_original("dit", "DiT-XL-2-256x256.pt")': "",
}
# Blocks that are not run here, by how they begin, and where the same is.
ELSEWHERE = {
    "guidance = SelfAttentionGuidance(0.75)\nwith guidance.attach(base)": "test_together",
    "handle = guidance.attach(transformer": "test_transformer_tasks",
    "from self_attention_guidance import GuidanceGuider": "test_guider",
    "from gradio_client import Client": "test_demo",
}
# What a web interface writes into a picture.
INFOTEXT = (
    "red heart\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 7, Size: 512x512, "
    "SAG Guidance Scale: 0.75, SAG Mask Threshold: 1"
)
FEW = ["--num-samples", "2"]
# What is added to commands so that they end soon; the last word on an option counts.
LITTLE = {
    "generate": ["--steps", "2", "--overwrite"],
    "compare": ["--steps", "2", "--overwrite"],
    "sample": ["--steps", "2", "--overwrite", *FEW],
    "batch": ["--steps", "2", "--workers", "1"],
    "evaluate": ["--overwrite"],
}
# Programs of others.
FOREIGN = ("ray", "pip", "python evaluator.py")


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, with the page's own variables."""
    variables: dict[str, str] = {}
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if words and re.fullmatch(r"[A-Z0-9]+=.*", words[0], re.DOTALL):
                name, value = words[0].split("=", 1)
                variables[name] = value
            elif words:
                found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_have_ends(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)\s#:]*)(#[^)\s]*)?\)", text):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {_anchor(heading) for heading in headings}, anchor


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Pages may add to these.
    monkeypatch.setattr(base, "METHODS", dict(base.METHODS))
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    found = [block for block in blocks(page, "python") if not block.startswith(tuple(ELSEWHERE))]
    if not found:
        return
    names = _names(tmp_path)
    for block in found:
        for name, instead in REPLACED.items():
            block = block.replace(name, instead)
        exec(compile(block, str(page), "exec"), names)


def _names(folder: Path) -> dict[str, Any]:
    """What a page may use without making it: models, the output of `sag batch`, and a picture."""
    pipe: Any = StableDiffusionPipeline(**builtin_model("emoji").components)
    pipe.set_progress_bar_config(disable=True)
    list_of_two = listed(folder / "prompts.jsonl", ["cat", "fail"])
    job(list_of_two, folder / "pictures", StandIn()).run()
    Image.new("RGB", (64, 64)).save(folder / "from-a1111.png", pnginfo=png_text(INFOTEXT))
    other: Any = builtin_model("emoji-adm")
    return {"pipe": pipe, "unet": other.unet, "scheduler": other.scheduler}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_can_be_given(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (ROOT / "Makefile").read_text()
    monkeypatch.chdir(ROOT)
    _inputs(tmp_path)
    for program, *arguments in commands(page):
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), arguments
        elif program == "python" and (ROOT / arguments[0]).is_file():
            continue
        elif program == "sag":
            monkeypatch.chdir(tmp_path)
            _check(arguments, tmp_path)
            monkeypatch.chdir(ROOT)
        else:
            assert " ".join([program, *arguments]).startswith(FOREIGN), program


def _check(arguments: list[str], folder: Path) -> None:
    """Runs a command on little; those of servers, clusters and other models are understood."""
    name = arguments[0]
    is_here = "--address" not in arguments and _model(arguments) in builtin_names()
    if name in LITTLE and is_here:
        little = [*LITTLE[name], *(FEW if "--num-samples" in arguments else [])]
        assert run(*arguments, *little) == 0
        return
    group: Any = typer.main.get_command(app)
    group.commands[name].make_context(name, arguments[1:])


def _model(arguments: list[str]) -> str:
    return arguments[arguments.index("--model") + 1] if "--model" in arguments else "emoji"


def _inputs(folder: Path) -> None:
    """What commands read, in the form of noise."""
    listed(folder / "prompts.jsonl", ["cat", "red heart"])
    (folder / "prompts.txt").write_text("cat\nred heart\n")
    noise = np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "photo.png")
    for name in ("unguided", "guided"):
        np.savez(folder / f"{name}.npz", noise.integers(0, 256, (16, 64, 64, 3), np.uint8))
    (folder / "training-pictures").mkdir()
    for number in range(16):
        pixels = noise.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "training-pictures" / f"{number}.png")


def test_nothing_is_skipped_that_is_not_there() -> None:
    all_blocks = [block for page in PAGES for block in blocks(page, "python")]
    for beginning in ELSEWHERE:
        assert any(block.startswith(beginning) for block in all_blocks), beginning
    text = "\n".join(all_blocks)
    for name in REPLACED:
        assert name in text, name


def test_every_column_of_the_manifest_is_documented() -> None:
    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    table = text[
        text.index("The manifest has these columns") : text.index("`manifest.parts` holds")
    ]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall("`([a-z0-9_]+)`", " ".join(first_cells))) == sorted(SCHEMA.names)
