"""What the study measures: a point is a model, a way to sample and a guidance."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from controls import RandomMaskGuidance
from self_attention_guidance import BlurGuidance, SelfAttentionGuidance
from self_attention_guidance.models.builtin import builtin_folder

Guidance = SelfAttentionGuidance | BlurGuidance
UNGUIDED = SelfAttentionGuidance(0.0)
STEPS = 25
# With so many, the fast presets cost what guidance at every one of `STEPS` does.
MORE_STEPS = 40
# Settings are compared with few steps: twice as many points in the same time.
FEW_STEPS = 12


@dataclass(frozen=True)
class Model:
    """A builtin model and what is compared on it.

    Attributes:
        exact: A second pass at every step, as in the paper, from where it does no harm on.
        fast: The preset for guidance that costs little.
        held: Guidance of all of `MORE_STEPS` at the cost of `exact`, by holding the term.
        recommended: What the model recommends for itself.
        recommended_steps: How many steps it recommends.
        other_layers: Other self-attention layers, by what they are called in tables.
        scales: Scales of exact guidance, other than its own.
        mark: What a condition is called: a caption or a class.
        cfg: A usual scale of classifier-free guidance; `None` if the pipeline has none.
        schedulers: Other schedulers, by the names of `sag generate --scheduler`.
        times: How many times as many samples it takes to tell what the model recommends from
            `exact`; at 1 the headline does.
    """

    exact: SelfAttentionGuidance
    fast: SelfAttentionGuidance
    held: SelfAttentionGuidance
    recommended: SelfAttentionGuidance
    recommended_steps: int
    other_layers: dict[str, str]
    scales: tuple[float, ...]
    mark: str
    cfg: float | None
    schedulers: tuple[str, ...]
    times: int = 1


_EMOJI = SelfAttentionGuidance(
    3.0, blur_sigma=3.0, layer="mid_block.attentions.0.transformer_blocks.0.attn1"
)
# Its attention has four times as many positions as the paper's layer, that of the mid block.
_EMOJI_ENCODER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
_EMOJI_FAST = SelfAttentionGuidance.fast(4.0, blur_sigma=3.0, layer=_EMOJI_ENCODER)
# Its first steps see hardly more than noise: guidance there does harm, which a point shows.
_EMOJI_ADM = SelfAttentionGuidance(2.0, blur_sigma=3.0, layer="mid_block.attentions.0", start=0.1)
_EMOJI_ADM_HELD = dataclasses.replace(_EMOJI_ADM, every=4)

MODELS = {
    "emoji": Model(
        exact=_EMOJI,
        fast=_EMOJI_FAST,
        held=dataclasses.replace(_EMOJI, scale=4.0, every=4),
        recommended=_EMOJI_FAST,
        recommended_steps=MORE_STEPS,
        other_layers={
            "first encoder layer": _EMOJI_ENCODER,
            "last decoder layer": "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
        },
        scales=(0.75, 1.5, 5.0),
        mark="caption",
        cfg=3.0,
        schedulers=("euler", "dpm++ 2m", "unipc"),
        times=3,
    ),
    "emoji-adm": Model(
        exact=_EMOJI_ADM,
        fast=SelfAttentionGuidance.fast(
            3.0, blur_sigma=3.0, layer=_EMOJI_ADM.layer, start=0.3, stop=1.0, every=4
        ),
        held=_EMOJI_ADM_HELD,
        recommended=_EMOJI_ADM_HELD,
        recommended_steps=MORE_STEPS,
        other_layers={
            "first decoder layer": "up_blocks.0.attentions.0",
            "last decoder layer": "up_blocks.1.attentions.2",
        },
        scales=(0.5, 1.0, 4.0),
        mark="class",
        cfg=None,
        schedulers=("ddim", "dpm++ 2m"),
    ),
}


@dataclass(frozen=True)
class Point:
    """One point of the study.

    Attributes:
        model: A builtin model.
        group: The table that it belongs to.
        label: Its row there.
        guidance: Scale 0 is unguided.
        steps: Sampling steps.
        scheduler: A name of `sag generate --scheduler`; `None` is the model's own.
        conditional: Whether captions, or classes, are given.
        guidance_scale: Of classifier-free guidance; 1 is off.
        like: Guidance whose term's size the scale is chosen to give; the scale of `guidance` is
            where the search begins.
        times: How many times as many samples as other points.
    """

    model: str
    group: str
    label: str
    guidance: Guidance
    steps: int = FEW_STEPS
    scheduler: str | None = None
    conditional: bool = False
    guidance_scale: float = 1.0
    like: Guidance | None = None
    times: int = 1

    @property
    def name(self) -> str:
        """What its files are called."""
        words = f"{self.group} {self.label}".lower()
        kept = "".join(c if c.isalnum() or c == "." else " " for c in words)
        return f"{self.model}/" + "-".join(kept.split())

    def description(self) -> dict[str, Any]:
        """All that decides its result, for JSON."""
        told = dataclasses.asdict(self) | {
            "form": type(self.guidance).__name__,
            "weights": _digest_of_weights(self.model),
            "own_scheduler": _own_scheduler(self.model),
        }
        # The number of samples is told by itself.
        untold = ("group", "label", "times")
        return {name: value for name, value in told.items() if name not in untold}


@functools.cache
def _digest_of_weights(model: str) -> str:
    """Tells the weights of a model's network from earlier ones."""
    (weights,) = (builtin_folder(model) / "unet").glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


