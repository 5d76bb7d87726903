"""Guidances as guiders of diffusers' modular pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor, nn

from ..denoiser.caller import find_caller
from ..denoiser.families import family_of
from ..guidance import (
    Branch,
    Guidance,
    GuidanceHandle,
    GuidanceSum,
    SelfAttentionGuidance,
    attach,
    guidance_of,
)

_Given = Guidance | GuidanceSum | Mapping[str, Any]


class _Guider(ClassifierFreeGuidance):
    """Classifier-free guidance with other guidances; subclasses call `_begin` in `__init__`.

    A modular pipeline calls its denoiser once for each condition. The guidances of a call's branch
    are attached for this call only; `forward` adds their terms to the other prediction.
    """

    def _begin(self, guidances: tuple[Guidance, ...]) -> None:
        self.guidances = guidances
        self.guidance_handles: tuple[GuidanceHandle, ...] = ()
        self.scheduler: Any = None
        self._present: dict[Branch, GuidanceHandle] = {}
        self._earlier: GuidanceHandle | None = None
        self._is_negated = False

    @property
    def guidance_handle(self) -> GuidanceHandle | None:
        """The handle of the last guided step; of two handles, that of the unconditional branch."""
        return self.guidance_handles[-1] if self.guidance_handles else None

    def new(self, **kwargs: Any) -> Any:
        """Copy this guider with other settings and the same scheduler.

        Args:
            **kwargs: The settings that differ.
        """
        config: Any = self.config
        # diffusers thinks that settings given by position were not given, and would drop them.
        given = {name: value for name, value in config.items() if name != "_use_default_values"}
        copy: Any = type(self).from_config(given, **kwargs)
        copy.scheduler = self.scheduler
        return copy

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Set the present step; the pipeline calls this at every step."""
        super().set_state(step, num_inference_steps, timestep)
        self._release()
        self._present = {}

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Guide the next call of the denoiser, if its branch is guided.

        Raises:
            ValueError: No pipeline runs and `scheduler` was not given, or a guidance does not
                support the denoiser.
        """
        super().prepare_models(denoiser)
        self._release()
        branch: Branch = "cond" if self.is_conditional else "uncond"
        numbers = tuple(n for n, of in self._branches().items() if of == branch)
        if not numbers:
            return
        scheduler = self._scheduler_that_runs()
        handle = attach(denoiser, *self.guidances, scheduler=scheduler, batch_layout="single")
        handle.remove_after_call(self._earlier, numbers)
        self._is_negated = family_of(denoiser).is_negated
        self._present[branch] = self._earlier = handle

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Restore the denoiser.

        Raises:
            RuntimeError: It was not called since `prepare_models`, so guidance had no effect.
        """
        super().cleanup_models(denoiser)
        was_called = not any(handle.attached for handle in self._present.values())
        self._release()
        if not was_called:
            raise RuntimeError(
                f"{type(denoiser).__name__} was prepared for guidance but not called, so it would "
                "not be guided; call the same module that prepare_models got"
            )

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """Add the terms of all guidances to both predictions, and apply classifier-free guidance.

        Args:
            pred_cond: The conditional prediction, as the scheduler takes it: pipelines negate that
                of Z-Image. It may lack the tokens of pictures behind the one that is denoised.
            pred_uncond: The unconditional prediction, same shape; `None` without classifier-free
                guidance.

        Returns:
            diffusers' `GuiderOutput`, with `pred`, `pred_cond` and `pred_uncond`.

        Raises:
            RuntimeError: The denoiser was called without `prepare_models`, so guidance had no
                effect.
        """
        if missing := {*self._branches().values()} - self._present.keys():
            raise RuntimeError(
                f"the {' and '.join(sorted(missing))} prediction was made without guidance: call "
                "prepare_models before each call of the denoiser"
            )
        guided = {of: handle for of, handle in self._present.items() if handle.term is not None}
        if guided:
            self.guidance_handles = tuple(guided[branch] for branch in sorted(guided))
        # The prediction of a guided branch already contains its terms.
        if pred_uncond is not None:
            pred_uncond = self._with_term(pred_uncond, guided.get("cond"))
            pred_cond = self._with_term(pred_cond, guided.get("uncond"))
        return super().forward(pred_cond, pred_uncond)

    def _branches(self) -> dict[int, Branch]:
        """Map the number of each guidance that is on to the branch of the call that it guides.

        Without classifier-free guidance, the conditional call is the only one.
        """
        config: Any = self.config
        is_alone = self.num_conditions == 1
        return {
            number: "cond" if is_alone else guidance.branch
            for number, guidance in enumerate(self.guidances)
            if config.enabled and guidance.scale != 0
        }

    def _scheduler_that_runs(self) -> Any:
        caller = find_caller() if self.scheduler is None else None
        scheduler = self.scheduler if caller is None else caller.pipeline.scheduler
        if scheduler is None:
            raise ValueError(
                "the guider does not know the scheduler: no modular pipeline runs; set "
                "guider.scheduler to the one that drives your loop"
            )
        return scheduler

    def _with_term(self, prediction: Tensor, handle: GuidanceHandle | None) -> Tensor:
        """Add the term that a handle added to the other prediction."""
        if handle is None or handle.term is None:
            return prediction
        # The tokens of other pictures come last, and the pipeline may have cut them off.
        term = handle.term[:, : prediction.shape[1]]
        return (prediction + (-term if self._is_negated else term)).to(prediction.dtype)

    def _release(self) -> None:
        for handle in self._present.values():
            handle.remove()


