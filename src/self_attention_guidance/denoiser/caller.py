"""The caller of a denoiser: the running pipeline, its scheduler, and whether it uses CFG.

A denoiser does not know its pipeline. Several pipelines may share it, a copy of a guided pipeline
calls a copy of it, and inversion has its own scheduler. So the pipeline is found on the call stack.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline, SchedulerMixin
from torch import nn

_CFG = "do_classifier_free_guidance"
# In pipelines of diffusers that can stop CFG before the last step: one variable or the other.
_CFG_AT_STEP = "apply_cfg"
_CFG_HAS_STOPPED = "do_classifier_free_truncation"
_CFG_OF_DISTILLED = "do_true_cfg"  # in pipelines of networks that take a scale as an argument

# Pipelines whose denoiser gets x_t = alpha_t * x0 + sigma_t * eps in its first channels or tokens,
# at the scheduler's noise level, with one or two conditions. Their subclasses count as known, too.
_KNOWN = re.compile(
    r"""(
    StableDiffusion (XL)? (Adapter | Img2Img | Inpaint | ControlNet (Img2Img | Inpaint | XS)?)?
    | StableDiffusion (Depth2Img | DiffEdit | GLIGEN (TextImage)? | ImageVariation | LDM3D)
    | StableDiffusion (ModelEditing | Panorama | SAG | Upscale)
    | StableDiffusionXLControlNetUnion (Img2Img | Inpaint)?
    | StableDiffusion3 (Img2Img | Inpaint | ControlNet (Inpainting)?)?
    | (StableUnCLIP | AltDiffusion | LatentConsistencyModel) (Img2Img)? | PaintByExample
    | IF (Img2Img | Inpainting)?
    | Kandinsky (V22)? (Img2Img | Inpaint)? | KandinskyV22Controlnet (Img2Img)?
    | LDM (TextToImage | SuperResolution)? | AudioLDM | MusicLDM
    | DDIM | DDPM | PNDM | ADM | DiT | PixArt (Alpha | Sigma) | HunyuanDiT (ControlNet)? | AuraFlow
    | Flux (Control | ControlNet)? (Img2Img | Inpaint)? | FluxFill | FluxKontext (Inpaint)?
    | Chroma (Img2Img | Inpaint)?
    | QwenImage (Img2Img | Inpaint | ControlNet (Inpaint)? | Edit (Inpaint | Plus)?)?
    | ZImage (Img2Img | Inpaint)? | Kolors | Lumina2 | CogView4 | Flux2 (Klein)? | HiDreamImage
    )Pipeline""",
    re.VERBOSE,
)

# Methods of DiffEdit that don't draw: x_t is at another noise level than the timestep says, or has
# four conditions a picture.
_NOT_DRAWING = ("invert", "generate_mask")


@dataclass(frozen=True)
class Caller:
    """The pipeline that runs a denoiser, and the stack frame of its call."""

    pipeline: Any
    frame: FrameType

    @property
    def is_known(self) -> bool:
        """Whether the call is in code of diffusers or of this package, not in a user's own."""
        package = str(self.frame.f_globals.get("__name__")).partition(".")[0]
        return package in ("diffusers", __name__.partition(".")[0])

    def refuse_not_drawing(self) -> None:
        """Refuse methods of the pipeline whose calls can't be guided."""
        method = self.frame.f_code.co_name
        if self.is_known and method in _NOT_DRAWING:
            raise ValueError(
                f"{type(self.pipeline).__name__}.{method} is not supported, only the call that "
                f"draws is: run {method} without guidance, and attach it afterwards"
            )

    @functools.cached_property
    def cfg(self) -> bool | None:
        """Whether classifier-free guidance is on in the pipeline's call; `None` if unknown.

        Pipelines of a user's own may inherit a property that their own loop does not follow.
        """
        if not self.is_known:
            return None
        code, variables = self.frame.f_code, self.frame.f_locals
        if variables.get(_CFG_HAS_STOPPED):
            return False
        # The variable comes first, because the property may differ from it.
        for name in (_CFG_AT_STEP, _CFG_OF_DISTILLED, _CFG):
            if name in (*code.co_varnames, *code.co_cellvars):
                return variables.get(name)
        return bool(getattr(self.pipeline, _CFG)) if _CFG in code.co_names else None

    @property
    def turns(self) -> object:
        """What is the same in a pipeline's whole call, if its scheduler gets other tables in it.

        The views of a panorama take turns at each step, each with a copy of the scheduler's tables.
        """
        return self.frame.f_locals.get("views_scheduler_status") if self.is_known else None

    @property
    def schedulers(self) -> list[Any]:
        """The pipeline's schedulers, its `scheduler` first."""
        own = getattr(self.pipeline, "scheduler", None)
        found = [each for each in vars(self.pipeline).values() if isinstance(each, SchedulerMixin)]
        others = [each for each in found if each is not own]
        return others if own is None else [own, *others]


def find_caller(own: Any = None) -> Caller | None:
    """Find the innermost pipeline that runs in this thread.

    `own` is a pipeline to look for that need not be a `DiffusionPipeline`.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for name in _candidates(frame.f_code):
            found = frame.f_locals.get(name)
            is_own = own is not None and found is own
            if is_own or isinstance(found, DiffusionPipeline | ModularPipeline):
                return Caller(found, frame)
        frame = frame.f_back
    return None


def is_running(denoiser: nn.Module, thread: threading.Thread) -> bool:
    """Whether a thread is inside a call of the denoiser."""
    frame = sys._current_frames().get(thread.ident or 0) if thread.is_alive() else None
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is denoiser:
            return True
        frame = frame.f_back
    return False


def refuse_unknown(pipeline: Any) -> None:
    """Refuse pipelines for which it is not known what their denoiser receives."""
    names = [base.__name__ for base in type(pipeline).__mro__]
    if any("PAG" in name and name.endswith("Pipeline") for name in names):
        raise ValueError(
            f"{names[0]} does not remove the attention processors of its own guidance; attach "
            "PerturbedAttentionGuidance to the pipeline of the same name without PAG"
        )
    if isinstance(pipeline, ModularPipeline):
        raise ValueError(f"{names[0]} is guided by a guider: see GuidanceGuider")
    if not any(_KNOWN.fullmatch(name) for name in names):
        raise ValueError(
            f"{names[0]} is not supported; if its network receives the noisy picture as the "
            "scheduler has it, in its first channels, with at most two conditions a picture, "
            "attach to the network, with scheduler= and batch_layout="
        )


@functools.cache
def _candidates(code: CodeType) -> tuple[str, ...]:
    """Return the variables that may hold a pipeline: `self`, and `components` in modular blocks."""
    arguments = code.co_varnames[: code.co_argcount]
    return tuple(name for name in ("self", "components") if name in arguments)
