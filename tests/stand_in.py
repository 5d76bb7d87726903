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

from self_attention_guidance.batch import Defaults, Task
from self_attention_guidance.generate import GeneratedImage, GenerationSettings, Record

DEFAULTS = Defaults(settings=GenerationSettings(num_inference_steps=5))


def record_of(task: Task, name: str) -> Record:
    """What a picture of no model at all was made with."""
    return {
        "version": "none",
        "model": name,
        "prompt": task.prompt,
        "seed": task.seed,
        "size": [8, 8],
        "settings": {"num_inference_steps": task.settings.num_inference_steps},
        "guidance": {"method": "sag", "scale": 0.0},
        "scheduler": "none",
        "scheduler_config": {},
        "dtype": "float32",
    }


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

    def draw(self, tasks: Sequence[Task]) -> list[GeneratedImage]:
        self.sizes.append(len(tasks))
        if self.watches:
            self.held.append(sum(type(found) is GeneratedImage for found in gc.get_objects()))
        time.sleep(self.seconds)
        if len(tasks) > self.most:
            raise torch.OutOfMemoryError("no room")
        return [
            GeneratedImage(image=picture(task.seed), index=index, record=record_of(task, self.name))
            for index, task in enumerate(map(_do, tasks))
        ]


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
