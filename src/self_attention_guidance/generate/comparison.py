"""The same prompts and seeds at several guidance scales, or any two settings, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..checks import check_prompts, check_scales
from ..denoiser.families import denoiser_of
from ..guidance.sag import Blurring
from .axes import Axis, Cell, cells_of
from .cost import Cost, generate_one
from .drawing import GeneratedImage, Progress
from .grid import BETWEEN, EMPTY_PROMPT, draw_grid, overlay_attended
from .metadata import Record, method_label, text_of, written
from .sampling import generate
from .schedulers import check_steps_of, label_of
from .settings import GenerationSettings
from .shared import guidance_line, layers_of, shared_guidance, shared_record


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A grid of pictures.

    Attributes:
        grid: The labelled grid.
        columns: The pictures, column by column.
        record: The settings that all pictures share (see `describe`), and what differs. From
            `compare`, that is "prompts", "seed" (of each prompt's first row), "num_images" and
            "sag_scales"; from `compare_axes`, "prompts", "rows" and "columns". If one of these is
            an axis of guidances, "guidances" has the settings of each, or `None` for no guidance.
        guidances: The guidances of the pictures for readers, one line each, as below the grid.
        costs: From `compare_axes`: the cost of each picture, column by column.
    """

    grid: Image.Image
    columns: Sequence[Sequence[GeneratedImage]]
    record: Mapping[str, Any]
    guidances: Sequence[str] = ()
    costs: Sequence[Sequence[Cost]] = ()

    @property
    def parameters(self) -> str:
        """The settings of the grid, in the form of `format_parameters`."""
        return text_of(self.record)


def compare(
    pipeline: Any,
    prompts: str | Sequence[str],
    sag_scales: Sequence[float],
    settings: GenerationSettings | None = None,
    *,
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 1,
    model_name: str | None = None,
    show_attention: bool = False,
    on_progress: Progress | None = None,
) -> Comparison:
    """Draw a grid with a row for each prompt and seed, and a column for each guidance scale.

    Args:
        pipeline: Its `guidance` holds the other settings of guidance.
        prompts: One prompt or several; an empty text is a prompt, too.
        sag_scales: Guidance scales; 0 is off.
        settings: Settings that all pictures share; its `sag_scale` is not used.
        seed: Seed of every prompt's first row.
        num_images: Rows of each prompt; row k has the seed `seed + k`.
        batch_size: Pictures made at once.
        model_name: Name for the footer and the metadata; `None` leaves it out.
        show_attention: Whether to add a column after each guided one that shows where the
            pictures were blurred. A stronger colour means more of the guided steps. Only for
            guidances that blur.
        on_progress: As in `generate`.

    Returns:
        The grid and its pictures.

    Raises:
        ValueError: An argument is outside its range; raised before any work.
    """
    prompts = check_prompts(prompts)
    scales = check_scales(sag_scales)
    settings = settings or GenerationSettings()
    if show_attention and not any(isinstance(part, Blurring) for part in pipeline.guidance.parts):
        raise ValueError(
            f"show_attention shows where pictures were blurred: {pipeline.guidance.method} blurs"
            " none"
        )
    run: dict[str, Any] = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
    others: dict[str, Any] = {"record_attention": show_attention, "on_progress": on_progress}
    columns = [
        list(generate(pipeline, prompts, of_scale, model_name=model_name, **run, **others))
        for of_scale in (replace(settings, sag_scale=scale) for scale in scales)
    ]
    record = shared_record([picture.record for column in columns for picture in column])
    lines = [guidance_line(record["guidance"], pipeline.guidance.method)]
    footer = _footer(record, lines)
    record |= {"prompts": prompts, "sag_scales": scales, "show_attention": show_attention, **run}
    headings, pictures = _drawn_columns(columns, scales, method_label(pipeline.guidance.method))
    rows = list(zip(*pictures, strict=True))
    labels = _row_labels(columns[0], num_images)
    grid = draw_grid(rows, labels, headings, footer)
    return Comparison(grid=grid, columns=columns, record=record, guidances=lines)


