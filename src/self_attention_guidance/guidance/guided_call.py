"""Algorithm 1 of Self-Attention Guidance: the part that all methods share."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..checks import GuidanceError
from ..denoiser.attention import StandIn, received, why_unseen
from ..denoiser.call import Call, Layout
from ..denoiser.families import uncompiled
from ..denoiser.joint import JointPass, joint_pass
from ..denoiser.noise import Prediction
from ..denoiser.outputs import precise, stacked, total
from ..denoiser.picture import PicturePlace, place_of, tokens_at
from ..denoiser.prefix import Prefix, ShapesDiffer, blocks_before
from ..denoiser.run import Run
from ..denoiser.safety import not_finite
from ..maths import limiting, rescaling
from .base import Guidance
from .step import Step


def _no_effect(step: int, guidance: Guidance) -> GuidanceError:
    return GuidanceError(
        f"step {step}: {guidance} had no effect: the weakened network predicted the same as the "
        "network itself"
    )


def _rounding(dtype: torch.dtype) -> float:
    """How far outputs of different batch sizes may differ, relative to the largest value.

    It is 0 in half precision, where rounding and a small effect look the same.
    """
    eps = torch.finfo(dtype).eps
    return 256 * eps if eps < 1e-6 else 0.0


@dataclass(frozen=True)
class GuidedCall:
    """A call of a denoiser at a guided step.

    Attributes:
        acting: The guidances that act, by number. Each comes with the noise that it adds again;
            or, for a weakened pass, with `None` and the layers that it reads.
        read: The layers that are read, by their dotted paths.
    """

    run: Run
    denoiser: nn.Module
    call: Call
    layout: Layout
    acting: dict[int, tuple[Guidance, Tensor | None, tuple[str, ...]]]
    read: dict[str, StandIn]

    @functools.cached_property
    def _weak(self) -> dict[int, Guidance]:
        """The guidances that weaken the network at this step, by number."""
        return {
            number: guidance for number, (guidance, held, _) in self.acting.items() if held is None
        }

    @functools.cached_property
    def joint(self) -> JointPass | None:
        """The first pass, if the rows of the only weakened network join it; else `None`."""
        if len(self._weak) != 1:
            return None
        [(number, guidance)] = self._weak.items()
        layers = None if guidance.needs_first_pass else guidance.weakens(self.denoiser)
        if layers is None:
            return None
        return joint_pass(self.denoiser, self.call, self._rows(number), layers)

    @functools.cached_property
    def prefix(self) -> Prefix:
        """Outputs of the first pass that weakened passes reuse."""
        return Prefix(uncompiled(self.denoiser))

    def first_pass(self) -> AbstractContextManager[None]:
        """Prepare the first pass for the weakened rows: they join it, or reuse outputs of it."""
        if self.joint is None:
            return self._noting_prefix()
        [guidance] = self._weak.values()
        if self.joint.begin(guidance.weaken(self._joined_step)) is not None:
            self.joint.end()
            raise GuidanceError(f"{guidance} has a worse clean sample, so it needs the first pass")
        return nullcontext()

    @functools.cached_property
    def _joined_step(self) -> Step:
        """The step before its joint pass: the clean sample is not known yet."""
        [number], joint = self._weak, self.joint
        assert joint is not None
        x0 = self.call.sample.new_full((), math.nan)
        place = PicturePlace(self.call.denoised.shape[1])
        return self._step(number, x0, place, joint.count)

    def _noting_prefix(self) -> AbstractContextManager[None]:
        """Record, in the first pass, the outputs of blocks that run before any weakened one."""
        sets = [guidance.weakens(self.denoiser) for guidance in self._weak.values()]
        weak = {layers for layers in sets if layers is not None}
        # A U-Net adds the outputs of a T2I-Adapter to those of its blocks, in place.
        is_adapted = self.call.arguments.get("down_intrablock_additional_residuals") is not None
        blocks = blocks_before(self.denoiser) if weak and not is_adapted else []
        return self.prefix.noting(blocks, weak) if blocks else nullcontext()

    def terms(self, whole: Tensor) -> tuple[dict[int, Tensor], list[Step]]:
        """Compute each guidance's term, for its branch's output, and the steps of weak passes."""
        place = place_of(self.call, whole, self.run.on_cpu)
        prediction = self.run.prediction(self.call)
        terms: dict[int, Tensor] = {}
        steps: list[Step] = []
        for number, (_, held, _) in self.acting.items():
            rows = self._rows(number)
            levels = prediction.rows(rows)
            if held is not None:
                terms[number] = levels.held(held)
            else:
                terms[number], step = self._compare(number, rows, whole[rows], place, levels)
                steps.append(step)
        terms = self._rescaled(self._limited(terms, prediction), whole, place)
        return {n: self._written(n, term, whole, place) for n, term in terms.items()}, steps

    def _rows(self, number: int) -> slice:
        """The rows that a guidance compares."""
        return self.layout.rows(len(self.call.sample), self.acting[number][0].branch)

    def _written(self, number: int, term: Tensor, whole: Tensor, place: PicturePlace) -> Tensor:
        """Return a term in the layout of the denoiser's output."""
        output = whole[self._rows(number)]
        if term.shape == output.shape:
            return term
        return place.written(torch.zeros_like(output, dtype=term.dtype), term)

    def _limited(self, terms: dict[int, Tensor], prediction: Prediction) -> dict[int, Tensor]:
        """Scale terms down so that their sum keeps to `norm_limit`; see `_rescaled`."""
        first = min(terms, default=0)
        limit = self.acting[first][0].norm_limit if terms else None
        if limit is None:
            return terms
        levels = prediction.rows(self._rows(first))
        factor = limiting(levels.from_output * total(terms), limit)
        return {number: factor * term for number, term in terms.items()}

    def _rescaled(
        self, terms: dict[int, Tensor], whole: Tensor, place: PicturePlace
    ) -> dict[int, Tensor]:
        """Scale terms so that the guided prediction has the standard deviation that `rescale` asks.

        All guidances have the same branch, `rescale` and `norm_limit`; `attach` refuses others. If
        each term were rescaled alone, their sum could remove more than the whole prediction.
        """
        if not terms:
            return terms
        first = min(terms)
        rescale = self.acting[first][0].rescale
        if rescale == 0:
            return terms
        u = precise(place.read(whole[self._rows(first)]))
        factor = rescaling(u, u + total(terms), rescale)
        # factor * (u + terms) - u, split between the guidances
        rescaled = {number: factor * term for number, term in terms.items()}
        return rescaled | {first: rescaled[first] + (factor - 1) * u}

    def _compare(
        self, number: int, rows: slice, output: Tensor, place: PicturePlace, levels: Prediction
    ) -> tuple[Tensor, Step]:
        """Run a weakened pass, and return scale * (eps - eps') in units of the output."""
        guidance, sample = self.acting[number][0], self.call.sample[rows]
        x_t, u = precise(place.read(sample)), precise(place.read(output))
        x0 = levels.x0(x_t, u)
        limited, sample_weak, change = self.run.schedule.limited(x0), sample, None
        if self.joint is not None:
            if self.joint.error is not None:
                raise self.joint.error
            step = replace(self._joined_step, x0=limited)
            output_weak = self.joint.weak_output
        else:
            step = self._step(number, limited, place)
            with guidance.weaken(step) as x0_weak:
                if x0_weak is not None:
                    sample_weak = place.written(sample, levels.renoise(x_t, x0, x0_weak))
                    change = x0_weak - x0
                known = guidance.weakens(self.denoiser) if x0_weak is None else None
                output_weak = self._weak_output(rows, sample_weak, known or ())
        u_weak = precise(place.read(output_weak))
        term = guidance.scale * levels.term(u, u_weak, change)
        if change is None:
            is_nothing = (u - u_weak).abs().max() <= _rounding(output.dtype) * u.abs().max()
        else:  # if nothing was blurred, a term of 0 is no error
            is_nothing = (term == 0).all() & (sample_weak != sample).any()
        self.run.refuse(is_nothing, _no_effect, self.run.step, guidance)
        if guidance.every > 1:
            self.run.hold(number, levels.noise(term.detach()), sample.shape)
        return term, step

    def _step(self, number: int, x0: Tensor, place: PicturePlace, joined: int = 0) -> Step:
        """Return the step as a guidance sees it."""
        rows = self._rows(number)
        attention = {n: self._attention(n, rows, place) for n in self.acting[number][2]}
        where = functools.partial(tokens_at, self.denoiser, call=self.call, place=place, rows=rows)
        return Step(self.denoiser, x0, attention, self.run.step, where, joined)

    def _attention(self, layer: str, rows: slice, place: PicturePlace) -> Tensor:
        """Return the attention that each picture token received, (batch, rows, columns)."""
        noted = self.read[layer].noted
        if not noted:
            reason = why_unseen(self.denoiser, layer)
            raise GuidanceError(f"no attention was recorded at {layer!r}: {reason}")
        positions, batch = noted[0].key.shape[-2], range(len(self.call.sample))
        found: list[Tensor] = []
        for own, tokens in tokens_at(self.denoiser, layer, self.call, place, rows).groups():
            (picture, grid), own_rows = tokens.at(positions), batch[rows][own]
            own = slice(own_rows.start, own_rows.stop)
            found.append(received(noted, len(batch), own, picture).unflatten(1, grid))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _weak_output(self, rows: slice, sample: Tensor, weak: tuple[str, ...]) -> Tensor:
        """Run the weakened network; with `weak`, reuse what runs before these layers."""
        self.run.is_weak = True
        try:
            batch = len(self.call.sample)
            with self.prefix.reused(weak, batch, rows) if weak else nullcontext():
                args, kwargs = self.call.rows(rows, sample)
                output = stacked(self.denoiser(*args, **kwargs)[0])
        except ShapesDiffer:  # these rows have shorter texts than the longest of the batch
            return self._weak_output(rows, sample, ())
        finally:
            self.run.is_weak = False
        if len(output) != len(sample):
            raise GuidanceError(
                f"the weakened pass of {len(sample)} pictures returned {len(output)}: an argument "
                "with a row for each picture is unknown to guidance; see register_batch_arguments"
            )
        return output

    def check(self, whole: Tensor, terms: dict[int, Tensor], guided: Tensor) -> None:
        """Refuse values that are not finite, and read all checks of the step."""
        stages = {
            "the denoiser's input": self.call.sample,
            "the denoiser's prediction": whole,
            "its prediction in the weakened pass": total(terms) if terms else whole,
            "the guided prediction": guided,
        }
        # A value that is not finite at an earlier stage is not finite at the last one either.
        is_bad = ~guided.isfinite().all()
        self.run.refuse(is_bad, not_finite, stages, self.run.step, self.call.timestep)
        self.run.read_checks()
