"""Schedulers by their usual names."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import check_steps

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class _Sampler(NamedTuple):
    label: str
    class_name: str
    overrides: Mapping[str, Any] = {}


_SAMPLERS = (
    _Sampler("DDIM", "DDIMScheduler"),
    _Sampler("DDPM", "DDPMScheduler"),
    _Sampler("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
    _Sampler("PNDM", "PNDMScheduler", {"skip_prk_steps": False}),
    _Sampler("LMS", "LMSDiscreteScheduler"),
    _Sampler("Euler", "EulerDiscreteScheduler"),
    _Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    _Sampler("Heun", "HeunDiscreteScheduler"),
    _Sampler("DPM2", "KDPM2DiscreteScheduler"),
    _Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
    _Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    _Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    _Sampler("DPM++ 2S", "DPMSolverSinglestepScheduler"),
    _Sampler("DPM++ SDE", "DPMSolverSDEScheduler"),
    _Sampler("DEIS", "DEISMultistepScheduler"),
    _Sampler("UniPC", "UniPCMultistepScheduler"),
    _Sampler("EDM Euler", "EDMEulerScheduler"),
)

# A trailing word chooses the spacing of the noise levels.
_SPACINGS = {
    "karras": ("Karras", "use_karras_sigmas"),
    "exponential": ("Exponential", "use_exponential_sigmas"),
    "beta": ("Beta", "use_beta_sigmas"),
}


def scheduler_names() -> tuple[str, ...]:
    """The short names of `make_scheduler`, in lower case.

    " karras", " exponential" or " beta" may follow a name whose scheduler has that spacing of
    noise levels.
    """
    return tuple(sampler.label.lower() for sampler in _SAMPLERS)


def check_scheduler_name(name: str) -> None:
    """Refuse a name that `make_scheduler` does not know, without any heavy import.

    Args:
        name: As in `make_scheduler`.

    Raises:
        ValueError: The name is unknown; the message lists the nearest ones.
    """
    if not name.endswith("Scheduler"):  # classes of diffusers are looked up there
        _find(name)


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """Make a scheduler from its name and another scheduler's configuration.

    If the configuration limits the predicted picture to a range (`thresholding`) and the scheduler
    can't do that, steps begin below the last timestep (`timestep_spacing="leading"`).

    Args:
        name: A short name from `scheduler_names()` ("ddim", "euler-a", "dpm++ 2m karras";
            case, spaces, hyphens and underscores do not matter), or the name of a diffusers
            class ("UniPCMultistepScheduler"), which keeps every choice of the configuration.
        config: Configuration with the training schedule, such as `pipe.scheduler.config`.

    Returns:
        A diffusers scheduler.

    Raises:
        ValueError: The name is unknown, the scheduler does not have the spacing, or it needs a
            library that is not installed.
    """
    try:
        return _made(name, config)
    except ImportError as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"scheduler={name!r} is not possible: {line}") from error


def _made(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    import diffusers

    if name in _class_names() or _is_class(name, diffusers):
        return getattr(diffusers, name).from_config(config)
    sampler, spacing = _find(name)
    if "shift" in config and "beta_schedule" not in config:
        return _flow_scheduler(name, sampler, spacing, config)
    scheduler_class = getattr(diffusers, sampler.class_name)
    known = inspect.signature(scheduler_class.__init__).parameters
    flags = {flag: word == spacing for word, (_, flag) in _SPACINGS.items() if flag in known}
    if spacing and _SPACINGS[spacing][1] not in known:
        raise ValueError(f"scheduler={name!r}: {sampler.label} has no {spacing} spacing")
    # Where the noise holds nothing of the picture, unbounded predictions explode.
    is_unbounded = bool(config.get("thresholding")) and "thresholding" not in known
    early = {"timestep_spacing": "leading"} if is_unbounded and "timestep_spacing" in known else {}
    return scheduler_class.from_config(config, **early, **flags, **sampler.overrides)


def _flow_scheduler(
    name: str, sampler: _Sampler, spacing: str, config: Mapping[str, Any]
) -> SchedulerMixin:
    """A scheduler for a network that was trained by flow matching."""
    import diffusers

    if sampler.label == "Euler" and not spacing:
        euler: Any = diffusers.FlowMatchEulerDiscreteScheduler
        return euler.from_config(config)
    chosen = getattr(diffusers, sampler.class_name)
    known = inspect.signature(chosen.__init__).parameters
    # The shift of some models depends on the picture's size, which these schedulers do not get.
    if "use_flow_sigmas" not in known or spacing or config.get("use_dynamic_shifting"):
        raise ValueError(
            f"scheduler={name!r} can't sample this model, which was trained by flow matching: use "
            "'euler', or the model's own"
        )
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    overrides = {**flow, "flow_shift": config["shift"], **sampler.overrides}
    steps = config.get("num_train_timesteps", 1000)
    return chosen(num_train_timesteps=steps, **overrides)


def make_pixel_scheduler(
    name: str, config: Mapping[str, Any], learned_variance: bool
) -> SchedulerMixin:
    """Like `make_scheduler`, with the step spacing of ADM's and IDDPM's own samplers.

    DDIM counts from timestep 0 in whole strides. DDPM uses a learned variance and then spreads
    the steps evenly from the first timestep to the last. The others keep the configuration.

    Args:
        name: As in `make_scheduler`.
        config: Configuration with the training schedule.
        learned_variance: Whether the network predicts its variance, too.

    Returns:
        A diffusers scheduler.

    Raises:
        ValueError: The name is unknown, or the scheduler does not have the spacing.
    """
    chosen: Any = make_scheduler(name, config)
    class_name = type(chosen).__name__
    if class_name == "DDIMScheduler":
        # With set_alpha_to_one, the step that ends at 0 ends at the clean sample.
        own = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
    elif class_name == "DDPMScheduler" and learned_variance:
        own = {"timestep_spacing": "linspace", "variance_type": "learned_range"}
    else:
        own = {}
    kept = dict(chosen.config)
    if class_name != "DDPMScheduler":
        kept.pop("variance_type", None)  # for others, the pipeline cuts off a learned one
    return type(chosen).from_config(kept, **own)


def check_steps_of(scheduler: Any, steps: int) -> None:
    """Refuse a number of steps with which a scheduler fails, or never leaves the noise.

    Args:
        scheduler: A diffusers scheduler; it is not changed.
        steps: Number of sampling steps.

    Raises:
        ValueError: There are too many steps, or too few; the message has the limit.
    """
    check_steps(steps)
    if _has_steps(scheduler, steps):
        return
    # Beside the number of timesteps in training, limits are small: PNDM's first steps need four.
    most = min(steps - 1, int(scheduler.config.get("num_train_timesteps", steps)))
    fewer = next((n for n in range(most, max(0, most - 3), -1) if _has_steps(scheduler, n)), None)
    more = next((n for n in range(steps + 1, steps + 9) if _has_steps(scheduler, n)), None)
    rule = "is not possible"
    if fewer is not None or more is not None:
        rule = f"must be at most {fewer}" if fewer is not None else f"must be at least {more}"
    raise ValueError(f"num_inference_steps={steps} {rule} with {type(scheduler).__name__}")


def _has_steps(scheduler: Any, steps: int) -> bool:
    """Whether a scheduler has timesteps for a number of steps that lead from noise to a picture."""
    config = scheduler.config
    if config.get("use_dynamic_shifting"):  # its timesteps also depend on the picture's size
        return True
    trial: Any = type(scheduler).from_config(config)
    try:
        trial.set_timesteps(steps)
    except Exception:  # schedulers for other models raise all kinds of errors
        return False
    times = [float(each) for each in trial.timesteps]
    if not hasattr(trial, "sigmas") and max(times) >= config.get("num_train_timesteps", math.inf):
        return False  # it looks its noise level up in a table
    # With more steps than it was trained with, rounding makes all timesteps the last one.
    return steps == 1 or max(times) > min(times)


def check_eta(eta: float, scheduler: str) -> None:
    """Refuse a share of fresh noise for a scheduler that has none.

    Args:
        eta: The share; 0 is none.
        scheduler: As in `make_scheduler`: a name that it knows.

    Raises:
        ValueError: The share is not 0, and the scheduler is not DDIM.
    """
    name = scheduler if scheduler in _class_names() else _find(scheduler)[0].class_name
    if eta and name != "DDIMScheduler":
        raise ValueError(f"eta={eta} has no effect with {name}: it is a setting of DDIM")


def scheduler_label(scheduler: Any) -> str:
    """The name of a scheduler in metadata.

    Args:
        scheduler: A diffusers scheduler.

    Returns:
        For example "DDIM" or "DPM++ 2M Karras"; the name of the class if there is no shorter one.
    """
    return label_of(type(scheduler).__name__, scheduler.config)


def label_of(class_name: str, config: Mapping[str, Any]) -> str:
    """Like `scheduler_label`, without the scheduler itself.

    Args:
        class_name: Class of the scheduler.
        config: Its configuration.
    """
    for sampler in _SAMPLERS:
        chosen = all(config.get(key) == value for key, value in sampler.overrides.items())
        if sampler.class_name == class_name and chosen:
            spacing = [label for label, flag in _SPACINGS.values() if config.get(flag)]
            return " ".join([sampler.label, *spacing])
    return class_name


def _class_names() -> set[str]:
    return {sampler.class_name for sampler in _SAMPLERS}


def _is_class(name: str, diffusers: Any) -> bool:
    found = getattr(diffusers, name, None)
    return isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)


def _find(name: str) -> tuple[_Sampler, str]:
    words = name.lower().replace("dpmpp", "dpm++").replace("-", " ").replace("_", " ").split()
    spacing = words.pop() if words and words[-1] in _SPACINGS else ""
    wanted = " ".join(words)
    for sampler in _SAMPLERS:
        if sampler.label.lower() == wanted:
            return sampler, spacing
    raise ValueError(f"scheduler={name!r} is unknown: {_advice(wanted, name)}")


def _advice(wanted: str, name: str) -> str:
    near = difflib.get_close_matches(wanted, scheduler_names(), n=3, cutoff=0.5)
    near += difflib.get_close_matches(name, sorted(_class_names()), n=2, cutoff=0.7)
    if near:
        return "the nearest names are " + ", ".join(near)
    return "the names are " + ", ".join(scheduler_names())
