"""Loaders of the paper's original checkpoints, and small models that ship with the package."""
