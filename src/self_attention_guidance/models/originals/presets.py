"""The arguments of every published checkpoint, by the name of its file without the suffix.

Sources: the READMEs of openai/guided-diffusion, openai/improved-diffusion and
facebookresearch/DiT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

_ADM: Config = {
    "num_channels": 256,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "learn_sigma": True,
    "class_cond": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_fp16": True,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
}
_ADM_LSUN: Config = {**_ADM, "image_size": 256, "class_cond": False, "dropout": 0.1}
_CLASSIFIER: Config = {
    "in_channels": 3,
    "model_channels": 128,
    "out_channels": 1000,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "pool": "attention",
}
_IDDPM: Config = {
    "num_channels": 128,
    "num_res_blocks": 3,
    "learn_sigma": True,
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
}
_IDDPM_CIFAR: Config = {**_IDDPM, "image_size": 32, "dropout": 0.3}
_IDDPM_LSUN: Config = {
    **_IDDPM,
    "image_size": 256,
    "num_res_blocks": 2,
    "num_heads": 1,
    "use_scale_shift_norm": False,
    "attention_resolutions": "16",
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_timesteps": False,
}
PRESETS: Mapping[str, Mapping[str, Config]] = {
    "adm": {
        "64x64_diffusion": {
            **_ADM,
            "image_size": 64,
            "num_channels": 192,
            "num_res_blocks": 3,
            "use_new_attention_order": True,
            "noise_schedule": "cosine",
            "dropout": 0.1,
        },
        "128x128_diffusion": {**_ADM, "image_size": 128, "num_heads": 4, "num_head_channels": -1},
        "256x256_diffusion": {**_ADM, "image_size": 256},
        "256x256_diffusion_uncond": {**_ADM, "image_size": 256, "class_cond": False},
        "512x512_diffusion": {**_ADM, "image_size": 512, "use_fp16": False},
        "lsun_bedroom": _ADM_LSUN,
        "lsun_cat": _ADM_LSUN,
        "lsun_horse": _ADM_LSUN,
        "lsun_horse_nodropout": {**_ADM_LSUN, "dropout": 0.0},
    },
    "classifier": {
        "64x64_classifier": {
            **_CLASSIFIER,
            "image_size": 64,
            "num_res_blocks": 4,
            "channel_mult": (1, 2, 3, 4),
            "attention_ds": (2, 4, 8),
        },
        "128x128_classifier": {
            **_CLASSIFIER,
            "image_size": 128,
            "channel_mult": (1, 1, 2, 3, 4),
            "attention_ds": (4, 8, 16),
        },
        "256x256_classifier": {
            **_CLASSIFIER,
            "image_size": 256,
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "attention_ds": (8, 16, 32),
        },
        "512x512_classifier": {
            **_CLASSIFIER,
            "image_size": 512,
            "channel_mult": (0.5, 1, 1, 2, 2, 4, 4),
            "attention_ds": (16, 32, 64),
        },
    },
    "iddpm": {
        "imagenet64_uncond_100M_1500K": {**_IDDPM, "image_size": 64},
        "imagenet64_uncond_vlb_100M_1500K": {**_IDDPM, "image_size": 64},
        "imagenet64_cond_270M_250K": {
            **_IDDPM,
            "image_size": 64,
            "num_channels": 192,
            "class_cond": True,
            "rescale_timesteps": False,
        },
        "cifar10_uncond_50M_500K": _IDDPM_CIFAR,
        "cifar10_uncond_vlb_50M_500K": _IDDPM_CIFAR,
        "lsun_uncond_100M_1200K_bs128": _IDDPM_LSUN,
        "lsun_uncond_100M_2400K_bs64": _IDDPM_LSUN,
    },
    "dit": {  # the rest are the constructor's defaults
        "DiT-XL-2-256x256": {"input_size": 32},
        "DiT-XL-2-512x512": {"input_size": 64},
    },
}
KINDS = tuple(PRESETS)


def preset_names(kind: str) -> tuple[str, ...]:
    """Return the names of a kind's presets: names of published files, without the suffix.

    Args:
        kind: One of `KINDS`.

    Raises:
        ValueError: The kind is unknown.
    """
    if kind not in PRESETS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    return tuple(PRESETS[kind])


def preset(kind: str, name: str) -> Config:
    """Return the original arguments of a published checkpoint.

    Args:
        kind: One of `KINDS`.
        name: One of `preset_names(kind)`.

    Raises:
        ValueError: The kind or the name is unknown.
    """
    names = preset_names(kind)
    if name not in names:
        raise ValueError(f"config={name!r} must be a preset of {kind}: {', '.join(names)}")
    return PRESETS[kind][name]
