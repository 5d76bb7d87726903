"""Pipelines of diffusers with guidance in their call."""
