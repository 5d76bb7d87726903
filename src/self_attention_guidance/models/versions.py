"""Names that differ between versions of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the argument of `from_pretrained` that loads weights in a type.

    Args:
        dtype: The type.

    Returns:
        One argument: `dtype`, or `torch_dtype` before diffusers 0.40; newer versions warn of it.
    """
    import diffusers
    from packaging.version import Version

    has_dtype = Version(diffusers.__version__) >= Version("0.40.dev0")
    return {"dtype" if has_dtype else "torch_dtype": dtype}
