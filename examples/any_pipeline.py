"""Guidance on a pipeline of diffusers' own: `python examples/any_pipeline.py [OUT.png]`.

Here it is image to image of the builtin model; `pipe` may be any that docs/support.md lists, such
as `AutoPipelineForImage2Image.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")`.
"""

import sys

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

from self_attention_guidance import SelfAttentionGuidance, builtin_model

emoji = builtin_model("emoji")
pipe = StableDiffusionImg2ImgPipeline.from_pipe(emoji)
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)

seed = torch.Generator().manual_seed(1)
drawn = emoji("red heart", num_inference_steps=25, generator=seed).images[0]
with SelfAttentionGuidance(3.0, blur_sigma=3.0).attach(pipe) as handle:
    image = pipe("green apple", image=drawn, strength=0.7, generator=seed).images[0]
    print(f"{handle.steps} second passes; the last one blurred {handle.mask.float().mean():.0%}")
image.save(sys.argv[1] if len(sys.argv) > 1 else "any_pipeline.png")
