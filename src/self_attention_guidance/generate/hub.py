"""Models of the Hugging Face hub: their configs, without their weights. No heavy import."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.builtin import SETTINGS_FILE
from .classes import CLASSES_FILE

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_OF_WEIGHTS = re.compile(r".*\.(safetensors|sft|ckpt|bin|pt|pth|gguf)", re.IGNORECASE)
_INDEXES = ("model_index.json", "config.json")
_CONFIG = re.compile(r"[^/]+/(config|scheduler_config)\.json")
_SECONDS_TO_ANSWER = 10


@dataclass(frozen=True)
class HubModel:
    """What is known of a model of the hub before its weights are downloaded.

    Attributes:
        folder: Its folder on this machine, with its configs, but perhaps no weights.
        files: Paths of all its files on the hub; empty if the hub could not be asked.
    """

    folder: Path
    files: Sequence[str] = ()


def is_hub_id(model: str) -> bool:
    """Whether a name has the form of a hub id, "owner/name", and not that of a file of weights."""
    return bool(_HUB_ID.fullmatch(model)) and not _OF_WEIGHTS.fullmatch(model)


@functools.cache
def hub_model(model: str) -> HubModel:
    """Find a model of the hub, and download its configs if they are new.

    If the hub can't be asked, an earlier download is used.

    Args:
        model: A hub id.

    Raises:
        ValueError: The hub has no such model that one may read; or it can't be asked, and there is
            no earlier download.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    before = _earlier_download(model)
    try:
        info = HfApi().model_info(model, timeout=_SECONDS_TO_ANSWER)
        files = [each.rfilename for each in info.siblings or ()]
        configs = [file for file in files if _is_config(file)]
        if before and before.name == info.sha and all((before / f).is_file() for f in configs):
            return HubModel(before, files)
        found = snapshot_download(model, allow_patterns=configs, tqdm_class=_no_bar())
        return HubModel(Path(found), files)
    except errors.GatedRepoError as error:
        reason = "its page asks for consent: give it there, and log in with `hf auth login`"
        failure = error
    except errors.RepositoryNotFoundError as error:
        reason = "there is none with this id, or it is private: log in with `hf auth login`"
        raise ValueError(_failed(model, reason)) from error
    except errors.OfflineModeIsEnabled as error:
        reason, failure = "HF_HUB_OFFLINE is set, and it was not downloaded before", error
    except Exception as error:  # networks and disks fail in all kinds of ways
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        reason, failure = f"is the network there? {line}", error
    if before is None:
        raise ValueError(_failed(model, reason)) from failure
    return HubModel(before)


def _earlier_download(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = (try_to_load_from_cache(model, name) for name in _INDEXES)
        return next((Path(each).parent for each in found if isinstance(each, str)), None)
    except HFValidationError as error:
        raise ValueError(f"model={model!r} does not exist, and is no hub id: {error}") from error


def _is_config(file: str) -> bool:
    return file in (*_INDEXES, SETTINGS_FILE, CLASSES_FILE) or bool(_CONFIG.fullmatch(file))


def _no_bar() -> Any:
    """A class of progress bars that show nothing: configs have some kilobytes."""
    from tqdm.auto import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))

    return NoBar


def _failed(model: str, reason: str) -> str:
    return (
        f"model={model!r} is no local folder or file and could not be loaded from the Hugging Face"
        f" hub ({reason}): give a local path, a hub id or a builtin model"
    )
