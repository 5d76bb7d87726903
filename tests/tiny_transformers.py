"""Tiny pipelines of diffusion transformers with random weights, without text encoders.

`TRANSFORMERS` holds, by name, how to make each pipeline and the embeddings to call it with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor

from tiny import BETAS, seeded

WIDTH = 32
"""Heads times channels of each, and channels of text."""
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT = 6
"""Tokens of a text."""
SIZE: dict[str, Any] = {"height": 64, "width": 96}


@dataclass(frozen=True)
class Transformer:
    """How to make a pipeline, and the arguments of its call.

    Attributes:
        make: A new pipeline.
        embeddings: Arguments for a list of texts, each a seed, and whether they are negative.
        scale: Name of the argument that turns classifier-free guidance on.
    """

    make: Callable[[], Any]
    embeddings: Callable[[list[int], str], dict[str, Any]]
    scale: str = "guidance_scale"


def texts(seeds: list[int], tokens: int = TEXT, width: int = WIDTH) -> Tensor:
    """Embeddings of one text for each seed, (texts, tokens, width)."""
    rows = [torch.randn(tokens, width, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows)


def masks(seeds: list[int], tokens: int = TEXT) -> Tensor:
    """Which tokens of each text count: the longer the higher its seed, at least two."""
    lengths = torch.tensor([2 + seed % (tokens - 2) for seed in seeds])
    return (torch.arange(tokens) < lengths[:, None]).long()


@torch.no_grad()
def lively(network: torch.nn.Module) -> torch.nn.Module:
    """Make attention peaked and outputs of the size of noise, as in trained networks.

    Their initial weights make attention uniform, and some zero all that depends on the time.
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "norm_q" in name or "norm_k" in name:
            parameter.fill_(2.0)
    for name, module in network.named_modules():
        if name.endswith(("to_q", "to_k")):
            module.weight.mul_(3.0)
    return network.eval()


def build(pipeline: type, network: type, scheduler: Any, unused: str, **config: Any) -> Any:
    with seeded(0):
        transformer = lively(network(**config))
    parts = dict.fromkeys(unused.split())
    pipe = pipeline(transformer=transformer, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart() -> Any:
    """PixArt-Sigma."""
    return build(
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
        DPMSolverMultistepScheduler(**BETAS),
        "vae text_encoder tokenizer",
        **HEADS,
        num_layers=3,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
        use_additional_conditions=False,
    )


def stable_diffusion_3() -> Any:
    """Stable Diffusion 3.5, whose first blocks attend to the picture alone as well."""
    return build(
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae text_encoder text_encoder_2 text_encoder_3 tokenizer tokenizer_2 tokenizer_3",
        **HEADS,
        num_layers=3,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def hunyuan_dit() -> Any:
    """Hunyuan-DiT."""
    return build(
        HunyuanDiTPipeline,
        HunyuanDiT2DModel,
        DDPMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False),
        "vae text_encoder tokenizer text_encoder_2 tokenizer_2 safety_checker feature_extractor",
        **HEADS,
        num_layers=4,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=WIDTH,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=WIDTH,
        text_len=TEXT,
        text_len_t5=TEXT,
    )


def aura_flow() -> Any:
    """AuraFlow."""
    return build(
        AuraFlowPipeline,
        AuraFlowTransformer2DModel,
        FlowMatchEulerDiscreteScheduler(shift=1.73),
        "vae text_encoder tokenizer",
        **HEADS,
        num_mmdit_layers=1,
        num_single_dit_layers=3,
        sample_size=8,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=64,
    )


def flux(in_channels: int = 16) -> Any:
    """Flux; `in_channels` of a token are more than the 16 that are denoised for FLUX.1 Fill."""
    return build(
        FluxPipeline,
        FluxTransformer2DModel,
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae text_encoder tokenizer text_encoder_2 tokenizer_2",
        **HEADS,
        num_layers=1,
        num_single_layers=3,
        in_channels=in_channels,
        out_channels=16,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )


def chroma() -> Any:
    """Chroma."""
    return build(
        ChromaPipeline,
        ChromaTransformer2DModel,
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae text_encoder tokenizer",
        **HEADS,
        num_layers=1,
        num_single_layers=3,
        in_channels=16,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=WIDTH,
        approximator_layers=1,
    )


def qwen_image() -> Any:
    """Qwen-Image."""
    return build(
        QwenImagePipeline,
        QwenImageTransformer2DModel,
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        "vae text_encoder tokenizer",
        **HEADS,
        num_layers=3,
        in_channels=16,
        out_channels=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def z_image() -> Any:
    """Z-Image."""
    return build(
        ZImagePipeline,
        ZImageTransformer2DModel,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae text_encoder tokenizer",
        in_channels=4,
        dim=WIDTH,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[80, 16, 16],
    )


def lumina_2() -> Any:
    """Lumina 2."""
    return build(
        Lumina2Pipeline,
        Lumina2Transformer2DModel,
        FlowMatchEulerDiscreteScheduler(shift=6.0),
        "vae text_encoder tokenizer",
        sample_size=8,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 16, 16),
        cap_feat_dim=WIDTH,
    )


def cogview_4() -> Any:
    """CogView 4."""
    return build(
        CogView4Pipeline,
        CogView4Transformer2DModel,
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae text_encoder tokenizer",
        **HEADS,
        num_layers=3,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        rope_axes_dim=(16, 16),
    )


def flux_2() -> Any:
    """FLUX.2."""
    return build(
        Flux2Pipeline,
        Flux2Transformer2DModel,
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae text_encoder tokenizer",
        **HEADS,
        num_layers=1,
        num_single_layers=3,
        in_channels=16,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=16,
    )


def hidream() -> Any:
    """HiDream."""
    pipe = build(
        HiDreamImagePipeline,
        HiDreamImageTransformer2DModel,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae text_encoder tokenizer text_encoder_2 tokenizer_2 text_encoder_3 tokenizer_3 "
        "text_encoder_4 tokenizer_4",
        **HEADS,
        num_layers=1,
        num_single_layers=3,
        patch_size=2,
        in_channels=4,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 1, 1],
    )
    # It draws pictures of one area only: that of `SIZE`.
    pipe.default_sample_size = (SIZE["height"] * SIZE["width"]) ** 0.5 / 8 + 0.01
    return pipe


