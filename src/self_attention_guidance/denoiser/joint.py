"""One pass for the network and the weakened one: the weakened rows join the batch of the first.

A weakened pass of one picture takes more time than one more row of the first pass would: each pass
reads all weights, and a GPU has little to do for one row. So the rows of the weakened network join
the first pass where its first weakened block begins. From there on, the batch has further rows, for
which alone the layers are weakened. What comes before is computed once, as in `prefix`.

Only for one picture: more rows in a batch gain little and need more memory. Only in diffusers'
`UNet2DConditionModel`, whose forward does nothing to its states between its blocks except when it
gets the residuals of a ControlNet or an adapter.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.modules.module as _everywhere
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..checks import GuidanceError
from .attention import why_in_slices
from .call import Call
from .caller import is_running
from .outputs import with_first
from .prefix import part_of
from .safety import recomputes

# Where the classes of layers are that keep the rows of a batch apart.
_KNOWN_LAYERS = ("torch.nn.", "diffusers.", "peft.")

_KNOWN_WEIGHTS = {Tensor, nn.Parameter, type(None)}

_RESIDUALS = (
    "mid_block_additional_residual",
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
)

# One row for each row of the batch, or none; in any other shape, rows and heads might be mixed up.
_ROWS = ("encoder_hidden_states", "attention_mask", "encoder_attention_mask")

_counts: WeakKeyDictionary[nn.Module, list[list[int]]] = WeakKeyDictionary()


@contextmanager
def counting_joined(network: nn.Module, rows: list[int]) -> Generator[None]:
    """Append to `rows`, inside the `with` statement, the rows that join passes of a network."""
    _counts.setdefault(network, []).append(rows)
    try:
        yield
    finally:
        _counts[network] = [each for each in _counts[network] if each is not rows]


class JointPass:
    """The first pass of a call, which the rows of the weakened network join.

    It divides its output itself, so that guidance can be removed while it runs.

    Attributes:
        count: Number of the rows that join.
        weak_output: The output of the weakened network, once the pass has ended.
        error: The reason why the network could not be weakened, if so.
    """

    weak_output: Tensor

    def __init__(
        self, network: nn.Module, parts: Sequence[nn.Module], batch: int, rows: slice
    ) -> None:
        """Let copies of `rows` of a batch join it where the first of `parts` begins."""
        self.count, self.error = len(range(batch)[rows]), None
        self._network, self._parts, self._batch, self._rows = network, parts, batch, rows
        self._thread: threading.Thread | None = threading.current_thread()
        self._undo = ExitStack()

    def __deepcopy__(self, memo: object) -> JointPass:
        """Return one that does nothing: after Ctrl-C, a copied network may still have its hooks."""
        copy = JointPass(nn.Identity(), (), -1, slice(0))
        copy._thread = None
        return copy

    def begin(self, weakening: AbstractContextManager[object]) -> object:
        """Weaken the network for the rows that will join; return what `weakening` yields."""
        found = self._undo.enter_context(weakening)
        network = self._network
        hooks = [
            network.register_forward_pre_hook(self._before_next, prepend=True),
            network.register_forward_hook(self._after, prepend=True),
        ]
        before: Any = self._before
        hooks += [part.register_forward_pre_hook(before, with_kwargs=True) for part in self._parts]
        for hook in hooks:
            self._undo.callback(hook.remove)
        return found

    def end(self) -> None:
        """Restore the network."""
        try:
            self._undo.close()
        except GuidanceError as error:
            self.error = error

    def end_if_over(self) -> None:
        """Restore the network, unless the pass goes on; after Ctrl-C, nothing else does."""
        if self._thread is not None and not is_running(self._network, self._thread):
            self.end()

    @property
    def _is_own(self) -> bool:
        return threading.current_thread() is self._thread

    def _before_next(self, *_: object) -> None:
        if self._is_own:  # the next call of the network begins, so the pass was interrupted
            self.end()
        else:
            self.end_if_over()

    def _before(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self._is_own:
            return None
        return tree_map(self._joined, args), tree_map(self._joined, kwargs)

    def _joined(self, argument: Any) -> Any:
        is_short = isinstance(argument, Tensor) and argument.shape[:1] == (self._batch,)
        return torch.cat([argument, argument[self._rows]]) if is_short else argument

    def _after(self, network: nn.Module, args: object, output: Any) -> Any:
        if not self._is_own:
            return None
        self.end()
        for rows in _counts.get(network, ()):
            rows.append(self.count)
        self.weak_output = output[0][self._batch :]
        return with_first(output, output[0][: self._batch])


def joint_pass(
    denoiser: nn.Module, call: Call, rows: slice, weak: Sequence[str]
) -> JointPass | None:
    """Return the joint pass of a call, or `None` if the weakened network needs its own pass.

    Args:
        denoiser: The network.
        call: The call, whose pass has not begun.
        rows: The rows that a guidance compares.
        weak: Dotted paths of the layers or blocks that it weakens.
    """
    batch, network = len(call.sample), cast("Any", denoiser)
    if len(range(batch)[rows]) != 1 or not _is_alone(network) or not _is_usual(call):
        return None
    middle = [] if network.mid_block is None else [network.mid_block]
    parts = [*network.down_blocks, *middle, *network.up_blocks]
    weakened = [part_of(network, path) for path in weak]
    if not weakened or any(part not in parts for part in weakened):
        return None
    return JointPass(network, parts[min(map(parts.index, weakened)) :], batch, rows)


def _is_alone(network: Any) -> bool:
    """Whether nothing but diffusers' own code sees the rows between the network's blocks."""
    forward = type(network).forward
    name = f"{forward.__module__.partition('.')[0]}.{forward.__qualname__}"
    if name != "diffusers.UNet2DConditionModel.forward" or "forward" in vars(network):
        return False
    # Guidance itself has a hook on each side of the network, and may count its rows.
    before = {_package(hook) for hook in network._forward_pre_hooks.values()}
    has_hooks = len(network._forward_hooks) > 1 or before != {_package(_is_alone)}
    has_hooks |= bool(_everywhere._global_forward_hooks or _everywhere._global_forward_pre_hooks)
    if has_hooks or network._compiled_call_impl is not None or recomputes(network):
        return False
    modules = itertools.islice(network.modules(), 1, None)
    return why_in_slices() is None and all(map(_keeps_rows_apart, modules))


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", None)).partition(".")[0]


def _keeps_rows_apart(module: nn.Module) -> bool:
    """Whether a module has no hooks, its class's own `forward`, and a known processor if any."""
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
    is_own = "forward" not in vars(module) and module._compiled_call_impl is None
    processor = vars(module).get("processor", module._modules.get("processor"))
    # Other kinds of tensors may scale a batch by its largest value.
    is_own &= {type(each) for each in module._parameters.values()} <= _KNOWN_WEIGHTS
    is_known = f"{type(module).__module__}.".startswith(_KNOWN_LAYERS)
    return is_own and is_known and not has_hooks and (processor is None or _is_usual_one(processor))


def _is_usual_one(processor: Any) -> bool:
    """Whether a processor is diffusers' own, with an axis of rows."""
    cls = type(processor)
    is_its_own = cls.__call__.__module__ == cls.__module__
    return is_its_own and cls in (AttnProcessor2_0, FusedAttnProcessor2_0)


def _is_usual(call: Call) -> bool:
    """Whether all that the blocks get has one row for each row of the batch, or none."""
    given = call.arguments
    is_text = isinstance(given.get("encoder_hidden_states"), Tensor)
    found = [given[name] for name in _ROWS if given.get(name) is not None]
    has_rows = is_text and all(len(each) == len(call.sample) for each in found)
    has_prompts = "image_embeds" in (given.get("added_cond_kwargs") or {})  # then a tuple
    leaves: list[Any] = tree_leaves(given.get("cross_attention_kwargs"))
    has_others = any(isinstance(leaf, Tensor) for leaf in leaves)
    has_residuals = any(given.get(name) is not None for name in _RESIDUALS)
    return has_rows and not (has_prompts or has_others or has_residuals)
