"""A labelled grid of pictures, with labels beside the rows and headings over the columns."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow's own font has little more than ASCII; these are common on desktops and servers.
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")
EMPTY_PROMPT = "(empty prompt)"
BETWEEN = "  ·  "
"""The text between the settings of a footer, where its lines are broken first."""
_PAPER = (255, 255, 255)
_INK = (28, 30, 36)
_FAINT_INK = (120, 124, 134)
_LINE = (222, 224, 230)
_ATTENDED = (226, 0, 116)
_ATTENDED_OPACITY = 0.62
_SMALLEST_CELL = 192  # pixels; smaller pictures are enlarged to at least this
_TILE_GAP = 4  # pixels


@dataclass
class _Layout:
    """Sizes in pixels, all derived from those of the cells."""

    cell: tuple[int, int]
    headings: Sequence[str]
    labels: Sequence[str]
    footer: str = ""
    has_captions: bool = False

    @property
    def font_size(self) -> int:
        return max(14, min(30, self.cell[0] // 12))

    @cached_property
    def font(self) -> Font:
        return _font_for("".join([*self.headings, *self.labels]), self.font_size)

    @property
    def gap(self) -> int:
        return max(8, self.cell[0] // 20)

    @property
    def margin(self) -> int:
        return 2 * self.gap

    @cached_property
    def wrapped_labels(self) -> list[str]:
        most = max(1, int(self.cell[1] // (self.font_size * 1.35)))
        width = max(120, int(self.cell[0] * 0.8))
        labels = [label.strip() or EMPTY_PROMPT for label in self.labels]
        return ["\n".join(wrap(label, width, self.font, most)) for label in labels]

    @cached_property
    def label_width(self) -> int:
        lines = [line for label in self.wrapped_labels for line in label.split("\n")]
        return max(int(self.font.getlength(line)) + 1 for line in lines)

    @cached_property
    def small_font(self) -> Font:
        return ImageFont.load_default(max(12, int(self.font_size * 0.8)))

    @property
    def caption_height(self) -> int:
        return int(self.font_size * 1.3) if self.has_captions else 0

    @cached_property
    def wrapped_headings(self) -> list[str]:
        return ["\n".join(wrap(each, self.cell[0], self.font, most=3)) for each in self.headings]

    @property
    def heading_height(self) -> int:
        lines = 1 + max(heading.count("\n") for heading in self.wrapped_headings)
        return int(self.font_size * (0.55 + 1.35 * lines))

    @cached_property
    def footer_lines(self) -> list[str]:
        width = self.size[0] - 2 * self.margin
        lines = self.footer.split("\n")
        return [each for line in lines for each in _wrap_settings(line, width, self.small_font)]

    @property
    def footer_height(self) -> int:
        return int(self.font_size * (1.1 + 1.1 * max(1, len(self.footer_lines))))

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a cell; row -1 is for headings, column -1 for labels."""
        left = self.margin + self.label_width + self.gap + column * (self.cell[0] + self.gap)
        top = (
            self.margin
            + self.heading_height
            + row * (self.cell[1] + self.caption_height + self.gap)
        )
        return left, top

    @property
    def size(self) -> tuple[int, int]:
        right, bottom = self.corner(len(self.labels), len(self.headings))
        return right - self.gap + self.margin, bottom


