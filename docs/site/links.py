"""A hook of mkdocs: pages that live elsewhere in the repository, and links to what has no page."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages of the site that are files outside docs.
PAGES = {
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "benchmarks.md": ROOT / "benchmarks/README.md",
    "models/emoji.md": ROOT / "src/self_attention_guidance/models/builtin/emoji/README.md",
    "models/emoji-adm.md": ROOT / "src/self_attention_guidance/models/builtin/emoji-adm/README.md",
    "models/emoji-styles.md": ROOT
    / "src/self_attention_guidance/models/builtin/emoji-styles/README.md",
    "models/encoder.md": ROOT / "src/self_attention_guidance/evaluate/emoji_encoder/README.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for name, path in PAGES.items():
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to pages of the site; what has none, such as code, becomes plain text."""
    source = PAGES.get(page.file.src_uri, DOCS / page.file.src_uri)

    def changed(match: re.Match[str]) -> str:
        is_picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        found = (source.parent / target).resolve()
        names = [name for name, path in PAGES.items() if path == found]
        if found == ROOT / "README.md":
            names, anchor = ["index.md"], ""
        if not names and found.is_relative_to(DOCS):
            names = [found.relative_to(DOCS).as_posix()]
        if not names:
            return "" if is_picture else text
        here = Path(page.file.src_uri).parent
        return f"{is_picture}[{text}]({os.path.relpath(names[0], here)}{anchor})"

    return _LINK.sub(changed, markdown)
