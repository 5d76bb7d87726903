"""Models: the paper's original checkpoints, and the small ones that ship with the package."""
