"""The end of a prompt that is too long for a model's text encoders."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase


def unread_part(pipeline: Any, prompt: str) -> str:
    """The end of a prompt that no text encoder of a model reads; empty if all of it is read.

    Args:
        pipeline: A pipeline with tokenizers.
        prompt: A prompt or a negative prompt.
    """
    tokenizers = [
        each for each in pipeline.components.values() if isinstance(each, PreTrainedTokenizerBase)
    ]
    # For CLIP's tokenizers, the limit is always the model's length.
    longest = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    limits = (
        each.model_max_length
        if longest is None or "CLIP" in type(each).__name__
        else min(each.model_max_length, longest.default)
        for each in tokenizers
    )
    pairs = zip(tokenizers, limits, strict=True)
    return min((_rest(prompt, each, int(limit)) for each, limit in pairs), key=len, default="")


def _rest(prompt: str, tokenizer: Any, limit: int) -> str:
    """The tokens of a prompt after the first `limit`, as text."""
    tokens: list[int] = tokenizer(prompt, truncation=False, verbose=False).input_ids
    if len(tokens) <= limit:
        return ""
    # The tokens that end every text also end the cut one.
    kept = tokenizer(prompt, truncation=True, max_length=limit).input_ids
    shared = next((n for n, (a, b) in enumerate(zip(kept, tokens, strict=False)) if a != b), limit)
    return str(tokenizer.decode(tokens[shared:], skip_special_tokens=True)).strip()
