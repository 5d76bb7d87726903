"""The controls of the page, and the settings in its address."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..generate import LoadedPipeline, method_label, scheduler_names
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
        settings, guidance = model.settings(), model.recommended.make_guidance()
        self.limits = limits
        with gr.Group():
            prompt = gr.Textbox(
                label="Prompt", lines=2, max_length=MOST_CHARACTERS, placeholder=_hint(model)
            )
            negative = gr.Textbox(label="Negative prompt", max_length=MOST_CHARACTERS)
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
            self.dice = gr.Button("\N{DIE FACE-5} Random seed", min_width=120)
        own = guidance.to_dict()
        scale_label = f"{method_label(guidance.method)} scale (0 is off)"
        scale = gr.Slider(-2, 10, guidance.scale, step=0.05, label=scale_label)
        sigma = gr.Slider(
            *(0, 10, own.get("blur_sigma", 1)), step=0.1, label="Blur sigma",
            visible="blur_sigma" in own,
        )  # fmt: skip
        threshold = gr.Slider(
            *(0, 3, own.get("threshold", 1)), step=0.05, label="Mask threshold",
            visible="threshold" in own,
        )  # fmt: skip
        with gr.Row():
            start = gr.Slider(0, 1, guidance.start, step=0.05, label="Guide from", min_width=120)
            stop = gr.Slider(0, 1, guidance.stop, step=0.05, label="Guide until", min_width=120)
        every = gr.Slider(1, 10, guidance.every, step=1, label="Second pass every n-th step")
        with gr.Accordion("Sampling", open=False):
            steps = gr.Slider(
                *(1, limits.max_steps, min(settings.num_inference_steps, limits.max_steps)),
                step=1,
                label="Steps",
            )
            choices = [("the model's own", ""), *((name, name) for name in scheduler_names())]
            scheduler = gr.Dropdown(choices, value="", label="Scheduler")
            cfg = gr.Slider(1, 20, settings.guidance_scale, step=0.1, label="CFG scale (1 is off)")
            size = gr.Slider(0, limits.max_size, 0, step=8, label="Size (0 is the model's own)")
        by_name: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative,
            "seed": seed,
            "steps": steps,
            "scheduler": scheduler,
            "guidance_scale": cfg,
            "sag_scale": scale,
            "blur_sigma": sigma,
            "threshold": threshold,
            "start": start,
            "stop": stop,
            "every": every,
            "size": size,
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
