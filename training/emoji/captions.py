"""Captions of the pictures, and the tokenizer that reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from data import STYLE_SUFFIX, Picture
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

VOCABULARY_SIZE = 2200
MAX_TOKENS = 32


def train_tokenizer(pictures: Sequence[Picture]) -> CLIPTokenizer:
    """A byte-level BPE in `CLIPTokenizer` form, learned from every label and keyword."""
    texts = [text for picture in pictures for text in (picture.caption, *picture.keywords)]
    learned = CLIPTokenizer().train_new_from_iterator(
        texts, vocab_size=VOCABULARY_SIZE, initial_alphabet=ByteLevel.alphabet()
    )
    learned.model_max_length = MAX_TOKENS
    return learned


def draw_caption(picture: Picture, rng: random.Random) -> str:
    """One caption of `picture` as training sees it.

    10 % are empty (for classifier-free guidance), 65 % the picture's own caption, 15 % have
    one or two keywords beside the label, 10 % are keywords alone.
    """
    choice = rng.random()
    if choice < 0.10:
        return ""
    suffix = STYLE_SUFFIX[picture.vendor]
    if choice < 0.75 or not picture.keywords:
        return picture.label + suffix
    few = rng.sample(picture.keywords, k=min(len(picture.keywords), rng.randint(1, 2)))
    if choice < 0.90:
        return ", ".join([picture.label, *few]) + suffix
    return ", ".join(few) + suffix
