"""A hook of mkdocs: the reference of the command line, written from the commands themselves."""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

import typer

from self_attention_guidance.cli import app

MARK = "<!-- commands -->"
# The type of a value, "<int range>" say; the text of the option has its limits.
_TYPE = re.compile(r"(?<= )<(?:list\[)?(\w+)[^>]*>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference where a page asks for it."""
    return markdown.replace(MARK, reference()) if MARK in markdown else markdown


def reference() -> str:
    """Every command with its arguments, options and examples, in Markdown."""
    group: Any = typer.main.get_command(app)
    return "\n\n".join(_section(name, command) for name, command in group.commands.items())


def _section(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["sag", name, *command.collect_usage_pieces(context)])
    text, _, examples = (command.help or "").partition("\b\n")
    parts = [f"## sag {name}", text.strip(), f"```text\n{usage}\n```"]
    if examples:
        lines = textwrap.dedent(examples.split("\n", 1)[1]).strip()
        parts.append(f"```bash\n{lines}\n```")
    for title in ("argument", "option"):
        chosen = [each for each in command.params if each.param_type_name == title]
        rows = [_row(*record) for each in chosen if (record := each.get_help_record(context))[1]]
        if rows:
            head = f"| {title.capitalize()} | |\n| --- | --- |"
            parts.append("\n".join([head, *rows]))
    return "\n\n".join(parts)


def _row(name: str, text: str) -> str:
    return f"| `{_TYPE.sub(lambda found: found[1].upper(), name)}` | {_cell(text)} |"


def _cell(text: str) -> str:
    """Text of one cell: no line ends, and no sign that Markdown would read."""
    return re.sub(r"([|*_\[])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
