"""The report of a run: a page in Markdown, and a grid of the best settings' pictures."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..evaluate import Estimate
from ..evaluate.report import format_estimate
from ..generate.files import whole_file
from ..generate.grid import draw_grid
from ..generate.loaded import default_guidance
from ..guidance import Guidance
from ..guidance.text import guidance_text
from ..pipelines.adm import ADMPipeline
from ..pipelines.guided import GuidedPipelineMixin
from .gallery import Gallery
from .plan import MOST_SHOWN
from .result import Tuned
from .scores import FIGURES, moved_by
from .space import Candidate

PAGE, GRID = "report.md", "report.png"


@dataclass(frozen=True, kw_only=True)
class About:
    """The facts about a run that a report shows besides its result.

    Attributes:
        model: As the user named it.
        takes_prompts: Whether `sag generate` draws with the model; else it is `sag sample`.
        scheduler: As the user named it; `None` is the model's own.
        prompts: The prompts of the pictures.
        seed: The first seed.
        reference: As the user named it; `None` means none.
        features: Name of the encoder.
        settings_file: Where the chosen settings are.
        by_user: Whether the user chose them.
    """

    model: str
    takes_prompts: bool
    scheduler: str | None
    prompts: Sequence[str]
    seed: int
    reference: str | None
    features: str
    settings_file: Path
    by_user: bool = False


def write_report(folder: str | Path, found: Tuned, gallery: Gallery, about: About) -> Path:
    """Write the page and its grid.

    Args:
        folder: The folder for both files; earlier ones are replaced.
        found: The result of the run.
        gallery: The pictures.
        about: The facts about the run.

    Returns:
        The page.

    Raises:
        OSError: They can't be written.
    """
    folder = Path(folder)
    with whole_file(folder / GRID) as file:
        _grid(found, gallery, about).save(file, format="PNG")
    with whole_file(folder / PAGE) as file:
        # Names of files may be no UTF-8.
        file.write(("\n".join(_page(found, about)) + "\n").encode("utf-8", "backslashreplace"))
    return folder / PAGE


def _grid(found: Tuned, gallery: Gallery, about: About) -> Image.Image:
    first = found.plan.seeds
    chunks = -(-min(MOST_SHOWN, found.seeds[1]) // gallery.unit)
    end = first + chunks * gallery.unit
    rows = [gallery.shown(row.candidate, first, end)[:MOST_SHOWN] for row in found.rows]
    labels = [f"{number}: {row.candidate}" for number, row in enumerate(found.rows)]
    titles = [f"seed {about.seed + first + number}" for number in range(len(rows[0]))]
    return draw_grid(rows, labels, titles, f"{_name(about)}, {found.steps} steps")


def _name(about: About) -> str:
    """The model's name; "." and ".." have none, but their folders do."""
    name = Path(os.path.abspath(about.model)).name
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _page(found: Tuned, about: About) -> Iterator[str]:
    yield from (f"# Settings for {_name(about)}", "", *_summary(found, about), "")
    yield from (f"![The best settings, row by row]({GRID})", "")
    if any(about.prompts):
        yield from ("Prompts of the columns, in turn:", "")
        yield from (f"- {prompt}" for prompt in _shown_prompts(found, about.prompts))
        yield ""
    yield from ("## The best settings", "", *_scores(found), "")
    yield (
        f"All figures are from {found.seeds[1]} seeds that were not used to choose. Brackets hold"
        " 95 % intervals; they are about other seeds, not other models. Differences are paired:"
        " both sides have the same seeds. An evaluation is one picture in one pass of the network."
    )
    yield from (
        "",
        "## Commands to draw with them",
        "",
        "```bash",
        *_commands(found, about),
        "```",
        "",
    )
    yield (
        f"To write another row to `{about.settings_file.name}`, repeat the command with `--choose`"
        " and the number of the row. Nothing is drawn again."
    )
    yield from ("", "## What the score means", "", found.score.advice, "")
    yield from ("How the pictures compare with those without guidance:", "")
    yield from (*_changes(found), "")
    yield (
        "`moved` is the distance from the picture of the same seed without guidance, as a share of"
        " the distance between pictures of different seeds."
    )
    yield from ("", "## How they were found", "", *_history(found, about))


def _shown_prompts(found: Tuned, prompts: Sequence[str]) -> list[str]:
    """The prompts of the grid's first columns; further columns repeat them."""
    columns = min(MOST_SHOWN, found.seeds[1], len(prompts))
    return [prompts[(found.plan.seeds + number) % len(prompts)] for number in range(columns)]


