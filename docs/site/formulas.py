"""A hook of mkdocs: formulas in LaTeX become MathML, which browsers draw without any script.

`$x_t$` stands in a line, and `$$ ... $$` stands alone. GitHub reads both, too.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# As pymdownx.arithmatex writes them with `generic: true`.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Convert the formulas of a page, each in a box that scrolls where it is too wide."""

    def converted(match: re.Match[str]) -> str:
        tag, opened, formula = match[1], match[2], html.unescape(match[3])
        display = "block" if opened == "[" else "inline"
        return f'<{tag} class="formula">{convert(formula, display=display)}</{tag}>'

    return _FORMULA.sub(converted, content)
