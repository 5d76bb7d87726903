"""Two methods at once: `python examples/two_guidances.py [OUT.png]`.

PAG shapes the picture in the first half of the steps, and SAG sharpens it afterwards. Their terms
are added where windows overlap.
"""

import sys

import torch

from self_attention_guidance import (
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    attach,
    builtin_model,
)

pipe = builtin_model("emoji")
shape = PerturbedAttentionGuidance(2.0, stop=0.5)
detail = SelfAttentionGuidance(2.0, blur_sigma=3.0, start=0.3, stop=0.65)
seed = torch.Generator().manual_seed(4)
with attach(pipe, shape, detail) as handle:
    image = pipe("fruit", sag_scale=0, num_inference_steps=25, generator=seed).images[0]
    # A step that both guide has two.
    print(f"{handle.steps} predictions of weakened networks in 25 steps")
image.save(sys.argv[1] if len(sys.argv) > 1 else "two_guidances.png")
