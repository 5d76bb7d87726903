"""ADM: guided-diffusion's U-Nets (Dhariwal and Nichol, arXiv 2105.05233), and IDDPM's.

ADM's code is based on IDDPM's (Nichol and Dhariwal, arXiv 2102.09672). Their U-Nets differ in the
published arguments, not in the code that builds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from .architecture import architecture_of, complete_config
from .rules import convert
from .unet import ADMUNet2DModel, unet_config, unet_rules

_BETA_SCHEDULES: Mapping[str, Any] = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def load_unet(
    kind: str, original: Mapping[str, Tensor], config: Mapping[str, Any]
) -> ADMUNet2DModel:
    """Load an ADM or IDDPM network.

    Args:
        kind: "adm" or "iddpm".
        original: The checkpoint's tensors.
        config: The original arguments.

    Returns:
        The network, in eval mode.

    Raises:
        ValueError: The config is invalid, or does not fit the checkpoint.
    """
    architecture = architecture_of(complete_config(kind, config))
    unet = ADMUNet2DModel(**unet_config(architecture))
    convert(original, unet, unet_rules(architecture))
    return unet.eval()


def original_scheduler(kind: str, config: Mapping[str, Any]) -> DDPMScheduler:
    """Make a scheduler with an ADM or IDDPM network's noise levels, and the original's sampling.

    Args:
        kind: "adm" or "iddpm".
        config: The original arguments.

    Returns:
        A scheduler that spaces its steps as the original's respacing "N" does. For "ddimN", make a
        `DDIMScheduler` from its config with `timestep_spacing="leading"`.

    Raises:
        ValueError: The schedule is unknown.
    """
    complete = complete_config(kind, config)
    steps, name = complete["diffusion_steps"], complete["noise_schedule"]
    if name not in _BETA_SCHEDULES:
        raise ValueError(f"config: noise_schedule={name!r} must be 'linear' or 'cosine'")
    learned = complete["out_channels"] == 2 * complete["in_channels"]
    fixed = "fixed_small" if complete["sigma_small"] else "fixed_large"
    return DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule=_BETA_SCHEDULES[name],
        # The endpoints are 1e-4 and 0.02 at 1000 steps; they scale with 1 / steps.
        beta_start=0.1 / steps,
        beta_end=20 / steps,
        variance_type="learned_range" if learned else fixed,
        prediction_type="sample" if complete["predict_xstart"] else "epsilon",
        clip_sample=True,
        timestep_spacing="linspace",
    )
