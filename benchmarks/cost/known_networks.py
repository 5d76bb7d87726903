"""Whose pictures are timed: the builtin models, and networks of random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from random_networks import sd15_unet, sdxl_unet, stable_diffusion, stable_diffusion_xl
from self_attention_guidance.guidance import METHODS, Guidance, SelfAttentionGuidance
from self_attention_guidance.models.builtin import (
    builtin_folder,
    builtin_model,
    recommended_settings,
)
from self_attention_guidance.models.versions import dtype_argument

if TYPE_CHECKING:
    from plan import Configuration

_PROMPT = "red heart"
_TOKENS = 77

Inputs = Callable[["Configuration"], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network and the pipeline that draws with it.

    Attributes:
        make: From a type to the pipeline, on the CPU.
        inputs: From a configuration to the arguments of the pipeline's call that the network
            decides: prompts or embeddings, and the picture's size.
        steps: Sampling steps by default.
        size: Side of its pictures in pixels.
        cpu_size: The same, where there is no accelerator.
        takes_size: Whether it draws other sizes, too.
        cfg_scale: Weight of classifier-free guidance; `None` if it has none.
        suits_diffusers: Whether diffusers' pipelines of Stable Diffusion can draw with it.
        folder: The builtin model's, else `None`.
    """

    make: Callable[[torch.dtype], Any]
    inputs: Inputs
    steps: int
    size: int
    cpu_size: int
    takes_size: bool
    cfg_scale: float | None
    suits_diffusers: bool
    folder: Path | None = None

    @property
    def has_cfg(self) -> bool:
        """Whether it can be drawn from with classifier-free guidance."""
        return self.cfg_scale is not None

    def size_on(self, device: str) -> int:
        """Side of a picture in pixels by default.

        Args:
            device: Name of a device.
        """
        return self.cpu_size if torch.device(device).type == "cpu" else self.size


def exact_guidance(folder: Path | None, method: str) -> Guidance:
    """The papers' guidance: a weakened pass at every step, and the default layer.

    diffusers' class for SAG has that layer fixed; a model may recommend another.

    Args:
        folder: The model's, if it recommends settings of this guidance; `None` takes the defaults.
        method: Short name of the guidance.
    """
    recommended = None if folder is None else recommended_settings(folder).make_guidance()
    if isinstance(recommended, SelfAttentionGuidance) and method == "sag":
        return replace(recommended, start=0.0, stop=1.0, every=1, layer=None)
    return METHODS[method]()


def fast_guidance(folder: Path | None, method: str) -> Guidance:
    """The fast preset of a guidance.

    Args:
        folder: The model's, if it recommends one of this guidance; `None` takes the usual one.
        method: Short name of the guidance.
    """
    recommended = None if folder is None else recommended_settings(folder).make_fast_guidance()
    if recommended is not None and recommended.method == method:
        return recommended
    return METHODS[method].fast()


def load(network: Network, dtype: str, device: str) -> Any:
    """The network's pipeline, ready to draw.

    Args:
        network: One of `NETWORKS`, or another.
        dtype: Name of a type of torch.
        device: Name of a device.
    """
    pipeline = network.make(getattr(torch, dtype)).to(torch.device(device))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embedding_inputs(configuration: Configuration, widths: Mapping[str, int]) -> dict[str, Any]:
    """Random embeddings of a prompt and of the negative one, and the picture's size.

    Args:
        configuration: What is measured.
        widths: Channels of "prompt_embeds", (pictures, 77, channels), and of other embeddings of a
            pipeline's call, (pictures, channels).
    """
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {"height": configuration.size, "width": configuration.size}
    for name, width in widths.items():
        tokens = (_TOKENS,) if name == "prompt_embeds" else ()
        for argument in (name, f"negative_{name}"):
            values = torch.randn(configuration.batch_size, *tokens, width, generator=generator)
            kind = getattr(torch, configuration.dtype)
            found[argument] = values.to(torch.device(configuration.device), kind)
    return found


def _prompt_inputs(configuration: Configuration) -> dict[str, Any]:
    side = configuration.size
    return {"prompt": [_PROMPT] * configuration.batch_size, "height": side, "width": side}


def _builtin(name: str, inputs: Inputs, size: int, suits_diffusers: bool) -> Network:
    folder = builtin_folder(name)
    recommended = recommended_settings(folder)
    return Network(
        make=lambda dtype: builtin_model(name, **dtype_argument(dtype)),
        inputs=inputs,
        steps=recommended.num_inference_steps or 25,
        size=size,
        cpu_size=size,
        takes_size=False,
        cfg_scale=recommended.guidance_scale,
        suits_diffusers=suits_diffusers,
        folder=folder,
    )


NETWORKS: Mapping[str, Network] = {
    "emoji": _builtin("emoji", _prompt_inputs, 64, suits_diffusers=True),
    "emoji-adm": _builtin(
        "emoji-adm",
        lambda configuration: {"batch_size": configuration.batch_size},
        32,
        suits_diffusers=False,
    ),
    "sd15": Network(
        make=lambda dtype: stable_diffusion(sd15_unet, dtype),
        inputs=lambda configuration: embedding_inputs(configuration, {"prompt_embeds": 768}),
        steps=8,
        size=512,
        cpu_size=256,
        takes_size=True,
        cfg_scale=7.5,
        suits_diffusers=True,
    ),
    "sdxl": Network(
        make=lambda dtype: stable_diffusion_xl(sdxl_unet, dtype),
        inputs=lambda configuration: embedding_inputs(
            configuration, {"prompt_embeds": 2048, "pooled_prompt_embeds": 1280}
        ),
        steps=8,
        size=1024,
        cpu_size=256,
        takes_size=True,
        cfg_scale=5.0,
        suits_diffusers=False,
    ),
}
"""The networks by name, in the order in which the command lists them."""
