"""Devices and floating-point types by name. Only finding one imports torch, not checking a name."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""torch's names of the floating-point types, by the names that users know."""

_DEVICE = re.compile(r"(\w+)(:\d+)?")
_DEVICE_TYPES = frozenset(
    (
        *("auto", "cpu", "cuda", "hip", "mps", "xpu", "hpu", "xla", "mtia", "maia", "ipu", "ve"),
        *("vulkan", "meta", "privateuseone"),
    )
)


def check_dtype_name(dtype: str) -> None:
    """Refuse the name of a dtype that `find_dtype` does not know.

    Args:
        dtype: As in `find_dtype`.

    Raises:
        ValueError: Unknown name.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of auto, {', '.join(DTYPES)}")


def check_device_name(device: str) -> None:
    """Refuse the name of a device that torch can't know. What this machine has is not checked.

    Args:
        device: As in `find_device`.

    Raises:
        ValueError: Unknown name.
    """
    found = _DEVICE.fullmatch(device)
    # A package for other hardware may give torch more types.
    is_known = found and (found[1] in _DEVICE_TYPES or entry_points(group="torch.backends"))
    if not is_known or (found and found[1] == "cpu" and found[2] not in (None, ":0")):
        raise ValueError(f"device={device!r} is unknown: use auto, cpu, cuda, cuda:1, mps, ...")


def find_device(device: str) -> torch.device:
    """Find the device with a name.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", ..., or "auto" for the best one on this machine.

    Returns:
        The device.

    Raises:
        ValueError: There is no such device on this machine.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.ones(1, device=found).item()  # "meta" has tensors, but no values in them
    except Exception as error:  # backends that are not there raise all kinds of errors
        raise ValueError(
            f"device={device!r} is not available here: use one of {', '.join(_devices())}"
        ) from error
    return found


def find_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Find the floating-point type with a name.

    Args:
        dtype: "float32", "float16", "bfloat16" (or "fp32", "fp16", "bf16"), or "auto" for
            float32 on a CPU and float16 elsewhere.
        device: The device of the model.

    Returns:
        The type.

    Raises:
        ValueError: The name is unknown.
    """
    import torch

    check_dtype_name(dtype)
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return getattr(torch, DTYPES[dtype])


def _devices() -> list[str]:
    import torch

    devices = ["auto", "cpu"]
    devices += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])
