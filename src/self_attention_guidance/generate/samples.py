"""Many samples of a pixel-space model to one file that evaluators read.

Example:
    ```python
    from self_attention_guidance.generate import SampleRun, load_pixel_model

    loaded = load_pixel_model("./imagenet128")
    run = SampleRun(loaded.pipeline, "samples.npz", 50_000, loaded.settings(sag_scale=0.1))
    run.finish(batch_size=16)  # goes on where an earlier, killed run ended
    ```
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import check_count, seeds_of
from ..denoiser.noise import check_scheduler
from ..pipelines.adm import ADMPipeline
from .drawing import Progress
from .files import check_free, check_samples_path, grid_path, parts_folder, save_png
from .grid import draw_tiles
from .labels import choose_labels
from .metadata import RECORD_KEY, Record
from .npz import StreamedArray, write_npz
from .parts import Parts
from .pixel_drawing import draw_samples, to_image
from .record import describe_samples
from .sample_settings import SampleSettings
from .workers import Crew, Lost, distribute

_MOST_TILES = 64


@dataclass(frozen=True, kw_only=True)
class FinishedSamples:
    """What a finished run wrote.

    Attributes:
        path: The `.npz` file.
        grid: The PNG file that shows the first samples.
        count: Samples in the file.
        drawn: Samples that the last call drew; the others were there.
        seconds: How long the last call drew.
    """

    path: Path
    grid: Path
    count: int
    drawn: int
    seconds: float


@dataclass(frozen=True)
class _Batch:
    first: int
    end: int
    seeds: list[int]
    labels: list[int] | None


@dataclass
class _SampleWorker:
    """Draws batches; each worker's process has a copy with a pipeline of its own."""

    load: Callable[[], ADMPipeline]
    settings: SampleSettings
    batch_size: int
    on_progress: Progress | None = None
    pipeline: ADMPipeline | None = None

    def prepared(self) -> _SampleWorker:
        return replace(self, pipeline=self.load())

    def __call__(self, batch: _Batch) -> NDArray[np.uint8]:
        """The last batch is filled up: what a network computes depends on the batch's size."""
        assert self.pipeline is not None
        count = len(batch.seeds)
        more = self.batch_size - count
        seeds = batch.seeds + batch.seeds[-1:] * more
        labels = None if batch.labels is None else batch.labels + batch.labels[-1:] * more
        report, share = self.on_progress, count / self.batch_size
        pictures = draw_samples(
            self.pipeline,
            self.settings,
            seeds,
            labels,
            None if report is None else lambda done: report(done * share),
        )
        return pictures[:count]


