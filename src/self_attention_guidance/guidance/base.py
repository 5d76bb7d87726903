"""The base of all methods: guided steps, branch, scale, and how the network is weakened.

Settings can be checked before torch is imported, which takes seconds. So no module with settings
imports it on top; what weakens networks imports it when it runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast, get_args

from ..checks import check_count, check_number, keep_python_numbers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..denoiser.families import BatchLayout
    from ..denoiser.noise import Scheduler
    from .handle import GuidanceHandle
    from .several import GuidanceSum
    from .step import Step

Branch = Literal["uncond", "cond"]
Self = TypeVar("Self", bound="Guidance")

METHODS: dict[str, type[Guidance]] = {}
"""The guidances by their short names, such as "sag"."""


@dataclass(frozen=True)
class Guidance:
    """Settings of a guidance, which compares the predictions of the network and a weakened one.

    A method is a subclass with a short name: `class Mine(Guidance, method="mine")`. It defines how
    the network is weakened. The rest is the same for all methods: the guided steps, the guided part
    of the batch, and how the difference is used.

    Attributes:
        scale: How far predictions move away from those of the weakened network, any finite number;
            0 is off.
        start: Guidance begins at this fraction of the scheduler's timesteps, 0 to 1.
        stop: Guidance ends at this fraction, above `start`, at most 1.
        every: A weakened pass runs at every n-th guided timestep, at least 1; the timesteps in
            between add the same term again, at no extra cost.
        noise_from: Guidance begins once the noise level has fallen to this, above 0; `None` is no
            limit. The unit is noise over signal, sigma_t / alpha_t of x_t = alpha_t * x0 + sigma_t
            * eps: EDM's sigma (arXiv 2206.00364), the unit of published windows (arXiv 2404.07724,
            Sec. 3). The `sigmas` of diffusers' schedulers hold it, except for flow matching, where
            it is sigma / (1 - sigma). Without `sigmas`, it is exp(-logSNR / 2). So it means the
            same for any scheduler, number of steps and strength of image to image.
        noise_to: Guidance ends once the noise level has fallen to this, at least 0 and below
            `noise_from`; `None` is no limit. A step is guided if it is in both windows, that of
            timesteps and that of noise.
        rescale: How far the standard deviation of each guided prediction is pulled back to that of
            the network's own prediction, 0 to 1; 0 is off (arXiv 2305.08891, Sec. 3.4, there for
            classifier-free guidance). It is measured on the prediction of `branch`, with the terms
            of all guidances. The rescaled term is added to both predictions of classifier-free
            guidance, so it does not depend on that guidance's weight.
        norm_limit: The most that guidance may change each picture's predicted clean sample at a
            step: the root mean square of the change over its elements, above 0; `None` is no limit.
            It keeps large scales from ruining pictures (arXiv 2410.02416, Sec. 3, there for
            classifier-free guidance), and limits the sum of all guidances' terms.
        branch: Which prediction of classifier-free guidance is compared, "uncond" or "cond".

    Raises:
        ValueError: A setting is out of its range or not of its type.
    """

    method: ClassVar[str]
    needs_first_pass: ClassVar[bool] = True
    """Whether `weaken` uses what the step knows from the first pass: `x0` and `attention`. If not,
    and if `weakens` names the layers, both networks may run in one pass (see `Step.joined`)."""

    scale: float = 1.0
    _: KW_ONLY
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    noise_from: float | None = None
    noise_to: float | None = None
    rescale: float = 0.0
    norm_limit: float | None = None
    branch: Branch = "uncond"

    def __init_subclass__(cls, *, method: str | None = None) -> None:
        """Register a method under its short name."""
        super().__init_subclass__()
        said = next(base for base in cls.__mro__ if "needs_first_pass" in vars(base))
        if cls.weaken is not getattr(
            said, "weaken", cls.weaken
        ):  # what another `weaken` needs was not said
            cls.needs_first_pass = True
        if method is not None:
            cls.method = method
            METHODS[method] = cls

    def __post_init__(self) -> None:
        """Check every setting."""
        keep_python_numbers(self)
        check_number("scale", self.scale, -math.inf, math.inf)
        check_number("start", self.start, 0, 1)
        check_number("stop", self.stop, 0, 1)
        check_count("every", self.every)
        check_number("rescale", self.rescale, 0, 1)
        if self.norm_limit is not None:
            check_number("norm_limit", self.norm_limit, 0, math.inf)
            if self.norm_limit == 0:
                raise ValueError("norm_limit=0 must be above 0; scale=0 turns guidance off")
        if self.start >= self.stop:
            raise ValueError(f"start={self.start} must be below stop={self.stop}")
        for name in ("noise_from", "noise_to"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, math.inf)
        lowest = self.noise_to or 0  # no step has noise below 0
        if self.noise_from is not None and self.noise_from <= lowest:
            raise ValueError(f"noise_from={self.noise_from} must be above noise_to={lowest}")
        if self.branch not in get_args(Branch):
            raise ValueError(f"branch={self.branch!r} must be 'uncond' or 'cond'")

    @property
    def parts(self) -> tuple[Guidance, ...]:
        """The guidance itself, as a tuple for `attach`, like the parts of a sum."""
        return (self,)

    def __add__(self, other: Guidance | GuidanceSum) -> GuidanceSum:
        """Return the sum of both guidances: their terms add up."""
        from .several import GuidanceSum

        return GuidanceSum((*self.parts, *other.parts))

    @property
    def has_noise_window(self) -> bool:
        """Whether the noise level of a step decides if it is guided."""
        return self.noise_from is not None or self.noise_to is not None

    @property
    def depends_on_step(self) -> bool:
        """Whether what guidance does to a picture depends on the index of its step or its noise."""
        return self.start > 0 or self.stop < 1 or self.has_noise_window

    @property
    def counts_steps(self) -> bool:
        """Whether the number of steps and the index of a step decide if a weakened pass runs."""
        return self.start > 0 or self.stop < 1 or self.every > 1

    def acts_at(self, step: int, steps: int, noise: float | None = None) -> bool:
        """Whether a step of a run is guided.

        Args:
            step: The step's index among the scheduler's timesteps.
            steps: Number of timesteps.
            noise: Noise over signal at the step; `None` checks only `start` and `stop`.
        """
        # Rounding: 1 - 0.7 is not exactly the 0.3 of a step.
        is_inside = self.start - 1e-9 <= step / steps < self.stop - 1e-9
        if noise is not None:  # schedulers have it in float32
            is_inside &= self.noise_from is None or noise <= self.noise_from * (1 + 1e-5)
            is_inside &= self.noise_to is None or noise > self.noise_to * (1 + 1e-5)
        return self.scale != 0 and is_inside

    def reads(self, denoiser: nn.Module) -> tuple[str, ...]:
        """Dotted paths of the self-attention layers to read in the first pass; none by default.

        `attach` calls it, too: raise `ValueError` for denoisers that the method can't weaken. The
        denoiser may be compiled.
        """
        return ()

    def weakens(self, denoiser: nn.Module) -> tuple[str, ...] | None:
        """Dotted paths of all layers or blocks that the method changes; `None` if not known.

        What runs before them is computed once. With `None`, the weakened pass computes everything.
        """
        return None

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Weaken the network inside the `with` statement.

        Yields:
            A worse clean sample for the weakened pass, of the shape of `step.x0`; `None` runs it
            at the unchanged x_t.
        """
        raise NotImplementedError
        yield

    @classmethod
    def fast(cls: type[Self], scale: float | None = None, **settings: Any) -> Self:
        """Make a guidance with a sixth of the usual extra cost.

        Only the steps from a fifth to two thirds of the way are guided, and a weakened pass runs
        at every third of them. Measured for Self-Attention Guidance: the term is small before
        these steps, adds speckles after them, and changes slowly.

        Args:
            scale: `None` is a third more than the default, to make up for the steps left out.
            **settings: Any other settings.
        """
        preset: dict[str, Any] = {"start": 0.2, "stop": 0.65, "every": 3}
        scale = cls().scale * 4 / 3 if scale is None else scale
        return cls(scale, **{**preset, **settings})

    def to_dict(self) -> dict[str, Any]:
        """Return all settings and the short name of the method, as JSON values."""
        settings = dataclasses.asdict(self)
        return {"method": self.method, **{n: _plain(value) for n, value in settings.items()}}

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> Guidance:
        """Make a guidance from the output of `to_dict`; missing settings have their defaults.

        `guidance_of` also reads the output of a sum.

        Raises:
            ValueError: The method or a setting is not known, or has a value out of its range.
        """
        if not isinstance(settings, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"settings={settings!r} must be settings by name")
        given = dict(settings)
        name = given.pop("method", None)
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"method={name!r} must be one of {', '.join(sorted(METHODS))}")
        known = [each.name for each in dataclasses.fields(METHODS[name])]
        for unknown in given.keys() - known:
            raise ValueError(f"{unknown!r} is not a setting of {name}: {', '.join(known)}")
        return METHODS[name](**given)

    def attach(
        self,
        target: Any,
        *,
        scheduler: Scheduler | None = None,
        batch_layout: BatchLayout | None = None,
    ) -> GuidanceHandle:
        """Guide every call of a denoiser until the handle is removed (see `attach`).

        Args:
            target: A diffusers pipeline, or a denoiser for a loop of your own.
            scheduler: The scheduler that drives a bare denoiser. With a pipeline, the scheduler of
                the running pipeline is used.
            batch_layout: How calls are made under classifier-free guidance: with a batch of two
                halves, "uncond_first" or "cond_first"; or with two calls for each step,
                "cond_call_first" or "uncond_call_first". Without it, "single": each row is a
                picture. `None` asks the running pipeline. In a loop of your own, `None` is
                "single", but an error if the batch looks like two halves.

        Returns:
            The handle; use it in a `with` statement, or call its `remove`.
        """
        from .handle import attach

        return attach(target, self, scheduler=scheduler, batch_layout=batch_layout)


def _plain(value: Any) -> Any:
    """Convert a setting to a JSON value; JSON has no infinity."""
    if isinstance(value, tuple):
        return list(cast("tuple[Any, ...]", value))
    return "inf" if value == math.inf else value
