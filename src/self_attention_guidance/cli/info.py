"""The command `info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def info_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="PNG or .npz files.")],
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all settings, as one JSON object per line.")
    ] = False,
) -> None:
    """Show how pictures were made.

    Without --json, it prints the text that web interfaces read. Pictures from other programs hold
    only that text.

    \b
    Examples:
      sag info out/00000-0.png
      sag info out/*.png --json
    """
    from ..generate import read_record, read_text

    for file in files:
        if not file.is_file():
            raise ValueError(f"FILE={str(file)!r} does not exist")
        if as_json or file.suffix == ".npz":
            typer.echo(json.dumps({"path": str(file), **read_record(file)}, ensure_ascii=False))
            continue
        if len(files) > 1:
            typer.echo(f"{file}:")
        typer.echo(read_text(file))
