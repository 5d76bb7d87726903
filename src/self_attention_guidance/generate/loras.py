"""LoRA files on a pipeline, and texts that name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checks import check_finite, parse_number


def parse_lora(text: str) -> tuple[str, float]:
    """Read "style.safetensors" or "style.safetensors:0.8"; needs no heavy import.

    Args:
        text: A file, and after a colon its scale; 1 by default.

    Returns:
        The file and the scale.

    Raises:
        ValueError: The file does not exist, or the scale is not a finite number.
    """
    path, colon, scale = text.rpartition(":")
    # A colon may also follow the letter of a drive.
    if not colon or {"/", "\\"} & set(scale) or Path(text).is_file():
        path, scale = text, "1"
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"lora={text!r} must be FILE.safetensors or FILE.safetensors:SCALE")
    if not Path(path).is_file():
        raise ValueError(f"lora={path!r} does not exist")
    try:
        return path, float(check_finite("scale", parse_number(scale, float)))
    except ValueError:
        raise ValueError(f"lora={text!r}: the scale {scale!r} must be a finite number") from None


def add_loras(pipeline: Any, loras: Sequence[tuple[str, float]]) -> None:
    """Load LoRA files into a pipeline, and store their names in its `loras`.

    Args:
        pipeline: A pipeline for prompts.
        loras: Files and scales; their effects add up.

    Raises:
        ValueError: The pipeline takes no LoRAs, or no weight of a file fits it.
    """
    pipeline.loras = [list(each) for each in loras]
    if not loras:
        return
    kind = type(pipeline).__name__.removeprefix("Guided")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"lora must not be given: {kind} takes none")
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        try:
            folder, file = Path(path).parent, Path(path).name
            pipeline.load_lora_weights(folder, weight_name=file, adapter_name=name)
        except Exception as error:  # libraries raise all kinds of errors for files that don't fit
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"lora={path!r} can't be loaded into {kind}: {reason}") from error
        # diffusers silently loads a file without any fitting weight.
        if not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
            raise ValueError(f"lora={path!r} holds no weight that fits {kind}")
    pipeline.set_adapters(names, [scale for _, scale in loras])
