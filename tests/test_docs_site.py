"""The web site of the documentation: what its hooks write."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from self_attention_guidance.cli import app

DOCS = Path(__file__).parents[1] / "docs"
GROUP: Any = typer.main.get_command(app)


def hook(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """The sections of the command line reference, by their commands."""
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    written = hook("commands").on_page_markdown(page)
    assert hook("commands").MARK not in written
    parts = re.split(r"^## sag (\S+)$", written, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_reference_has_every_command(reference: dict[str, str]) -> None:
    assert list(reference) == list(GROUP.commands)


@pytest.mark.parametrize("name", GROUP.commands)
def test_the_reference_has_every_option_and_example(name: str, reference: dict[str, str]) -> None:
    command = GROUP.commands[name]
    section = reference[name]
    for parameter in command.params:
        words = parameter.opts if parameter.param_type_name == "option" else []
        for word in words:
            assert re.search(rf"^\| `[^`]*{word}\b", section, re.MULTILINE), word
    for line in re.findall(rf"^ +(sag {name} .*)$", command.help, re.MULTILINE):
        assert line in section
    assert not re.search(r"[\b]|<\w", section)


def test_formulas_are_drawn_without_a_script() -> None:
    html = (
        r'<p><span class="arithmatex">\(x_t &gt; \psi\)</span> and</p>'
        r'<div class="arithmatex">\[\frac{a}{b}\]</div>'
    )
    drawn = hook("formulas").on_page_content(html)
    assert drawn.count("<math ") == 2
    assert 'display="block"' in drawn
    assert "<mfrac>" in drawn
    assert "arithmatex" not in drawn
    assert "\\" not in drawn


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_formulas_of_pages_can_be_drawn(page: Path) -> None:
    """What the converter does not know, it leaves in the text."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    convert = hook("formulas").convert
    for formula in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, re.DOTALL):
        drawn = convert(formula[0] or formula[1])
        assert "\\" not in drawn, formula
