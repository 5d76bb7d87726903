"""Tiny models with text encoders of their own, whole enough to be saved and loaded."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tiny import (
    BETAS,
    TEXT_WIDTH,
    seeded,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)
from tiny_transformers import HEADS, lively
from tiny_xl import second_text_encoder, xl_pipeline


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows a few words, instead of T5's."""
    words = ["<pad>", "</s>", "<unk>", "red", "heart", "blue", "fox"]
    model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=8,
    )


def t5(width: int = TEXT_WIDTH) -> T5EncoderModel:
    """A text encoder of the kind that transformers read."""
    config = T5Config(vocab_size=16, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with seeded(2):
        return T5EncoderModel(config).eval()


def _shifted_vae() -> Any:
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    return vae


def _network(cls: type, **config: Any) -> Any:
    with seeded(0):
        return lively(cls(**HEADS, **config))


def stable_diffusion() -> Any:
    """Stable Diffusion 1."""
    return tiny_pipeline(StableDiffusionPipeline)


def stable_diffusion_xl() -> Any:
    """Stable Diffusion XL."""
    return xl_pipeline(StableDiffusionXLPipeline)


def stable_diffusion_3() -> Any:
    """Stable Diffusion 3.5."""
    transformer = _network(
        SD3Transformer2DModel,
        num_layers=3,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_shifted_vae(),
        text_encoder=second_text_encoder(),
        text_encoder_2=second_text_encoder(),
        text_encoder_3=t5(2 * TEXT_WIDTH),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        tokenizer_3=word_tokenizer(),
    )


def flux() -> Any:
    """Flux."""
    transformer = _network(
        FluxTransformer2DModel,
        num_layers=1,
        num_single_layers=3,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_shifted_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(),
    )


def pixart() -> Any:
    """PixArt-Sigma."""
    transformer = _network(
        PixArtTransformer2DModel,
        num_layers=3,
        cross_attention_dim=TEXT_WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=32,  # its pipeline knows a few sizes only
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**BETAS),
        vae=tiny_vae(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )


def z_image() -> Any:
    """Z-Image, whose text encoder is a language model that chats."""
    with seeded(0):
        transformer = lively(
            ZImageTransformer2DModel(
                in_channels=4,
                dim=TEXT_WIDTH,
                n_layers=3,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=TEXT_WIDTH,
                axes_dims=[4, 6, 6],
                axes_lens=[80, 16, 16],
            )
        )
    text = Qwen3Config(
        vocab_size=16,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    with seeded(2):
        text_encoder = Qwen3Model(text).eval()
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} {% endfor %}red"
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_shifted_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


MODELS = {
    model.__name__: model
    for model in (stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux, pixart, z_image)
}
