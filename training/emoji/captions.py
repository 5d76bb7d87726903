"""Captions of the pictures, and the tokenizer that reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from data import STYLE_SUFFIX, Picture

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


def draw_caption(picture: Picture, rng: random.Random, keyword_share: float) -> str:
    """One caption of `picture` as training sees it.

    10 % are empty (for classifier-free guidance). `keyword_share` of them hold one or two
    keywords: three in five beside the label, the others alone. The rest is the own caption.
    """
    choice = rng.random()
    if choice < 0.10:
        return ""
    suffix = STYLE_SUFFIX[picture.vendor]
    if choice >= 0.10 + keyword_share or not picture.keywords:
        return picture.label + suffix
    few = rng.sample(picture.keywords, k=min(len(picture.keywords), rng.randint(1, 2)))
    if choice < 0.10 + 0.6 * keyword_share:
        return ", ".join([picture.label, *few]) + suffix
    return ", ".join(few) + suffix
