"""Who calls a denoiser: the pipeline that runs, its scheduler, and what it says of its batch.

A denoiser is not told. Several pipelines may share it, a copy of a guided pipeline calls a copy of
it, and inversion has a scheduler of its own. The pipeline that runs stands on the call stack.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline, SchedulerMixin
from torch import nn

_CFG = "do_classifier_free_guidance"

# Pipelines whose denoiser sees x_t = alpha_t * x0 + sigma_t * eps as its scheduler counts, in its
# first channels or tokens, one or two conditions a picture. Their subclasses are known, too.
_KNOWN = frozenset(
    """
    StableDiffusionPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline
    StableDiffusionDepth2ImgPipeline StableDiffusionUpscalePipeline
    StableDiffusionImageVariationPipeline StableDiffusionAdapterPipeline
    StableDiffusionControlNetPipeline StableDiffusionControlNetImg2ImgPipeline
    StableDiffusionControlNetInpaintPipeline StableDiffusionControlNetXSPipeline
    StableDiffusionDiffEditPipeline StableDiffusionGLIGENPipeline
    StableDiffusionGLIGENTextImagePipeline StableDiffusionLDM3DPipeline
    StableDiffusionModelEditingPipeline StableDiffusionPanoramaPipeline StableDiffusionSAGPipeline
    StableUnCLIPPipeline StableUnCLIPImg2ImgPipeline AltDiffusionPipeline
    AltDiffusionImg2ImgPipeline LatentConsistencyModelPipeline
    LatentConsistencyModelImg2ImgPipeline PaintByExamplePipeline
    StableDiffusionXLPipeline StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
    StableDiffusionXLAdapterPipeline StableDiffusionXLControlNetPipeline
    StableDiffusionXLControlNetImg2ImgPipeline StableDiffusionXLControlNetInpaintPipeline
    StableDiffusionXLControlNetUnionPipeline StableDiffusionXLControlNetUnionImg2ImgPipeline
    StableDiffusionXLControlNetUnionInpaintPipeline StableDiffusionXLControlNetXSPipeline
    IFPipeline IFImg2ImgPipeline IFInpaintingPipeline KandinskyPipeline KandinskyImg2ImgPipeline
    KandinskyInpaintPipeline KandinskyV22Pipeline KandinskyV22Img2ImgPipeline
    KandinskyV22InpaintPipeline KandinskyV22ControlnetPipeline
    KandinskyV22ControlnetImg2ImgPipeline LDMTextToImagePipeline AudioLDMPipeline MusicLDMPipeline
    DDIMPipeline DDPMPipeline PNDMPipeline LDMPipeline LDMSuperResolutionPipeline ADMPipeline
    DiTPipeline PixArtAlphaPipeline PixArtSigmaPipeline HunyuanDiTPipeline
    HunyuanDiTControlNetPipeline AuraFlowPipeline
    StableDiffusion3Pipeline StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline
    StableDiffusion3ControlNetPipeline StableDiffusion3ControlNetInpaintingPipeline
    FluxPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxFillPipeline FluxControlPipeline
    FluxControlImg2ImgPipeline FluxControlInpaintPipeline FluxControlNetPipeline
    FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline FluxKontextPipeline
    FluxKontextInpaintPipeline ChromaPipeline ChromaImg2ImgPipeline ChromaInpaintPipeline
    QwenImagePipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline
    QwenImageControlNetPipeline QwenImageControlNetInpaintPipeline QwenImageEditPipeline
    QwenImageEditInpaintPipeline QwenImageEditPlusPipeline
    """.split()  # noqa: SIM905  # one name a line would fill two screens
)


@dataclass(frozen=True)
class Caller:
    """What runs a denoiser.

    Attributes:
        pipeline: The pipeline.
        frame: Of its call, if that is under way.
    """

    pipeline: Any
    frame: FrameType | None

    @property
    def name(self) -> str:
        """Of the pipeline's class."""
        return type(self.pipeline).__name__

    @property
    def cfg(self) -> bool | None:
        """Whether classifier-free guidance is on, as its own call has it; `None` if unknown."""
        if self.frame is None:
            return None
        where = _where_cfg_is_kept(type(self.pipeline))
        if where == "variable":
            return self.frame.f_locals.get(_CFG)
        return bool(getattr(self.pipeline, _CFG)) if where == "property" else None

    @property
    def schedulers(self) -> list[Any]:
        """The pipeline's schedulers, the usual one first."""
        own = getattr(self.pipeline, "scheduler", None)
        others = [
            value
            for value in vars(self.pipeline).values()
            if isinstance(value, SchedulerMixin) and value is not own
        ]
        return [own, *others] if own is not None else others


def find_caller(own: Any = None) -> Caller | None:
    """The innermost pipeline whose code runs in this thread.

    Args:
        own: A pipeline that is no `DiffusionPipeline`, to be found as well.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for name in _candidates(frame.f_code):
            found = frame.f_locals.get(name)
            if isinstance(found, DiffusionPipeline | ModularPipeline) or (
                own is not None and found is own
            ):
                return Caller(found, frame)
        frame = frame.f_back
    return None


def is_running(denoiser: nn.Module, thread: threading.Thread) -> bool:
    """Whether a thread is inside of a call of a module."""
    frame = sys._current_frames().get(thread.ident or 0) if thread.is_alive() else None
    while frame is not None:
        is_call = frame.f_code.co_name == "_call_impl"
        if is_call and frame.f_locals.get("self") is denoiser:
            return True
        frame = frame.f_back
    return False


def refuse_unknown(pipeline: Any) -> None:
    """Refuse pipelines of which nobody knows what their denoiser receives.

    Raises:
        ValueError: Names the pipeline, and what to do.
    """
    names = [base.__name__ for base in type(pipeline).__mro__]
    if any("PAG" in name and name.endswith("Pipeline") for name in names):
        raise ValueError(
            f"{names[0]} brings perturbed-attention guidance of its own, which leaves its "
            "processors behind; attach PerturbedAttentionGuidance to the pipeline of the same name "
            "without PAG"
        )
    if isinstance(pipeline, ModularPipeline):
        raise ValueError(f"{names[0]} is guided by a guider: see SelfAttentionGuider")
    if not _KNOWN.intersection(names):
        raise ValueError(
            f"{names[0]} is not supported: it is not known whether its network receives the noisy "
            "picture as the scheduler has it, in its first channels, with at most two conditions "
            "a picture. If so, attach to the network, with scheduler= and batch_layout="
        )


@functools.cache
def _candidates(code: CodeType) -> tuple[str, ...]:
    """Names of variables that may hold a pipeline: methods' own, and that of modular blocks."""
    arguments = code.co_varnames[: code.co_argcount]
    return tuple(name for name in ("self", "components") if name in arguments)


@functools.cache
def _where_cfg_is_kept(pipeline: type) -> str:
    """Whether a pipeline's call keeps a variable, or asks a property that may say otherwise."""
    for base in pipeline.__mro__:
        call = vars(base).get("__call__")
        code = getattr(inspect.unwrap(call), "__code__", None) if call is not None else None
        if code is None:
            continue
        if _CFG in (*code.co_varnames, *code.co_cellvars):
            return "variable"
        # Others may use the property in part, and decide by something else.
        is_known = base.__module__.startswith("diffusers.")
        if _CFG in code.co_names and is_known:
            return "property"
        if not is_known and "super" not in code.co_names:
            return "unknown"
    return "unknown"