def compare_axes(
    pipeline: Any,
    rows: Axis,
    columns: Axis,
    settings: GenerationSettings | None = None,
    *,
    prompt: str = "",
    seed: int = 0,
    model_name: str | None = None,
    on_progress: Progress | None = None,
) -> Comparison:
    """Draw a grid of two settings against each other, with the cost below each picture.

    Args:
        pipeline: Its `guidance` is that of all pictures, unless an axis changes it.
        rows: The setting that differs by row.
        columns: The setting that differs by column.
        settings: Settings of all pictures, unless an axis changes them.
        prompt: Prompt of all pictures, unless an axis changes it.
        seed: Seed of all pictures, unless an axis changes it.
        model_name: Name for the footer and the metadata; `None` leaves it out.
        on_progress: As in `generate`.

    Returns:
        The grid and its pictures.

    Raises:
        ValueError: An argument is outside its range; raised before any work.
    """
    settings = settings or GenerationSettings()
    own = pipeline.guidance
    cells = cells_of(Cell(prompt=prompt, seed=seed, settings=settings, guidance=own), rows, columns)
    for steps in {cell.settings.num_inference_steps for row in cells for cell in row}:
        check_steps_of(pipeline.scheduler, steps)
    denoiser: Any = denoiser_of(pipeline)
    for cell in (cell for row in cells for cell in row if cell.settings.sag_scale != 0):
        for part in cell.guidance.parts:
            part.reads(denoiser)  # refuses layers that do not exist
    try:
        drawn = [[_draw(pipeline, cell, on_progress) for cell in row] for row in cells]
    finally:
        pipeline.guidance = own
    record, lines = _described(
        [[{**picture.record, "model": model_name} for picture, _ in row] for row in drawn],
        {"rows": rows, "columns": columns},
        prompt,
    )
    grid = draw_grid(
        [[picture.image for picture, _ in row] for row in drawn],
        rows.headings,
        columns.headings,
        _footer(record, lines),
        [[str(cost) for _, cost in row] for row in drawn],
    )
    turned = list(zip(*drawn, strict=True))
    return Comparison(
        grid=grid,
        columns=[[picture for picture, _ in column] for column in turned],
        record=record,
        guidances=lines,
        costs=[[cost for _, cost in column] for column in turned],
    )


def _draw(pipeline: Any, cell: Cell, on_progress: Progress | None) -> tuple[GeneratedImage, Cost]:
    pipeline.guidance = cell.guidance
    return generate_one(
        pipeline, cell.prompt, cell.settings, seed=cell.seed, on_progress=on_progress
    )


def _row_labels(pictures: Sequence[GeneratedImage], num_images: int) -> list[str]:
    if num_images == 1:
        return [picture.prompt for picture in pictures]
    return [f"{picture.prompt or EMPTY_PROMPT}, seed {picture.seed}" for picture in pictures]


def _drawn_columns(
    columns: Sequence[Sequence[GeneratedImage]], scales: Sequence[float], method: str
) -> tuple[list[str], list[list[Image.Image]]]:
    headings: list[str] = []
    drawn: list[list[Image.Image]] = []
    for scale, pictures in zip(scales, columns, strict=True):
        headings.append(f"{method} {scale:g}" if scale else f"without {method}")
        drawn.append([picture.image for picture in pictures])
        maps = [picture.attended for picture in pictures]
        if all(attended is not None for attended in maps):
            headings.append(f"blurred ({method} {scale:g})")
            drawn.append(
                [
                    overlay_attended(picture.image, attended)
                    for picture, attended in zip(pictures, maps, strict=True)
                    if attended is not None
                ]
            )
    return headings, drawn


def _described(
    records: Sequence[Sequence[Record]], axes: Mapping[str, Axis], prompt: str
) -> tuple[Record, list[str]]:
    """The record of a grid and the lines on its guidances, from the pictures' records by row."""
    by_side = {"rows": records, "columns": list(zip(*records, strict=True))}
    side_of = {axis.name: side for side, axis in axes.items()}
    shared = shared_record([each for row in records for each in row])
    shared["prompts"] = list(axes[side_of["prompt"]].values) if "prompt" in side_of else [prompt]
    layers = axes[side_of["layer"]].values if "layer" in side_of else ()
    default = list(layers).index(None) if None in layers else None

    if "guidance" in side_of:
        axis, groups = axes[side_of["guidance"]], by_side[side_of["guidance"]]
        shared.pop("guidance", None)
        shared["guidances"] = [
            None if value is None else shared_guidance(group)
            for value, group in zip(axis.values, groups, strict=True)
        ]
        lines = [
            guidance_line(guidance, heading, "" if default is None else _layers([group[default]]))
            for heading, guidance, group in zip(
                axis.headings, shared["guidances"], groups, strict=True
            )
            if guidance is not None
        ]
        return {**shared, **{side: str(axis) for side, axis in axes.items()}}, lines

    guidance = shared["guidance"]
    layer = "" if default is None else _layers(by_side[side_of["layer"]][default])
    if layer:  # the record says which layer that is
        known = axes[side_of["layer"]]
        explicit = replace(known, values=[layer if each is None else each for each in layers])
        axes = {**axes, side_of["layer"]: explicit}
    sides = {side: str(axis) for side, axis in axes.items()}
    return {**shared, **sides}, [guidance_line(guidance, guidance["method"], layer)]


def _layers(records: Sequence[Record]) -> str:
    return layers_of(shared_guidance(records))


def _footer(shared: Mapping[str, Any], guidances: Sequence[str]) -> str:
    """The settings that all pictures share, and a line on each guidance."""
    settings = shared["settings"]
    shown = {
        "model": shared["model"],
        "sampler": label_of(shared["scheduler"], shared["scheduler_config"]),
        "steps": settings.get("num_inference_steps"),
        "CFG": settings.get("guidance_scale"),
        "seed": shared.get("seed"),
    }
    items = [f"{label} {written(value)}" for label, value in shown.items() if value is not None]
    return "\n".join([BETWEEN.join(items), *guidances])
