"""The command `tune`."""

# Not `from __future__ import annotations`: typer reads the types of the options.

import dataclasses
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..guidance.text import check_methods
from ..models.builtin import SETTINGS_FILE, builtin_names
from .loading import check_drawing
from .options import DrawingOptions, prompts_of
from .output import hide_loading_bars, note, print_line, progress

if TYPE_CHECKING:
    from ..evaluate import LoadedSet
    from ..evaluate.features import Encoder
    from ..tune import About, Tuned, TuneSettings
    from ..tune.trial import Report

_WORK = "sag_tune"
# A copy of the settings that a run wrote, by which it knows them again.
_WRITTEN = "written_settings.json"


class Features(str, Enum):
    """Names of the encoders of `sag evaluate`."""

    EMOJI = "emoji"
    INCEPTION = "inception"


@dataclass(frozen=True, kw_only=True)
class TuneCommand(DrawingOptions):
    """Find settings of guidance for a model: method, layers, scale, steps to guide, blur and CFG.

    Many settings are tried on few seeds, the better ones on more. The score is the distance to
    --reference; without one, it is how gently settings change pictures, which is no measure of
    quality. A report shows the best five on other seeds. If it is killed, the same command
    resumes.

    \b
    Examples:
      sag tune ./my-pixel-model --reference ./training-pictures --steps 50 --budget 2h
      sag tune ./my-model --prompts prompts.txt --methods sag,pag --budget 500
      sag tune ./my-model --prompts prompts.txt --methods sag,pag --budget 500 --choose 3
    """

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a builtin model, a .safetensors file or a hub id."
        ),
    ]
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURES", help="A folder, or an .npz file as `sag evaluate` takes it."
        ),
    ] = None
    budget: Annotated[
        str, typer.Option(metavar="TIME|N", help="A time (90s, 30m, 2h), or a number of pictures.")
    ] = "30m"
    prompts_file: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts, one per line; - is stdin. [default: draw without a prompt]",
        ),
    ] = None
    methods: Annotated[
        str | None,
        typer.Option(metavar="M,M,...", help="From sag, blur, pag, seg, slg, tpg. [default: all]"),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(help="Sampling steps of all settings. [default: the model's, else 50 or 250]"),
    ] = None
    count: Annotated[
        int | None,
        typer.Option(
            help="Seeds: half to choose on, half to report on. [default: as the budget allows]"
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="Pictures made at once.")] = 8
    features: Annotated[
        Features,
        typer.Option(help="The encoder; emoji suits pictures of the builtin models."),
    ] = Features.EMOJI
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help=f"The settings. [default: {SETTINGS_FILE} in the model]"
        ),
    ] = None
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help=f"The report and the pictures. [default: {_WORK} beside --out]"
        ),
    ] = None
    choose: Annotated[
        int | None,
        typer.Option(help="Take this row of the report instead; nothing is drawn again."),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing file and a run with other settings."),
    ] = False

    def run(self) -> None:
        """Try settings, write the best and the report, and print their paths."""
        started = time.monotonic()
        settings, out, work = _check_before_loading(self)

        from ..tune import TuneJob, check_budget, settings_content, write_report, write_settings

        hide_loading_bars()
        loaded = _load(self)
        check_budget(loaded, settings)
        encoder, reference = _load_reference(self)
        job = TuneJob(
            loaded, work, settings, encoder, reference, overwrite=self.overwrite, started=started
        )
        with _bar(self.quiet) as report:
            found, gallery = job.run(lambda line: note(line, self.quiet), report)
        found = _chosen(found, self.choose)
        content = settings_content(found.rows[found.chosen].candidate, found.steps, out)
        page = write_report(work, found, gallery, _about(self, out, settings))
        # Written last: once it exists, the run is done.
        write_settings(out, content)
        write_settings(work / _WRITTEN, content)
        print_line(out)
        print_line(page)
        row = found.rows[found.chosen]
        note(f"row {found.chosen}: {row.candidate}", self.quiet)


def _out(options: TuneCommand) -> Path:
    """The file of settings.

    Raises:
        ValueError: It is not given where it must be, or has another ending.
    """
    if options.out is not None:
        if options.out.suffix != ".json":
            raise ValueError(f"out={str(options.out)!r} must end in .json")
        return options.out
    folder = Path(os.path.expanduser(options.model))
    if options.model in builtin_names() or not folder.is_dir():
        raise ValueError(f"--out must be given: {options.model!r} is no folder of yours")
    return folder / SETTINGS_FILE