def draw_grid(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    headings: Sequence[str],
    footer: str = "",
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Draw a labelled grid of equally large pictures.

    Args:
        rows: The pictures, row by row; pictures under 192 pixels are enlarged.
        labels: One text for each row, wrapped beside it.
        headings: One text for each column, wrapped above it.
        footer: Lines below the grid, wrapped where they are too long.
        captions: A short line below each picture, row by row; empty for none.

    Returns:
        The grid, RGB.

    Raises:
        ValueError: The counts of pictures, labels and headings do not match, or there are none.
    """
    if not rows or len(labels) != len(rows) or any(len(row) != len(headings) for row in rows):
        raise ValueError(
            f"rows ({len(rows)}), labels ({len(labels)}) and headings ({len(headings)}) must"
            " match each other and the pictures"
        )
    factor = _enlargement(rows[0][0].size)
    cell = (rows[0][0].width * factor, rows[0][0].height * factor)
    layout = _Layout(cell, headings, labels, footer, bool(captions))
    width, height = layout.size
    grid = Image.new("RGB", (width, height + layout.footer_height), _PAPER)
    draw = ImageDraw.Draw(grid)
    _draw_headings(draw, layout)
    for number, row in enumerate(rows):
        _draw_label(draw, layout, number)
        for column, picture in enumerate(row):
            _draw_picture(grid, layout, (number, column), picture)
    for number, row in enumerate(captions):
        for column, caption in enumerate(row):
            _draw_caption(draw, layout, (number, column), caption)
    _draw_footer(draw, layout)
    return grid


def draw_tiles(pictures: Sequence[Image.Image]) -> Image.Image:
    """Draw equally large pictures as tiles, in about as many rows as columns.

    Args:
        pictures: At least one; pictures under 192 pixels are enlarged.

    Returns:
        The tiles, RGB.

    Raises:
        ValueError: There is no picture.
    """
    if not pictures:
        raise ValueError("pictures=[] must hold at least one picture")
    factor = _enlargement(pictures[0].size)
    width, height = (side * factor for side in pictures[0].size)
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    pitch = (width + _TILE_GAP, height + _TILE_GAP)
    size = (columns * pitch[0] + _TILE_GAP, rows * pitch[1] + _TILE_GAP)
    tiles = Image.new("RGB", size, _PAPER)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        corner = (_TILE_GAP + column * pitch[0], _TILE_GAP + row * pitch[1])
        enlarged = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        tiles.paste(enlarged, corner)
    return tiles


def overlay_attended(image: Image.Image, attended: NDArray[np.float64]) -> Image.Image:
    """Draw the attended region over a picture in a translucent colour.

    Args:
        image: The picture.
        attended: How strongly to colour, on a grid of any size, (height, width), 0 to 1.

    Returns:
        A picture of at least 192 pixels, RGB: the picture in grey, coloured where attended.
    """
    factor = _enlargement(image.size)
    size = (image.width * factor, image.height * factor)
    picture = image.convert("L").resize(size, Image.Resampling.LANCZOS).convert("RGB")
    opacity = np.clip(attended, 0, 1) * _ATTENDED_OPACITY * 255
    # Sharp edges, because the mask consists of whole positions.
    mask = Image.fromarray(opacity.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    picture.paste(Image.new("RGB", size, _ATTENDED), mask=mask)
    return picture


def _enlargement(size: tuple[int, int]) -> int:
    return max(1, -(-_SMALLEST_CELL // min(size)))


def _font_for(text: str, size: int) -> Font:
    """Pillow's own font, or for text that is not ASCII the first wider one installed."""
    for name in () if text.isascii() else _WIDE_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _draw_headings(draw: ImageDraw.ImageDraw, layout: _Layout) -> None:
    for column, heading in enumerate(layout.wrapped_headings):
        left, top = layout.corner(0, column)
        centre = (left + layout.cell[0] // 2, top - layout.heading_height // 2)
        draw.multiline_text(
            centre,
            heading,
            fill=_INK,
            font=layout.font,
            anchor="mm",
            align="center",
            spacing=layout.font_size * 0.35,
        )


def _draw_label(draw: ImageDraw.ImageDraw, layout: _Layout, row: int) -> None:
    label = layout.wrapped_labels[row]
    draw.multiline_text(
        (layout.margin + layout.label_width, layout.corner(row, 0)[1] + layout.cell[1] // 2),
        label,
        fill=_FAINT_INK if label == EMPTY_PROMPT else _INK,
        font=layout.font,
        anchor="rm",
        align="right",
        spacing=layout.font_size * 0.35,
    )


def _draw_picture(
    grid: Image.Image, layout: _Layout, cell: tuple[int, int], picture: Image.Image
) -> None:
    left, top = layout.corner(*cell)
    picture = picture.convert("RGB").resize(layout.cell, Image.Resampling.LANCZOS)
    grid.paste(picture, (left, top))
    box = (left - 1, top - 1, left + layout.cell[0], top + layout.cell[1])
    ImageDraw.Draw(grid).rectangle(box, outline=_LINE)


def _draw_caption(
    draw: ImageDraw.ImageDraw, layout: _Layout, cell: tuple[int, int], caption: str
) -> None:
    left, top = layout.corner(*cell)
    below = top + layout.cell[1] + layout.caption_height // 2
    centre = (left + layout.cell[0] // 2, below)
    draw.text(centre, caption, fill=_FAINT_INK, font=layout.small_font, anchor="mm")


def _draw_footer(draw: ImageDraw.ImageDraw, layout: _Layout) -> None:
    for number, line in enumerate(layout.footer_lines):
        middle = layout.size[1] + int(layout.font_size * 1.1 * (number + 1))
        place = (layout.margin, middle)
        draw.text(place, line, fill=_FAINT_INK, font=layout.small_font, anchor="lm")


def wrap(text: str, width: float, font: Font, most: int) -> list[str]:
    """Break a text into lines.

    Args:
        text: Any text; a word that is too wide is broken as well, between settings if there are
            several.
        width: Width of a line, in pixels.
        font: Font of the text.
        most: Largest number of lines; an ellipsis ends the last one if there is more text.

    Returns:
        The lines; none for an empty text.
    """
    lines: list[str] = []
    words = (part for word in text.split() for part in _fitting(word, width, font))
    for word in words:
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "…"]


def _wrap_settings(text: str, width: float, font: Font) -> list[str]:
    """Break a line of a footer, but not within a setting that fits into a line."""
    between = BETWEEN if BETWEEN in text else " "
    items = text.split(BETWEEN) if BETWEEN in text else re.split("(?<=,) ", text)
    lines: list[str] = []
    for item in items:
        joined = f"{lines[-1]}{between}{item}" if lines else item
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines += wrap(item, width, font, most=len(item) + 1)
    return lines


# Words are broken behind these: between settings, around their values, and last within a path.
_BREAKS = (",", ":=+", "._")


def _fitting(word: str, width: float, font: Font, breaks: Sequence[str] = _BREAKS) -> list[str]:
    """Break a word into parts that fit into lines."""
    if font.getlength(word) <= width or len(word) < 2:
        return [word]
    # At the end there is nothing left but letters.
    pattern = f"[^{breaks[0]}]*[{breaks[0]}]|[^{breaks[0]}]+" if breaks else "(?s)."
    found: list[str] = []
    for part in re.findall(pattern, word):
        if found and font.getlength(found[-1] + part) <= width:
            found[-1] += part
        else:
            found += _fitting(part, width, font, breaks[1:])
    return found