@functools.cache
def _own_scheduler(model: str) -> dict[str, Any]:
    """Tells the scheduler of a model from earlier ones."""
    text = (builtin_folder(model) / "scheduler" / "scheduler_config.json").read_text("utf-8")
    return {name: value for name, value in json.loads(text).items() if value is not None}


def points() -> list[Point]:
    """All points, those that matter most first; each has a name of its own."""
    groups = (
        _headline,
        _steps,
        _recommended,
        _controls,
        _scales,
        _settings,
        _cheap,
        _conditional,
        _schedulers,
    )
    return [point for group in groups for name in MODELS for point in group(name, MODELS[name])]


def _headline(name: str, model: Model) -> Iterator[Point]:
    for label, guidance, steps in (
        ("unguided", UNGUIDED, STEPS),
        ("exact", model.exact, STEPS),
        ("fast", model.fast, STEPS),
        (f"held, {MORE_STEPS} steps", model.held, MORE_STEPS),
        (f"fast, {MORE_STEPS} steps", model.fast, MORE_STEPS),
        ("unguided, twice the steps", UNGUIDED, 2 * STEPS),
    ):
        yield Point(name, "headline", label, guidance, steps)
    if model.fast.layer != model.exact.layer:
        same_layer = dataclasses.replace(model.exact, layer=model.fast.layer)
        yield Point(name, "headline", "exact, layer of the fast preset", same_layer, STEPS)


def _steps(name: str, model: Model) -> Iterator[Point]:
    for steps in (FEW_STEPS, MORE_STEPS):
        yield Point(name, "steps", f"unguided, {steps} steps", UNGUIDED, steps)
    yield Point(name, "steps", f"fast, {FEW_STEPS} steps", model.fast, FEW_STEPS)


def _recommended(name: str, model: Model) -> Iterator[Point]:
    if model.times == 1:
        return
    own = model.recommended_steps
    for label, guidance, steps in (
        (f"unguided, {own} steps", UNGUIDED, own),
        ("exact", model.exact, STEPS),
        (f"recommended, {own} steps", model.recommended, own),
    ):
        yield Point(name, "recommended", label, guidance, steps, times=model.times)


def _controls(name: str, model: Model) -> Iterator[Point]:
    exact = model.exact
    settings = {"scale": exact.scale, "blur_sigma": exact.blur_sigma, "start": exact.start}
    random = RandomMaskGuidance(**settings, layer=exact.layer)
    blur = BlurGuidance(**settings)
    yield Point(name, "controls", "attention's mask", exact)
    for label, guidance in (("random mask", random), ("blur everywhere", blur)):
        yield Point(name, "controls", f"{label}, same scale", guidance)
        yield Point(name, "controls", f"{label}, same size of the term", guidance, like=exact)


def _scales(name: str, model: Model) -> Iterator[Point]:
    for scale in model.scales:
        guidance = dataclasses.replace(model.exact, scale=scale)
        yield Point(name, "scale", f"scale {scale:g}", guidance)


def _settings(name: str, model: Model) -> Iterator[Point]:
    for threshold in (0.7, 1.3):
        guidance = dataclasses.replace(model.exact, threshold=threshold)
        yield Point(name, "settings", f"threshold {threshold:g}", guidance)
    yield Point(name, "settings", "blur_sigma 1", dataclasses.replace(model.exact, blur_sigma=1.0))
    for label, layer in model.other_layers.items():
        guidance = dataclasses.replace(model.exact, layer=layer)
        yield Point(name, "settings", label, guidance)


def _cheap(name: str, model: Model) -> Iterator[Point]:
    if model.exact.start > 0:
        from_the_first = dataclasses.replace(model.exact, start=0.0)
        yield Point(name, "cheap", "from the first step on", from_the_first)
    for every in (2, 3):
        guidance = dataclasses.replace(model.exact, every=every)
        yield Point(name, "cheap", f"every {every}", guidance)
    for start, stop in ((model.exact.start, 0.3), (0.3, 0.65), (0.65, 1.0)):
        guidance = dataclasses.replace(model.exact, start=start, stop=stop)
        yield Point(name, "cheap", f"steps from {start:g} to {stop:g}", guidance)


def _conditional(name: str, model: Model) -> Iterator[Point]:
    for cfg in (1.0, model.cfg):
        if cfg is None:
            continue
        with_cfg = f", CFG {cfg:g}" if cfg > 1 else ""
        for label, guidance in _conditional_guidance(model, cfg):
            label = f"{model.mark}{with_cfg}: {label}"
            yield Point(name, "conditional", label, guidance, conditional=True, guidance_scale=cfg)


def _conditional_guidance(model: Model, cfg: float) -> Iterator[tuple[str, SelfAttentionGuidance]]:
    gentle = dataclasses.replace(model.exact, scale=0.75)
    yield "unguided", UNGUIDED
    yield "exact", model.exact
    yield "exact, scale 0.75", gentle
    if cfg > 1:
        yield "exact, scale 0.75, conditional branch", dataclasses.replace(gentle, branch="cond")


def _schedulers(name: str, model: Model) -> Iterator[Point]:
    for scheduler in model.schedulers:
        for label, guidance in (("unguided", UNGUIDED), ("fast", model.fast)):
            yield Point(name, "schedulers", f"{scheduler}, {label}", guidance, scheduler=scheduler)
