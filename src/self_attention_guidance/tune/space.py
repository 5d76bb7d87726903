"""The settings that may be tried on a model: methods, layers, scales, windows, blurs and CFG."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.quasirandom import SobolEngine

from ..denoiser.layers import attention_names, beginnings, block_names
from ..guidance import METHODS, Guidance, SelfAttentionGuidance
from ..guidance.sag import LARGEST_KERNEL, Blurring
from ..guidance.seg import SmoothedEnergyGuidance
from ..guidance.text import guidance_text
from ..guidance.weak_layers import WeakLayers

# Factors of a method's default. The best scales measured on small models lay between 1/8 and 5.
_SCALES = (2**-3.5, 2**2.5)
_STARTS = (0.0, 0.1, 0.2, 0.3)
_STOPS = (1.0, 0.8, 0.65)
_EVERY = (1, 2, 4)
_BLURS = (1.0, 2.0, 3.0, 5.0)
_SMOOTHINGS = (math.inf, 1.0, 3.0)
_CFG_FACTORS = (1.0, 0.5, 0.75, 1.5)
_MOST_LAYERS = 5
_NEAR = 1.5
_DIMENSIONS = 7


@dataclass(frozen=True)
class Candidate:
    """A setting to try.

    Attributes:
        guidance: The guidance; a scale of 0 means none.
        cfg: Scale of classifier-free guidance, 1 is off; `None` if the pipeline has none.
    """

    guidance: Guidance
    cfg: float | None = None

    @property
    def is_unguided(self) -> bool:
        """Whether there is no guidance besides classifier-free guidance."""
        return self.guidance.scale == 0

    @property
    def key(self) -> str:
        """A short name for files, the same for equal settings."""
        described = [None if self.is_unguided else self.guidance.to_dict(), self.cfg]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """The text for `--guidance`, and the CFG scale."""
        text = "no guidance" if self.is_unguided else guidance_text(self.guidance.to_dict())
        return text if self.cfg is None else f"{text}, CFG {self.cfg:g}"


@dataclass(frozen=True)
class Space:
    """The settings that can be tried on a model.

    Attributes:
        steps: Sampling steps, at least 1.
        layers: Values of `layer` or `layers`, by the short names of methods; `None` is the
            default, and comes first.
        own: The guidance that the model has now.
        cfg: Scales of classifier-free guidance, the model's first; `(None,)` if it has none.
    """

    steps: int
    layers: dict[str, tuple[str | None, ...]]
    own: Guidance
    cfg: tuple[float | None, ...] = (None,)
    blurs: tuple[float, ...] = field(default=_BLURS)

    @property
    def unguided(self) -> Candidate:
        """No guidance, at the model's CFG scale."""
        return Candidate(SelfAttentionGuidance(0.0), self.cfg[0])

    @property
    def as_it_is(self) -> Candidate:
        """The present setting of the model."""
        return self.unguided if self.own.scale == 0 else Candidate(self.own, self.cfg[0])

    def anchors(self) -> list[Candidate]:
        """Settings that are always tried: no guidance, the model's own, each method's defaults."""
        defaults = [Candidate(METHODS[name](), self.cfg[0]) for name in self.layers]
        return list(dict.fromkeys([self.unguided, self.as_it_is, *defaults]))

    def listed(self, count: int, seed: int) -> list[Candidate]:
        """The anchors, and evenly spread settings of each method in turn.

        Args:
            count: Total number of settings, at least that of the anchors.
            seed: Seed of the list, at least 0.
        """
        methods = [*self.layers, *(["none"] if len(self.cfg) > 1 else [])]
        points = [
            SobolEngine(_DIMENSIONS, scramble=True, seed=seed + number).draw(4 * count).tolist()
            for number in range(len(methods))
        ]
        drawn = (
            self._at(method, of_method[number])
            for number in range(4 * count)
            for method, of_method in zip(methods, points, strict=True)
        )
        found = {self._effect(each): each for each in self.anchors()}
        for candidate in filter(self.acts, drawn):
            if len(found) == count:
                break
            found.setdefault(self._effect(candidate), candidate)
        return list(found.values())

    def neighbours(
        self, parents: Sequence[Candidate], count: int, seed: int, known: Iterable[Candidate]
    ) -> list[Candidate]:
        """New settings near good ones, with one or two values changed a little.

        Args:
            parents: The good settings, at least one.
            count: Largest number of settings.
            seed: Seed of the choice, at least 0.
            known: Settings that were tried; none of them is returned.
        """
        tried = set(map(self._effect, known))
        found: list[Candidate] = []
        for number in range(20 * count):  # some were tried, or guide no step
            dice = random.Random(f"{seed} {number}")
            try:
                near = self._near(parents[number % len(parents)], dice)
            except ValueError:  # the parent's other values do not allow it, like an early stop
                continue
            if self._effect(near) not in tried and self.acts(near):
                found.append(near)
                tried.add(self._effect(near))
            if len(found) == count:
                break
        return found

    def acts(self, candidate: Candidate) -> bool:
        """Whether any step is guided, or the setting is no guidance."""
        return candidate.is_unguided or bool(self._guided(candidate.guidance))

    def _guided(self, guidance: Guidance) -> tuple[int, ...]:
        """Indices of the guided steps."""
        return tuple(n for n in range(self.steps) if guidance.acts_at(n, self.steps))

    def _effect(self, candidate: Candidate) -> tuple[Any, ...]:
        """A key that is equal for settings with equal pictures, like windows of the same steps."""
        if candidate.is_unguided:
            return (None, candidate.cfg)
        guidance, steps = candidate.guidance, self._guided(candidate.guidance)
        every = min(guidance.every, max(len(steps), 1))
        return (replace(guidance, start=0.0, stop=1.0, every=every), candidate.cfg, steps)

    def _at(self, method: str, point: Sequence[float]) -> Candidate:
        """The setting at a point of the unit cube."""
        scale, layer, start, stop, every, blur, cfg = point
        chosen_cfg = _pick(self.cfg, cfg)
        if method == "none":
            return replace(self.unguided, cfg=chosen_cfg)
        low, high = map(math.log, _SCALES)
        factor = math.exp(low + scale * (high - low))
        settings: dict[str, Any] = {
            "scale": _rounded(METHODS[method]().scale * factor),
            "start": _pick(_STARTS, start),
            "stop": _pick(_STOPS, stop),
            "every": _pick(_EVERY, every),
        }
        # Half of them have the default layers.
        layers = self.layers[method]
        chosen = None if layer < 0.5 else _pick(layers, 2 * layer - 1)
        settings |= _layer_setting(method, chosen) | self._blur_setting(method, blur)
        return Candidate(METHODS[method](**settings), chosen_cfg)

    def _near(self, parent: Candidate, dice: random.Random) -> Candidate:
        for _ in range(dice.choice((1, 1, 2))):
            parent = self._moved(parent, dice)
        return parent

    def _moved(self, parent: Candidate, dice: random.Random) -> Candidate:
        guidance, method = parent.guidance, parent.guidance.method
        names = ["cfg"] if len(self.cfg) > 1 else []
        if not parent.is_unguided:
            # The scale matters most.
            names += ["scale", "scale", "scale", "start", "stop", "every", "layers", "blur"]
        what = dice.choice(names or ["nothing"])
        if what == "cfg":
            others = sorted(each for each in self.cfg if each is not None)
            return replace(parent, cfg=_beside(others, parent.cfg, dice))
        change: dict[str, Any] = {}
        if what == "scale":
            change = {"scale": _rounded(guidance.scale * dice.choice((_NEAR, 1 / _NEAR)))}
        elif what in ("start", "stop", "every"):
            values = {"start": _STARTS, "stop": _STOPS, "every": _EVERY}[what]
            change = {what: _beside(values, getattr(guidance, what), dice)}
        elif what == "layers":
            change = _layer_setting(method, dice.choice(self.layers.get(method, (None,))))
        elif what == "blur":
            change = self._blur_setting(method, dice.random())
        return replace(parent, guidance=replace(guidance, **change))

    def _blur_setting(self, method: str, part: float) -> dict[str, Any]:
        if issubclass(METHODS[method], SmoothedEnergyGuidance):
            return {"blur_sigma": _pick(_SMOOTHINGS, part)}
        if not issubclass(METHODS[method], Blurring):
            return {}
        sigma = _pick(self.blurs, part)
        # Three times as many taps as sigma lose little, and the default has nine.
        taps = min(max(9, math.ceil(3 * sigma) // 2 * 2 + 1), LARGEST_KERNEL)
        return {"blur_sigma": sigma, "blur_kernel_size": taps}


def space_of(
    denoiser: nn.Module,
    steps: int,
    own: Guidance,
    methods: Sequence[str] = (),
    cfg: float | None = None,
) -> Space:
    """Find the settings that can be tried on a network.

    Args:
        denoiser: The network.
        steps: Sampling steps, at least 1.
        own: The guidance that the model has now.
        methods: Short names of methods to try; empty tries all that the network allows.
        cfg: The model's scale of classifier-free guidance; `None` if it has none.

    Raises:
        ValueError: A method that was named can't guide this network, or no method can.
    """
    layers: dict[str, tuple[str | None, ...]] = {}
    for name in methods or METHODS:
        try:
            METHODS[name]().reads(denoiser)
        except ValueError as error:
            if methods:
                raise ValueError(f"methods: {name} does not suit this model: {error}") from None
            continue
        layers[name] = (None, *_layers_of(name, denoiser))
    if not layers:
        raise ValueError(f"no method suits this model: {', '.join(METHODS)}")
    blurs = {*_BLURS, *([own.blur_sigma] if isinstance(own, Blurring) else [])}
    return Space(steps, layers, own, _cfg_scales(cfg), tuple(sorted(blurs)))


def _layers_of(method: str, denoiser: nn.Module) -> list[str]:
    """Some of the layers that a method may weaken or read, from the first to the last."""
    cls = METHODS[method]
    if not issubclass(cls, WeakLayers | SelfAttentionGuidance):
        return []
    weakens = issubclass(cls, WeakLayers)
    names = (block_names if weakens and cls.has_blocks else attention_names)(denoiser)
    found = beginnings(names)
    if not weakens:  # it reads one layer: the last one of each part
        groups = {each: [n for n in names if beginnings([n]) == [each]] for each in found}
        found = [group[-1] for group in groups.values()]
    if len(found) <= _MOST_LAYERS:
        return found
    picked = (round(n * (len(found) - 1) / (_MOST_LAYERS - 1)) for n in range(_MOST_LAYERS))
    return [found[number] for number in picked]


def _layer_setting(method: str, layer: str | None) -> dict[str, Any]:
    cls = METHODS[method]
    if issubclass(cls, WeakLayers):
        return {"layers": None if layer is None else (layer,)}
    return {"layer": layer} if issubclass(cls, SelfAttentionGuidance) else {}


def _cfg_scales(own: float | None) -> tuple[float | None, ...]:
    if own is None or own <= 1:  # distilled models are made for one scale
        return (own,)
    others = (_rounded(own * factor) for factor in _CFG_FACTORS[1:])
    return tuple(dict.fromkeys([own, 1.0, *(each for each in others if each > 1)]))


def _pick(values: Sequence[Any], part: float) -> Any:
    return values[min(int(part * len(values)), len(values) - 1)]


def _beside(values: Sequence[Any], value: Any, dice: random.Random) -> Any:
    """A value next to another one; any value if that one is not in the list."""
    if value not in values:
        return dice.choice(values)
    place = [*values].index(value) + dice.choice((-1, 1))
    return values[min(max(place, 0), len(values) - 1)]


def _rounded(number: float) -> float:
    return float(f"{number:.2g}")
