"""Calls of a denoiser: which step they are at, what their batch holds, how to cut it."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .families import BatchLayout, Family, uncompiled

# Tensors whose first dimension counts something else than pictures.
_NOT_BATCHES = ("ip_adapter_masks", "image_rotary_emb")


@dataclass(frozen=True)
class Target:
    """A denoiser, and who knows its scheduler and batch layout.

    Attributes:
        denoiser: The module that is called at every step, possibly compiled.
        family: Its row of the table.
        own_scheduler: The scheduler of a loop of the user's own; `None` asks the pipeline.
        pipeline: The diffusers pipeline that calls the denoiser, if any.
        own_layout: The batch layout, if the user gave one; `None` asks the pipeline.
    """

    denoiser: nn.Module
    family: Family
    own_scheduler: Any
    pipeline: Any
    own_layout: BatchLayout | None

    @property
    def scheduler(self) -> Any:
        """The scheduler of the present step."""
        return self.pipeline.scheduler if self.own_scheduler is None else self.own_scheduler

    @property
    def told_cfg(self) -> bool | None:
        """Whether the pipeline says that classifier-free guidance is on; `None` if it is silent."""
        return getattr(self.pipeline, "do_classifier_free_guidance", None)

    @property
    def is_guessing(self) -> bool:
        """Whether nobody tells the batch layout, so that it follows from the samples."""
        is_told = self.own_layout is not None or self.family.tells_layout
        return not (is_told or hasattr(type(self.pipeline), "do_classifier_free_guidance"))

    def scheduler_timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The timestep of a call as the scheduler counts.

        Networks that were trained with rescaled timesteps say in their config by how much what
        they receive differs from that; for others, the table says what their pipelines do.
        """
        timestep = self._arguments(args, kwargs)["timestep"]
        config: Any = uncompiled(self.denoiser).config
        scale: float = config.get("timestep_scale", self.family.timestep_scale)
        return timestep if scale == 1 else torch.as_tensor(timestep).cpu().double() / scale

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], branch: str) -> Call:
        """A call of the denoiser as guidance sees it.

        Args:
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            branch: Whose rows are guided under classifier-free guidance, "uncond" or "cond".

        Raises:
            ValueError: The batch does not fit its layout.
        """
        name = self.family.sample_argument
        arguments = self._arguments(args, kwargs)
        layout = self._layout(arguments)
        rows = _guided_rows(arguments[name], layout, branch)
        cut = functools.partial(_rows_of, batch=len(arguments[name]), rows=rows)
        timestep = self.scheduler_timestep(args, kwargs)
        return Call(cut(args), cut(kwargs), arguments, name, timestep, layout, rows)

    def refuse_change(self, before: BatchLayout, call: Call) -> None:
        """Refuse a step whose samples tell that the layout of the step before was wrong.

        Args:
            before: The layout of the step before.
            call: Of a step that is not the first one of its run.

        Raises:
            ValueError: Pictures of one seed were taken for the halves of a batch, or halves of a
                batch for pictures.
        """
        if call.layout != "single" or before == "cond_call_first":
            return
        if self.is_guessing and before != "single":
            raise ValueError(
                "the halves of the batch held the same samples, but no longer do: without "
                "classifier-free guidance, attach with batch_layout='single'"
            )
        is_told = self.own_layout is None and not (self.family.tells_layout or self.is_guessing)
        if not is_told or before != "single" or not _are_halves_equal(call.sample):
            return
        texts = call.arguments.get("encoder_hidden_states")
        if texts is not None and not _are_halves_equal(texts):
            raise ValueError(
                "the batch holds the same samples with two conditions, as under classifier-free "
                f"guidance, but {type(self.pipeline).__name__} says that this is off: attach to "
                "the pipeline that runs"
            )

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        names = _parameters(type(uncompiled(self.denoiser)))
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _layout(self, arguments: dict[str, Any]) -> BatchLayout:
        if self.own_layout is not None:
            return self.own_layout
        _refuse_other_guidance(self.pipeline, arguments)
        if self.family.null_label is not None:
            return self._layout_by_labels(arguments, self.family.null_label)
        if self.family.tells_layout:
            return self.family.cfg_layout
        if self.is_guessing:
            return self._layout_by_samples(arguments[self.family.sample_argument])
        if not hasattr(self.pipeline, "do_classifier_free_guidance"):
            raise RuntimeError(
                f"{type(self.pipeline).__name__} is not running, so its batch layout is unknown; "
                "to call the denoiser in a loop of your own, attach to it with scheduler= and "
                "batch_layout="
            )
        return self.family.cfg_layout if self.pipeline.do_classifier_free_guidance else "single"

    def _layout_by_samples(self, sample: Tensor) -> BatchLayout:
        """Two halves of the same samples are those of CFG."""
        if _are_halves_equal(sample):
            if len(self.scheduler.timesteps) == 1:  # a second step would tell them apart
                raise ValueError(
                    f"{type(self.pipeline).__name__} does not tell whether the samples that repeat "
                    f"are those of classifier-free guidance: attach with batch_layout='single' or "
                    f"{self.family.cfg_layout!r}"
                )
            return self.family.cfg_layout
        config: Any = uncompiled(self.denoiser).config
        denoised = sample[:, : config.get("out_channels", sample.shape[1])]
        if any(torch.equal(*pair) for pair in itertools.combinations(denoised, 2)):
            raise ValueError(
                f"{type(self.pipeline).__name__} does not tell what its batch holds: samples "
                "repeat, but not as a conditional and an unconditional half; if they are "
                "pictures of one seed, attach with batch_layout='single'"
            )
        return "single"

    def _layout_by_labels(self, arguments: dict[str, Any], null_label: str) -> BatchLayout:
        """Two halves of the same samples, one without a class, are those of CFG."""
        labels = arguments.get("class_labels")
        if labels is None or len(labels) % 2:
            return "single"
        config: Any = uncompiled(self.denoiser).config
        halves = (labels == config[null_label]).chunk(2)
        cond, uncond = halves if self.family.cfg_layout == "cond_first" else halves[::-1]
        same = _are_halves_equal(arguments[self.family.sample_argument])
        is_pair = uncond.all() and not cond.any() and same
        return self.family.cfg_layout if is_pair else "single"


