"""The controls of the page, and the settings in its address."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ..generate import method_label
from ..guidance import Guidance
from .earlier import values_of
from .limits import LARGEST_SEED, MOST_CHARACTERS, VisitorSettings
from .studio import Studio
from .uploads import upload
from .visits import FILES, SETTINGS, settings_of

_OF_METHOD = ("sag_scale", "blur_sigma", "threshold", "layers", "start", "stop", "every")
_TITLES = {
    "sag": "SAG: blur what is attended to",
    "blur": "Blur: blur everything",
    "pag": "PAG: attention to itself alone",
    "seg": "SEG: smoothed attention",
    "slg": "SLG: skipped blocks",
    "tpg": "TPG: shuffled tokens",
}
_TIPS = {
    "prompt": "What to draw, in a few words. May be empty.",
    "negative_prompt": "What to keep out. Needs a CFG scale above 1.",
    "seed": "The noise to begin with.",
    "steps": "More are finer and take longer.",
    "scheduler": "The rule for each step.",
    "guidance_scale": "How closely to follow the prompt.",
    "sag_scale": "How strongly to guide. Too much spoils the picture.",
    "blur_sigma": "How far the blur reaches.",
    "threshold": "Blur what gets more attention than this; 1 is the mean.",
    "start": "0 is the first step.",
    "stop": "1 is the last step.",
    "every": "Higher is faster and guides less.",
    "size": "Width and height in pixels.",
    "method": "How the second pass is weakened.",
    "layers": "Which layers are weakened.",
    "strength": "How much of the picture changes.",
    "rows": "The setting that changes from row to row.",
    "row_values": "Separated by commas.",
    "columns": "The setting that changes from column to column.",
    "column_values": "Separated by commas.",
}
_AXES = {
    "guidance": "Method",
    "scale": "Guidance scale",
    "window": "Window of steps",
    "layer": "Layer",
    "blur": "Blur sigma",
    "cfg": "CFG scale",
    "steps": "Steps",
    "seed": "Seed",
    "prompt": "Prompt (with | between)",
}
_MOST_EXAMPLES = 4
# Characters that mean something in Markdown or HTML.
_IN_MARKDOWN = re.compile(r"([\\`*_\[\]!<>&~#|])")
_RANDOM_SEED = f"() => Math.floor(Math.random() * {LARGEST_SEED + 1})"
_TO_ADDRESS = """(...values) => {
  const address = new URL(window.location);
  const names = %s;
  names.forEach((name, place) => address.searchParams.set(name, values[place] ?? ""));
  // An address holds no picture, so whoever opens it would get another drawing.
  if (values.slice(names.length).some(Boolean)) address.searchParams.delete("draw");
  else address.searchParams.set("draw", %s);
  window.history.replaceState(null, "", address);
}"""


class Controls:
    """The settings of a visitor, and those of them in the page's address.

    Attributes:
        inputs: The controls of `VisitorSettings`, in its order.
        files: Those of `inputs` that take files, which no address can hold.
        in_address: All other controls, by their names in the address.
    """

    def __init__(self, studio: Studio) -> None:
        """Add the prompt, and prompts to click, to the current block.

        Args:
            studio: The controls first show what its model recommends.
        """
        self.studio = studio
        examples = [text for text in studio.model.recommended.compare_prompts if text]
        self.prompt = gr.Textbox(
            examples[0] if examples else "",
            label="Prompt",
            lines=2,
            max_length=MOST_CHARACTERS,
        )
        with gr.Row(elem_classes="examples", visible=bool(examples)):
            for text in examples[:_MOST_EXAMPLES]:
                example = gr.Button(text, size="sm", min_width=90)
                script = f"() => {json.dumps(text)}"
                example.click(None, None, self.prompt, js=script, api_visibility="private")

    def draw_settings(self) -> None:
        """Add all other settings to the current block."""
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
            dice = gr.Button("\N{DIE FACE-5} Random seed", min_width=120)
        by_name: dict[str, Any] = {
            "prompt": self.prompt,
            "seed": seed,
            "negative_prompt": gr.Textbox(label="Negative prompt", max_length=MOST_CHARACTERS),
            **_of_guidance(self.studio.model.usual(""), self.studio.methods()),
            **_of_sampling(self.studio),
            **_of_start(self.studio),
        }
        for name, control in by_name.items():
            if isinstance(control, gr.Slider | gr.Number):
                _refuse_texts(name, control)
        self.inputs = [by_name[name] for name in SETTINGS]
        self.files = [by_name[name] for name in FILES]
        self.in_address = {name: by_name[name] for name in SETTINGS if name not in FILES}
        dice.click(None, None, seed, js=_RANDOM_SEED, api_visibility="private")
        # Not `change`: a method from the address comes with its settings.
        by_name["method"].input(
            self._of_method,
            by_name["method"],
            [by_name[name] for name in _OF_METHOD],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    def draw_axes(self) -> dict[str, Any]:
        """Add the axes of a grid to the current block; return them by name in the address."""
        drawn: dict[str, Any] = {}
        usual = {"row": "seed", "column": "scale"}
        for side, axis in usual.items():
            with gr.Row():
                choices = [(title, name) for name, title in _AXES.items()]
                name = gr.Dropdown(choices, value=axis, label=f"{side.title()}s", min_width=140)
                values = gr.Textbox(
                    self.studio.values_to_try(axis),
                    label=f"Values of the {side}s",
                    max_length=MOST_CHARACTERS,
                    scale=2,
                    min_width=140,
                )
            # Not `change`: an axis from the address comes with its values.
            name.input(
                self.studio.values_to_try,
                name,
                values,
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
            drawn |= {f"{side}s": name, f"{side}_values": values}
        self.in_address |= drawn
        return drawn

    def _of_method(self, method: str) -> list[Any]:
        """Updates of the controls for a method, with its usual values."""
        usual = self.studio.model.usual(method)
        return [gr.update(**_look(name, usual)) for name in _OF_METHOD]

    def draw_earlier(self) -> None:
        """Add an upload that sets the controls from an earlier picture to the current block."""
        with gr.Accordion("Settings of an earlier picture", open=False):
            message = gr.Markdown("A PNG file that was drawn here, or by `sag`, sets all controls.")
            place = upload("Earlier picture")
        # The upload is emptied, so that it takes the next picture.
        outputs = [message, place, *self.files, *self.in_address.values()]
        place.upload(
            self._of_earlier,
            place,
            outputs,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    def _of_earlier(self, path: str) -> list[Any]:
        values, message = values_of(path, self.studio)
        unfit = [n for n, text in values.items() if not _value_for(self.in_address[n], text)]
        if unfit:
            message += f" Out of range here: {', '.join(f'{n}={values[n]}' for n in unfit)}."
        message = _IN_MARKDOWN.sub(r"\\\1", message)  # it quotes the visitor's file
        if not values:
            return [message, None, *(gr.skip() for _ in (*self.files, *self.in_address))]
        return [message, None, *(None for _ in self.files), *self.from_address(values)]

    def add_tips(self) -> None:
        """Add a sentence below each label that says what the control is for."""
        for name, control in self.in_address.items():
            control.info = _TIPS[name]

    def at_first(self) -> VisitorSettings:
        """The settings of a page that was just opened."""
        return settings_of([control.value for control in self.inputs])

    def write_address(self, drawing: Any, name: str) -> None:
        """Write the settings into the page's address after a drawing, so that it can be shared.

        Args:
            drawing: The event of a drawing.
            name: What to draw, as the address has it.
        """
        script = _TO_ADDRESS % (json.dumps([*self.in_address]), json.dumps(name))
        controls = [*self.in_address.values(), *self.files]
        drawing.success(None, controls, None, js=script, api_visibility="private")

    def from_address(self, given: Mapping[str, str]) -> list[Any]:
        """Updates of the controls that the page's address has values for.

        A text that does not fit its control is ignored.
        """
        method = given.get("method", "")
        usual = self.studio.model.usual(method if method in self.studio.methods() else "")
        updates: list[Any] = []
        for name, control in self.in_address.items():
            update: dict[str, Any] = _look(name, usual) if name in _OF_METHOD else {}
            if name in given:
                update |= _value_for(control, given[name])
            updates.append(gr.update(**update) if update else gr.skip())
        return updates


def _refuse_texts(name: str, control: Any) -> None:
    """Let a control for numbers refuse what else a request may hold; gradio fails for it."""
    read = control.preprocess

    def checked(value: Any) -> Any:
        if value is None:  # refused with the other settings
            return None
        if not isinstance(value, int | float):
            raise gr.Error(f"{name}={value!r:.60} must be a number.", print_exception=False)
        return read(value)

    control.preprocess = checked


def _of_guidance(guidance: Guidance, methods: Sequence[str]) -> dict[str, Any]:
    """Controls of guidance; settings that the method does not have are hidden."""
    choices = [(_TITLES.get(name, method_label(name)), name) for name in methods]
    controls: dict[str, Any] = {
        "method": gr.Dropdown(choices, value=guidance.method, label="Guidance"),
        "sag_scale": gr.Slider(-2, 10, step=0.05, **_look("sag_scale", guidance)),
        "blur_sigma": gr.Slider(0, 10, step=0.1, **_look("blur_sigma", guidance)),
        "threshold": gr.Slider(
            0, 3, step=0.05, label="Mask threshold", **_look("threshold", guidance)
        ),
        "layers": gr.Textbox(
            label="Layers",
            placeholder="the method's own, or names from `sag layers` with + between",
            max_length=MOST_CHARACTERS,
            **_look("layers", guidance),
        ),
    }
    with gr.Row():
        for name, title in (("start", "Guide from"), ("stop", "Guide until")):
            controls[name] = gr.Slider(
                0, 1, step=0.05, label=title, min_width=120, **_look(name, guidance)
            )
    controls["every"] = gr.Slider(
        1, 10, step=1, label="Second pass every n-th step", **_look("every", guidance)
    )
    return controls


def _look(name: str, guidance: Guidance) -> dict[str, Any]:
    """Value, visibility and label of a control for a method's usual settings."""
    own = guidance.to_dict()
    if name == "sag_scale":
        label = f"{method_label(guidance.method)} scale (0 is off)"
        return {"value": guidance.scale, "label": label}
    if name == "layers":
        return {"value": "+".join(own.get(name) or []), "visible": name in own}
    value = own.get(name, 1)
    look: dict[str, Any] = {"value": 0 if value == "inf" else value, "visible": name in own}
    if name == "blur_sigma":
        look["label"] = "Blur sigma (0 is no end)" if value == "inf" else "Blur sigma"
    return look


