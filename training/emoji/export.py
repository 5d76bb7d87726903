"""Write the trained networks as one diffusers folder that loads plainly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import denoiser
from data import Picture


def load_average(checkpoint: Path, tokenizer: CLIPTokenizer) -> denoiser.Model:
    """The averaged weights of a training checkpoint."""
    model = denoiser.Model(tokenizer)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["ema"])
    model.unet.set_attn_processor(AttnProcessor2_0())
    return model.eval()


def assemble(
    model: denoiser.Model, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The pipeline that diffusers will load."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=denoiser.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def export(pipe: StableDiffusionPipeline, pictures: Sequence[Picture], folder: Path) -> None:
    """Save `pipe` in half precision, and the list of its captions, into `folder`."""
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    pipe.to(dtype=torch.float32)
    forget_origin(folder / "vae/config.json")
    declare_float32(folder / "text_encoder/config.json")
    name_text_weights(folder / "text_encoder/model.safetensors")
    write_slow_tokenizer(folder / "tokenizer")
    entries = {picture.caption: [picture.vendor, picture.code] for picture in pictures}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
    (folder / "vocabulary.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


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
