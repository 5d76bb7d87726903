"""Guidance in a sampling loop of your own: `python examples/raw_loop.py [OUT.png]`.

The loop does not know of guidance. For another model, use `UNet2DModel.from_pretrained(...)` and
its scheduler instead of the builtin ones. Leave out `class_labels` if it has no classes.
"""

import sys

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import pt_to_pil

from self_attention_guidance import SelfAttentionGuidance, builtin_model

pipe = builtin_model("emoji-adm")
scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(25)
no_class = torch.tensor([pipe.config.null_label])
size = pipe.unet.config.sample_size
sample = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))

guidance = SelfAttentionGuidance(2.0, blur_sigma=3.0, start=0.1)  # earlier, all is noise
with guidance.attach(pipe.unet, scheduler=scheduler), torch.no_grad():
    for timestep in scheduler.timesteps:
        prediction = pipe.unet(sample, timestep, class_labels=no_class).sample
        sample = scheduler.step(prediction, timestep, sample).prev_sample

(image,) = pt_to_pil(sample)
image.save(sys.argv[1] if len(sys.argv) > 1 else "raw_loop.png")
