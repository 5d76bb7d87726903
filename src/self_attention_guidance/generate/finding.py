"""Search for models and classifiers by name, without loading them. No heavy import."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from ..models.builtin import (
    RecommendedSettings,
    builtin_folder,
    builtin_names,
    recommended_settings,
)
from .hub import hub_model, is_hub_id
from .parts import STABLE_DIFFUSION, Parts, refuse_unfit_parts, refuse_unfit_pixel_parts
from .single_file import check_single_file

PIXEL_NETWORK = "UNet2DModel"
PIXEL_CLASSES = ("ADMPipeline", "DDPMPipeline", "DDIMPipeline", PIXEL_NETWORK)

IndexCheck = Callable[[str, Mapping[str, Any], Path], object]
"""Called with a model's name, the content of its `model_index.json` and its folder."""


def find_model(model: str) -> tuple[str, bool]:
    """Find the model of a name, without loading it.

    Args:
        model: As in `load_pipeline`.

    Returns:
        A folder, a file or a hub id; and whether it is a file.

    Raises:
        ValueError: It is none of these, or cannot be loaded.
    """
    path = Path(os.path.expanduser(model))
    if model not in builtin_names() and path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise ValueError(
                f"model={model!r}: a single file must be a .safetensors file, because other"
                " checkpoints can run code when they are loaded; convert it to safetensors"
            )
        check_single_file(model, path)
        return str(path.resolve()), True
    return find_folder(model, check_prompt_index, "a .safetensors file, "), False


def find_pixel_model(model: str) -> str:
    """Find the pixel-space model of a name, without loading it.

    Args:
        model: As in `load_pixel_model`.

    Returns:
        A folder or a hub id.

    Raises:
        ValueError: It is neither, or cannot be loaded.
    """
    if model not in builtin_names() and Path(os.path.expanduser(model)).is_file():
        raise ValueError(
            f"model={model!r} is a file: give a folder; `sag convert` makes one of an original"
            " checkpoint"
        )
    return find_folder(model, check_pixel_index)


def find_prompt_or_pixel_model(model: str) -> str:
    """Find the model of either kind with a name, without loading it.

    Args:
        model: As in `load_pixel_model` or in `load_pipeline`.

    Returns:
        A folder, a file or a hub id.

    Raises:
        ValueError: It is none of these, or cannot be loaded.
    """
    return find_pixel_model(model) if is_pixel_model(model) else find_model(model)[0]


def find_folder(model: str, check_index: IndexCheck, or_else: str = "") -> str:
    """Find the model in diffusers format with a name, without loading it.

    Args:
        model: Name of a builtin model, a folder, or a hub id.
        check_index: Raises `ValueError` if the model is of another kind.
        or_else: What else the caller accepts, for the message.

    Returns:
        A folder or a hub id.

    Raises:
        ValueError: It is neither, or cannot be loaded.
    """
    folder = model_folder(model, or_else)
    index = model_index(model, folder)
    check_index(model, index, folder)
    _refuse_missing_files(model, index, folder)
    try:
        recommended_settings(folder)
    except ValueError as error:
        raise ValueError(f"model={model!r}: {error}") from error
    return model if _is_of_hub(model) else str(folder)


def model_folder(model: str, or_else: str = "") -> Path:
    """The folder of a model in diffusers format, on this machine.

    Args:
        model: As in `find_folder`. Of a model of the hub, the configs are downloaded, no weights.
        or_else: As in `find_folder`.

    Raises:
        ValueError: There is no such model.
    """
    if _is_of_hub(model):
        return hub_model(model).folder
    path = _local_path(model)
    if path.is_dir():
        return path.resolve()
    near = difflib.get_close_matches(model.lower(), builtin_names(), n=1)
    raise ValueError(
        f"model={model!r} does not exist: "
        + (f"did you mean {near[0]}? " if near else "")
        + f"give a folder in diffusers format, {or_else}"
        f"a hub id (owner/name), or a builtin model ({_names()})"
    )


def recommended_by(source: str) -> RecommendedSettings:
    """Read what a model recommends.

    Args:
        source: The folder, file or hub id that was found. A file recommends nothing.

    Raises:
        ValueError: As in `recommended_settings`.
    """
    if os.path.isfile(source):
        return RecommendedSettings()
    return recommended_settings(model_folder(source))


def find_classifier(folder: str | Path) -> Path:
    """Check the folder of a classifier, without loading it.

    Args:
        folder: The folder that `save_pretrained` of a `NoisyClassifier` wrote.

    Returns:
        The folder.

    Raises:
        ValueError: It is no such folder.
    """
    path = Path(os.path.expanduser(folder))
    if not (path / "config.json").is_file():
        raise ValueError(
            f"classifier={str(folder)!r} must be a folder that `sag convert classifier` wrote"
        )
    return path


def is_pixel_model(model: str) -> bool:
    """Whether a name stands for a pixel-space model; not if there is no such folder.

    Args:
        model: As in `load_pixel_model`, or in `load_pipeline`.

    Raises:
        ValueError: It is the id of a model of the hub that can't be read.
    """
    try:
        return model_index(model, model_folder(model)).get("_class_name") in PIXEL_CLASSES
    except ValueError:
        if _is_of_hub(model):
            raise
        return False


