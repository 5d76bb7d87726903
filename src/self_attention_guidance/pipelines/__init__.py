"""Pipelines of diffusers with guidance as an argument of their call."""
