"""Self-Attention Guidance as the guider of a modular pipeline of diffusers."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor, nn

from ..denoiser.caller import find_caller
from ..guidance import Branch, GuidanceHandle, SelfAttentionGuidance


class SelfAttentionGuider(ClassifierFreeGuidance):
    """Classifier-free and Self-Attention Guidance for diffusers' modular pipelines.

    It predicts what `SelfAttentionGuidance.attach` does on the other pipelines (Hong et al., ICCV
    2023, arXiv 2210.00939, Eq. 16, added after classifier-free guidance):

        pipe.update_components(guider=SelfAttentionGuider(guidance_scale=5.0))

    Attributes:
        scheduler: The scheduler that drives a loop of your own; not saved with the config. `None`
            is that of the modular pipeline that runs.
        guidance: The settings of Self-Attention Guidance.
        guidance_handle: The handle of the last guided step: its mask and attention.

    Args:
        guidance_scale: Weight of classifier-free guidance; 1 is off.
        sag_scale: Weight of Self-Attention Guidance, any finite number; 0 is off.
        guidance_rescale: How much the prediction gets the standard deviation of the conditional
            one, 0 to 1 (arXiv 2305.08891, Sec. 3.4).
        use_original_formulation: See diffusers' `ClassifierFreeGuidance`.
        start: Classifier-free guidance begins at this fraction of the steps.
        stop: It ends at this fraction.
        enabled: Whether any guidance is on. `disable`, which modular pipelines call for networks
            with distilled classifier-free guidance, switches off that one alone.
        sag_start: Self-Attention Guidance begins at this fraction of the steps.
        sag_stop: It ends at this fraction.
        every: See `SelfAttentionGuidance`, as the following.
        blur_sigma: Standard deviation of the blur.
        blur_kernel_size: Taps of the blur.
        threshold: Attention received above which is blurred.
        layer: Dotted path of the attention layer, or `None`.
        branch: Whose attention and second pass are used, "uncond" or "cond".

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
        self.guidance = SelfAttentionGuidance(
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
        self.scheduler: Any = None
        self.guidance_handle: GuidanceHandle | None = None
        self._present: GuidanceHandle | None = None
        self._earlier: GuidanceHandle | None = None

    def new(self, **kwargs: Any) -> SelfAttentionGuider:
        """A copy of this guider with the same scheduler and other settings.

        Args:
            **kwargs: The settings that differ.
        """
        copy: Any = super().new(**kwargs)
        copy.scheduler = self.scheduler
        return copy

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Note where the sampling is; called by the pipeline at every step."""
        super().set_state(step, num_inference_steps, timestep)
        self._release()
        self._present = None

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Guide the next call of the denoiser if it predicts the branch that is guided.

        Raises:
            ValueError: No pipeline runs and `scheduler` was not given.
        """
        super().prepare_models(denoiser)
        self._release()
        alone = self.num_conditions == 1
        is_branch = alone or self.is_conditional == (self.guidance.branch == "cond")
        if self._is_guiding and is_branch:
            self._present = self.guidance.attach(
                denoiser, scheduler=self._scheduler_that_runs(), batch_layout="single"
            )
            self._present.remove_after_call(self._earlier)
            self._earlier = self._present

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Leave the denoiser as it was."""
        super().cleanup_models(denoiser)
        self._release()

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """Classifier-free guidance of both predictions, each with the guidance term.

        Args:
            pred_cond: The conditional prediction, of any shape.
            pred_uncond: The unconditional one, same shape; `None` without classifier-free
                guidance.

        Returns:
            diffusers' `GuiderOutput`, with `pred`, `pred_cond` and `pred_uncond`.
        """
        handle = self._present
        if handle is None or handle.term is None:
            return super().forward(pred_cond, pred_uncond)
        self.guidance_handle = handle
        # The prediction of the guided branch has the term already.
        if pred_uncond is not None and self.guidance.branch == "cond":
            pred_uncond = (pred_uncond + handle.term).to(pred_uncond.dtype)
        elif pred_uncond is not None:
            pred_cond = (pred_cond + handle.term).to(pred_cond.dtype)
        return super().forward(pred_cond, pred_uncond)

    def _scheduler_that_runs(self) -> Any:
        caller = find_caller() if self.scheduler is None else None
        scheduler = self.scheduler if caller is None else caller.pipeline.scheduler
        if scheduler is None:
            raise ValueError(
                "the guider does not know the scheduler: no modular pipeline runs; set "
                "guider.scheduler to the one that drives your loop"
            )
        return scheduler

    @property
    def _is_guiding(self) -> bool:
        config: Any = self.config
        return config.enabled and self.guidance.scale != 0

    def _release(self) -> None:
        if self._present is not None:
            self._present.remove()
