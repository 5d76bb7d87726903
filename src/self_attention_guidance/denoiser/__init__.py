"""The one seam: hooks on a denoiser, and all that is known of how diffusers calls it."""
