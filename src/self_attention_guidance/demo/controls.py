"""The controls of the page, and the settings in its address."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..generate import GenerationSettings, LoadedPipeline, method_label, scheduler_names
from ..guidance import Guidance
from .limits import LARGEST_SEED, MOST_CHARACTERS, Limits
from .visits import SETTINGS

_RANDOM_SEED = f"() => Math.floor(Math.random() * {LARGEST_SEED + 1})"
_TO_ADDRESS = f"""(...values) => {{
  const names = {list(SETTINGS)!r};
  const address = new URL(window.location);
  names.forEach((name, place) => address.searchParams.set(name, values[place] ?? ""));
  window.history.replaceState(null, "", address);
}}"""


class Controls:
    """What a visitor can set, in the order of `VisitorSettings`."""

    def __init__(self, model: LoadedPipeline, limits: Limits) -> None:
        """Draw the controls into the present block.

        Args:
            model: Its recommended settings are what the controls show at first.
            limits: Ends of the ranges.
        """
        self.limits = limits
        with gr.Group():
            prompt = gr.Textbox(
                label="Prompt", lines=2, max_length=MOST_CHARACTERS, placeholder=_hint(model)
            )
            negative = gr.Textbox(label="Negative prompt", max_length=MOST_CHARACTERS)
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
            self.dice = gr.Button("\N{DIE FACE-5} Random seed", min_width=120)
        by_name: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative,
            "seed": seed,
            **_of_guidance(model.recommended.make_guidance()),
            **_of_sampling(model.settings(), limits),
        }
        self.inputs = [by_name[name] for name in SETTINGS]
        self.dice.click(None, None, seed, js=_RANDOM_SEED, api_visibility="private")

    def write_address(self, after: Any) -> None:
        """Put the settings into the page's address after an event, so that it can be shared."""
        after.then(None, self.inputs, None, js=_TO_ADDRESS, api_visibility="private")

    def from_address(self, request: gr.Request) -> list[Any]:
        """The values of all controls that the page's address gives; others stay as they are.

        A text that doesn't fit its control is passed over.
        """
        given = dict(request.query_params)
        return [
            _value_for(control, given[name]) if name in given else gr.skip()
            for name, control in zip(SETTINGS, self.inputs, strict=True)
        ]


def _of_guidance(guidance: Guidance) -> dict[str, Any]:
    """Controls of guidance; those of settings that it does not have are not shown."""
    own, label = guidance.to_dict(), method_label(guidance.method)
    controls: dict[str, Any] = {
        "sag_scale": gr.Slider(-2, 10, guidance.scale, step=0.05, label=f"{label} scale (0 is off)")
    }
    for name, most, step, title in (
        ("blur_sigma", 10, 0.1, "Blur sigma"),
        ("threshold", 3, 0.05, "Mask threshold"),
    ):
        value, is_shown = own.get(name, 1), name in own
        controls[name] = gr.Slider(0, most, value, step=step, label=title, visible=is_shown)
    with gr.Row():
        for name, title in (("start", "Guide from"), ("stop", "Guide until")):
            controls[name] = gr.Slider(0, 1, own[name], step=0.05, label=title, min_width=120)
    controls["every"] = gr.Slider(
        1, 10, guidance.every, step=1, label="Second pass every n-th step"
    )
    return controls


def _of_sampling(settings: GenerationSettings, limits: Limits) -> dict[str, Any]:
    steps = min(settings.num_inference_steps, limits.max_steps)
    choices = [("the model's own", ""), *((name, name) for name in scheduler_names())]
    cfg = settings.guidance_scale
    with gr.Accordion("Sampling", open=False):
        return {
            "steps": gr.Slider(1, limits.max_steps, steps, step=1, label="Steps"),
            "scheduler": gr.Dropdown(choices, value="", label="Scheduler"),
            "guidance_scale": gr.Slider(1, 20, cfg, step=0.1, label="CFG scale (1 is off)"),
            "size": gr.Slider(0, limits.max_size, 0, step=8, label="Size (0 is the model's own)"),
        }


def _value_for(control: Any, text: str) -> Any:
    if isinstance(control, gr.Textbox):
        return text[:MOST_CHARACTERS]
    if isinstance(control, gr.Dropdown):
        return text if text in (value for _, value in control.choices) else gr.skip()
    try:
        value = float(text)
    except ValueError:
        return gr.skip()
    if not control.minimum <= value <= control.maximum:
        return gr.skip()
    return int(value) if value.is_integer() else value


def _hint(model: LoadedPipeline) -> str:
    suggested = [prompt for prompt in model.recommended.compare_prompts or () if prompt]
    return f"for example {', '.join(suggested[:3])}; may be empty" if suggested else "may be empty"
