"""Hooks on a denoiser, and all knowledge of how diffusers calls it; no other package has it."""
