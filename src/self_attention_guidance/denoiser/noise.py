"""Noise levels, and what a network's output says about the clean sample.

In its own input space, every supported denoiser gets x_t = alpha_t * x0 + sigma_t * eps, and its
output u determines the clean sample linearly: x0 = from_input * x_t + from_output * u. Only this
file knows how schedulers store their noise level.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol, overload

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")

# Offset of a midpoint's noise level from the step index, in schedulers that evaluate midpoints.
_MIDPOINT_OFFSETS = {"KDPM2DiscreteScheduler": 0, "KDPM2AncestralDiscreteScheduler": -1}

# Tables that schedulers may keep on the device, and that guidance needs on the CPU.
_TABLES = ("timesteps", "sigmas", "sigmas_interpol", "alphas_cumprod")

# The tables that are set for a run or changed by callbacks. Schedulers move the other one.
_SET_FOR_A_RUN = ("timesteps", "sigmas", "sigmas_interpol")

Level = float | Tensor
"""A number if all pictures share one noise level, else a float32 or float64 tensor of shape
(batch, 1, 1, 1). Python's numbers need no float64 on the device, and no transfer to it."""


class Scheduler(Protocol):
    """A diffusers scheduler with `sigmas`, indexed by `step_index`, or with `alphas_cumprod`."""

    config: Any
    timesteps: Tensor


@dataclass(frozen=True)
class Prediction:
    """Linear relations between a network's input, its output and the clean sample at one step.

    `correction` is the weight of the change of x0 in the guidance term, (1 - from_input * alpha) /
    from_output. `noise_from_output` is -alpha * from_output / sigma.
    """

    alpha: Level
    sigma: Level
    from_input: Level
    from_output: Level
    correction: Level
    noise_from_output: Level

    def rows(self, rows: slice) -> Prediction:
        levels = {name: level for name, level in vars(self).items() if isinstance(level, Tensor)}
        if not levels:
            return self
        return dataclasses.replace(self, **{name: level[rows] for name, level in levels.items()})

    def negated(self) -> Prediction:
        """Return the relations of a network that returns -u instead of u."""
        by_output = ("from_output", "correction", "noise_from_output")
        return dataclasses.replace(self, **{name: -getattr(self, name) for name in by_output})

    def x0(self, x_t: Tensor, output: Tensor) -> Tensor:
        """Predict the clean sample, without clipping; shapes (batch, channels, height, width)."""
        return self.from_input * x_t + self.from_output * output

    def renoise(self, x_t: Tensor, x0: Tensor, x0_degraded: Tensor) -> Tensor:
        """alpha_t * x0_degraded + sigma_t * eps; bit-equal to `x_t` where x0 is unchanged."""
        return x_t + self.alpha * (x0_degraded - x0)

    def term(self, output: Tensor, weak_output: Tensor, x0_change: Tensor | None = None) -> Tensor:
        """Compute the guidance term eps - eps' (arXiv 2210.00939, Eq. 16), in units of output u.

        `x0_change` is what was added to the clean sample for the weakened pass, if anything was.
        """
        change = output - weak_output
        return change if x0_change is None else change + self.correction * x0_change

    def noise(self, term: Tensor) -> Tensor | None:
        """Convert a term to units of the noise, to hold it; `None` where alpha may be 0.

        With a noise level for each picture, a search for 0 would wait for the device.
        """
        may_be_zero = isinstance(self.noise_from_output, Tensor) or self.noise_from_output == 0
        return None if may_be_zero else term * self.noise_from_output

    def held(self, noise: Tensor) -> Tensor:
        """Convert a held term from `noise` back to units of the output, at this noise level."""
        return noise / self.noise_from_output


def is_elsewhere(value: object) -> bool:
    """Whether reading a tensor waits for a device; subclasses of `Tensor` count, too."""
    return isinstance(value, Tensor) and (value.device.type != "cpu" or type(value) is not Tensor)


