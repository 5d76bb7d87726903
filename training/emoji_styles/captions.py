"""Captions of the pictures, and the tokenizer that reads them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer

from data import BACKGROUNDS, STYLES, Picture, caption

VOCABULARY_SIZE = 2600
MAX_TOKENS = 20
# The last part of the caption of a picture that is shown in a mirror.
MIRRORED = "mirrored"
MIRRORED_SHARE = 0.5
EMPTY_SHARE = 0.10
SYNONYM_SHARE = 0.15
# A caption may leave its style or its background open: "fox" alone should work, too.
OPEN_SHARE = 0.05
# A keyword that more things share is no other name of a thing: "animal", "face".
MOST_SHARED = 2
# Nor is a shorter one: "at", "c".
SHORTEST_SYNONYM = 3


def train_tokenizer(pictures: Iterable[Picture]) -> CLIPTokenizer:
    """A byte-level BPE in `CLIPTokenizer` form, learned from every caption and keyword."""
    names = {picture.label: picture.keywords for picture in pictures}
    endings = [
        f"{caption('', style, background)}, {MIRRORED}"
        for style in STYLES
        for background in BACKGROUNDS
    ]
    texts = [text for label, keywords in names.items() for text in (label, *keywords)]
    # The endings as often as in a caption of each thing, so that every word of them is a token.
    learned = CLIPTokenizer().train_new_from_iterator(
        [*texts, *endings * 20], vocab_size=VOCABULARY_SIZE, initial_alphabet=ByteLevel.alphabet()
    )
    learned.model_max_length = MAX_TOKENS
    return learned


class CaptionWriter:
    """Draws captions as training sees them."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        """`pictures` are all that the model learns: they say which keywords are rare."""
        keywords = {picture.label: picture.keywords for picture in pictures}
        uses = Counter(word for words in keywords.values() for word in set(words))
        self.synonyms = {
            label: [
                word
                for word in words
                if uses[word] <= MOST_SHARED
                and len(word) >= SHORTEST_SYNONYM
                and word not in keywords
            ]
            for label, words in keywords.items()
        }

    def draw(self, picture: Picture, background: str, mirrored: bool, rng: random.Random) -> str:
        """One caption, whole or with a part changed.

        Mirrored pictures say so, and thus teach more shapes without being drawn unasked.
        """
        name = picture.label
        if self.synonyms[name] and rng.random() < SYNONYM_SHARE:
            name = rng.choice(self.synonyms[name])
        parts = [name]
        if rng.random() >= OPEN_SHARE:
            parts.append(picture.style)
        if rng.random() >= OPEN_SHARE:
            parts.append(f"on {background}")
        if mirrored:
            parts.append(MIRRORED)
        return ", ".join(parts)


class Reader:
    """Token numbers of captions. Each caption is read once: large batches would wait for it."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        """Reads with `tokenizer`."""
        self.tokenizer = tokenizer
        self.known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token numbers, (captions, 20) int64."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            tokens = self.tokenizer(
                new,
                padding="max_length",
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).input_ids
            self.known.update(zip(new, tokens, strict=True))
        return torch.stack([self.known[text] for text in texts])
