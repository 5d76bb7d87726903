"""The table of supported denoisers: one entry for each class, and no code for any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

BatchLayout = Literal[
    "single", "uncond_first", "cond_first", "cond_call_first", "uncond_call_first"
]
"""How calls are made under classifier-free guidance: each row is a picture ("single"), the batch
has two halves, in either order, or each step has two calls, in either order."""

Joint = Literal["picture_first", "picture_last", "behind_own_text"]
"""Where the picture's tokens lie in joint attention with text (see `Family`)."""

# Arguments that hold one entry for each picture, in all of diffusers' denoisers.
_BATCHED = tuple(
    """
    encoder_hidden_states encoder_hidden_states_mask encoder_hidden_states_t5 attention_mask
    encoder_attention_mask text_embedding_mask text_embedding_mask_t5 pooled_projections
    class_labels guidance timestep_cond additional_t_cond image_meta_size style img_shapes
    txt_seq_lens added_cond_kwargs.text_embeds added_cond_kwargs.time_ids
    added_cond_kwargs.image_embeds added_cond_kwargs.hint added_cond_kwargs.resolution
    added_cond_kwargs.aspect_ratio cross_attention_kwargs.gligen joint_attention_kwargs.temb
    joint_attention_kwargs.ip_adapter_image_embeds joint_attention_kwargs.ip_hidden_states
    down_block_additional_residuals mid_block_additional_residual
    down_intrablock_additional_residuals block_controlnet_hidden_states controlnet_block_samples
    controlnet_single_block_samples original_size target_size crop_coords cap_feats
    encoder_hidden_states_llama3 pooled_embeds
    """.split()  # noqa: SIM905  # one name a line would fill a screen
)


@dataclass(frozen=True)
class Packing:
    """How latents are packed into a sequence of tokens, (batch, tokens, channels).

    The forward argument named by `ids` holds the positions of tokens: "img_ids" a row and a column
    for each token, "img_shapes" the numbers of rows and columns of each picture. A token is a
    square of `patch` x `patch` latent pixels.
    """

    ids: Literal["img_ids", "img_shapes"]
    patch: int = 2


@dataclass(frozen=True)
class Family:
    """One class of denoisers.

    Attributes:
        layer: Dotted path of the self-attention layer that guidance reads or weakens by default;
            "middle" stands for the middle block of a list.
        sample_argument: Name of the forward argument that holds x_t.
        batched: Names of the forward arguments that hold one entry for each picture: tensors, or
            lists of tensors or of other things, or dictionaries of these. "a.b" is the entry b of
            the dictionary a. All other arguments, except x_t and the timestep, are passed whole to
            the weakened pass. By default, all such names of diffusers' classes.
        batched_second: Names of batched arguments whose second axis holds the pictures.
        condition: Name of the argument that differs between the halves of classifier-free guidance.
        cfg_layout: Layout of diffusers' pipelines under classifier-free guidance; "single" if they
            have none.
        null_label: Entry of the denoiser's config that holds the label of "no class". It identifies
            the halves if the pipeline does not say which is which. `None` if there is none.
        timestep_argument: Name of the forward argument that holds the timestep.
        timestep_scale: Pipelines give the network the timestep `timestep_offset` + `timestep_scale`
            * t, where t is the scheduler's.
        timestep_offset: See `timestep_scale`; 1 if the network counts from 0 (noise) to 1
            (pictures).
        is_negated: Whether pipelines negate the network's prediction.
        tokens: The picture's tokens: "levels" of a U-Net, each half as fine as the one before, or
            square "patches" whose side is `patch_size` in the config.
        joint: Where the picture's tokens lie in joint attention with text; `None` without joint
            attention. "behind_own_text" is behind the words that `encoder_attention_mask` counts;
            their number differs from row to row.
        returned: What comes first in the output of a block that returns picture and text.
        packing: How the latents are packed; `None` if they are (batch, channels, height, width).
    """

    layer: str
    sample_argument: str = "hidden_states"
    batched: tuple[str, ...] = _BATCHED
    batched_second: tuple[str, ...] = ()
    condition: str = "encoder_hidden_states"
    cfg_layout: BatchLayout = "uncond_first"
    null_label: str | None = None
    timestep_argument: str = "timestep"
    timestep_scale: float = 1.0
    timestep_offset: float = 0.0
    is_negated: bool = False
    tokens: Literal["levels", "patches"] = "patches"
    joint: Joint | None = None
    returned: Literal["text_first", "picture_first"] = "text_first"
    packing: Packing | None = None


_UNET = Family("mid_block.attentions.0.transformer_blocks.0.attn1", "sample", tokens="levels")
_FLUX = Family(
    "single_transformer_blocks.middle.attn",
    cfg_layout="cond_call_first",
    timestep_scale=1e-3,
    joint="picture_last",
    packing=Packing("img_ids"),
)

# Networks whose time runs from 0 (noise) to 1 (pictures), and which predict x0 - eps.
_REVERSED: dict[str, Any] = {"timestep_scale": -1e-3, "timestep_offset": 1.0, "is_negated": True}

