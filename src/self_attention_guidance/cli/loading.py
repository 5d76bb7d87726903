"""The start of commands that draw: refuse wrong options, then load the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .options import DrawingOptions, PromptOptions, SamplingOptions
from .output import hide_loading_bars, note

if TYPE_CHECKING:
    from ..generate import LoadedPipeline
    from ..generate.loaded import Loaded


def check_sampling(
    options: SamplingOptions, num_images: int, count_name: str = "num_images"
) -> None:
    """Refuse wrong options before the heavy imports, which take seconds.

    Args:
        options: Options of a command that draws.
        num_images: Number of pictures, with consecutive seeds.
        count_name: Name of that number, for the message.

    Raises:
        ValueError: An option is outside its range.
    """
    options.guidance_arguments()
    check_drawing(options, num_images, count_name)


def check_drawing(options: DrawingOptions, num_images: int, count_name: str = "num_images") -> None:
    """Like `check_sampling`, for commands that choose the guidance themselves.

    Args:
        options: Options of the command.
        num_images: As in `check_sampling`.
        count_name: As in `check_sampling`.

    Raises:
        ValueError: An option is outside its range.
    """
    from ..checks import check_count, check_steps, seeds_of
    from ..generate import check_device_name, check_dtype_name, check_scheduler_name

    seeds_of(options.seed, num_images, count_name)
    check_count("batch_size", options.batch_size)
    if options.steps is not None:
        check_steps(options.steps)
    if options.scheduler is not None:
        check_scheduler_name(options.scheduler)
    check_device_name(options.device)
    check_dtype_name(options.dtype)


def check_prompting(
    options: PromptOptions, num_images: int, arguments: Mapping[str, Any] | None = None
) -> None:
    """Like `check_sampling`, for commands that draw prompts.

    Args:
        options: Options of the command.
        num_images: Number of pictures for each prompt.
        arguments: Arguments of `GenerationSettings`, if they are not those of the options alone.

    Raises:
        ValueError: An option is outside its range, or there is no such model.
    """
    from ..generate import GenerationSettings, check_start, find_model

    given = options.generation_arguments() if arguments is None else arguments
    chosen = {name: value for name, value in given.items() if value is not None}
    check_start(GenerationSettings(**chosen), options.max_size)
    for name in ("width", "height"):
        if (given.get(name) or 0) > options.max_size:
            raise ValueError(
                f"{name}={given[name]} must be at most {options.max_size} (--max-size)"
            )
    check_sampling(options, num_images)
    options.loading_arguments()
    find_model(options.model)


def load_pipeline_of(
    options: PromptOptions, record: Mapping[str, Any] | None = None
) -> LoadedPipeline:
    """Load the model of the options, with their scheduler and guidance.

    Args:
        options: Options of a command that draws prompts.
        record: The record of a picture, whose scheduler and guidance replace the model's.

    Raises:
        ValueError: The model cannot be loaded, or a setting does not suit it.
    """
    from ..generate import load_pipeline

    hide_loading_bars()
    loaded = load_pipeline(options.model, **options.loading_arguments())
    if record is not None:
        try:
            loaded.restore(record)
        except ValueError as error:
            raise ValueError(f"like={str(vars(options)['like'])!r}: {error}") from error
    guidance = options.guidance_arguments()
    is_off = options.generation_arguments().get("sag_scale") == 0
    note_fast_without_effect(loaded, options, is_off, record is not None)
    loaded.use(scheduler=options.scheduler, fast=options.fast, **guidance)
    return loaded


def note_fast_without_effect(
    loaded: Loaded[Any], options: SamplingOptions, is_off: bool, is_like: bool = False
) -> None:
    """Say why `--fast` changes nothing, if it was given and does not.

    Args:
        loaded: The model, before its guidance is set.
        options: Options of a command that draws.
        is_off: Whether an option turns guidance off.
        is_like: Whether the guidance is that of an earlier picture.
    """
    guidance = options.guidance_arguments()
    fast, usual = (loaded.guidance(is_fast, **guidance) for is_fast in (True, False))
    is_off = is_off or usual.scale == 0
    if not options.fast or (fast != usual and not is_off):
        return
    named = {name: guidance[name] for name in ("method",) if name in guidance}
    if "guidances" in guidance:
        named["guidances"] = [{"method": each["method"]} for each in guidance["guidances"]]
    if is_off:
        reason = "guidance is off"
    elif loaded.guidance(True, **named) != loaded.guidance(False, **named):
        reason = "other options decide all of the guidance"
    elif is_like:
        reason = "the picture was drawn with the fast preset already"
    else:
        reason = "what the model recommends is its fast preset already"
    note(f"--fast changes nothing: {reason}", options.quiet)