def _check_before_loading(options: TuneCommand) -> "tuple[TuneSettings, Path, Path]":
    """Refuse wrong options before a model is loaded, which takes long.

    Returns:
        The settings of the run, the file of settings, and the folder of the run.
    """
    from ..generate import check_count, check_folder, check_free
    from ..generate.files import check_place
    from ..generate.hub import is_hub_id
    from ..tune import TuneSettings, make_plan, parse_budget
    from ..tune.plan import BEST
    from ..tune.settings import RESULT_FILE

    methods = tuple(name.strip() for name in (options.methods or "").split(",") if name.strip())
    check_methods(methods)
    check_drawing(options, 1)
    settings = TuneSettings(
        budget=parse_budget(options.budget),
        methods=methods,
        prompts=tuple(prompts_of(options.prompts_file)) or ("",),
        steps=options.steps,
        count=options.count,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    if settings.budget.pictures is not None:
        # No guidance and each method's defaults are tried in any case. Which methods suit the model
        # is not known yet.
        anchors = max(len(methods), 1) + 1
        make_plan(settings.budget.pictures, options.batch_size, anchors, anchors, options.count)
    if options.reference is not None and not options.reference.exists():
        raise ValueError(
            f"reference={str(options.reference)!r} does not exist: give a folder of pictures or an"
            " .npz file"
        )
    # A model on this machine is found at once, and one on the hub after all other checks.
    if not is_hub_id(options.model):
        _check_model(options)
    out = _out(options)
    work = out.parent / _WORK if options.work is None else options.work
    if options.choose is not None:
        check_count("choose", options.choose, least=0, most=BEST + 1)
        if not (work / RESULT_FILE).is_file():
            raise ValueError(
                f"choose={options.choose} is a row of a report: there is none in {str(work)!r} yet"
            )
    check_place(out.parent)
    # If the same command ran before, the file is its own and may be replaced.
    check_free([out], options.overwrite or _is_own(out, work / _WRITTEN))
    check_place(work, "work")
    if is_hub_id(options.model):
        _check_model(options)
    check_folder(out.parent)
    check_folder(work, "work")
    return settings, out, work


def _check_model(options: TuneCommand) -> None:
    """Refuse a model that does not exist, or that takes no prompts if some are given."""
    from ..generate.finding import find_prompt_or_pixel_model, is_pixel_model

    find_prompt_or_pixel_model(options.model)
    if is_pixel_model(options.model) and options.prompts_file is not None:
        raise ValueError(f"--prompts must not be given: {options.model} takes no prompts")


def _is_own(out: Path, written: Path) -> bool:
    """Whether a file holds what this run wrote, and nobody has changed it since."""
    both = out, written
    return all(map(Path.is_file, both)) and out.read_bytes() == written.read_bytes()


def _load(options: TuneCommand) -> Any:
    from ..generate import load_pipeline, load_pixel_model
    from ..generate.finding import is_pixel_model

    load: Callable[..., Any] = load_pixel_model if is_pixel_model(options.model) else load_pipeline
    loaded = load(options.model, options.device, options.dtype)
    loaded.use(scheduler=options.scheduler)
    return loaded


def _load_reference(options: TuneCommand) -> "tuple[Encoder, LoadedSet | None]":
    from ..evaluate import SavedStatistics, load_encoder, load_set, open_set

    encoder = load_encoder(options.features.value)
    if options.reference is None:
        return encoder, None
    opened = open_set(options.reference)
    count = 0 if isinstance(opened, SavedStatistics) else opened.count
    with progress(count, "encoding", options.quiet or not count) as advance:
        return encoder, load_set(opened, encoder, 64, advance)


@contextmanager
def _bar(quiet: bool) -> "Generator[Report]":
    """A bar that shows what is drawn next, and the best so far."""
    from tqdm import tqdm

    form = "{percentage:3.0f}%|{bar:10}| {n}/{total} pictures, {elapsed}<{remaining}{postfix}"
    with tqdm(bar_format=form, dynamic_ncols=True, disable=quiet or None) as bar:

        def report(drawn: int, total: int, candidate: str, best: str) -> None:
            bar.total = max(total, drawn)
            bar.set_postfix_str(f"now {candidate}; best {best or 'not known yet'}", refresh=False)
            bar.update(drawn - bar.n)

        yield report


def _chosen(found: "Tuned", choose: int | None) -> "Tuned":
    """The result, with the row that the user chose."""
    if choose is None:
        return found
    if choose >= len(found.rows):
        raise ValueError(f"choose={choose} must be a row of the report, 0 to {len(found.rows) - 1}")
    return dataclasses.replace(found, chosen=choose)


def _about(options: TuneCommand, out: Path, settings: "TuneSettings") -> "About":
    from ..generate.finding import is_pixel_model
    from ..tune import About

    return About(
        model=options.model,
        takes_prompts=not is_pixel_model(options.model),
        scheduler=options.scheduler,
        prompts=settings.prompts,
        seed=options.seed,
        reference=None if options.reference is None else str(options.reference),
        features=options.features.value,
        settings_file=out,
        by_user=options.choose is not None,
    )
