"""Lists of pictures of any length, on one machine or a Ray cluster; none is lost or drawn twice.

Example:
    ```python
    from self_attention_guidance.batch import BatchJob, Defaults, Model, PromptList
    from self_attention_guidance.batch.workers import Crew

    model = Model(name="emoji")
    defaults = Defaults(settings=model.settings())
    job = BatchJob(PromptList("prompts.jsonl"), "pictures", model, defaults)
    summary = job.run(Crew(workers=2))  # if it is killed, the same lines resume it
    ```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import exported

if TYPE_CHECKING:
    from .artists import Artist, Model
    from .job import BatchJob, Summary
    from .lists import PromptList
    from .manifest import Manifest
    from .samples import FinishedSamples, SampleJob
    from .storage import Storage
    from .tasks import COLUMNS, Defaults, Task

__all__ = [
    "Artist",
    "BatchJob",
    "COLUMNS",
    "Defaults",
    "FinishedSamples",
    "Manifest",
    "Model",
    "PromptList",
    "SampleJob",
    "Storage",
    "Summary",
    "Task",
]

# Importing torch takes seconds; a wrong list is reported without it.
__getattr__, __dir__ = exported(
    __name__,
    {
        ".artists": ("Artist", "Model"),
        ".job": ("BatchJob", "Summary"),
        ".lists": ("PromptList",),
        ".manifest": ("Manifest",),
        ".samples": ("FinishedSamples", "SampleJob"),
        ".storage": ("Storage",),
        ".tasks": ("COLUMNS", "Defaults", "Task"),
    },
)
