"""Drawing many samples of a pixel-space model into one file that evaluators read.

Example:
    ```python
    from self_attention_guidance.batch import SampleJob
    from self_attention_guidance.generate import load_pixel_model

    loaded = load_pixel_model("./imagenet128")
    job = SampleJob(loaded.pipeline, "samples.npz", 50_000, loaded.settings(sag_scale=0.1))
    job.run(batch_size=16)  # resumes an earlier run that was killed
    ```
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..checks import check_count, seeds_of
from ..denoiser.noise import check_scheduler
from ..generate.drawing import Progress
from ..generate.files import (
    check_folder,
    check_free,
    check_samples_path,
    grid_path,
    parts_folder,
    save_png,
)
from ..generate.grid import draw_tiles
from ..generate.metadata import RECORD_KEY, read_record
from ..generate.pixel_drawing import to_image
from ..generate.record import describe_samples, difference
from ..generate.sample_settings import SampleSettings
from ..pipelines.adm import ADMPipeline
from .artists import PixelArtist
from .crew import Crew, Lost
from .drawing import IMAGES, JOB, Unit, UnitWorker, picture_file
from .labels import choose_labels
from .npz import StreamedArray, write_npz
from .storage import LOCK, UNFINISHED, Storage, json_object
from .tasks import Task
from .workers import distribute

_MOST_TILES = 64


@dataclass(frozen=True, kw_only=True)
class FinishedSamples:
    """The files of a finished job.

    Attributes:
        path: The `.npz` file.
        grid: The PNG file that shows the first samples.
        count: Samples in the file.
        drawn: Samples that the last run drew; earlier runs drew the others.
        seconds: How long the last run drew.
    """

    path: Path
    grid: Path
    count: int
    drawn: int
    seconds: float


class SampleJob:
    """A job that draws samples into a file; if it is killed, the same job resumes.

    Sample i has the seed `seed + i` and its own generator of random numbers on the CPU, so it
    depends neither on the batch size nor on the other samples, up to the rounding of the kernels.
    They are kept as pictures in the folder `OUT.parts` until all are drawn.

    Attributes:
        drawn: How many of the samples an earlier run drew.
        record: Everything that decides how the samples look: see `describe_samples`.
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
        class_names: Mapping[str, int] | None = None,
    ) -> None:
        """Look at earlier files, and refuse what cannot be done; draw nothing.

        Args:
            pipeline: Its `guidance` and `scheduler` are part of the settings.
            out: A `.npz` file: `arr_0`, the samples, uint8, (samples, height, width, channels),
                and `arr_1`, their classes, int64, (samples,), if they have any; `read_record`
                reads its settings. A PNG file beside it shows the first 64.
            num_samples: Number of samples.
            settings: Settings that all samples share; `None` is the defaults.
            seed: Seed of the first sample.
            overwrite: Whether `out`, and what a run with other settings left, may be replaced.
            model_name: Name for the metadata; `None` leaves it out.
            class_names: Numbers of classes by their names, for the metadata.

        Raises:
            ValueError: An argument is outside its range or does not fit the model, or the
                folder holds an unfinished run with other settings.
            FileExistsError: `out` exists and `overwrite` is False.
        """
        self.pipeline = pipeline
        self.out = check_samples_path(out, overwrite)
        check_folder(self.out.parent)
        self.model_name = model_name
        self.class_names = class_names or {}
        settings = settings or SampleSettings()
        check_count("num_samples", num_samples)
        check_scheduler(pipeline.scheduler)
        seeds = seeds_of(seed, num_samples)
        self.labels = choose_labels(pipeline, settings, seeds)
        self.record = describe_samples(pipeline, settings, seed=seed)
        shared = replace(settings, classes=())
        labels = self.labels or [None] * num_samples
        self.tasks = [
            Task(number, 0, str(number), "", of, shared, label)
            for number, (of, label) in enumerate(zip(seeds, labels, strict=True))
        ]
        self.overwrite = overwrite
        self.storage = Storage(str(parts_folder(self.out)))
        self._had_folder = parts_folder(self.out).is_dir()  # the lock makes it, too
        self._look()

    def _look(self) -> None:
        """Find what is missing, and refuse to mix or to replace what is there."""
        other = self._difference()
        if other is not None and not self.overwrite:
            raise ValueError(
                f"out: {self.storage.url!r} holds an unfinished run with {other}: go on with its"
                " settings, choose another place, or start again with overwrite=True"
            )
        self.is_written = self._is_written()
        missing = () if self.is_written else self.tasks if other else self._missing()
        self.drawn = len(self.tasks) - len(missing)
        if missing:
            check_free([self.out], self.overwrite)

    def run(
        self,
        batch_size: int = 8,
        on_progress: Progress | None = None,
        crew: Crew | None = None,
        load: Callable[[], ADMPipeline] | None = None,
    ) -> FinishedSamples:
        """Draw the missing samples and write the files. Call it once.

        Args:
            batch_size: Samples drawn at once; it may differ from that of an earlier run.
            on_progress: Called after each step, or with several workers after each batch, with the
                work done since the last call, in samples. Its arguments add up to the number of
                missing samples.
            crew: The workers; `None` is this process.
            load: Makes the pipeline in each worker's process, if there are several; picklable.

        Returns:
            What was written.

        Raises:
            ValueError: An argument is outside its range or does not fit the model, or another run
                draws into the same file, or left pictures with other settings meanwhile.
            FileExistsError: Another run has written the file meanwhile.
            FloatingPointError: A prediction is NaN or infinite.
            ChildProcessError: Three workers died while they had the same batch, or the device no
                longer responds.
        """
        check_count("batch_size", batch_size)
        crew = crew or Crew()
        if not crew.is_here and load is None:
            raise ValueError("load must be given for more than one worker")
        started, seconds, count = time.monotonic(), 0.0, len(self.tasks)
        is_left = False
        try:
            with self.storage.locked():
                try:
                    self._look()  # again: another run may have come first
                    if not self.is_written:
                        artist = self._artist(crew, load, on_progress)
                        self._draw(batch_size, crew, artist, on_progress)
                        seconds = time.monotonic() - started
                        self._write_files()
                    self.storage.remove(JOB, IMAGES)
                finally:
                    is_left = self._is_empty() and not self._remove_folder()
        finally:
            if is_left:
                self._remove_folder()
        drawn, self.drawn = count - self.drawn, count
        return FinishedSamples(
            path=self.out, grid=grid_path(self.out), count=count, drawn=drawn, seconds=seconds
        )

    def _artist(
        self, crew: Crew, load: Callable[[], ADMPipeline] | None, on_progress: Progress | None
    ) -> Callable[[], PixelArtist]:
        networks = self.record["networks"]
        if crew.is_here or load is None:
            return lambda: PixelArtist(self.pipeline, self.model_name, networks, on_progress)
        return functools.partial(_loaded_artist, load, self.model_name, networks)

    def _draw(
        self,
        batch_size: int,
        crew: Crew,
        artist: Callable[[], PixelArtist],
        on_progress: Progress | None,
    ) -> None:
        if self.drawn == 0:
            self.storage.remove(JOB, IMAGES)  # what a run with other settings left
            self.storage.write(JOB, json.dumps(self.record, indent=2).encode())
        missing = self._missing()
        batches = (
            Unit(tuple(missing[first : first + batch_size]))
            for first in range(0, len(missing), batch_size)
        )
        worker = functools.partial(
            UnitWorker, artist, self.storage, batch_size, stops_at_errors=True
        )
        for unit, result in distribute(batches, worker, crew):
            if isinstance(result, Lost):
                first, last = unit.tasks[0].row, unit.tasks[-1].row
                raise ChildProcessError(f"samples {first} to {last}: {result.reason}")
            if on_progress is not None and not crew.is_here:
                on_progress(len(unit.tasks))

    def _missing(self) -> Sequence[Task]:
        """The tasks that no run with these settings has drawn; files count only with a record."""
        if not self.storage.exists(JOB):
            return self.tasks
        gone = self.storage.gone(map(picture_file, self.tasks))
        return [task for task in self.tasks if picture_file(task) in gone]

    def _difference(self) -> str | None:
        """The settings of the pictures in the folder that differ from this job's."""
        if not any(map(self.storage.names, self.storage.names(IMAGES))):
            return None
        try:
            stored = self.storage.parsed(JOB, json_object)
        except ValueError:
            return f"a damaged {JOB}"
        return None if stored is None else difference(stored, self.record)

    def _is_written(self) -> bool:
        """Whether a run was killed after the files were written, before its parts were deleted."""
        if not (self.out.exists() and self._had_folder):
            return False
        with suppress(ValueError):
            stored = read_record(self.out)
            return {**stored, **self.record, "num_samples": len(self.tasks)} == stored
        return False

    def _write_files(self) -> None:
        first = np.concatenate(list(self._pictures(self.tasks[:_MOST_TILES])))
        height, width, channels = first.shape[1:]
        described = {
            "model": self.model_name,
            "size": [width, height],
            "num_samples": len(self.tasks),
        }
        names = {number: name for name, number in reversed(list(self.class_names.items()))}
        chosen = self.record["settings"]["classes"]
        if chosen and names:
            described["class_names"] = [names.get(number, str(number)) for number in chosen]
        record = {**self.record, **described}
        tiles = draw_tiles([to_image(pixels) for pixels in first])
        save_png(tiles, grid_path(self.out), record, overwrite=True)
        shape = (len(self.tasks), height, width, channels)
        arrays = {"arr_0": StreamedArray(shape, "uint8", self._pictures(self.tasks))}
        if self.labels is not None:
            labels = np.array(self.labels, dtype=np.int64)
            arrays["arr_1"] = StreamedArray(labels.shape, "int64", [labels])
        text = np.array([json.dumps(record)])
        arrays[RECORD_KEY] = StreamedArray(text.shape, text.dtype.str, [text])
        write_npz(self.out, arrays, parts_folder(self.out) / UNFINISHED)

    def _pictures(self, tasks: Sequence[Task]) -> Iterator[NDArray[np.uint8]]:
        """The pictures of tasks, each as an array (1, height, width, channels)."""
        for task in tasks:
            name = picture_file(task)
            try:
                with self.storage.open(name) as file, Image.open(file) as image:
                    pixels: NDArray[np.uint8] = np.asarray(image)
            except (OSError, SyntaxError) as error:  # Pillow's errors for damaged files
                remedy = "delete it, and it is drawn again"
                raise self.storage.damaged(name, error, remedy) from error
            yield pixels.reshape(1, *pixels.shape[:2], -1)

    def _is_empty(self) -> bool:
        """Whether the folder holds no pictures; what they would need is then removed."""
        if any(map(self.storage.names, self.storage.names(IMAGES))):
            return False
        self.storage.remove(JOB, IMAGES, UNFINISHED)
        return True

    def _remove_folder(self) -> bool:
        """Remove the folder, unless it holds other programs' files; whether its lock is removed."""
        try:
            (parts_folder(self.out) / LOCK).unlink(missing_ok=True)
        except OSError:  # Windows deletes no file that is open
            return False
        with suppress(OSError):
            parts_folder(self.out).rmdir()
        return True


def _loaded_artist(
    load: Callable[[], ADMPipeline], name: str | None, networks: Mapping[str, str]
) -> PixelArtist:
    return PixelArtist(load(), name, networks)
