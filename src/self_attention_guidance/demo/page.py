"""The page: controls on the left, what they draw on the right."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..generate import GeneratedImage, LoadedPipeline, overlay_attended, parse_axis
from .browser import AT_FIRST, DRAW_AT_ONCE, STYLE
from .controls import Controls
from .limits import Limits, VisitorSettings, check_axes
from .pictures import Pictures
from .studio import Studio, Watch
from .uploads import MOST_BYTES
from .visits import Visits

_MOST_KEPT = 24
_CACHE_SECONDS = 3600
# gradio keeps 80 kB for each session, and by default remembers 10,000.
_SESSIONS_PER_PLACE = 4
_INTRODUCTION = """# Self-Attention Guidance
Each sampling step is compared with that of a weakened network, for example one whose input is
blurred where it attends. The difference makes the picture clearer. Model: **{model}**"""
_ABOUT_STEPS = """For every second pass, this shows the picture that the network predicts, how much
attention each part receives, where it is blurred, the blurred prediction, and the size of the
guidance term."""


@dataclass(frozen=True)
class Page:
    """A page to launch.

    Attributes:
        app: gradio's `Blocks`, with its queue.
        launch_settings: Arguments of `app.launch`: the page's look, no access to the host's files,
            and how many visitors are remembered.
    """

    app: gr.Blocks
    launch_settings: dict[str, Any]


def build_page(model: LoadedPipeline, limits: Limits | None = None) -> Page:
    """The page for a model.

    Args:
        model: What `load_pipeline` returned.
        limits: How much a visitor may ask for; `None` is the defaults.

    Returns:
        The page. Its API has the endpoints `/generate`, `/steps` and `/sweep`.
    """
    limits = limits or Limits()
    builder = _Builder(model, limits)
    app = gr.Blocks(
        title="Self-Attention Guidance",
        analytics_enabled=False,
        delete_cache=(_CACHE_SECONDS, _CACHE_SECONDS),
    )
    with app:
        builder.draw(app)
    builder.draw_example()
    app.queue(max_size=limits.max_queue, default_concurrency_limit=1)
    # Fonts of the visitor's machine, so that nothing is fetched from elsewhere.
    theme = gr.themes.Default(
        primary_hue="orange",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    # Dark enough for the white text on it.
    theme.set(
        button_primary_background_fill="#c2410c", button_primary_background_fill_hover="#9a3412"
    )
    launch_settings: dict[str, Any] = {
        "theme": theme,
        "css": STYLE,
        "allowed_paths": [],
        "max_file_size": MOST_BYTES,
        "share": False,
        "enable_monitoring": False,
        # A visitor that is forgotten loses only the list of earlier pictures.
        "state_session_capacity": _SESSIONS_PER_PLACE * limits.max_queue,
    }
    return Page(app, launch_settings)


class _Builder:
    """The layout of the page, and the link from its buttons to the studio."""

    def __init__(self, model: LoadedPipeline, limits: Limits) -> None:
        self.studio = Studio(model, limits)
        self.limits = limits
        self.pictures = Pictures()
        self.lasting = Pictures()
        self.example: Any = None
        self.visits = Visits()
        self.starts: dict[str, gr.Button] = {}
        self.drawn: dict[str, Any] = {}

    def draw(self, app: gr.Blocks) -> None:
        gr.Markdown(_INTRODUCTION.format(model=self.studio.model.name), elem_classes="about")
        self.controls = Controls(self.studio)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.controls.draw_settings()
                earlier = gr.Column()  # it also sets the sweep's controls
            with gr.Column(scale=3, min_width=300, elem_classes="drawings"), gr.Tabs() as tabs:
                with gr.Tab("Compare", id="compare", elem_id="compare", render_children=True):
                    self._draw_compare()
                with gr.Tab("Step by step", id="steps", elem_id="steps", render_children=True):
                    self._draw_steps()
                with gr.Tab("Sweep", id="sweep", elem_id="sweep", render_children=True):
                    self._draw_sweep()
        with earlier:
            self.controls.draw_earlier()
        self.controls.add_tips()
        for name, event in self.drawn.items():
            self.controls.write_address(event, name)
        app.load(None, js=AT_FIRST, api_visibility="private")
        # Buttons work only after this: a quick visitor would draw without the address's settings.
        opened = app.load(
            self._open,
            None,
            [
                *self.controls.in_address.values(), *self.starts.values(), tabs, *self.shown,
            ],
            queue=False, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        opened.then(None, js=DRAW_AT_ONCE % json.dumps([*self.starts]), api_visibility="private")

    def _open(self, request: gr.Request) -> list[Any]:
        """Updates with the settings of the page's address, which also enable the buttons.

        If the address has no settings, the example is shown.
        """
        given = dict(request.query_params)
        tab = given.get("tab") or given.get("draw")
        is_bare = not given.keys() & {"draw", *self.controls.in_address}
        return [
            *self.controls.from_address(given),
            *(gr.Button(interactive=True) for _ in self.starts),
            gr.Tabs(selected=tab) if tab in self.starts else gr.skip(),
            *self._example(is_bare),
        ]

    def _example(self, is_shown: bool) -> list[Any]:
        """What the tab of pairs shows when the page is opened."""
        if self.example is None or not is_shown:
            return [gr.skip() for _ in self.shown]
        pair, costs, blurred = self.example
        return [pair, costs, blurred, *_keep(pair, blurred, [])]

    def draw_example(self) -> None:
        """Draw the first settings once for all visitors, if they have a prompt."""
        asked = self.controls.at_first()
        if asked.prompt:
            self.example = self._compare(asked, lambda share: None, self.lasting)

    def _draw_compare(self) -> None:
        start, cancel = _buttons("compare", "Draw without and with guidance")
        with gr.Row():
            slider = gr.ImageSlider(
                label="Unguided left, guided right",
                format="png",
                type="filepath",
                buttons=["download", "fullscreen"],
                interactive=False,
                max_height=520,
                scale=3,
                min_width=280,
            )
            with gr.Column(visible=False, min_width=140) as beside:
                blurred = _image("Where it was blurred")
                gr.Markdown("Pink shows where it was blurred: stronger means more often.")
        costs = gr.Markdown()
        with gr.Row():
            unguided = gr.DownloadButton("Download unguided", interactive=False)
            guided = gr.DownloadButton("Download guided", interactive=False)
        gallery = gr.Gallery(
            label="Earlier pictures, newest first", columns=6, height="auto", format="png"
        )
        kept = gr.State([])
        drawn = [slider, costs, blurred]
        event = self._on_click(start, cancel, "generate", self._compare, drawn)
        others = [kept, gallery, unguided, guided, beside]
        event.success(_keep, [slider, blurred, kept], others, api_visibility="private")
        self.shown = [*drawn, *others]

    def _draw_steps(self) -> None:
        gr.Markdown(_ABOUT_STEPS)
        start, cancel = _buttons("steps", "Watch the steps")
        strip = _image("One guided step")
        number = gr.Slider(
            1, 2, 1, step=1, label="Second pass", info="From noise to picture.", interactive=False
        )
        strips = gr.Gallery(visible=False, format="png")
        event = self._on_click(start, cancel, "steps", self._steps, [strips])
        event.success(_first_strip, strips, [strip, number], api_visibility="private")
        number.change(
            _strip_at, [strips, number], strip, queue=False, api_visibility="private",
            show_progress="hidden",
        )  # fmt: skip

    def _draw_sweep(self) -> None:
        extra = self.controls.draw_axes()
        start, cancel = _buttons("sweep", "Draw the grid")
        grid = _image("Rows against columns", "grid")
        event = self._on_click(start, cancel, "sweep", self._sweep, [grid], extra)
        sides = [extra["columns"], extra["column_values"]]
        event.success(_wide_enough, sides, grid, api_visibility="private")

    def _on_click(
        self,
        start: gr.Button,
        cancel: gr.Button,
        api_name: str,
        draw: Callable[..., Any],
        outputs: list[Any],
        extra: dict[str, Any] | None = None,
    ) -> Any:
        """Draw when a button is pressed; all drawings share one queue."""
        extra = extra or {}
        name = str(start.elem_id).removeprefix("draw-")
        self.starts[name] = start
        event = self.drawn[name] = start.click(
            self.visits.endpoint(draw, len(outputs), list(extra)),
            [*self.controls.inputs, *extra.values()],
            outputs,
            api_name=api_name,
            concurrency_id="model",
            concurrency_limit=1,
        )
        cancel.click(self.visits.cancel, cancels=event, queue=False, api_visibility="private")
        return event

    def _compare(
        self, asked: VisitorSettings, watch: Watch, pictures: Pictures | None = None
    ) -> Any:
        pictures = pictures or self.pictures
        pair = self.studio.pair(asked, watch)
        if any(picture.flagged for picture, _ in pair):
            gr.Warning("The model's safety checker blacked a picture out.")
        _warn(picture for picture, _ in pair)
        if asked.sag_scale and len({cost.evaluations for _, cost in pair}) == 1:
            gr.Warning("No step is guided: widen the guided steps, or take more steps.")
        names = ("unguided", "guided")
        paths = tuple(
            pictures.save(picture.image, f"{asked.seed}-{name}", picture.record)
            for name, (picture, _) in zip(names, pair, strict=True)
        )
        costs = "; ".join(
            f"{name} {cost.time}, {cost.evaluations} network evaluations"
            for name, (_, cost) in zip(names, pair, strict=True)
        )
        guided, blurred = pair[1][0], None
        if guided.attended is not None:
            overlay = overlay_attended(guided.image, guided.attended)
            blurred = pictures.save(overlay, f"{asked.seed}-blurred")
        return paths, costs.capitalize(), blurred

    def _steps(self, asked: VisitorSettings, watch: Watch) -> Any:
        return [self.pictures.save(strip, "step") for strip in self.studio.steps(asked, watch)]

    def _sweep(self, asked: VisitorSettings, *sides_and_watch: Any) -> Any:
        *sides, watch = sides_and_watch
        rows, columns = check_axes(*sides, limits=self.limits)
        drawn = self.studio.grid(asked, rows, columns, watch)
        _warn(picture for column in drawn.columns for picture in column)
        return self.pictures.save(drawn.grid, "grid", drawn.record)


def _image(label: str, *classes: str) -> gr.Image:
    """A picture whose label only screen readers see, because it would cover the picture."""
    return gr.Image(
        label=label,
        elem_classes=["picture", *classes],
        format="png",
        type="filepath",
        interactive=False,
        buttons=["download", "fullscreen"],
    )


def _warn(pictures: Iterable[GeneratedImage]) -> None:
    """Show what the model ignored of the prompts, once for all pictures."""
    for text in dict.fromkeys(text for picture in pictures for text in picture.warnings):
        gr.Warning(html.escape(f"{text[0].upper()}{text[1:]}.", quote=False))


def _wide_enough(columns: str, values: str) -> gr.Image:
    """A grid wide enough to read its columns; if there are many, it scrolls."""
    count = len(parse_axis("columns", f"{columns}={values}").values)
    return gr.Image(elem_classes=["picture", "grid", f"columns-{count}"])


def _buttons(name: str, label: str) -> tuple[gr.Button, gr.Button]:
    """A button that draws, once the page is ready, and one that cancels."""
    with gr.Row():
        start = gr.Button(
            label, variant="primary", scale=3, interactive=False, elem_id=f"draw-{name}"
        )
        return start, gr.Button("Cancel", min_width=90)


def _keep(pair: tuple[str, str], blurred: str | None, kept: list[str]) -> tuple[Any, ...]:
    """Add a pair to the visitor's gallery and to the download buttons.

    The column that shows where it was blurred is hidden if nothing was blurred.
    """
    kept = [*pair, *kept][:_MOST_KEPT]
    files = (gr.DownloadButton(value=path, interactive=True) for path in pair)
    return kept, kept, *files, gr.Column(visible=blurred is not None)


def _first_strip(strips: list[tuple[str, str | None]]) -> tuple[Any, ...]:
    last = max(len(strips), 2)
    return strips[0][0], gr.Slider(maximum=last, value=1, interactive=len(strips) > 1)


def _strip_at(strips: list[tuple[str, str | None]], number: float) -> Any:
    return strips[int(number) - 1][0] if 1 <= number <= len(strips) else gr.skip()