class GuidanceGuider(_Guider):
    """One or several guidances, and classifier-free guidance, for modular pipelines.

    Its predictions are those of `attach` on other pipelines, with classifier-free guidance (Ho and
    Salimans, arXiv 2207.12598) or without:

        guider = GuidanceGuider(PerturbedAttentionGuidance(3.0), guidance_scale=5.0)
        pipe.update_components(guider=guider)

    Guidance without effect is an error: no guidance, a layer that does not run, a weakened
    prediction equal to the usual one, or a pipeline that does not tell the guider of its calls.

    Attributes:
        scheduler: The scheduler that drives a loop of your own; not saved with the config. `None`
            is the scheduler of the running modular pipeline.
        guidances: The guidances.
        guidance_handles: The handles of the last guided step, one for each guided branch, with what
            the guidances read and added.

    Args:
        guidances: One guidance or several, also as a sum, or their `to_dict()`.
        guidance_scale: Weight of classifier-free guidance; 1 is off.
        guidance_rescale: How far the standard deviation of the prediction is pulled back to that of
            the conditional prediction, 0 to 1 (arXiv 2305.08891, Sec. 3.4).
        use_original_formulation: See diffusers' `ClassifierFreeGuidance`.
        start: Classifier-free guidance begins at this fraction of the steps; the guidances have
            their own `start` and `stop`.
        stop: Classifier-free guidance ends at this fraction.
        enabled: Whether any guidance is on. `disable`, which modular pipelines call for networks
            with distilled classifier-free guidance, only turns off classifier-free guidance.

    Raises:
        ValueError: There is no guidance, or a setting is out of its range or not of its type.
    """

    @register_to_config
    def __init__(
        self,
        guidances: _Given | Sequence[_Given],
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        """Check every setting."""
        super().__init__(
            guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled
        )
        self._begin(_guidances(guidances))
        # The config is saved as JSON.
        self.register_to_config(guidances=[each.to_dict() for each in self.guidances])


def _guidances(given: Any) -> tuple[Guidance, ...]:
    several = cast("Sequence[Any]", given if isinstance(given, list | tuple) else (given,))
    found = [guidance_of(dict(each)) if isinstance(each, Mapping) else each for each in several]
    if not found or not all(isinstance(each, Guidance | GuidanceSum) for each in found):
        raise ValueError(
            f"guidances={given!r:.60} must be a guidance or several: SelfAttentionGuidance(0.75)"
        )
    return tuple(part for each in found for part in each.parts)


class SelfAttentionGuider(_Guider):
    """Classifier-free and Self-Attention Guidance for diffusers' modular pipelines.

    Its predictions are those of `SelfAttentionGuidance.attach` on other pipelines (Hong et al.,
    ICCV 2023, arXiv 2210.00939, Eq. 16, added after classifier-free guidance):

        pipe.update_components(guider=SelfAttentionGuider(guidance_scale=5.0))

    Attributes:
        scheduler: The scheduler that drives a loop of your own; not saved with the config. `None`
            is the scheduler of the running modular pipeline.
        guidance: The settings of Self-Attention Guidance.
        guidance_handle: The handle of the last guided step: its mask and attention.

    Args:
        guidance_scale: Weight of classifier-free guidance; 1 is off.
        sag_scale: Weight of Self-Attention Guidance, any finite number; 0 is off.
        guidance_rescale: How far the standard deviation of the prediction is pulled back to that of
            the conditional prediction, 0 to 1 (arXiv 2305.08891, Sec. 3.4).
        use_original_formulation: See diffusers' `ClassifierFreeGuidance`.
        start: Classifier-free guidance begins at this fraction of the steps.
        stop: Classifier-free guidance ends at this fraction.
        enabled: Whether any guidance is on. `disable`, which modular pipelines call for networks
            with distilled classifier-free guidance, only turns off classifier-free guidance.
        sag_start: Self-Attention Guidance begins at this fraction of the steps.
        sag_stop: Self-Attention Guidance ends at this fraction.
        every: See `SelfAttentionGuidance` for this and the following arguments.
        blur_sigma: Standard deviation of the blur.
        blur_kernel_size: Taps of the blur.
        threshold: Positions that receive more attention than this are blurred.
        layer: Dotted path of the attention layer, or `None`.
        branch: The branch that is read and weakened, "uncond" or "cond".

    Raises:
        ValueError: A setting is out of its range or not of its type.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        sag_scale: float = 0.75,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        sag_start: float = 0.0,
        sag_stop: float = 1.0,
        every: int = 1,
        blur_sigma: float = 1.0,
        blur_kernel_size: int = 9,
        threshold: float = 1.0,
        layer: str | None = None,
        branch: Branch = "uncond",
    ) -> None:
        """Check every setting."""
        super().__init__(
            guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled
        )
        guidance = SelfAttentionGuidance(
            sag_scale,
            blur_sigma=blur_sigma,
            blur_kernel_size=blur_kernel_size,
            start=sag_start,
            stop=sag_stop,
            every=every,
            branch=branch,
            threshold=threshold,
            layer=layer,
        )
        self._begin((guidance,))

    @property
    def guidance(self) -> Guidance:
        """The settings of Self-Attention Guidance."""
        return self.guidances[0]
