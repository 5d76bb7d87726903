"""The base of all methods: which steps, which branch, how much, and how to weaken the network."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast, get_args

from torch import Tensor, nn

from ..checks import check_count, check_number
from ..denoiser.attention import why_unseen
from ..denoiser.families import BatchLayout
from ..denoiser.noise import Scheduler
from ..denoiser.picture import PictureTokens
from ..denoiser.safety import refuse_recomputing
from ..denoiser.weakening import Change, Weaken, attending_by, changing_block, reordered

if TYPE_CHECKING:
    from .handle import GuidanceHandle
    from .several import GuidanceSum

Branch = Literal["uncond", "cond"]
Self = TypeVar("Self", bound="Guidance")

METHODS: dict[str, type[Guidance]] = {}
"""The guidances by their short names, such as "sag"."""


@dataclass(frozen=True)
class Step:
    """The view of a guided step that a method gets, for the pictures of its branch.

    Attributes:
        denoiser: The network.
        x0: The clean sample that was predicted, as the scheduler clips or thresholds it,
            (pictures, channels, height, width), at least float32.
        attention: What each position received in the layers that the guidance reads, by their
            dotted paths: (pictures, rows, columns) float32, mean 1.
        index: The step's index among the scheduler's timesteps.
        tokens_at: Where the picture's tokens lie in a layer or block, by its dotted path.
        noted: What the guidance notes for its handle to show, by name.
    """

    denoiser: nn.Module
    x0: Tensor
    attention: dict[str, Tensor]
    index: int
    tokens_at: Callable[[str], PictureTokens]
    noted: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @contextmanager
    def attending(self, layers: Sequence[str], weaken: Weaken) -> Generator[None]:
        """Let layers, by their dotted paths, compute another attention inside the `with` statement.

        Raises:
            ValueError: A layer does not see the whole picture.
            RuntimeError: A layer's attention could not be changed, or gradient checkpointing
                would run the layer again without the change.
        """
        refuse_recomputing(self.denoiser)
        with ExitStack() as stack:
            begun = [
                stack.enter_context(attending_by(self.denoiser, n, self.tokens_at(n), weaken))
                for n in layers
            ]
            yield
        for layer, stand_in in zip(layers, begun, strict=True):
            if not stand_in.was_called:
                reason = why_unseen(self.denoiser, layer)
                raise RuntimeError(f"no attention was weakened at {layer!r}: {reason}")

    @contextmanager
    def skipping(self, blocks: Sequence[str]) -> Generator[None]:
        """Leave out blocks, by their dotted paths, inside the `with` statement.

        Such a block returns what it is given, the text beside the picture included.

        Raises:
            RuntimeError: A block was not reached.
        """
        with self._changing(dict.fromkeys(blocks)):
            yield

    @contextmanager
    def shuffling(
        self, blocks: Sequence[str], order: Callable[[str, int], Tensor]
    ) -> Generator[None]:
        """Give blocks, by their dotted paths, the picture's tokens in another order.

        Args:
            blocks: Their paths.
            order: Of a block and its number of tokens, a permutation of their indices.

        Raises:
            ValueError: A block does not see the whole picture.
            RuntimeError: A block was not reached.
        """
        refuse_recomputing(self.denoiser)
        changes: dict[str, Change | None] = {}
        for block in blocks:
            tokens = self.tokens_at(block)
            counts = {rows * columns for rows, columns in tokens.grids}
            orders = {count: order(block, count).to(self.x0.device) for count in counts}
            changes[block] = functools.partial(reordered, tokens=tokens, orders=orders)
        with self._changing(changes):
            yield

    @contextmanager
    def _changing(self, changes: Mapping[str, Change | None]) -> Generator[None]:
        with ExitStack() as stack:
            begun = {
                block: stack.enter_context(changing_block(self.denoiser, block, change))
                for block, change in changes.items()
            }
            yield
        for block, stand_in in begun.items():
            if not stand_in.was_called:
                raise RuntimeError(
                    f"no tokens were changed at {block!r}: the block did not run; if the denoiser "
                    "was compiled and run before guidance was attached, call torch.compiler.reset()"
                )


@dataclass(frozen=True)
class Guidance:
    """Settings of a guidance, which compares the network's prediction with a weakened one's.

    A method is a subclass with a short name: `class Mine(Guidance, method="mine")`. It says how the
    network is weakened; when, for which part of the batch, and what becomes of the difference is
    the same for all.

    Attributes:
        scale: How far predictions move away from the weakened network's, any finite number; 0 is
            off.
        start: Guidance begins at this fraction of the scheduler's timesteps, 0 to 1.
        stop: Guidance ends at this fraction, above `start`, at most 1.
        every: A weakened pass runs at every n-th guided timestep, at least 1; those between add
            its term again, at no extra cost.
        noise_from: Guidance begins where the noise of a step has come down to this, above 0;
            `None` is no limit. The unit is noise over signal, sigma_t / alpha_t of x_t = alpha_t *
            x0 + sigma_t * eps: EDM's sigma (arXiv 2206.00364), in which windows are published
            (arXiv 2404.07724, Sec. 3). It is what `sigmas` of diffusers' schedulers hold, but for
            flow matching, where it is sigma / (1 - sigma); exp(-logSNR / 2) otherwise. So it means
            the same for any scheduler, number of steps and strength of image to image.
        noise_to: Guidance ends where the noise has come down to this, at least 0 and below
            `noise_from`; `None` is no limit. A step is guided if both windows hold it.
        rescale: How far the standard deviation of each guided prediction is pulled back to that of
            the network's own, 0 to 1; 0 is off (arXiv 2305.08891, Sec. 3.4, there for
            classifier-free guidance). It is measured on the prediction of `branch`, with the terms
            of all guidances; what it makes of the term is added to both predictions of
            classifier-free guidance, so it is the same for every weight of that.
        norm_limit: How far guidance moves each picture's predicted clean sample at most, at a step:
            the root mean square of that change over its elements, above 0; `None` is no limit. It
            keeps large scales from ruining pictures (arXiv 2410.02416, Sec. 3, there for
            classifier-free guidance), and holds for the sum of all guidances' terms.
        branch: Whose prediction is compared under classifier-free guidance, "uncond" or "cond".

    Raises:
        ValueError: A setting is out of its range or not of its type.
    """

    method: ClassVar[str]

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
        """Enter a method into the registry by its short name."""
        super().__init_subclass__()
        if method is not None:
            cls.method = method
            METHODS[method] = cls

    def __post_init__(self) -> None:
        """Check every setting once, here."""
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
        """Itself: what `attach` takes, as for the sum of several."""
        return (self,)

    def __add__(self, other: Guidance | GuidanceSum) -> GuidanceSum:
        """Both guidances together: their terms add up."""
        from .several import GuidanceSum

        return GuidanceSum((*self.parts, *other.parts))

    @property
    def has_noise_window(self) -> bool:
        """Whether the noise of a step decides if it is guided."""
        return self.noise_from is not None or self.noise_to is not None

    def acts_at(self, step: int, steps: int, noise: float | None = None) -> bool:
        """Whether a step of a run is guided.

        Args:
            step: Its index among the scheduler's timesteps.
            steps: Their number.
            noise: Its noise over signal; `None` asks for the window of fractions alone.
        """
        # A fraction such as 1 - 0.7 is not quite the 0.3 at which the step lies.
        is_inside = self.start - 1e-9 <= step / steps < self.stop - 1e-9
        if noise is not None:  # which schedulers know in float32
            is_inside &= self.noise_from is None or noise <= self.noise_from * (1 + 1e-5)
            is_inside &= self.noise_to is None or noise > self.noise_to * (1 + 1e-5)
        return self.scale != 0 and is_inside

    def reads(self, denoiser: nn.Module) -> tuple[str, ...]:
        """Dotted paths of the self-attention layers to read in the first pass; none by default.

        Also called when attaching: raise `ValueError` for denoisers that the method can't weaken.
        The denoiser may be compiled.
        """
        return ()

    def weakens(self, denoiser: nn.Module) -> tuple[str, ...] | None:
        """Dotted paths of all that the method changes in the network, if it changes nothing else.

        What runs before them is then not computed twice. `None` is not known, and computes all.
        """
        return None

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Weaken the network inside the `with` statement.

        Yields:
            A worse clean sample to run the network at, of the shape of `step.x0`; `None` runs it
            at x_t as it is.
        """
        raise NotImplementedError
        yield

    @classmethod
    def fast(cls: type[Self], scale: float | None = None, **settings: Any) -> Self:
        """Guidance that costs a sixth of what it costs at every step.

        Only the steps from a fifth to two thirds of the way are guided, and a weakened pass runs
        at every third of them. Measured for Self-Attention Guidance: the term is small before,
        draws speckles after, and changes slowly.

        Args:
            scale: `None` is a third more than the default, for the steps that are left out.
            **settings: Any others.
        """
        preset: dict[str, Any] = {"start": 0.2, "stop": 0.65, "every": 3}
        scale = cls().scale * 4 / 3 if scale is None else scale
        return cls(scale, **{**preset, **settings})

    def to_dict(self) -> dict[str, Any]:
        """All settings, with the short name of the method, as JSON can hold them."""
        settings = dataclasses.asdict(self)
        return {"method": self.method, **{n: _plain(value) for n, value in settings.items()}}

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> Guidance:
        """The guidance that `to_dict` gave; settings that are missing have their defaults.

        That of a sum of guidances is read by `guidance_of`.

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
            scheduler: The scheduler that drives a bare denoiser. For a pipeline, that of the
                pipeline that runs is used.
            batch_layout: What a call holds under classifier-free guidance: a batch of two halves
                in this order, "uncond_first" or "cond_first", or the first of two calls of a
                step, "cond_call_first" or "uncond_call_first"; "single" without it (each row is
                a picture). `None` asks the pipeline that runs; in a loop of your own it is
                "single", and refused where the batch looks like two halves.

        Returns:
            The handle; use it in a `with` statement, or call its `remove`.
        """
        from .handle import attach

        return attach(target, self, scheduler=scheduler, batch_layout=batch_layout)


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it, which knows no infinity."""
    if isinstance(value, tuple):
        return list(cast("tuple[Any, ...]", value))
    return "inf" if value == math.inf else value
