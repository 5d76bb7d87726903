"""Write the trained networks as one diffusers folder that loads plainly.

    python training/emoji_styles/export.py --work DIR --out FOLDER

`train.py` does so when it ends. This exports the last checkpoint while training goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import networks
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer


def assemble(work: Path, state: dict[str, Any]) -> StableDiffusionPipeline:
    """The averaged weights of a checkpoint or snapshot, as the pipeline that diffusers loads."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    model = networks.Model.new(tokenizer, state["channels"])
    model.load_state_dict(state["ema"])
    model.unet.set_attn_processor(AttnProcessor2_0())
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32),
        text_encoder=model.text_encoder.eval(),
        tokenizer=tokenizer,
        unet=model.unet.eval(),
        scheduler=networks.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def export(work: Path, folder: Path) -> None:
    """Save the pipeline in half precision into `folder`."""
    state = torch.load(work / "unet.pt", weights_only=True, map_location="cpu")
    assemble(work, state).to(dtype=torch.float16).save_pretrained(folder)
    forget_origin(folder / "vae/config.json")
    declare_float32(folder / "text_encoder/config.json")
    name_text_weights(folder / "text_encoder/model.safetensors")
    write_slow_tokenizer(folder / "tokenizer")


def forget_origin(config_file: Path) -> None:
    """Drop the path that the network was loaded from on the machine that trained it."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def declare_float32(config_file: Path) -> None:
    """Make transformers compute in float32, as diffusers does for the other networks.

    transformers 5 takes the precision of the weights if the configuration names it; diffusers
    always takes float32. A pipeline of both would stop at the first matrix product.
    """
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def name_text_weights(weights_file: Path) -> None:
    """Give the text encoder's weights the names that both transformers 4 and 5 load.

    transformers 5 saves them without the prefix, and transformers 4 then starts from random ones.
    """
    weights = load_file(weights_file)
    prefixed = {f"text_model.{name.removeprefix('text_model.')}": weights[name] for name in weights}
    save_file(prefixed, weights_file, metadata={"format": "pt"})


def write_slow_tokenizer(folder: Path) -> None:
    """Add vocab.json and merges.txt, which transformers 4 reads instead of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocab + "\n", encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")


def main() -> None:
    """Export the checkpoint in a training folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    options = parser.parse_args()
    export(options.work, options.out)


if __name__ == "__main__":
    main()