class SampleRun:
    """Draws samples into a file; killed at any moment, the same run goes on where it was.

    Sample i has the seed `seed + i` and its own generator of random numbers on the CPU, so it
    depends neither on the batch size nor on the other samples, up to the rounding of the kernels.
    Finished batches wait in the folder `OUT.parts` until all are there.

    Attributes:
        drawn: How many of the samples an earlier run left.
        record: What decides how the samples look: see `describe_samples`.
    """

    def __init__(
        self,
        pipeline: ADMPipeline,
        out: str | Path,
        num_samples: int,
        settings: SampleSettings | None = None,
        *,
        seed: int = 0,
        overwrite: bool = False,
        model_name: str | None = None,
    ) -> None:
        """Looks at earlier files, and refuses what cannot be done; draws nothing.

        Args:
            pipeline: Its `guidance` and `scheduler` are part of the settings.
            out: A `.npz` file: `arr_0`, the samples, uint8, (samples, height, width, channels),
                and `arr_1`, their classes, int64, (samples,), if they have any; `read_record`
                reads its settings. A PNG file beside it shows the first 64.
            num_samples: How many.
            settings: What all samples share; `None` is the defaults.
            seed: Of the first sample.
            overwrite: Whether `out`, and what a run with other settings left, may be replaced.
            model_name: For the metadata; `None` leaves it out.

        Raises:
            ValueError: An argument is outside its range or does not fit the model, or an
                unfinished run with other settings is in the way.
            FileExistsError: `out` exists and `overwrite` is False.
        """
        self.pipeline: Any = pipeline
        self.out = check_samples_path(out, overwrite)
        self.num_samples = check_count("num_samples", num_samples)
        self.settings = settings or SampleSettings()
        self.seeds = seeds_of(seed, num_samples)
        self.model_name = model_name
        check_scheduler(pipeline.scheduler)
        self.labels = choose_labels(pipeline, self.settings, self.seeds)
        self.record = describe_samples(pipeline, self.settings, seed=seed)
        self.parts = Parts(parts_folder(self.out), self.record)
        difference = self.parts.difference()
        if difference is not None and not overwrite:
            raise ValueError(
                f"out: {str(self.parts.folder)!r} holds an unfinished run with {difference}: go on"
                " with its settings, choose another place, or begin anew with overwrite=True"
            )
        drawn = self.parts.drawn if difference is None else 0
        self.is_written = self.out.exists() and self.parts.is_finished(num_samples)
        self.drawn = num_samples if self.is_written else min(drawn, num_samples)
        if self.drawn < num_samples:
            check_free([self.out], overwrite)

    def finish(
        self,
        batch_size: int = 8,
        on_progress: Progress | None = None,
        crew: Crew | None = None,
        load: Callable[[], ADMPipeline] | None = None,
    ) -> FinishedSamples:
        """Draws what is missing and writes the files. Call it once.

        Args:
            batch_size: Samples drawn at once; it does not have to be that of the earlier run.
            on_progress: Called with the share of one sample's work that was done, summed over the
                batch, after each step, or with several workers after each batch: its arguments
                add up to the samples that were missing.
            crew: Who draws; `None` is this process.
            load: Makes the pipeline in the process of each of several workers; picklable.

        Returns:
            What was written.

        Raises:
            ValueError: An argument is outside its range or does not fit the model.
            FloatingPointError: A prediction is NaN or infinite.
            RuntimeError: A batch ended three workers.
        """
        check_count("batch_size", batch_size)
        crew = crew or Crew()
        if not crew.is_here and load is None:
            raise ValueError("load must be given for more than one worker")
        started = time.monotonic()
        missing = range(self.drawn, self.num_samples)
        if self.drawn == 0:
            self.parts.remove()  # what a run with other settings left
        worker = _SampleWorker(
            (lambda: self.pipeline) if crew.is_here or load is None else load,
            self.settings,
            batch_size,
            on_progress if crew.is_here else None,
        )
        self._draw(missing, worker, crew, None if crew.is_here else on_progress)
        self.drawn = self.num_samples
        seconds = time.monotonic() - started
        if not self.is_written:
            self._write_grid()
            self._write_samples()
            self.parts.mark_finished(self.num_samples)
        self.parts.remove()
        return FinishedSamples(
            path=self.out,
            grid=grid_path(self.out),
            count=self.num_samples,
            drawn=len(missing),
            seconds=seconds,
        )

    def _draw(
        self, missing: range, worker: _SampleWorker, crew: Crew, on_batch: Progress | None
    ) -> None:
        size = worker.batch_size
        batches = (self._batch(first, size) for first in missing[::size])
        for batch, pictures in distribute(batches, worker.prepared, crew):
            if isinstance(pictures, Lost):
                raise RuntimeError(f"samples {batch.first} to {batch.end - 1}: {pictures.reason}")
            self.parts.save(batch.first, pictures)
            if on_batch is not None:
                on_batch(len(pictures))

    def _batch(self, first: int, batch_size: int) -> _Batch:
        end = min(first + batch_size, self.num_samples)
        labels = None if self.labels is None else self.labels[first:end]
        return _Batch(first, end, self.seeds[first:end], labels)

    def _write_samples(self) -> None:
        size = next(self.parts.read(1)).shape[1:]
        pictures = self.parts.read(self.num_samples)
        arrays = {"arr_0": StreamedArray((self.num_samples, *size), "uint8", pictures)}
        if self.labels is not None:
            labels = np.array(self.labels, dtype=np.int64)
            arrays["arr_1"] = StreamedArray(labels.shape, "int64", [labels])
        text = np.array([json.dumps(self._whole_record())])
        arrays[RECORD_KEY] = StreamedArray(text.shape, text.dtype.str, [text])
        whole = self.parts.temporary_path(self.out.name)
        write_npz(whole, arrays)
        os.replace(whole, self.out)

    def _write_grid(self) -> None:
        first = self.parts.read(min(self.num_samples, _MOST_TILES))
        pictures = [to_image(picture) for batch in first for picture in batch]
        save_png(draw_tiles(pictures), grid_path(self.out), self._whole_record(), overwrite=True)

    def _whole_record(self) -> Record:
        height, width, _ = next(self.parts.read(1)).shape[1:]
        told = {"model": self.model_name, "size": [width, height], "num_samples": self.num_samples}
        return {**self.record, **told}
