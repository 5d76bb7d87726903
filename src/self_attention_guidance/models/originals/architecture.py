"""The constructor arguments of ADM, IDDPM and the classifiers, in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checks import check_count

# Defaults of the original scripts' flags. A config with `num_channels` has the form of the scripts;
# a config with `model_channels` has that of the network's constructor.
_SCRIPT_DEFAULTS: Mapping[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "use_scale_shift_norm": True,
}
_CONSTRUCTOR_DEFAULTS: Mapping[str, Any] = {"num_heads": 1, "channel_mult": (1, 2, 4, 8)}
_SHARED_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "learn_sigma": False,
    "class_cond": False,
    "num_classes": None,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "use_fp16": False,
    "dropout": 0.0,
    "conv_resample": True,
    "dims": 2,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_timesteps": False,
    "predict_xstart": False,
    "sigma_small": False,
    "pool": None,
}
# Settings of training and sampling that do not change the network or its noise levels.
_WITHOUT_EFFECT = frozenset(
    ["use_checkpoint", "use_kl", "rescale_learned_sigmas", "timestep_respacing", "small_size"]
)
_REQUIRED = ("model_channels", "num_res_blocks", "out_channels")
_MULTIPLIERS: Mapping[int, Sequence[float]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class UNetArchitecture:
    """The architecture of a U-Net, or of the encoder of one.

    Attributes:
        image_size: Height and width in pixels.
        in_channels: Channels of the picture.
        out_channels: Channels of the output, or number of classes.
        model_channels: The base width, and the width of the timestep's sinusoids.
        widths: Channels of each level, the finest first.
        attends: Whether each level has attention.
        num_res_blocks: Residual blocks of each level of the encoder.
        num_classes: Number of classes; `None` if the network is not class-conditional.
        num_heads: Attention heads, unless `num_head_channels` is given.
        num_head_channels: Channels of an attention head; -1 if not given.
        num_heads_upsample: Attention heads of the decoder; -1 is `num_heads`.
        use_scale_shift_norm: Whether the timestep scales and shifts normalised features.
        resblock_updown: Whether residual blocks change the resolution.
        use_new_attention_order: Whether the order of qkv rows is [(q, k, v), head] instead of
            [head, (q, k, v)].
        use_fp16: Whether the torso computes in float16.
        dropout: Dropout rate in training.
        timestep_scale: The network's timestep divided by the scheduler's.
    """

    image_size: int
    in_channels: int
    out_channels: int
    model_channels: int
    widths: tuple[int, ...]
    attends: tuple[bool, ...]
    num_res_blocks: int
    num_classes: int | None
    num_heads: int
    num_head_channels: int
    num_heads_upsample: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool
    use_fp16: bool
    dropout: float
    timestep_scale: float

    def heads(self, level: int, in_decoder: bool = False) -> int:
        """Return the number of attention heads at a level."""
        if self.num_head_channels != -1:
            return self.widths[level] // self.num_head_channels
        if in_decoder and self.num_heads_upsample != -1:
            return self.num_heads_upsample
        return self.num_heads


def complete_config(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete an original config with the defaults of its original code.

    Args:
        kind: "adm", "iddpm" or "classifier".
        config: Arguments of the original scripts (with `num_channels`) or of the network's
            constructor (with `model_channels`).

    Returns:
        Every argument that matters here, under the constructor's names.

    Raises:
        ValueError: An argument is unknown, missing or not supported.
    """
    in_script_form = "model_channels" not in config
    form = _SCRIPT_DEFAULTS if in_script_form else _CONSTRUCTOR_DEFAULTS
    if in_script_form and kind == "iddpm":
        form = {**form, "rescale_timesteps": True}
    given = {name: value for name, value in config.items() if name not in _WITHOUT_EFFECT}
    if not in_script_form and "attention_resolutions" in given:
        given["attention_ds"] = given.pop("attention_resolutions")  # factors, despite the name
    _check_names(given, {*form, *_SHARED_DEFAULTS})
    complete = {**_SHARED_DEFAULTS, **form, **given}
    check_count("config: image_size", complete.get("image_size"))
    if in_script_form:
        complete["model_channels"] = complete.pop("num_channels")
        complete["out_channels"] = 6 if complete["learn_sigma"] else 3
        complete["attention_ds"] = _factors(
            complete.pop("attention_resolutions"), complete["image_size"]
        )
        complete["num_classes"] = (
            (complete["num_classes"] or _IMAGENET_CLASSES) if complete["class_cond"] else None
        )
    _check_supported(complete)
    return complete


def architecture_of(complete: Mapping[str, Any]) -> UNetArchitecture:
    """Make the architecture that a config describes.

    Args:
        complete: What `complete_config` returned.

    Raises:
        ValueError: An entry is invalid.
    """
    width = complete["model_channels"]
    multipliers = _multipliers(complete["channel_mult"], complete["image_size"])
    factors = {int(factor) for factor in complete["attention_ds"]}
    names = UNetArchitecture.__dataclass_fields__
    derived: dict[str, Any] = {
        "widths": tuple(int(multiplier * width) for multiplier in multipliers),
        "attends": tuple(2**level in factors for level in range(len(multipliers))),
        "timestep_scale": (
            1000.0 / complete["diffusion_steps"] if complete["rescale_timesteps"] else 1.0
        ),
    }
    plain: dict[str, Any] = {name: complete[name] for name in names if name not in derived}
    return UNetArchitecture(**plain, **derived)


def _check_names(given: Mapping[str, Any], known: set[str]) -> None:
    known = known | {"model_channels", "out_channels", "attention_ds"}
    known |= {"image_size", "num_res_blocks"}
    unknown = sorted(name for name in given if name not in known)
    if unknown:
        raise ValueError(
            f"config: {', '.join(unknown)} unknown; known names are {', '.join(sorted(known))}"
        )


def _check_supported(complete: Mapping[str, Any]) -> None:
    for name in (*_REQUIRED, "attention_ds"):
        if name not in complete:
            raise ValueError(f"config: {name} is missing")
    for name in _REQUIRED:
        check_count(f"config: {name}", complete[name])
    if complete["dims"] != 2 or not complete["conv_resample"]:
        raise ValueError("config: only dims=2 and conv_resample=True are supported")


def _factors(resolutions: object, image_size: int) -> tuple[int, ...]:
    try:
        return tuple(image_size // int(part) for part in str(resolutions).split(",") if part)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"config: attention_resolutions={resolutions!r} must be like '32,16,8'"
        ) from None


def _multipliers(given: Any, image_size: int) -> tuple[float, ...]:
    if given == "":
        if image_size not in _MULTIPLIERS:
            raise ValueError(f"config: channel_mult is missing for image_size={image_size}")
        return tuple(_MULTIPLIERS[image_size])
    parts = given.split(",") if isinstance(given, str) else given
    try:
        return tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"config: channel_mult={given!r} must be like '1,2,4'") from None
