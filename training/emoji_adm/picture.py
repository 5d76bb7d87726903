"""Draw the picture of the documentation: the first seeds, without and with guidance.

    python training/emoji_adm/picture.py docs/images/emoji-adm.png

The settings of guidance are those that the model recommends, which benchmarks/quality measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sampling import load, sample, to_images
from self_attention_guidance import SelfAttentionGuidance
from self_attention_guidance.generate import draw_grid, method_label
from self_attention_guidance.models.builtin import recommended_settings
from shipping import SHIPPED

SEEDS = range(10)
UNGUIDED = SelfAttentionGuidance(0.0)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the PNG file")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="default: the shipped model")
    options = parser.parse_args()
    pipe, recommended = load(options.model), recommended_settings(options.model)
    guidance, steps = recommended.make_guidance(), recommended.num_inference_steps
    assert steps is not None
    drawn = [sample(pipe, each, SEEDS, steps) for each in (UNGUIDED, guidance)]
    grid = draw_grid(
        [to_images(pixels) for pixels in drawn],
        labels=["unguided", f"{method_label(guidance.method)}, scale {guidance.scale:g}"],
        headings=[f"seed {seed}" for seed in SEEDS],
        footer=f"emoji-adm, 32x32, no class given, {steps} steps of DDPM; "
        "the first seeds, not picked",
    )
    grid.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