def plain_embeddings(seeds: list[int], prefix: str) -> dict[str, Any]:
    return {f"{prefix}prompt_embeds": texts(seeds)}


def pooled_embeddings(seeds: list[int], prefix: str) -> dict[str, Any]:
    pooled = texts(seeds, 1)[:, 0]
    return {f"{prefix}prompt_embeds": texts(seeds), f"{prefix}pooled_prompt_embeds": pooled}


def masked_embeddings(seeds: list[int], prefix: str) -> dict[str, Any]:
    mask = {f"{prefix}prompt_attention_mask": masks(seeds)}
    return {f"{prefix}prompt_embeds": texts(seeds), **mask}


def chroma_embeddings(seeds: list[int], prefix: str) -> dict[str, Any]:
    mask = {f"{prefix}prompt_attention_mask": masks(seeds).bool()}
    return {f"{prefix}prompt_embeds": texts(seeds), **mask}


def two_embeddings(seeds: list[int], prefix: str) -> dict[str, Any]:
    second = {
        f"{prefix}prompt_embeds_2": texts([seed + 100 for seed in seeds]),
        f"{prefix}prompt_attention_mask_2": masks(seeds),
    }
    return {**masked_embeddings(seeds, prefix), **second}


def qwen_embeddings(seeds: list[int], prefix: str) -> dict[str, Any]:
    mask = masks(seeds)
    longest = int(mask.sum(1).max())
    return {
        f"{prefix}prompt_embeds": texts(seeds)[:, :longest],
        f"{prefix}prompt_embeds_mask": mask[:, :longest],
    }


def listed_embeddings(seeds: list[int], prefix: str) -> dict[str, Any]:
    lengths = masks(seeds).sum(1).tolist()
    cut = [text[:length] for text, length in zip(texts(seeds), lengths, strict=True)]
    return {f"{prefix}prompt_embeds": cut}


def hidream_embeddings(seeds: list[int], prefix: str) -> dict[str, Any]:
    layers = [texts([seed + 100 * layer for seed in seeds]) for layer in (1, 2)]
    return {
        f"{prefix}prompt_embeds_t5": texts(seeds),
        f"{prefix}prompt_embeds_llama3": torch.stack(layers),
        f"{prefix}pooled_prompt_embeds": texts(seeds, 1)[:, 0],
    }


TRANSFORMERS = {
    "PixArt-Sigma": Transformer(pixart, masked_embeddings),
    "Stable Diffusion 3.5": Transformer(stable_diffusion_3, pooled_embeddings),
    "Hunyuan-DiT": Transformer(hunyuan_dit, two_embeddings),
    "AuraFlow": Transformer(aura_flow, masked_embeddings),
    "Flux": Transformer(flux, pooled_embeddings, "true_cfg_scale"),
    "Chroma": Transformer(chroma, chroma_embeddings),
    "Qwen-Image": Transformer(qwen_image, qwen_embeddings, "true_cfg_scale"),
    "Z-Image": Transformer(z_image, listed_embeddings),
    "Lumina 2": Transformer(lumina_2, masked_embeddings),
    "CogView 4": Transformer(cogview_4, plain_embeddings),
    "FLUX.2": Transformer(flux_2, plain_embeddings),
    "HiDream": Transformer(hidream, hidream_embeddings),
}


def draw(
    name: str,
    pipe: Any,
    seeds: tuple[int, ...],
    cfg: float | None = 3.0,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Tensor:
    """Final latents, as the pipeline gives them, of a prompt and a seed each.

    `cfg` is the weight of classifier-free guidance, `None` where the pipeline has none.
    """
    transformer = TRANSFORMERS[name]
    usual: dict[str, Any] = {
        "num_inference_steps": 3,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "latent",
        **SIZE,
    }
    if cfg is not None:
        usual[transformer.scale] = cfg
    if name in ("PixArt-Sigma", "Hunyuan-DiT"):
        usual["use_resolution_binning"] = False
    if name == "PixArt-Sigma":
        usual["negative_prompt"] = None  # its default does not go with embeddings
    if name == "Z-Image" and cfg is not None:
        usual["guidance_scale"] = cfg - 1  # it counts from the conditional prediction
    usual |= transformer.embeddings(list(seeds), "")
    if cfg is not None and cfg > 1 and name != "FLUX.2":  # which has no negative prompt
        usual |= transformer.embeddings([50 + seed for seed in seeds], "negative_")
    for key, value in usual.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            usual[key] = value.to(dtype)
    return pipe(**{**usual, **arguments}).images
