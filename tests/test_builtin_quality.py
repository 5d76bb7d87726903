"""The shipped model `emoji`: its files, how it loads, and whether it draws what is asked for.

The reference pictures are 16x16 thumbnails of the training pictures (Google Noto emoji,
Apache-2.0; Twitter Twemoji, CC-BY 4.0), written by training/emoji/reference.py.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

import self_attention_guidance

FOLDER = Path(self_attention_guidance.__file__).parent / "models" / "builtin" / "emoji"
REFERENCE = Path(__file__).parent / "data" / "emoji_reference.npz"
DRAWS = 20


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def drawn(pipe: StableDiffusionPipeline) -> tuple[list[str], list[Image.Image]]:
    """Twenty captions drawn from the vocabulary, and what the model makes of them."""
    captions = random.Random(2024).sample(sorted(vocabulary()), k=DRAWS)
    generators = [torch.Generator().manual_seed(seed) for seed in range(DRAWS)]
    images = pipe(captions, guidance_scale=3.0, num_inference_steps=25, generator=generators).images
    return captions, images


def vocabulary() -> dict[str, list[str]]:
    return json.loads((FOLDER / "vocabulary.json").read_text(encoding="utf-8"))


def test_files_are_small_and_safe() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert sum(file.suffix == ".safetensors" for file in files) == 3


def test_no_file_tells_where_it_was_made() -> None:
    for file in FOLDER.rglob("*config.json"):
        assert "_name_or_path" not in json.loads(file.read_text(encoding="utf-8")), file


def test_loads_plainly_in_float32(pipe: StableDiffusionPipeline) -> None:
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {network.dtype for network in networks} == {torch.float32}


def test_text_weights_have_the_names_that_every_transformers_loads() -> None:
    with safe_open(FOLDER / "text_encoder/model.safetensors", framework="pt") as weights:
        assert all(name.startswith("text_model.") for name in weights.keys())  # noqa: SIM118


def test_loads_in_the_precision_asked_for() -> None:
    loaded = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    image = loaded("red heart", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()


def test_default_size_is_64(drawn: tuple[list[str], list[Image.Image]]) -> None:
    assert {image.size for image in drawn[1]} == {(64, 64)}


def test_reference_is_of_the_vocabulary() -> None:
    assert np.load(REFERENCE)["captions"].tolist() == list(vocabulary())


def test_vocabulary_is_wide_and_short_enough(pipe: StableDiffusionPipeline) -> None:
    lengths = [len(tokens) for tokens in pipe.tokenizer(list(vocabulary())).input_ids]
    assert len(lengths) >= 300
    assert max(lengths) <= pipe.tokenizer.model_max_length


def test_draws_what_the_caption_says(drawn: tuple[list[str], list[Image.Image]]) -> None:
    """Among all pictures, the caption's own is one of the five nearest to most samples."""
    captions, images = drawn
    reference = np.load(REFERENCE)
    names, thumbnails = reference["captions"].tolist(), reference["thumbnails"].astype(np.float64)
    ranks = [
        rank_of(thumbnails, names.index(caption), np.asarray(image.reduce(4), dtype=np.float64))
        for caption, image in zip(captions, images, strict=True)
    ]
    assert sum(rank < 5 for rank in ranks) >= 12, dict(zip(captions, ranks, strict=True))


def rank_of(thumbnails: np.ndarray, own: int, image: np.ndarray) -> int:
    """How many reference pictures are nearer to `image` than the one at `own`."""
    distances = np.square(thumbnails - image).sum((1, 2, 3))
    return int((distances < distances[own]).sum())


def test_an_image_depends_on_its_own_seed_only(
    pipe: StableDiffusionPipeline, drawn: tuple[list[str], list[Image.Image]]
) -> None:
    captions, images = drawn
    alone = pipe(
        captions[3],
        guidance_scale=3.0,
        num_inference_steps=25,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    difference = np.asarray(alone, dtype=float) - np.asarray(images[3], dtype=float)
    assert np.abs(difference).max() <= 2  # batched kernels round differently