@dataclass(frozen=True)
class Call:
    """One call of the denoiser, and the part of the batch that is guided.

    Attributes:
        args: The guided rows of the positional arguments. As those of the keyword arguments, they
            were cut before the pass: diffusers' U-Net empties a list that it is given.
        kwargs: The guided rows of the keyword arguments.
        arguments: All arguments, by name, whole.
        sample_argument: Name of the argument that holds x_t.
        timestep: As the scheduler counts.
        layout: What the batch holds.
        rows: The part of the batch whose attention and second pass are used.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: dict[str, Any]
    sample_argument: str
    timestep: Any
    layout: BatchLayout
    rows: slice

    @property
    def sample(self) -> Tensor:
        """x_t, of the whole batch."""
        return self.arguments[self.sample_argument]

    def with_sample(self, sample: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The guided rows of every argument, with `sample` in the place of x_t."""
        if self.args:
            return (sample, *self.args[1:]), self.kwargs
        return self.args, {**self.kwargs, self.sample_argument: sample}


@functools.cache
def _parameters(denoiser: type[nn.Module]) -> list[str]:
    """Names of the arguments of a denoiser's call, in order."""
    return list(inspect.signature(denoiser.forward).parameters)[1:]


def _refuse_other_guidance(pipeline: Any, arguments: dict[str, Any]) -> None:
    """Refuse guidance of the pipeline that adds rows or calls which are not those of CFG."""
    if getattr(pipeline, "do_perturbed_attention_guidance", False):
        raise ValueError(
            "perturbed-attention guidance is on, and its rows of the batch are not supported; "
            "set pag_scale to 0"
        )
    if arguments.get("skip_layers") is not None:
        raise ValueError(
            "skip-layer guidance is on, and its call is not supported; leave out "
            "skip_guidance_layers"
        )


def _are_halves_equal(rows: Tensor) -> bool:
    """Whether a batch holds the same rows twice, one after the other."""
    if len(rows) % 2:
        return False
    return torch.allclose(*rows.chunk(2), rtol=0, atol=0, equal_nan=True)


def _guided_rows(sample: Tensor, layout: BatchLayout, branch: str) -> slice:
    """The rows of a batch whose attention and second pass are used."""
    batch = len(sample)
    if layout in ("single", "cond_call_first"):
        return slice(0, batch)
    if batch % 2:
        raise ValueError(
            f"a batch of {batch} can't hold a conditional and an unconditional half "
            f"(batch_layout={layout!r})"
        )
    # The term of one half is right for the other only if both predict from the same x_t.
    if not _are_halves_equal(sample):
        raise ValueError(
            "the batch has no conditional and unconditional half: its halves hold different "
            f"samples (batch_layout={layout!r})"
        )
    first = layout == f"{branch}_first"
    return slice(0, batch // 2) if first else slice(batch // 2, batch)


def _rows_of(argument: Any, batch: int, rows: slice) -> Any:
    """`argument` with every tensor of `batch` rows cut to `rows`, inside containers too."""
    if isinstance(argument, Tensor):
        is_batch = argument.ndim > 0 and len(argument) == batch
        return argument[rows] if is_batch else argument
    if isinstance(argument, Mapping):
        entries = cast("Mapping[str, Any]", argument)
        return {
            name: entry if name in _NOT_BATCHES else _rows_of(entry, batch, rows)
            for name, entry in entries.items()
        }
    if isinstance(argument, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", argument)
        return type(items)(_rows_of(item, batch, rows) for item in items)
    return argument