def _summary(found: Tuned, about: About) -> Iterator[str]:
    row = found.rows[found.chosen]
    who = "You chose" if about.by_user else "This run chose"
    yield (
        f"{who} row {found.chosen}, `{row.candidate}`, with {found.steps} steps. The settings are"
        f" in `{about.settings_file}`."
    )
    if not about.by_user:
        best, why = found.ranking[0][0], "no other setting had a lower score"
        if str(best) in found.failures:
            why = f"`{best}` had the lowest score, but it could not be drawn on the other seeds"
        elif best != row.candidate:
            why = (
                f"the score of `{best}` was lower by less than one standard error, and it costs"
                " more: among settings that noise cannot tell apart, the cheaper one is chosen"
            )
        yield f"On the seeds for choosing, {why}."
    title = found.score.title
    yield f"On the other seeds, its {title} is {_interval(row.score)}."
    if found.chosen:
        yield f"The difference from no guidance is {_difference(row.against_unguided)}."
    yield f"A picture takes {row.drawn.evaluations:.0f} evaluations of the network."


def _scores(found: Tuned) -> Iterator[str]:
    title = f"{found.score.title} ↓"
    heads = ["", "Setting", title, "against no guidance", "against the model's own"]
    rows = [
        [
            f"**{number}**" if number == found.chosen else str(number),
            f"`{row.candidate}`" + (" (the model's own)" if row.candidate == found.own else ""),
            _interval(row.score),
            "" if number == 0 else _difference(row.against_unguided),
            "" if row.candidate == found.own else _difference(row.against_own),
            f"{row.drawn.evaluations:.0f}",
            f"{row.drawn.seconds:.2g}",
        ]
        for number, row in enumerate(found.rows)
    ]
    return _table([*heads, "evaluations", "seconds a picture"], rows)


def _changes(found: Tuned) -> Iterator[str]:
    unguided = found.rows[0].drawn
    rows: list[list[str]] = []
    for number, row in enumerate(found.rows):
        figures = [f"{figure:.3f}" for figure in row.drawn.figures.mean(0).tolist()]
        moved = float(moved_by(row.drawn, unguided).mean())
        rows.append([str(number), *figures, f"{moved:.2f}"])
    return _table(["", *FIGURES, "moved"], rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _commands(found: Tuned, about: About) -> Iterator[str]:
    kind = GuidedPipelineMixin if about.takes_prompts else ADMPipeline
    known = [found.rows[found.chosen].candidate.guidance, found.own.guidance]
    for number, row in enumerate(found.rows):
        default = default_guidance(kind, row.candidate.guidance.method)
        words = ["sag", "generate", about.prompts[0]] if about.takes_prompts else ["sag", "sample"]
        words += ["--model", about.model, "--steps", str(found.steps)]
        words += [] if about.takes_prompts else ["--num-samples", "64"]
        words += _typed(row.candidate, [*known, default])
        words += [] if about.scheduler is None else ["--scheduler", about.scheduler]
        # cmd.exe knows neither single quotes nor comments behind a command.
        yield f"# {number}"
        yield subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _typed(candidate: Candidate, others: Sequence[Guidance]) -> list[str]:
    """Options that give a setting, whichever of the others fills what they leave out."""
    cfg = [] if candidate.cfg is None else ["--guidance-scale", f"{candidate.cfg:g}"]
    if candidate.is_unguided:
        return ["--sag-scale", "0", *cfg]
    settings = candidate.guidance.to_dict()
    rivals = [each.to_dict() for each in others]
    always = {
        name
        for rival in rivals
        if rival["method"] == settings["method"]
        for name, value in settings.items()
        if rival[name] != value
    }
    return ["--guidance", guidance_text(settings, always), *cfg]


def _history(found: Tuned, about: About) -> Iterator[str]:
    choosing, reporting = found.seeds
    first = about.seed + found.plan.seeds
    compared = "no reference" if about.reference is None else f"`{about.reference}`"
    yield (
        f"- {found.tried} settings were tried: no guidance, the model's own, each method's"
        " defaults, others that are spread over all possible settings, and neighbours of the best."
    )
    yield f"- Rungs (settings on seeds): {', '.join(map(str, found.plan.rungs))}."
    yield f"- Seeds {about.seed} to {about.seed + choosing - 1} were used to choose."
    yield f"- Seeds {first} to {first + reporting - 1} were used for this report."
    if choosing < found.plan.seeds or reporting < found.plan.seeds:
        yield f"- The time ended before all {found.plan.seeds} seeds of a half were drawn."
    yield f"- Compared with {compared}, features: {about.features}."
    yield f"- {found.pictures} pictures were drawn in {found.seconds / 60:.1f} minutes."
    for setting, why in found.failures.items():
        yield f"- `{setting}` could not be drawn: {why}"
    yield from (
        "",
        "The last rung. Settings were chosen by these scores, so the first ones look too good:",
        "",
    )
    yield from _table(
        ["Setting", f"{found.score.title}, {choosing} seeds"],
        ([f"`{each}`", f"{score:.3g}"] for each, score in found.ranking),
    )


def _interval(found: Estimate) -> str:
    return format_estimate(found, ".3g")


def _difference(found: Estimate | None) -> str:
    text = format_estimate(found, "+.3g")
    if found is None or found.low is None or found.high is None:
        return text
    return text if found.low <= 0 <= found.high else f"**{text}**"