def _of_sampling(studio: Studio) -> dict[str, Any]:
    settings, limits = studio.model.settings(), studio.limits
    steps = min(settings.num_inference_steps, limits.max_steps)
    choices = [(name or "the model's own", name) for name in studio.schedulers]
    cfg = settings.guidance_scale
    with gr.Accordion("Sampling", open=False):
        return {
            "steps": gr.Slider(1, limits.max_steps, steps, step=1, label="Steps"),
            "scheduler": gr.Dropdown(choices, value="", label="Scheduler"),
            "guidance_scale": gr.Slider(1, 20, cfg, step=0.1, label="CFG scale (1 is off)"),
            "size": gr.Slider(
                0,
                limits.max_size,
                studio.usual_size(),
                step=8,
                label="Size (0 is the model's own)",
            ),
        }


def _of_start(studio: Studio) -> dict[str, Any]:
    """Controls of image to image and inpainting, if the model supports them."""
    reason, has_mask = studio.why_no_start(), studio.why_no_start(has_mask=True) is None
    with gr.Accordion("Begin with a picture", open=False):
        if reason is None:
            text = "Only the white parts of a mask are redrawn; without a mask, the whole picture."
        else:
            text = f"This model always begins with noise: {reason.partition(': ')[2]}."
        gr.Markdown(text)
        with gr.Row(visible=reason is None):
            picture = upload("Picture")
            mask = upload("Mask", visible=has_mask)
        strength = gr.Slider(0.05, 1, 0.8, step=0.05, label="Strength", visible=reason is None)
    return {"image": picture, "mask": mask, "strength": strength}


def _value_for(control: Any, text: str) -> dict[str, Any]:
    """A control's value from a text; empty if the text does not fit."""
    if isinstance(control, gr.Textbox):
        return {"value": text[: control.max_length]}
    if isinstance(control, gr.Dropdown):
        return {"value": text} if text in (value for _, value in control.choices) else {}
    try:
        value = float(text)
    except ValueError:
        return {}
    if not control.minimum <= value <= control.maximum:
        return {}
    return {"value": int(value) if value.is_integer() else value}
