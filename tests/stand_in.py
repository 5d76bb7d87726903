"""An artist that costs nothing, for tests of what happens around the drawing."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from self_attention_guidance.batch import Defaults, Drawing, Task
from self_attention_guidance.generate import GenerationSettings

DEFAULTS = Defaults(settings=GenerationSettings(num_inference_steps=5))


@dataclass
class StandIn:
    """Draws noise of a task's seed; some prompts do harm.

    Attributes:
        name: Its identity.
        most: Tasks that its memory has room for.
        seconds: What a batch takes.
        sizes: Of the batches that it was given.
        watches: Whether `held` is kept, which takes its time.
        held: How many drawings were in memory at each batch.
    """

    name: str = "stand-in"
    most: int = 1000
    seconds: float = 0.0
    sizes: list[int] = field(default_factory=list)
    watches: bool = False
    held: list[int] = field(default_factory=list)

    @property
    def identity(self) -> dict[str, str]:
        return {"name": self.name}

    def __call__(self) -> StandIn:
        return self

    def draw(self, tasks: Sequence[Task]) -> list[Drawing]:
        self.sizes.append(len(tasks))
        if self.watches:
            self.held.append(sum(type(found) is Drawing for found in gc.get_objects()))
        time.sleep(self.seconds)
        if len(tasks) > self.most:
            raise torch.OutOfMemoryError("no room")
        return [Drawing(picture(task.seed), "", {"model": self.name}) for task in map(_do, tasks)]


def picture(seed: int) -> Image.Image:
    """What the stand-in draws with a seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _do(task: Task) -> Task:
    """What a task's prompt says."""
    if task.prompt == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.prompt == "fail":
        raise FloatingPointError("the sample is not finite")
    if task.prompt == "huge":
        raise MemoryError
    if task.prompt.startswith("die once "):
        mark = Path(task.prompt.removeprefix("die once "))
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return task
