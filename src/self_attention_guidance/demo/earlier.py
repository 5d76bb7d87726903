"""The settings of an earlier picture, for the controls of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..generate import Record, parse_axis, read_record
from ..generate.record import difference
from ..guidance import METHODS
from .limits import VisitorSettings
from .studio import OF_GUIDANCE, Studio
from .visits import FILES, SETTINGS


def values_of(path: str, studio: Studio) -> tuple[dict[str, str], str]:
    """The settings that a picture's file holds.

    Args:
        path: A file that a visitor uploaded.
        studio: What the page draws with.

    Returns:
        Texts by the names that controls have in the page's address, empty if the page can't draw
        the picture; and a message of one or two sentences.
    """
    try:
        record = read_record(path)
    except Exception:  # visitors upload files of every kind
        return {}, "This picture holds no settings: only PNG files that this program saved do."
    drawn_by, own = record.get("model"), studio.model.name
    if drawn_by != own:
        message = f"This picture was drawn by {drawn_by}, and this page draws with {own}"
        return {}, f"{message}: nothing was changed."
    try:
        record = _completed(record, studio)
        values = _values(record, studio)
        asked = VisitorSettings(**{name: values[name] for name in SETTINGS if name not in FILES})
        studio.check(asked)
        present = studio.choices(asked)
        given = record["settings"]
        earlier = {name: record.get(name, present[name]) for name in present}
        earlier["settings"] = {**given, "image": None, "mask": None, "strength": None}
        changed = difference(earlier, present)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        return {}, f"Its settings do not fit this page, and nothing was changed: {reason}"
    sentences = [
        "The page now has its settings.",
        f"It has no controls for all of them: {changed}." if changed else "",
        f"It began with {given['image']}: upload that below, too." if given.get("image") else "",
    ]
    texts = {name: str(value) for name, value in values.items()}
    return texts, " ".join(filter(None, sentences))


def _completed(record: Mapping[str, Any], studio: Studio) -> Record:
    """A record with the page's usual values for what it leaves out.

    Of guidance that was off, only the method is recorded. Of a grid, what its sides change is not.
    """
    completed: Record = dict(record)
    if "rows" in record:
        usual = studio.model.settings()
        varied = {
            "num_inference_steps": min(usual.num_inference_steps, studio.limits.max_steps),
            "guidance_scale": usual.guidance_scale,
        }
        completed = {"seed": 0, **record, "settings": {**varied, **record["settings"]}}
        if "guidances" in record:
            completed["guidance"] = _chosen(record, studio)
    guidance = completed["guidance"]
    own = studio.model.usual(guidance.get("method")).to_dict()
    return {**completed, "guidance": {**own, **guidance}}


def _chosen(record: Mapping[str, Any], studio: Studio) -> dict[str, Any]:
    """The guidance of the controls: in an axis of guidances, that with other values than usual."""
    sides = [parse_axis(side, record[side]) for side in ("rows", "columns")]
    (texts,) = (side.values for side in sides if side.name == "guidance")
    for text, drawn in zip(texts, record["guidances"], strict=True):
        if text in METHODS:  # the text has no settings of its own
            usual = studio.model.usual(text).to_dict()
            if {**usual, **drawn} != usual:
                return drawn
    return {}


def _values(record: Mapping[str, Any], studio: Studio) -> dict[str, Any]:
    """Values of controls, by their names in the page's address."""
    settings, guidance = record["settings"], record["guidance"]
    sides: dict[str, str] = {}
    for side in ("row", "column") if "rows" in record else ():
        name, _, values = record[f"{side}s"].partition("=")
        sides |= {f"{side}s": name, f"{side}_values": values}
    width, height = settings["width"], settings["height"]
    return {
        "prompt": record["prompts"][0] if sides else record["prompt"],
        "negative_prompt": settings["negative_prompt"],
        "seed": record["seed"],
        "steps": settings["num_inference_steps"],
        "scheduler": studio.scheduler_name(record),
        "guidance_scale": settings["guidance_scale"],
        "sag_scale": guidance["scale"],
        **{name: _number(guidance.get(name, 1)) for name in OF_GUIDANCE},
        "size": width if width and width == height else 0,
        "method": guidance["method"],
        "layers": "+".join(guidance.get("layers") or []),
        "strength": settings.get("strength") or VisitorSettings.strength,
        **sides,
    }


def _number(value: Any) -> Any:
    return 0 if value == "inf" else value  # a slider has no infinity
