"""bfloat16 on CPUs that have no instructions for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

PRODUCTS = frozenset(
    {
        torch.ops.aten.convolution.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


class Float32Products(TorchDispatchMode):
    """Computes products of bfloat16 numbers in float32, and rounds the results.

    That is what instructions for bfloat16 do, which sum in float32; results differ by the order of
    the sums. Without such instructions torch's own way takes twenty times as long.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return tree_map_only(Tensor, Tensor.bfloat16, func(*args, **kwargs))


@contextmanager
def autocast() -> Iterator[None]:
    """Networks run in bfloat16: half the time of float32 where a CPU has instructions for it."""
    is_slow = torch.backends.cpu.get_cpu_capability() == "AVX2"
    products = Float32Products() if is_slow else nullcontext()
    with torch.autocast("cpu", dtype=torch.bfloat16), products:
        yield
