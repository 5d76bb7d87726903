"""A tuning run from its budget to its result; a run that was killed resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..batch.storage import Storage, json_object
from ..checks import check_count
from ..denoiser.families import denoiser_of
from ..evaluate import LoadedSet
from ..evaluate.features import Encoder
from ..generate.files import check_folder
from ..generate.loaded import Loaded
from ..generate.prompts import unread_part
from ..generate.record import describe, difference, fingerprints
from ..guidance import Guidance, guidance_of
from .gallery import PARTS, Gallery
from .plan import LARGEST_BUDGET, Plan, fewest_pictures, make_plan
from .result import Tuned, as_json
from .scores import ChangeScore, FrechetScore, Score, halves_of
from .settings import RESULT_FILE, TuneSettings
from .space import Space, space_of
from .trial import JOURNAL, Journal, Report, Trial

JOB, PLAN = "job.json", "plan.json"

# Distances of few pictures are noisy, so few settings are enough for few pictures.
_SETTINGS_A_METHOD = 3
_FEWEST_SETTINGS = 16
# Share of the remaining time that is planned; the rest is for pictures slower than the first.
_RESERVE = 0.9


class TuneJob:
    """A job that tries settings on a model; if it is killed, the same job resumes."""

    def __init__(
        self,
        loaded: Loaded[Any],
        work: str | Path,
        settings: TuneSettings,
        encoder: Encoder,
        reference: LoadedSet | None = None,
        *,
        overwrite: bool = False,
        started: float | None = None,
    ) -> None:
        """Look at what an earlier run left, and refuse what cannot be done; draw nothing.

        Args:
            loaded: The model, with its scheduler.
            work: A folder for the pictures and the report.
            settings: Settings of the run.
            encoder: What makes features of pictures.
            reference: The set to compare pictures with; `None` scores how they change.
            overwrite: Whether the results of a run with other settings may be deleted.
            started: When the run began, by `time.monotonic`; `None` is now.

        Raises:
            ValueError: The settings do not suit the model, or a run with other settings is in the
                folder.
        """
        self.loaded, self.settings = loaded, settings
        self.storage = Storage(str(check_folder(work, "work")), "work")
        self.score: Score = ChangeScore() if reference is None else FrechetScore(reference)
        self._encoder, self._reference, self._started = encoder, reference, started
        asked, own = self._asked(), self._own()
        stored = self._stored(overwrite)
        other = difference(stored["asked"], asked) if stored else None
        if other is not None and not overwrite and self._has_begun():
            raise ValueError(
                f"work={str(work)!r} holds a run with {other}: go on with its settings, name"
                " another folder, or start again with overwrite=True"
            )
        # A result may have been written beside the model since. The run continues with the
        # settings that the model had when it began.
        self._job = stored if stored and other is None else {"asked": asked, "own": own}
        self._is_new = not stored or other is not None
        self._seen = self.storage.read(JOB)
        own = self._job["own"]
        guidance = guidance_of(own["guidance"])
        if not isinstance(guidance, Guidance):
            raise ValueError(
                f"the model's guidance, {guidance.method}, is a sum: give it a single one"
            )
        network: Any = denoiser_of(loaded.pipeline)
        cfg = own["guidance_scale"]
        self.space: Space = space_of(network, own["steps"], guidance, settings.methods, cfg)
        self.anchors = self.space.anchors()

    def run(
        self, note: Callable[[str], object] = lambda line: None, report: Report | None = None
    ) -> tuple[Tuned, Gallery]:
        """Draw the missing pictures, and choose; the pipeline keeps its guidance.

        Args:
            note: Called with lines about the plan before drawing begins.
            report: Called before each chunk of pictures.

        Returns:
            The result, and the pictures.

        Raises:
            ValueError: The budget is too small, the reference does not fit, or another run uses
                the folder.
            FloatingPointError: Without guidance, a picture is NaN or infinite.
        """
        with self.storage.locked(), _kept_guidance(self.loaded.pipeline):
            if self.storage.read(JOB) != self._seen:
                raise ValueError(
                    f"work={self.storage.url!r}: another run has begun here since this one was"
                    " started: start it again"
                )
            if self._is_new:
                self.storage.remove(JOB, PLAN, JOURNAL, RESULT_FILE, PARTS)
                self.storage.write(JOB, json.dumps(self._job, indent=2).encode())
                self._seen, self._is_new = self.storage.read(JOB), False
            settings = self.settings
            gallery = Gallery(
                self.loaded,
                self._encoder,
                self.storage,
                steps=self.space.steps,
                seed=settings.seed,
                unit=settings.batch_size,
                prompts=settings.prompts,
                started=self._started,
            )
            if gallery.damaged:
                note(f"{len(gallery.damaged)} damaged files are drawn again: {gallery.damaged[0]}")
            cut = sum(bool(unread_part(self.loaded.pipeline, each)) for each in settings.prompts)
            if cut:
                note(f"prompts that are too long for this model, and are cut: {cut}")
            plan = self._plan(gallery, note)
            found = Trial(
                self.space, gallery, self.score, plan, settings, Journal(self.storage), report
            ).run()
            self.storage.write(RESULT_FILE, json.dumps(as_json(found), indent=2).encode())
        return found, gallery

    def _asked(self) -> dict[str, Any]:
        """Everything that pictures and choice depend on, except the model's recommendations."""
        settings, pipeline = self.settings, self.loaded.pipeline
        record = describe(pipeline, self.loaded.settings_class())
        kept = {name: record[name] for name in ("scheduler", "scheduler_config", "dtype")}
        asked: dict[str, Any] = {
            **dataclasses.asdict(settings),
            "reference": None if self._reference is None else _digest(self._reference),
            "features": self._encoder.name,
            "loras": record.get("loras", []),
            "networks": fingerprints(pipeline),
            **kept,
        }
        return json.loads(json.dumps(asked))

    def _own(self) -> dict[str, Any]:
        recommended = self.loaded.recommended
        own: Any = self.loaded.settings(num_inference_steps=self.settings.steps)
        has_cfg = recommended.guidance_scale is not None
        return {
            "guidance": self.loaded.pipeline.guidance.to_dict(),
            "guidance_scale": getattr(own, "guidance_scale", None) if has_cfg else None,
            "steps": own.num_inference_steps,
        }

    def _stored(self, overwrite: bool) -> dict[str, Any] | None:
        """What an earlier run was asked for. If that is not known, its pictures stay."""
        try:
            stored = self.storage.parsed(JOB, _job)
            if stored is None and (self._has_begun() or self.storage.names(PARTS)):
                raise self.storage.damaged(JOB, "it is gone, and says what the pictures are of")
        except ValueError:
            if overwrite:
                return None
            raise
        return stored

    def _has_begun(self) -> bool:
        """Whether a run has a plan; until then, it only tried whether it can draw and score."""
        return any(map(self.storage.exists, (PLAN, JOURNAL, RESULT_FILE)))

    def _plan(self, gallery: Gallery, note: Callable[[str], object]) -> Plan:
        """Make the plan of this run, or restore the one that it began with."""
        settings, unit = self.settings, self.settings.batch_size
        wanted = max(_FEWEST_SETTINGS, _SETTINGS_A_METHOD * len(self.space.layers))
        anchors = len(self.anchors)
        stored = self.storage.parsed(PLAN, _pictures)
        pictures = stored or settings.budget.pictures
        if settings.budget.pictures is not None:
            note(str(make_plan(settings.budget.pictures, unit, anchors, wanted, settings.count)))
        each = self._seconds_of_a_picture(gallery)
        if pictures is None:
            left = (settings.budget.seconds or 0) - gallery.elapsed
            pictures = gallery.drawn + int(_RESERVE * max(left, 0) / each)
            pictures = max(pictures, fewest_pictures(unit, anchors, settings.count))
            pictures = min(pictures, LARGEST_BUDGET)
        plan = make_plan(pictures, unit, anchors, wanted, settings.count)
        if stored is None:
            self.storage.write(PLAN, json.dumps({"pictures": pictures}).encode())
        if settings.budget.pictures is None:
            note(str(plan))
        left = each * max(plan.pictures - gallery.drawn, 0)
        note(f"about {_duration(left)} at {each:.2g} s a picture")
        return plan

    def _seconds_of_a_picture(self, gallery: Gallery) -> float:
        """Time for a picture of a usual setting, whose guidance adds about half a pass."""
        unguided = gallery.draw(self.space.unguided, 0)
        self._check_size(unguided.size.tolist())
        for first in range(gallery.unit, gallery.fewest, gallery.unit):
            gallery.draw(self.space.unguided, first)
        # Pictures that can't be scored are an error before more are drawn.
        drawn = gallery.of(self.space.unguided, 0, gallery.fewest)
        self.score.values(drawn, drawn, halves_of(gallery.fewest, 0, 0))
        seconds = [unguided.seconds]
        for candidate in self.anchors[1:]:
            chunk = gallery.draw(candidate, 0)
            if not chunk.failure:
                seconds.append(chunk.seconds)
                break
        return sum(seconds) / len(seconds) / gallery.unit

    def _check_size(self, size: Sequence[int]) -> None:
        """Refuse a reference with pictures of another size, on which features depend."""
        real = None if self._reference is None else self._reference.features
        if real is not None and [*real.size] != [*size]:
            sizes = "{}x{} pixels, the model draws {}x{}".format(*real.size, *size)
            raise ValueError(f"reference: it holds pictures of {sizes}")


