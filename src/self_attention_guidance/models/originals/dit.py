"""DiT (Peebles and Xie, arXiv 2212.09748) as a diffusers model with the original's results."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from ...checks import check_count
from ...pipelines.dit import CFG_CHANNELS
from .rules import Rule, convert, qkv_by_part

# Defaults of the original constructor, which make DiT-XL/2.
_DEFAULTS: Mapping[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
}


# bfloat16 rounds numbers up to 1 by half of this.
_ROUNDED = 4e-3


class OriginalDiTModel(DiTTransformer2DModel):
    """diffusers' `DiTTransformer2DModel` with the original's timestep embedding and norms.

    diffusers spaces the frequencies of the timestep's sinusoids differently (its shift is 1); its
    converted weights do not compensate for that. It also has another epsilon by default. Source:
    Peebles and Xie, arXiv 2212.09748.
    """

    def __init__(self, **transformer: Any) -> None:
        """Make a network with random weights.

        Args:
            **transformer: Arguments of `DiTTransformer2DModel`; `norm_eps` is 1e-6 by default.
        """
        arguments: dict[str, Any] = {"norm_eps": 1e-6, **transformer}
        super().__init__(**arguments)
        blocks: Any = self.transformer_blocks
        for block in blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    def forward_with_cfg(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        guidance_scale: float,
        channels: int | None = CFG_CHANNELS,
    ) -> Tensor:
        """Predict with classifier-free guidance, as the original's function of this name does.

        Args:
            hidden_states: (2 * batch, channels, height, width); the second half is replaced by
                the first.
            timestep: (2 * batch,).
            class_labels: (2 * batch,): the classes, then the label of "no class" as many times.
            guidance_scale: Weight of the guidance; 1 is off.
            channels: Number of latent channels to guide, by default 3 as in the original; `None`
                guides all.

        Returns:
            (2 * batch, out_channels, height, width): guided channels are equal in both halves; the
            other channels are each half's own prediction.
        """
        half = hidden_states.chunk(2)[0]
        output = self(torch.cat([half, half]), timestep, class_labels).sample
        config: Any = self.config
        guided = config.in_channels if channels is None else channels
        cond, uncond = output[:, :guided].chunk(2)
        mixed = uncond + guidance_scale * (cond - uncond)
        return torch.cat([torch.cat([mixed, mixed]), output[:, guided:]], dim=1)


# Saved pipelines name a class by its module. This is the package, so that the class can be moved.
OriginalDiTModel.__module__ = "self_attention_guidance"
OriginalDiTModel.__init__.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    DiTTransformer2DModel.__init__
)


def load_dit(original: Mapping[str, Tensor], config: Mapping[str, Any]) -> OriginalDiTModel:
    """Load a DiT network.

    Args:
        original: The checkpoint's tensors.
        config: Arguments of the original `DiT`.

    Returns:
        The network, in eval mode.

    Raises:
        ValueError: The config is invalid, or does not fit the checkpoint.
    """
    complete = _complete(config)
    width, heads = complete["hidden_size"], complete["num_heads"]
    channels = complete["in_channels"]
    model = OriginalDiTModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=2 * channels if complete["learn_sigma"] else channels,
        num_layers=complete["depth"],
        sample_size=complete["input_size"],
        patch_size=complete["patch_size"],
        num_embeds_ada_norm=complete["num_classes"],
    )
    tensors = dict(original)
    computed: Any = model.pos_embed.pos_embed
    _check_positions(tensors.pop("pos_embed", None), computed)
    convert(tensors, model, _rules(complete["depth"]))
    return model.eval()


def dit_scheduler() -> DDIMScheduler:
    """Make a DDIM scheduler with DiT's noise levels of training; it ignores a learned variance."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
    )


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(config) - set(_DEFAULTS))
    if unknown:
        known = ", ".join(sorted(_DEFAULTS))
        raise ValueError(f"config: {', '.join(unknown)} unknown; known names are {known}")
    complete = {**_DEFAULTS, **config}
    for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
        check_count(f"config: {name}", complete[name])
    check_count("config: num_classes", complete["num_classes"])
    if complete["mlp_ratio"] != 4:
        raise ValueError(f"config: mlp_ratio={complete['mlp_ratio']} must be 4")
    if complete["class_dropout_prob"] <= 0:
        raise ValueError("config: class_dropout_prob must be above 0, or there is no null label")
    if complete["hidden_size"] % complete["num_heads"]:
        raise ValueError("config: hidden_size must be a multiple of num_heads")
    return complete


def _check_positions(given: Tensor | None, computed: Tensor) -> None:
    """Refuse another position embedding than DiT's, which is computed and not loaded."""
    if given is None:
        raise ValueError("the checkpoint does not fit the config: pos_embed is missing")
    if given.shape != computed.shape:
        raise ValueError(
            f"the checkpoint does not fit the config: pos_embed has shape {tuple(given.shape)}, "
            f"not {tuple(computed.shape)}"
        )
    if (given.float() - computed).abs().max() > _ROUNDED:
        raise ValueError("pos_embed holds other values than the sines and cosines of DiT")


def _rules(depth: int) -> Iterator[Rule]:
    blocks = [f"transformer_blocks.{number}" for number in range(depth)]
    embeddings = [f"{block}.norm1.emb" for block in blocks]  # diffusers has one for each block
    steps = [f"{embedding}.timestep_embedder" for embedding in embeddings]
    yield Rule("t_embedder.mlp.0", [[f"{step}.linear_1" for step in steps]])
    yield Rule("t_embedder.mlp.2", [[f"{step}.linear_2" for step in steps]])
    classes = [f"{embedding}.class_embedder.embedding_table" for embedding in embeddings]
    yield Rule("y_embedder.embedding_table", [classes])
    yield Rule("x_embedder.proj", ["pos_embed.proj"])
    for number, block in enumerate(blocks):
        source, attention = f"blocks.{number}", f"{block}.attn1"
        sides = [f"{attention}.{side}" for side in ("to_q", "to_k", "to_v")]
        yield Rule(f"{source}.attn.qkv", sides, qkv_by_part)
        yield Rule(f"{source}.attn.proj", [f"{attention}.to_out.0"])
        yield Rule(f"{source}.mlp.fc1", [f"{block}.ff.net.0.proj"])
        yield Rule(f"{source}.mlp.fc2", [f"{block}.ff.net.2"])
        yield Rule(f"{source}.adaLN_modulation.1", [f"{block}.norm1.linear"])
    yield Rule("final_layer.adaLN_modulation.1", ["proj_out_1"])
    yield Rule("final_layer.linear", ["proj_out_2"])
