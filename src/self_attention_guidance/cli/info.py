"""The command `info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .output import print_error, print_line, reason_of


def info_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="PNG or .npz files.")],
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all settings, as one JSON object per line.")
    ] = False,
) -> None:
    """Show how pictures were made.

    Without --json, it prints the text that web interfaces read, for files of samples, too. Pictures
    from other programs hold only that text.

    A file that can't be read is an error; the others are shown nevertheless.

    \b
    Examples:
      sag info out/00000-0.png
      sag info out/*.png --json
      sag info samples.npz
    """
    from ..generate import read_record, read_text
    from ..generate.metadata import text_of

    failed = False
    for file in files:
        try:
            if not file.is_file():
                raise ValueError(f"FILE={str(file)!r} does not exist")
            if as_json:
                # In ASCII: any terminal can show it, and any path.
                text = json.dumps({"path": str(file), **read_record(file)})
            elif file.suffix == ".npz":
                text = text_of(read_record(file)).strip()
            else:
                text = read_text(file)
        except (ValueError, OSError) as error:
            print_error(reason_of(error).removeprefix("path="))
            failed = True
            continue
        if len(files) > 1 and not as_json:
            print_line(f"{file}:")
        print_line(text)
    if failed:
        raise typer.Exit(2)
