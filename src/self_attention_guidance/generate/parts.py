"""Whether the parts of a model fit each other, from their configs. No heavy import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

Parts = Mapping[str, Mapping[str, Any]]
"""The configs of a model's parts, by their names; "_class_name" is the class of a part."""

# Components of Stable Diffusion 1 and 2, and XL, in a `model_index.json`.
STABLE_DIFFUSION = frozenset(
    (
        *("vae", "text_encoder", "tokenizer", "unet", "scheduler"),
        *("safety_checker", "requires_safety_checker", "feature_extractor", "image_encoder"),
    )
)
_XL = STABLE_DIFFUSION | {"text_encoder_2", "tokenizer_2"}
# Denoisers of diffusers that were trained by flow matching; and those that get latents packed two
# by two.
_FLOW_MATCHING = {
    f"{name}Transformer2DModel"
    for name in (
        *("SD3", "AuraFlow", "Flux", "Flux2", "Chroma", "QwenImage", "ZImage", "Lumina2"),
        *("CogView4", "HiDreamImage"),
    )
}
_PACKED = {f"{name}Transformer2DModel" for name in ("Flux", "Flux2", "Chroma", "QwenImage")}
_WITHOUT_FLOW = {
    *("UNet2DConditionModel", "UNet2DModel", "ADMUNet2DModel"),
    *("PixArtTransformer2DModel", "HunyuanDiT2DModel", "DiTTransformer2DModel"),
}


def parts_of_pipeline(pipeline: Any) -> Parts:
    """The configs of the parts of a loaded model.

    Args:
        pipeline: A diffusers pipeline.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name, part in pipeline.components.items():
        if part is not None:
            config: Any = getattr(part, "config", {})
            values = config.to_dict() if hasattr(config, "to_dict") else config
            found[name] = {**values, "_class_name": type(part).__name__}
    return found


def refuse_unfit_parts(model: str, parts: Parts) -> None:
    """Refuse a model that takes more than prompts, or whose parts are not of one model.

    Args:
        model: As the user named it, for the message.
        parts: The configs of its parts. What they leave out is not checked.

    Raises:
        ValueError: It is such a model.
    """
    for problem in _problems(parts):
        raise ValueError(f"model={model!r} {problem}")


def refuse_unfit_pixel_parts(model: str, parts: Parts) -> None:
    """Refuse a pixel-space model that takes more than noise, or draws no pictures.

    Args:
        model: As the user named it, for the message.
        parts: The configs of its parts. What they leave out is not checked.

    Raises:
        ValueError: It is such a model.
    """
    unet = parts.get("unet", {})
    taken, drawn = (_count(unet, name, 3) for name in ("in_channels", "out_channels"))
    if taken is None or drawn is None:
        return
    if drawn not in (taken, 2 * taken):  # twice as many with a learned variance
        raise ValueError(
            f"model={model!r} is for more than sampling, such as super-resolution: its network"
            f" takes {taken} channels, and draws {drawn}"
        )
    if taken not in (1, 3):
        raise ValueError(
            f"model={model!r} draws {taken} channels: a picture has 3 channels, or 1 if it is grey"
        )
    for problem in _scheduler_problems("unet", parts):
        raise ValueError(f"model={model!r} {problem}")


def _problems(parts: Parts) -> Iterator[str]:
    name = next((each for each in ("unet", "transformer") if each in parts), None)
    if name is not None:
        yield from _channel_problems(name, parts)
        if parts[name]["_class_name"] == "UNet2DConditionModel":
            yield from _text_problems(parts)
        yield from _scheduler_problems(name, parts)


def _count(config: Mapping[str, Any], name: str, usual: int | None = None) -> int | None:
    """A number of a config; `None` if the config has no single number for it."""
    value = config.get(name, usual)
    return value if isinstance(value, int) else None


def _channel_problems(name: str, parts: Parts) -> Iterator[str]:
    """What is wrong with the channels that a denoiser takes and draws."""
    network, vae = parts[name], parts.get("vae")
    is_unet = network["_class_name"] == "UNet2DConditionModel"
    usual = 4 if is_unet else None
    taken, drawn = (_count(network, name, usual) for name in ("in_channels", "out_channels"))
    if vae is None or taken is None:
        return
    latents = _count(vae, "latent_channels", _count(vae, "z_dim", usual))
    if latents is None:
        return
    held = latents * (4 if network["_class_name"] in _PACKED else 1)
    title = "U-Net" if is_unet else "transformer"
    if taken > held or (is_unet and drawn != taken):
        purpose = "inpainting" if taken == 2 * held + 1 else "more than text to image"
        if is_unet and taken == 2 * held:
            purpose = "editing pictures by instructions (InstructPix2Pix)"
        draws = f"draws {drawn}" if drawn else f"latents have {held}"
        yield (
            f"is for {purpose}: its {title} takes {taken} channels, and {draws}; only text to image"
            " is supported here"
        )
    elif taken != held:
        yield (
            f"has parts of different models: its {title} takes {taken} channels, and the latents of"
            f" its VAE have {held}"
        )


def _text_problems(parts: Parts) -> Iterator[str]:
    """What is wrong with the condition that a U-Net takes."""
    unet = parts["unet"]
    if parts.keys() <= _XL:  # others have more to give
        for setting in ("num_class_embeds", "class_embed_type"):
            if unet.get(setting) is not None:
                yield (
                    f"needs more than a prompt: its U-Net takes classes"
                    f" ({setting}={unet[setting]!r}); only text to image is supported here"
                )
    if parts.keys() <= STABLE_DIFFUSION and unet.get("addition_embed_type") is not None:
        yield (
            "has parts of different models: its U-Net takes more than the text of one encoder"
            f" (addition_embed_type={unet['addition_embed_type']!r}), as that of Stable Diffusion"
            " XL"
        )
    encoders = [config for name, config in parts.items() if name.startswith("text_encoder")]
    widths = [_count(config, "hidden_size") for config in encoders]
    wanted = _count(unet, "cross_attention_dim")
    # The text of others goes through a projection.
    is_clip = all(str(each["_class_name"]).startswith("CLIPText") for each in encoders)
    if not is_clip or unet.get("encoder_hid_dim") is not None or wanted is None:
        return
    if widths and None not in widths and sum(cast("list[int]", widths)) != wanted:
        yield (
            f"has parts of different models: its U-Net takes text of the width {wanted}, and its"
            f" text encoder gives {' + '.join(map(str, widths))}"
        )


def _scheduler_problems(name: str, parts: Parts) -> Iterator[str]:
    """What is wrong with the kind of the scheduler."""
    network = str(parts.get(name, {}).get("_class_name"))
    config = parts.get("scheduler", {})
    scheduler = str(config.get("_class_name"))
    is_flow = scheduler.startswith("FlowMatch")
    if network in _WITHOUT_FLOW and is_flow:
        yield (
            f"has parts of different models: its scheduler ({scheduler}) is for networks that were"
            f" trained by flow matching, unlike its {network}"
        )
    is_flow = is_flow or bool(config.get("use_flow_sigmas")) or len(config) < 2
    if network in _FLOW_MATCHING and not is_flow:
        yield (
            f"has parts of different models: its {network} was trained by flow matching, and its"
            f" scheduler ({scheduler}) is for other networks"
        )
