"""The command `convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .output import print_line

_KINDS = ("adm", "iddpm", "dit", "classifier")


def convert_command(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="adm, iddpm, dit or classifier.")],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The original file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the model.")],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON: the arguments of the original script."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The published file's name, for a renamed one; an unknown name lists them.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")
    ] = False,
) -> None:
    """Convert an original checkpoint to a folder in diffusers format and print its path.

    No code in the checkpoint is ever run. Published files are recognized by name.

    \b
    Examples:
      sag convert adm 256x256_diffusion_uncond.pt ./imagenet256-uncond
      sag convert classifier renamed.pt ./classifier --preset 128x128_classifier
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(_KINDS)}")
    _check_paths(checkpoint, out, overwrite)
    if config is not None and preset is not None:
        raise ValueError("config and preset must not both be given")
    chosen = preset if config is None else _read_config(config)

    from ..models.originals import preset_names

    names = preset_names(kind)
    if preset is not None and preset not in names:
        raise ValueError(f"preset={preset!r} must be one of {', '.join(names)}")
    if chosen is None and checkpoint.stem not in names:
        raise ValueError(
            f"{checkpoint.name!r} is not the name of a published file of {kind}: give --preset with"
            f" the file that it was, or --config; published are {', '.join(names)}"
        )

    from ..models.originals import convert_original

    print_line(convert_original(cast("Any", kind), checkpoint, out, chosen))


def _check_paths(checkpoint: Path, out: Path, overwrite: bool) -> None:
    if not checkpoint.is_file():
        raise ValueError(f"checkpoint={str(checkpoint)!r} must be a file: there is none")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(
            f"out: {str(out)!r} exists and is not empty: choose another place, or overwrite it"
            " with --overwrite"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"config={str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config={str(path)!r} must hold a JSON object")
    return config  # pyright: ignore[reportUnknownVariableType]  # JSON's names are texts
