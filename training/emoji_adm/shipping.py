"""Write the trained network as a folder that `ADMPipeline` loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import UNet2DModel

from classes import CLASSES, NULL_LABEL
from network import build_scheduler

SHIPPED = Path(__file__).parents[2] / "src/self_attention_guidance/models/builtin/emoji-adm"
MODEL_INDEX = {
    "_class_name": "ADMPipeline",
    "_diffusers_version": "0.42.1",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "classifier": [None, None],
    "null_label": NULL_LABEL,
}


def export(unet: UNet2DModel, folder: Path) -> None:
    """Save `unet` in half precision, its schedule and the names of its classes into `folder`."""
    unet.to(dtype=torch.float16).save_pretrained(folder / "unet")
    unet.to(dtype=torch.float32)
    build_scheduler().save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "classes.json", list(CLASSES))


def write_json(file: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
