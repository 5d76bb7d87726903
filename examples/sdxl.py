"""Guidance for SDXL: `python examples/sdxl.py [OUT.png [MODEL]]`.

MODEL is a hub id or a folder. The default one needs a GPU with 8 GB or more.
"""

import sys

import torch
from diffusers import StableDiffusionXLPipeline

from self_attention_guidance import SelfAttentionGuidance

out = sys.argv[1] if len(sys.argv) > 1 else "sdxl.png"
model = sys.argv[2] if len(sys.argv) > 2 else "stabilityai/stable-diffusion-xl-base-1.0"
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)

pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
seed = torch.Generator().manual_seed(0)
with SelfAttentionGuidance(0.75).attach(pipe) as handle:
    image = pipe("a red apple on a table", num_inference_steps=30, generator=seed).images[0]
print(f"{handle.steps} second passes")
image.save(out)
