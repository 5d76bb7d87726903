"""Draw samples of some points of the study beside each other, the same seeds in each row.

    python benchmarks/quality/samples.py FILE.png adm/every/none adm/every/sag

The page of the study shows adm/every/none, adm/every/sag, adm/every/pag and adm/cheap/tpg.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from PIL import Image

import drawing
import results
from self_attention_guidance import attach
from tasks import TASKS, asked_with

COUNT = 12
# Behind those of the report, and the first ones there are: nothing was chosen.
SEEDS = range(600_000, 600_000 + COUNT)
ENLARGED = 3


def row(name: str) -> torch.Tensor:
    """Samples of a point side by side, (height, width, 3) uint8."""
    task = TASKS[name.split("/")[0]]
    found = results.read(name, task)
    if found is None:
        raise SystemExit(f"{name} was not measured: run study.py first")
    guidance = found.setting.guidance
    prompts = None
    if task.has_captions:
        pairs, backgrounds = asked_with(SEEDS, is_search=False)
        prompts = pairs.captions(backgrounds)
    pipe = drawing.pipeline(task.model)
    with torch.no_grad(), attach(pipe, *guidance) if guidance else nullcontext():
        pictures = drawing.run(task, found.setting, SEEDS, prompts)
    pixels = (pictures.float() * 255).round().clamp(0, 255).byte()
    return torch.cat(list(pixels), dim=2).permute(1, 2, 0)


def main() -> None:
    """Draw one row for each name."""
    file, *names = sys.argv[1:]
    sheet = Image.fromarray(torch.cat([row(name) for name in names]).numpy())
    size = (sheet.width * ENLARGED, sheet.height * ENLARGED)
    sheet.resize(size, Image.Resampling.NEAREST).save(file)


if __name__ == "__main__":
    main()
