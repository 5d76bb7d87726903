"""The paper's main case, samples without any condition: `python examples/paper_adm.py [OUT.png]`.

For ADM itself: `sag convert adm 256x256_diffusion_uncond.pt imagenet256`, then
`ADMPipeline.from_pretrained("imagenet256")` with `SelfAttentionGuidance(0.5, blur_sigma=9,
blur_kernel_size=31)` and 250 steps.
"""

import sys

import torch
from diffusers.utils import make_image_grid

from self_attention_guidance import SelfAttentionGuidance, builtin_model

pipe = builtin_model("emoji-adm")
pipe.guidance = SelfAttentionGuidance(2.0, blur_sigma=3.0, start=0.1, every=4)
rows = []
for scale in (0.0, 2.0):  # without and with guidance, of the same seeds
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    rows += pipe(batch_size=4, num_inference_steps=40, sag_scale=scale, generator=seeds).images
image = make_image_grid(rows, rows=2, cols=4)
image.save(sys.argv[1] if len(sys.argv) > 1 else "paper_adm.png")