class _Source:
    """A table of a scheduler, with its version counter at the time of reading."""

    def __init__(self, table: Any) -> None:
        self._table, self._version = table, self._changes(table)

    def is_still(self, table: Any) -> bool:
        """Whether a table is this one, and unchanged."""
        return table is self._table and self._version == self._changes(table)

    @staticmethod
    def _changes(table: Any) -> int:
        counts = isinstance(table, Tensor) and not table.is_inference()
        return table._version if counts else 0


class Schedule:
    """A scheduler whose timesteps are set; its tables are copied as numbers, in one transfer."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.timesteps: Any = getattr(scheduler, "timesteps", None)
        self._sources = {n: _Source(getattr(scheduler, n, None)) for n in _SET_FOR_A_RUN}
        self.has_sigmas = hasattr(scheduler, "sigmas")
        tables = {
            name: table.flatten()
            for name in _TABLES
            if isinstance(table := getattr(scheduler, name, None), Tensor)
        }
        remote = [table for table in tables.values() if is_elsewhere(table)]
        self.has_waited = bool(remote)
        numbers = iter(torch.cat(remote).cpu().tolist() if remote else ())
        self.tables: dict[str, list[float]] = {
            name: [*itertools.islice(numbers, len(table))]
            if is_elsewhere(table)
            else table.tolist()
            for name, table in tables.items()
        }

    def __len__(self) -> int:
        return len(self.tables.get("timesteps", ()))

    @property
    def is_current(self) -> bool:
        """Whether the scheduler still has the tables that were read."""
        found = self._sources.items()
        return all(source.is_still(getattr(self.scheduler, n, None)) for n, source in found)

    @property
    def is_set(self) -> bool:
        """Whether the scheduler says for how many steps it was set."""
        return getattr(self.scheduler, "num_inference_steps", None) is not None

    def check_set(self) -> None:
        """Refuse a scheduler without timesteps, or whose sigmas are in the order of training."""
        sigmas = self.tables.get("sigmas", ()) if self.has_sigmas and not self.is_set else ()
        if not len(self) or (sigmas and sigmas[0] < sigmas[-1]):
            name = type(self.scheduler).__name__
            raise ValueError(
                f"{name} is not set to a number of steps: call its set_timesteps, or attach with "
                "the scheduler that runs"
            )

    def equal_to(self, step: int) -> list[int]:
        """Return the steps with the same timestep as this step, itself included."""
        timesteps = self.tables["timesteps"]
        return [i for i, timestep in enumerate(timesteps) if timestep == timesteps[step]]

    def own_step(self) -> int | None:
        """Return the step at which the scheduler says it is; `None` if it does not say."""
        index = getattr(self.scheduler, "step_index", None)
        index = getattr(self.scheduler, "begin_index", None) if index is None else index
        return None if index is None else int(index)

    def step_at(self, timestep: float) -> int:
        """Return the step at which the scheduler says it is, or else the step of the timestep."""
        step = self.own_step()
        if step is not None:
            return step
        timesteps = self.tables["timesteps"]
        step = min(range(len(self)), key=lambda i: abs(timesteps[i] - timestep))
        # A scheduler with sigmas that starts midway takes the second of two equal timesteps.
        equal = self.equal_to(step) if self.has_sigmas else [step]
        return equal[min(1, len(equal) - 1)]

    def is_at(self, timestep: float) -> bool:
        step = self.step_at(timestep)
        return 0 <= step < len(self) and abs(self.tables["timesteps"][step] - timestep) < 1

    def place_of(self, timestep: Any) -> int | None:
        """Return the index of a view into the tensor of timesteps; `None` if it is not a view."""
        own: Tensor = self.timesteps
        is_single = isinstance(timestep, Tensor) and not any(timestep.stride())
        if not is_single or timestep.dtype != own.dtype or own.stride() != (1,):
            return None
        place = int(timestep.storage_offset()) - int(own.storage_offset())
        memories = (tensor.untyped_storage().data_ptr() for tensor in (timestep, own))
        return place if len(set(memories)) == 1 and 0 <= place < len(own) else None

    def prediction(self, step: int, timesteps: list[float], like: Tensor) -> Prediction:
        """Return the linear relations for a call of the denoiser at a step.

        The call's `timesteps` (see `Call.timesteps`) are used if there are no sigmas. Levels that
        differ between pictures have the device and the precision of `like`, at least float32.
        """
        kind = _prediction_type(self.scheduler)
        if self.has_sigmas:
            sigma = self._sigma(step)
            if kind == "flow_prediction":
                # x = (1 - sigma) * x0 + sigma * eps, u = eps - x0 (arXiv 2209.03003)
                return Prediction(1 - sigma, sigma, 1.0, -sigma, -1.0, 1 - sigma)
            if (sigma_data := setting(self.scheduler, "sigma_data")) is not None:
                return _preconditioned(sigma, kind, float(sigma_data))
            alpha = 1 / math.sqrt(1 + sigma**2)
            sigma = sigma * alpha
        else:
            squares = self.tables["alphas_cumprod"]
            alpha, sigma = _levels([squares[round(each)] for each in timesteps], like)
        if kind == "epsilon":
            weights = (_ratio(1.0, alpha), -_ratio(sigma, alpha), 0.0, 1.0)
        elif kind == "v_prediction":
            weights = (alpha, -sigma, -sigma, alpha)
        else:
            weights = (0.0, 1.0, 1.0, -_ratio(alpha, sigma))
        return Prediction(alpha, sigma, *weights)

    def noise(self, step: int) -> float:
        """Return noise over signal at a step, sigma_t / alpha_t; infinite if there is no signal."""
        if not self.has_sigmas:
            square = self.tables["alphas_cumprod"][round(self.tables["timesteps"][step])]
            return math.sqrt(_ratio(1 - square, square))
        sigma = self._sigma(step)
        return _ratio(sigma, 1 - sigma) if _is_flow_matching(self.scheduler) else sigma

    def limited(self, x0: Tensor) -> Tensor:
        """Threshold or clip x0 as the scheduler does; thresholding takes precedence."""
        # UniPC thresholds only if it predicts x0.
        if self._applies("thresholding") and setting(self.scheduler, "predict_x0", True):
            return self.scheduler._threshold_sample(x0)
        if not self._applies("clip_sample"):
            return x0
        clip = float(setting(self.scheduler, "clip_sample_range", 1.0))
        return x0.clamp(-clip, clip)

    def _applies(self, name: str) -> bool:
        return bool(setting(self.scheduler, name)) and _is_read(name, type(self.scheduler))

    def _sigma(self, step: int) -> float:
        """Return the sigma of x0 + sigma * eps, or of (1 - sigma) * x0 + sigma * eps."""
        if not getattr(self.scheduler, "state_in_first_order", True):
            if hasattr(self.scheduler, "mid_point_sigma"):
                return float(self.scheduler.mid_point_sigma)
            for name in _class_names(type(self.scheduler)):
                if name in _MIDPOINT_OFFSETS:
                    return self.tables["sigmas_interpol"][step + _MIDPOINT_OFFSETS[name]]
        return self.tables["sigmas"][step]


def _levels(squares: list[float], like: Tensor) -> tuple[Level, Level]:
    """Compute alpha and sigma from the squares of alpha."""
    if len(squares) == 1:
        return math.sqrt(squares[0]), math.sqrt(1 - squares[0])
    square = torch.tensor(squares, dtype=torch.float64).view(-1, 1, 1, 1)
    dtype = torch.promote_types(like.dtype, torch.float32)
    alpha, sigma = (level.sqrt().to(dtype).to(like.device) for level in (square, 1 - square))
    return alpha, sigma


def check_scheduler(scheduler: Any) -> None:
    """Refuse schedulers with an unknown noise level or prediction type."""
    kind, is_flow = _prediction_type(scheduler), _is_flow_matching(scheduler)
    name, problem = type(scheduler).__name__, ""
    if not (hasattr(scheduler, "sigmas") or hasattr(scheduler, "alphas_cumprod")):
        problem = "has neither sigmas nor alphas_cumprod: not supported"
    elif any("Inverse" in each for each in _class_names(type(scheduler))):
        problem = "is not supported: its samples have another noise level than its timesteps say"
    elif kind not in PREDICTION_TYPES:
        problem = f"has prediction_type={kind!r}; it must be one of {', '.join(PREDICTION_TYPES)}"
    elif is_flow != (kind == "flow_prediction"):
        needs = "flow_prediction needs flow sigmas, and flow sigmas need flow_prediction"
        problem = f"has prediction_type={kind!r} with use_flow_sigmas={is_flow}; {needs}"
    elif setting(scheduler, "invert_sigmas"):
        problem = "has invert_sigmas=True: not supported"
    elif setting(scheduler, "sigma_data") is not None and "beta_schedule" in scheduler.config:
        has = f"has beta_schedule={scheduler.config['beta_schedule']!r} of another kind of model"
        problem = f"{has}, but needs EDM preconditioning; use EulerDiscreteScheduler for this model"
    if problem:
        raise ValueError(f"scheduler {name} {problem}")


def setting(scheduler: Any, name: str, default: Any = None) -> Any:
    """Return a setting if the scheduler's class has it; configs may hold those of other classes."""
    config = getattr(scheduler, "config", {})
    return config.get(name, default) if name in _settings(type(scheduler)) else default


