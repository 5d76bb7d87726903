"""Models of the Hugging Face hub: their configs, without their weights. No heavy import."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from ..models.builtin import SETTINGS_FILE
from .classes import CLASSES_FILE

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pt")
_CONFIGS = (
    *("model_index.json", "config.json", "*/config.json", "*/scheduler_config.json"),
    *(SETTINGS_FILE, CLASSES_FILE),
)


def is_hub_id(model: str) -> bool:
    """Whether a name has the form of a hub id, "owner/name", and not that of a file of weights."""
    return _HUB_ID.fullmatch(model) is not None and Path(model).suffix not in _WEIGHTS


@functools.cache
def hub_folder(model: str) -> Path:
    """The folder of a model of the hub on this machine, with its configs, but perhaps no weights.

    They are downloaded if they are new. Without a network, those of an earlier download are used.

    Args:
        model: A hub id.

    Raises:
        ValueError: The hub has no such model that one may read, or cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download
    from tqdm.auto import tqdm

    class NoBar(tqdm):  # for some kilobytes
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))

    try:
        found = snapshot_download(model, allow_patterns=list(_CONFIGS), tqdm_class=NoBar)
        return Path(found)
    except errors.GatedRepoError as error:
        reason = "its page asks for consent: give it there, and log in with `hf auth login`"
        raise ValueError(_failed(model, reason)) from error
    except errors.RepositoryNotFoundError as error:
        reason = "there is none with this id, or it is private: log in with `hf auth login`"
        raise ValueError(_failed(model, reason)) from error
    except Exception as error:  # networks fail in all kinds of ways
        reason = "is the id right, the network there, HF_HUB_OFFLINE unset?"
        raise ValueError(_failed(model, reason)) from error


def _failed(model: str, reason: str) -> str:
    return (
        f"model={model!r} is no local folder or file and could not be loaded from the Hugging Face"
        f" hub ({reason}): give a local path, a hub id or a builtin model"
    )
