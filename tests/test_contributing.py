"""The worked examples of CONTRIBUTING pass the tests that they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from self_attention_guidance import __version__
from self_attention_guidance.denoiser import families
from self_attention_guidance.guidance import base
from test_documentation import blocks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names() -> Any:
    """What the blocks of the page define, read one after the other."""
    found: dict[str, Any] = {"__name__": "contributing"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "METHODS", dict(base.METHODS))
        patch.setattr(families, "FAMILIES", dict(families.FAMILIES))
        for block in blocks(ROOT / "CONTRIBUTING.md", "python"):
            exec(compile(block, "CONTRIBUTING.md", "exec"), found)
        yield found


TESTS = [
    "test_row_blur_guides_and_leaves_no_trace",
    "test_the_denoiser_is_guided_without_a_trace",
]


@pytest.mark.parametrize("test", TESTS)
def test_an_example_passes_its_own_test(names: dict[str, Any], test: str) -> None:
    names[test]()


def test_the_example_is_a_method_of_the_command_line_then(names: dict[str, Any]) -> None:
    made = base.Guidance.from_dict({"method": "row-blur", "scale": 0.5})
    assert isinstance(made, names["RowBlurGuidance"])


def test_every_test_of_the_page_is_run(names: dict[str, Any]) -> None:
    assert [name for name in names if name.startswith("test_")] == TESTS


def test_the_release_has_one_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")
    ]
    assert headings[1].startswith(f"## [{__version__}]")
