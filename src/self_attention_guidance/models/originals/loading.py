"""Loading and converting original checkpoints of all kinds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ...pipelines.adm import ADMPipeline
from .adm import load_unet, original_scheduler
from .checkpoint import read_checkpoint
from .classifier import load_classifier
from .dit import load_dit
from .presets import preset, preset_names

Kind = Literal["adm", "iddpm", "dit", "classifier"]
Config = Mapping[str, Any] | str


def load_original(kind: Kind, checkpoint: str | Path, config: Config | None = None) -> nn.Module:
    """Load a checkpoint that the original code of one of the paper's models wrote.

    No code in the file is ever run. The networks take the same inputs as the original ones,
    including already scaled timesteps; a classifier is `classifier(x, t) -> logits`.

    Args:
        kind: "adm", "iddpm", "dit", or "classifier" for ADM's noisy classifiers.
        checkpoint: A state dict that `torch.save` wrote, or a `.safetensors` file.
        config: The arguments of the original constructor or script, or the name of a preset (see
            `preset_names`). `None` is the preset of the published file with this name.

    Returns:
        A diffusers model in float32 and eval mode: `ADMUNet2DModel`, `OriginalDiTModel` or
        `NoisyClassifier`. `save_pretrained` and `from_pretrained` reproduce it bit for bit.

    Raises:
        ValueError: The file is damaged, of another kind, or does not fit the config.
    """
    chosen = _config(kind, checkpoint, config)
    original = read_checkpoint(checkpoint)
    try:
        if kind == "dit":
            return load_dit(original, chosen)
        if kind == "classifier":
            return load_classifier(original, chosen)
        return load_unet(kind, original, chosen)
    except ValueError as error:
        raise ValueError(f"checkpoint={str(checkpoint)!r} as {kind}: {error}") from None


def convert_original(
    kind: Kind, checkpoint: str | Path, out: str | Path, config: Config | None = None
) -> Path:
    """Convert an original checkpoint to a folder in diffusers format.

    Args:
        kind: As in `load_original`.
        checkpoint: As in `load_original`.
        out: The folder. For "adm" and "iddpm", it becomes a folder of an `ADMPipeline`, with the
            scheduler of their training; for "dit" and "classifier", of the model alone.
        config: As in `load_original`.

    Returns:
        The folder.

    Raises:
        ValueError: As in `load_original`.
    """
    model: Any = load_original(kind, checkpoint, config)
    if kind in ("adm", "iddpm"):
        scheduler = original_scheduler(kind, _config(kind, checkpoint, config))
        model = ADMPipeline(model, scheduler)
    model.save_pretrained(out)
    return Path(out)


def _config(kind: str, checkpoint: str | Path, config: Config | None) -> Mapping[str, Any]:
    names = preset_names(kind)
    if config is None:
        name = Path(checkpoint).stem
        if name not in names:
            raise ValueError(
                f"config=None must be given: {Path(checkpoint).name!r} is not a published file of "
                f"{kind}; those are {', '.join(names)}"
            )
        return preset(kind, name)
    return preset(kind, config) if isinstance(config, str) else config
