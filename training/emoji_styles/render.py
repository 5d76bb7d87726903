"""Draw every picture once: 64x64 with alpha, all in one file.

    python render.py FOLDER FILE.npz

Run by `train.py` in an environment of its own: nothing else needs CairoSVG.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import cairosvg
import numpy as np
import sources
from PIL import Image

SIZE = 64
# Many drawings touch the edge of their canvas. The margin shows the background all round.
MARGIN = 3


def draw(document: str) -> Image.Image:
    """An SVG document as a 64x64 RGBA picture, drawn at twice the size and averaged down."""
    inner = SIZE - 2 * MARGIN
    encoded = cairosvg.svg2png(document.encode(), output_width=2 * inner, output_height=2 * inner)
    large = Image.open(io.BytesIO(encoded)).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(large.resize((inner, inner), Image.Resampling.BOX), (MARGIN, MARGIN))
    return canvas


def main() -> None:
    """Write the pictures, (pictures, 64, 64, 4) uint8, and beside them what they show."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    documents = {package: sources.svg(folder, package) for package in sources.STYLES}
    drawn: list[np.ndarray] = []
    index: list[dict[str, object]] = []
    for thing in sources.things(folder):
        styles: list[str] = []
        for style, drawing in thing.drawings.items():
            try:
                picture = np.array(draw(documents[drawing.package][drawing.icon]))
            except MemoryError:
                # What Cairo says of some degenerate transformations.
                print(f"left out, Cairo cannot draw it: {thing.label}, {style}", flush=True)
                continue
            # Transparent pixels keep no colour: the file is smaller by it.
            picture[picture[..., 3] == 0] = 0
            drawn.append(picture)
            styles.append(style)
        index.append(
            {
                "label": thing.label,
                "keywords": thing.keywords,
                "group": thing.group,
                "styles": styles,
            }
        )
    print(f"{len(drawn)} pictures of {len(index)} things", flush=True)
    partial = out.with_suffix(".partial.npz")
    np.savez_compressed(partial, rgba=np.stack(drawn), index=json.dumps(index))
    partial.replace(out)


if __name__ == "__main__":
    main()