def is_bare_network(folder: str | Path) -> bool:
    """Whether a folder holds a network alone, without a pipeline's scheduler and other parts."""
    path = Path(folder)
    return (path / "config.json").is_file() and not (path / "model_index.json").exists()


def model_index(model: str, folder: Path) -> dict[str, Any]:
    """The content of a folder's `model_index.json`, or of a bare network's config.

    Args:
        model: As the user named it, for the message.
        folder: A folder in diffusers format.

    Raises:
        ValueError: There is none, or it can't be read.
    """
    name = "config.json" if is_bare_network(folder) else "model_index.json"
    return _json_object(model, folder / name, "it must be as save_pretrained writes it")


def check_prompt_index(model: str, index: Mapping[str, Any], folder: Path) -> None:
    """Refuse models that take no prompts, or need more than prompts, if their files show it.

    Args:
        model: As the user named it, for the message.
        index: The content of its `model_index.json`.
        folder: Folder of its configs.

    Raises:
        ValueError: It is such a model.
    """
    name = str(index.get("_class_name"))
    if is_bare_network(folder) and name != PIXEL_NETWORK:
        raise ValueError(
            f"model={model!r} is a network alone ({name}), without what reads prompts and decodes"
            " pictures: give the folder of its pipeline"
        )
    if name in PIXEL_CLASSES:
        raise ValueError(
            f"model={model!r} is a pixel-space model ({name}), which takes no prompts: draw from"
            " it with `sag sample`"
        )
    refuse_unfit_parts(model, _parts_of(model, index, folder))


def check_pixel_index(model: str, index: Mapping[str, Any], folder: Path) -> None:
    """Refuse models that are not pixel-space models.

    Args:
        model: As the user named it, for the message.
        index: The content of its `model_index.json`, or of a bare network's config.
        folder: Folder of its configs.

    Raises:
        ValueError: It is of another class.
    """
    class_name = index.get("_class_name")
    if class_name in PIXEL_CLASSES:
        is_bare = class_name == PIXEL_NETWORK
        parts = {"unet": index} if is_bare else _parts_of(model, index, folder)
        refuse_unfit_pixel_parts(model, parts)
        return
    if is_stable_diffusion(index):
        raise ValueError(
            f"model={model!r} is a Stable Diffusion model: draw from it with `sag generate`"
        )
    raise ValueError(
        f"model={model!r} is of the class {class_name}: it must be one of"
        f" {', '.join(PIXEL_CLASSES)}"
    )


def is_stable_diffusion(index: Mapping[str, Any]) -> bool:
    """Whether a `model_index.json` lists components of Stable Diffusion 1 and 2 only.

    Args:
        index: Its content.
    """
    components = {key for key in index if not key.startswith("_")}
    return {"unet", "text_encoder"} <= components <= STABLE_DIFFUSION


def loading_failed(model: str, error: Exception) -> str:
    """Explain in one line why a model could not be loaded.

    Args:
        model: As the user gave it.
        error: The error of the libraries.
    """
    reason = f"{type(error).__name__}: {_one_line(error)}"
    if isinstance(error, NotImplementedError) and "meta tensor" in reason:
        reason = "weights are missing: it is damaged, or of another model"
    return f"model={model!r} cannot be loaded: {reason}"


def _local_path(model: str) -> Path:
    return builtin_folder(model) if model in builtin_names() else Path(os.path.expanduser(model))


def _is_of_hub(model: str) -> bool:
    return is_hub_id(model) and not _local_path(model).exists()


def _refuse_missing_files(model: str, index: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model without the folder of a part, or without weights of its denoiser."""
    if _is_of_hub(model):
        files = hub_model(model).files
        if not files:  # the hub could not be asked
            return
    else:
        files = [f"{each.parent.name}/{each.name}" for each in folder.glob("*/*")]
        files += [each.name for each in folder.glob("*.safetensors")]
    parts = () if is_bare_network(folder) else _parts_of(model, index, folder)
    for part in parts:
        if not any(file.startswith(f"{part}/") for file in files):
            raise ValueError(
                f"model={model!r} cannot be loaded: it has no folder {part!r}, which its index"
                " names"
            )
    weights = [file for file in files if file.endswith(".safetensors")]
    denoiser = next((part for part in ("unet", "transformer") if part in parts), None)
    if is_bare_network(folder) and not weights:
        raise ValueError(
            f"model={model!r} cannot be loaded: it has no weights in .safetensors files"
        )
    if denoiser is not None and not any(file.startswith(f"{denoiser}/") for file in weights):
        raise ValueError(
            f"model={model!r} cannot be loaded: its folder {denoiser!r} has no weights in"
            " .safetensors files"
        )


def _parts_of(model: str, index: Mapping[str, Any], folder: Path) -> Parts:
    """The configs of a model's parts, of those files that are there."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, part in index.items():
        if isinstance(part, list) and part and part[-1]:
            kind = "scheduler_config" if name == "scheduler" else "config"
            file = folder / name / f"{kind}.json"
            config = _json_object(model, file, "it is damaged") if file.is_file() else {}
            found[name] = {**config, "_class_name": str(part[-1])}
    return found


def _json_object(model: str, file: Path, advice: str) -> dict[str, Any]:
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model={model!r} has no {file.name}: {advice}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model={model!r}: {file.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"model={model!r}: {file.name} must hold a JSON object")
    return cast("dict[str, Any]", found)


def _names() -> str:
    return ", ".join(builtin_names()) or "none in this installation"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