# For transformers, the middle block, by argument, not by measurement. All blocks see the same grid
# of tokens; the first ones attend to neighbours, and the last ones work on pixels. So the middle
# block corresponds to the bottleneck of a U-Net, the layer that the paper reads. diffusers'
# examples of perturbed-attention guidance, a related method, take the middle block, too.
FAMILIES = {
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": replace(
        _UNET, layer="mid_block.attentions.0", condition="class_labels", cfg_layout="single"
    ),
    "DiTTransformer2DModel": Family(
        "transformer_blocks.middle.attn1",
        condition="class_labels",
        cfg_layout="cond_first",
        null_label="num_embeds_ada_norm",
    ),
    "PixArtTransformer2DModel": Family("transformer_blocks.middle.attn1"),
    "HunyuanDiT2DModel": Family("blocks.middle.attn1"),
    "SD3Transformer2DModel": Family("transformer_blocks.middle.attn", joint="picture_first"),
    "AuraFlowTransformer2DModel": replace(_FLUX, cfg_layout="uncond_first", packing=None),
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "QwenImageTransformer2DModel": replace(
        _FLUX, layer="transformer_blocks.middle.attn", packing=Packing("img_shapes")
    ),
    "ZImageTransformer2DModel": Family(
        "layers.middle.attention",
        sample_argument="x",
        condition="cap_feats",
        cfg_layout="cond_first",
        timestep_argument="t",
        joint="picture_first",
        **_REVERSED,
    ),
    "Lumina2Transformer2DModel": Family(
        "layers.middle.attn", cfg_layout="cond_call_first", joint="behind_own_text", **_REVERSED
    ),
    "CogView4Transformer2DModel": Family(
        "transformer_blocks.middle.attn1",
        cfg_layout="cond_call_first",
        joint="picture_last",
        returned="picture_first",
    ),
    # Its tokens hold 2 x 2 latent pixels, too; its pipeline calls them 128 channels.
    "Flux2Transformer2DModel": _FLUX,
    "HiDreamImageTransformer2DModel": Family(
        "single_stream_blocks.middle.block.attn1",
        batched_second=("encoder_hidden_states_llama3",),
        condition="pooled_embeds",
        timestep_argument="timesteps",
        is_negated=True,
        joint="picture_first",
        returned="picture_first",
    ),
}


def register_family(denoiser: str, family: Family) -> None:
    """Add your own class of denoisers, or change the entry of a known class.

    Args:
        denoiser: Name of the class; its subclasses are guided, too.
        family: Its entry in the table. To change the entry of a known class, apply
            `dataclasses.replace` to `family_of(denoiser)`.

    Raises:
        ValueError: The name is empty, or `family` is not a `Family`.
    """
    if not denoiser or not isinstance(family, Family):  # type: ignore[redundant-expr]
        raise ValueError(f"register_family({denoiser!r}, {family!r}): needs a name and a Family")
    FAMILIES[denoiser] = family


def register_batch_arguments(denoiser: str, *names: str) -> None:
    """Add forward arguments that hold one entry for each picture.

    Args:
        denoiser: Name of a known class of denoisers.
        *names: Names as in `Family.batched`, for example "cross_attention_kwargs.mine".

    Raises:
        ValueError: The class is not known.
    """
    family = FAMILIES.get(denoiser)
    if family is None:
        raise ValueError(_not_supported(denoiser))
    FAMILIES[denoiser] = replace(family, batched=(*family.batched, *names))


def default_layer(denoiser: nn.Module) -> str:
    """Return the dotted path of the layer that the table names for a denoiser."""
    path, module = "", uncompiled(denoiser)
    for name in family_of(denoiser).layer.split("."):
        if name == "middle" and isinstance(module, nn.ModuleList):
            name = str(len(module) // 2)
        path = f"{path}.{name}" if path else name
        module = getattr(module, name, None)
    return path


def family_of(denoiser: nn.Module | type[nn.Module]) -> Family:
    """Return the table's entry for a denoiser or its class; refuse it if there is none.

    The entry of a class also holds for its subclasses.
    """
    cls = denoiser if isinstance(denoiser, type) else type(uncompiled(denoiser))
    for base in cls.__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    raise ValueError(_not_supported(cls.__name__))


def _not_supported(denoiser: str) -> str:
    return (
        f"denoiser {denoiser} is not supported; supported: {', '.join(FAMILIES)}; for one of "
        "your own, see register_family"
    )


def denoiser_of(target: Any) -> nn.Module | None:
    """Return the denoiser of a pipeline, or the target itself if it is one; else `None`."""
    own = getattr(target, "unet", getattr(target, "transformer", None))
    found = target if isinstance(target, nn.Module) else own
    return found if isinstance(found, nn.Module) else None


def config_of(denoiser: nn.Module) -> Mapping[str, Any]:
    """Return the config of a denoiser; an empty one if it has none."""
    return getattr(uncompiled(denoiser), "config", {})


def uncompiled(denoiser: nn.Module) -> nn.Module:
    """Return the module behind `torch.compile(denoiser)`, or the denoiser itself."""
    inner = getattr(denoiser, "_orig_mod", denoiser)
    return inner if isinstance(inner, nn.Module) else denoiser