def check_budget(loaded: Loaded[Any], settings: TuneSettings) -> None:
    """Refuse a number of pictures that is too small for a model, before a reference is encoded.

    Args:
        loaded: The model.
        settings: Settings of the run.

    Raises:
        ValueError: It is too small, or no method suits the model.
    """
    pipeline: Any = loaded.pipeline
    network: Any = denoiser_of(pipeline)
    methods = space_of(network, 1, pipeline.guidance, settings.methods).layers
    if settings.budget.pictures is not None:
        least = len(methods) + 1
        make_plan(settings.budget.pictures, settings.batch_size, least, least, settings.count)


@contextmanager
def _kept_guidance(pipeline: Any) -> Generator[None]:
    before = pipeline.guidance
    try:
        yield
    finally:
        pipeline.guidance = before


def _job(content: bytes) -> dict[str, Any]:
    found = json_object(content, asked=dict, own=dict)
    own = json_object(found["own"], guidance=dict, guidance_scale=int | float | None, steps=int)
    guidance_of(own["guidance"])
    return found


def _pictures(content: bytes) -> int:
    return check_count("pictures", json_object(content)["pictures"], most=LARGEST_BUDGET)


def _digest(reference: LoadedSet) -> str:
    moments = reference.moments
    content = moments.mean.numpy().tobytes() + moments.covariance.numpy().tobytes()
    return f"{reference.path.name} {hashlib.sha256(content).hexdigest()[:8]}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
