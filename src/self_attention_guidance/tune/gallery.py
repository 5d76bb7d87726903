"""Pictures of settings and seeds: drawn once, stored in a folder, and read from it later."""

from __future__ import annotations

import functools
import io
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..batch.labels import choose_labels
from ..batch.storage import Storage
from ..checks import GuidanceError
from ..denoiser.families import denoiser_of
from ..evaluate.features import Encoder
from ..generate.counting import counted_rows
from ..generate.drawing import PromptArtist
from ..generate.loaded import Loaded
from ..generate.pixel_drawing import draw_samples, to_image
from ..generate.sample_settings import SampleSettings
from .scores import Drawn, figures_of
from .space import Candidate

PARTS = "parts"
_LARGEST_SHOWN = 256  # pixels
# Chunks that count as the latest: the load of a machine changes from minute to minute.
_LATEST = 8
# A score compares pictures of different seeds.
_FEWEST_SCORED = 2


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The stored results of some pictures of a setting, with consecutive seeds.

    Attributes:
        features: (pictures, features) float32; empty if drawing failed.
        figures: (pictures, figures) float64.
        shown: (pictures, height, width, 3), small; empty if they are not shown.
        size: Width and height of the pictures themselves, in pixels.
        rows: Rows that the network was run on, for all pictures.
        seconds: Time that drawing and scoring took.
        elapsed: Seconds since the previous chunk was done, or since the run began.
        failure: Why drawing failed; empty if it did not.
    """

    features: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    figures: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    shown: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8))
    size: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))
    rows: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0
    failure: str = ""


class Gallery:
    """A store that draws and scores pictures of settings, a chunk of seeds at a time.

    Chunks do not depend on what else is drawn, so pictures are the same to the last bit.

    Attributes:
        unit: Pictures of a chunk.
        fewest: Pictures of the chunks that a score needs at least.
        failures: Why settings could not be drawn.
        damaged: Files of earlier runs that can't be read; their chunks are drawn again.
    """

    def __init__(
        self,
        loaded: Loaded[Any],
        encoder: Encoder,
        storage: Storage,
        *,
        steps: int,
        seed: int,
        unit: int,
        prompts: Sequence[str] = ("",),
        started: float | None = None,
    ) -> None:
        """Read the chunks that were drawn before.

        Args:
            loaded: The model.
            encoder: What makes features of pictures.
            storage: The folder of the chunks.
            steps: Sampling steps.
            seed: Seed of picture 0; picture i has the seed `seed + i`.
            unit: Pictures of a chunk.
            prompts: Used in turn; ignored by models that take none.
            started: When the run began, by `time.monotonic`; `None` is now.
        """
        self._loaded, self._encoder, self._storage = loaded, encoder, storage
        self._steps, self._seed, self._prompts = steps, seed, prompts
        self.unit = unit
        self.fewest = -(-_FEWEST_SCORED // unit) * unit
        self.damaged: list[str] = []
        self._chunks: dict[str, Chunk] = {}
        for name in storage.names(PARTS):
            try:
                chunk = storage.parsed(name, functools.partial(_parsed, unit=unit))
            except ValueError:
                chunk = None
            if chunk is None:
                self.damaged.append(name)
            else:
                self._chunks[name] = chunk
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self._kept = sum(chunk.elapsed for chunk in self._chunks.values())
        self.failures: dict[Candidate, str] = {}
        self._last = time.monotonic() if started is None else started

    @property
    def elapsed(self) -> float:
        """Seconds that this run and earlier ones took, without chunks that were lost with those."""
        return self._kept + time.monotonic() - self._last

    @property
    def pace(self) -> float:
        """Seconds per picture: the mean of all, or of this run's latest if these were slower."""
        of_latest = sum(self._latest) / max(len(self._latest), 1)
        return max(self.elapsed / len(self._chunks), of_latest) / self.unit

    @property
    def drawn(self) -> int:
        """Number of drawn pictures, without those of settings that failed."""
        return self.unit * sum(not chunk.failure for chunk in self._chunks.values())

    def has(self, candidate: Candidate, first: int) -> bool:
        """Whether a chunk was drawn.

        Args:
            candidate: The setting.
            first: Number of its first picture, a multiple of the unit.
        """
        return _name(candidate, first) in self._chunks

    def draw(self, candidate: Candidate, first: int, keep_pictures: bool = False) -> Chunk:
        """Return a chunk, drawn if it does not exist; a setting that failed is not tried again.

        Args:
            candidate: The setting.
            first: Number of its first picture, a multiple of the unit.
            keep_pictures: Whether they will be shown.
        """
        name = _name(candidate, first)
        if name not in self._chunks:
            chunk = self._drawn(candidate, first, keep_pictures)
            now = time.monotonic()
            chunk = replace(chunk, elapsed=now - self._last)
            self._kept, self._last = self._kept + chunk.elapsed, now
            self._latest.append(chunk.elapsed)
            self._storage.write(name, _content(chunk))
            self._chunks[name] = chunk
        chunk = self._chunks[name]
        if chunk.failure:
            self.failures[candidate] = chunk.failure
        return chunk

    def of(self, candidate: Candidate, first: int, end: int) -> Drawn:
        """The results of drawn pictures.

        Args:
            candidate: The setting.
            first: Number of the first picture, a multiple of the unit.
            end: Number after the last picture, a multiple of the unit.
        """
        chunks = [self._chunks[_name(candidate, each)] for each in range(first, end, self.unit)]
        return Drawn(
            torch.from_numpy(np.concatenate([chunk.features for chunk in chunks])),
            torch.from_numpy(np.concatenate([chunk.figures for chunk in chunks])),
            sum(chunk.rows for chunk in chunks) / (end - first),
            sum(chunk.seconds for chunk in chunks) / (end - first),
        )

    def shown(self, candidate: Candidate, first: int, end: int) -> list[Image.Image]:
        """Small pictures of seeds that were drawn to be shown.

        Args:
            candidate: The setting.
            first: As in `of`.
            end: As in `of`.
        """
        chunks = (self._chunks[_name(candidate, each)] for each in range(first, end, self.unit))
        return [to_image(pixels) for chunk in chunks for pixels in chunk.shown]

    def _drawn(self, candidate: Candidate, first: int, keep_pictures: bool) -> Chunk:
        started = time.monotonic()
        numbers = range(first, first + self.unit)
        try:
            with counted_rows(denoiser_of(self._loaded.pipeline)) as rows:
                pictures = self._pictures(candidate, numbers)
        except (FloatingPointError, ValueError, GuidanceError) as error:
            if candidate.is_unguided:
                raise
            return Chunk(seconds=time.monotonic() - started, failure=" ".join(str(error).split()))
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        planes = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        return Chunk(
            features=self._encoder.encode(planes).features.float().numpy(),
            figures=figures_of(pixels),
            shown=np.stack([_small(p) for p in pictures]) if keep_pictures else Chunk().shown,
            size=np.array(pictures[0].size),
            rows=sum(rows),
            seconds=time.monotonic() - started,
        )

    def _pictures(self, candidate: Candidate, numbers: range) -> list[Image.Image]:
        pipeline: Any = self._loaded.pipeline
        pipeline.guidance = candidate.guidance
        seeds = [self._seed + number for number in numbers]
        given = {"num_inference_steps": self._steps, "guidance_scale": candidate.cfg}
        if self._loaded.settings_class is SampleSettings:
            settings = SampleSettings(num_inference_steps=self._steps)
            labels = choose_labels(pipeline, settings, seeds)
            return [to_image(each) for each in draw_samples(pipeline, settings, seeds, labels)]
        artist = PromptArtist(pipeline, self._loaded.settings(**given))
        prompts = [self._prompts[number % len(self._prompts)] for number in numbers]
        return [picture.image for picture in artist.draw(prompts, seeds)]


def _name(candidate: Candidate, first: int) -> str:
    return f"{PARTS}/{candidate.key}-{first:05d}.npz"


def _small(picture: Image.Image) -> NDArray[np.uint8]:
    picture = picture.convert("RGB")
    picture.thumbnail((_LARGEST_SHOWN, _LARGEST_SHOWN), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _content(chunk: Chunk) -> bytes:
    file = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(chunk).items()}
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _parsed(content: bytes, unit: int) -> Chunk:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    # Numbers and texts are stored as arrays without dimensions.
    chunk = Chunk(**{key: each if each.ndim else each.item() for key, each in arrays.items()})
    counts = len(chunk.features), len(chunk.figures), len(chunk.shown) or unit
    if not chunk.failure and counts != (unit, unit, unit):
        raise ValueError(f"it holds {counts} pictures, not {unit}")
    return chunk