@functools.cache
def _is_read(name: str, scheduler: type) -> bool:
    """Whether a scheduler's code reads a setting: TCD's and CogVideoX's never clip."""
    members = (each for base in scheduler.__mro__ for each in vars(base).values())
    codes = (inspect.unwrap(each).__code__ for each in members if inspect.isfunction(each))
    return any(name in (*code.co_names, *code.co_consts) for code in codes)


@functools.cache
def _settings(scheduler: type) -> frozenset[str]:
    # A subclass may pass on settings that its own signature does not name.
    own = (vars(base)["__init__"] for base in scheduler.__mro__ if "__init__" in vars(base))
    return frozenset(name for each in own for name in inspect.signature(each).parameters)


@functools.cache
def _class_names(scheduler: type) -> tuple[str, ...]:
    """Names of a scheduler's class and of the classes that it is derived from."""
    return tuple(base.__name__ for base in scheduler.__mro__)


def _is_flow_matching(scheduler: Any) -> bool:
    # Schedulers made for flow matching have no setting for it.
    is_named_so = any(name.startswith("FlowMatch") for name in _class_names(type(scheduler)))
    return is_named_so or bool(setting(scheduler, "use_flow_sigmas"))


def _prediction_type(scheduler: Any) -> Any:
    default = "flow_prediction" if _is_flow_matching(scheduler) else None
    return setting(scheduler, "prediction_type", default)


def _preconditioned(sigma: float, kind: str, sigma_data: float) -> Prediction:
    """Return the relations of EDM's preconditioning (Karras et al., arXiv 2206.00364, Table 1)."""
    c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
    c_skip = (sigma_data * c_in) ** 2
    c_out = sigma * sigma_data * c_in * (-1 if kind == "v_prediction" else 1)
    correction = _ratio(1 - c_skip, c_out)
    noise = -_ratio(c_out, sigma)
    return Prediction(c_in, sigma * c_in, c_skip / c_in, c_out, correction, noise)


@overload
def _ratio(a: float, b: float) -> float: ...
@overload
def _ratio(a: Level, b: Level) -> Level: ...
def _ratio(a: Level, b: Level) -> Level:
    """Divide; infinite where division of Python's numbers would raise an error."""
    return math.inf if not isinstance(b, Tensor) and b == 0 else a / b
