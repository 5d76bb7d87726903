"""Instead of diffusers' deprecated class: `python examples/drop_in.py [OUT.png]`.

The folder is the builtin model's; give the id of a Stable Diffusion model for larger pictures.
"""

import sys

import torch

from self_attention_guidance import StableDiffusionSAGPipeline
from self_attention_guidance.models.builtin import builtin_folder

pipe = StableDiffusionSAGPipeline.from_pretrained(str(builtin_folder("emoji")))
image = pipe(
    "fruit",
    sag_scale=3.0,  # 0.75 is usual for Stable Diffusion
    num_inference_steps=25,
    guidance_scale=3.0,
    generator=torch.Generator().manual_seed(4),
).images[0]
image.save(sys.argv[1] if len(sys.argv) > 1 else "drop_in.png")
