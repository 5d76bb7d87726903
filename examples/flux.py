"""Guidance for Flux: `python examples/flux.py [OUT.png [MODEL [SIZE]]]`.

MODEL is a hub id or a folder. If there is a GPU, weights move there only when they are needed.
The fast preset adds a second pass at a sixth of the steps.
"""

import sys

import torch
from diffusers import FluxPipeline

from self_attention_guidance import SelfAttentionGuidance

out = sys.argv[1] if len(sys.argv) > 1 else "flux.png"
model = sys.argv[2] if len(sys.argv) > 2 else "black-forest-labs/FLUX.1-dev"
size = int(sys.argv[3]) if len(sys.argv) > 3 else 1024
has_gpu = torch.cuda.is_available()

pipe = FluxPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if has_gpu else torch.float32)
if has_gpu:
    pipe.enable_model_cpu_offload()
seed = torch.Generator().manual_seed(0)
with SelfAttentionGuidance.fast(0.75).attach(pipe) as handle:
    settings = {"height": size, "width": size, "num_inference_steps": 28, "generator": seed}
    image = pipe("a red apple on a table", **settings).images[0]
print(f"{handle.steps} second passes")
image.save(out)
