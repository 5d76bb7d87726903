"""What a single .safetensors file holds, by the names of its tensors. No heavy import."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from .parts import refuse_unfit_parts

_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
# What else is published as one file, by a name of its tensors; the first that fits counts.
_OTHERS = {
    r"lora": "a LoRA, which is given beside the model it was trained for",
    r"conditioner\.embedders\.": "a Stable Diffusion XL model: give its folder in diffusers format",
    r"control_model\.|controlnet_|input_hint_block": "a ControlNet",
    r"^(model\.diffusion_model\.)?(double|joint|transformer|single_transformer)_blocks\.": (
        "a transformer: give the folder of its pipeline"
    ),
    r"^(down_blocks|input_blocks|model\.diffusion_model)\.": (
        "a network alone: give the folder of its pipeline"
    ),
    r"^(first_stage_model\.|(encoder|decoder)\.(conv_in|down|mid|up))": "a VAE",
    r"^(text_model|embeddings|encoder|cond_stage_model)\.": "a text encoder",
}


# What the library for .safetensors files reads at most.
_LONGEST_HEADER = 100_000_000


def check_single_file(model: str, path: Path) -> None:
    """Refuse a file that is not a whole Stable Diffusion 1 or 2 model for text to image.

    Args:
        model: As the user named it, for the message.
        path: A .safetensors file. One that can't be read is left to the loader, which says why.

    Raises:
        ValueError: It is another file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content: object = json.loads(file.read(length) if length < _LONGEST_HEADER else "")
    except (OSError, ValueError, RecursionError):
        return
    tensors = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    names = [name for name in tensors if name != "__metadata__"]
    first = tensors.get(_FIRST_LAYER)
    is_xl = any(name.startswith("conditioner.") for name in names)
    if isinstance(first, dict) and not is_xl:
        shape: Any = cast("dict[str, Any]", first).get("shape")
        channels = shape[1] if isinstance(shape, list) and len(cast("list[int]", shape)) == 4 else 4
        unet = {"_class_name": "UNet2DConditionModel", "in_channels": channels}
        refuse_unfit_parts(model, {"unet": unet, "vae": {"_class_name": "AutoencoderKL"}})
        return
    held = (text for rule, text in _OTHERS.items() if any(re.search(rule, n) for n in names))
    what = next(held, "something else" if names else "no weights")
    raise ValueError(
        f"model={model!r} must hold a whole Stable Diffusion 1 or 2 model, with VAE and text"
        f" encoder: it holds {what}"
    )
