"""The command `batch`."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import check_sampling
from .options import OneScaleOptions, PromptOptions, SamplingOptions
from .output import hide_loading_bars, note, print_line

if TYPE_CHECKING:
    from ..batch import BatchJob, Defaults, Manifest, Model, PromptList, Summary
    from ..generate import GenerationSettings


_SHOWN_FAILURES = 5
_MOST_SAMPLES = 10_000_000
_MOST_TOGETHER = 4096


@dataclass(frozen=True, kw_only=True)
class BatchCommand(OneScaleOptions):
    """Draw a list of prompts of any length; the same command resumes a killed job.

    Columns: prompt, and optionally id, negative_prompt, seed, width, height, steps,
    guidance_scale, sag_scale, num_images, image, mask, strength. FOLDER/manifest.parquet records
    each picture. The exit status is 0 if all are drawn and 3 if some failed. It needs pyarrow and
    Ray: pip install pyarrow ray.

    \b
    Examples:
      sag batch prompts.jsonl --out pictures --workers 2
      sag batch --num-samples 50000 --model emoji-adm --out samples --shard-size 1000
      sag batch s3://bucket/prompts.parquet --out s3://bucket/pictures --address auto --workers 16
    """

    prompts: Annotated[
        str | None, typer.Argument(metavar="PROMPTS", help="A .jsonl, .csv or .parquet file.")
    ] = None
    out: Annotated[str, typer.Option(metavar="FOLDER|URL", help="Where the pictures go.")] = "out"
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the results of an earlier run there.")
    ] = False
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try rows again that failed in an earlier run.")
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False
    seed: Annotated[
        int, typer.Option(help="Seed of each row's first picture; with --num-samples, of sample 0.")
    ] = 0
    batch_size: Annotated[
        int, typer.Option(help="Pictures that a worker gets at once; no pixel depends on it.")
    ] = 8
    together: Annotated[
        int,
        typer.Option(
            help="Pictures in one pass of the network. More are faster on a GPU, and the last bits"
            " depend on it."
        ),
    ] = 1
    num_images: Annotated[int, typer.Option(help="Pictures of each row.")] = 1
    num_samples: Annotated[
        int | None, typer.Option(help="Draw this many without prompts, instead of a list.")
    ] = None
    shard_size: Annotated[
        int | None,
        typer.Option(help="Write WebDataset tar files of this many pictures each."),
    ] = None
    workers: Annotated[int, typer.Option(help="Number of workers; several use Ray.")] = 1
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT|auto", help="A Ray cluster. [default: this machine]"),
    ] = None
    threads: Annotated[
        int, typer.Option(help="CPU threads of a worker; the last bits of pictures depend on it.")
    ] = 1
    gpus: Annotated[
        float | None, typer.Option(help="GPUs of a worker. [default: 1 if there is one]")
    ] = None
    max_steps: Annotated[int, typer.Option(help="Largest number of sampling steps.")] = 1000

    def defaults(self, settings: GenerationSettings, takes_prompts: bool) -> Defaults:
        """The values for empty cells of a row.

        Args:
            settings: Settings of the pictures.
            takes_prompts: Whether the model does.

        Raises:
            ValueError: A setting is outside its range.
        """
        from ..batch import Defaults

        names = ("seed", "num_images", "max_size", "max_steps")
        given = {name: getattr(self, name) for name in names}
        return Defaults(settings=settings, takes_prompts=takes_prompts, **given)

    def run(self) -> None:
        """Draw the missing pictures, and report on the list."""
        if importlib.util.find_spec("pyarrow") is None:
            raise ValueError("batch needs pyarrow: pip install pyarrow")
        if (self.prompts is None) == (self.num_samples is None):
            raise ValueError("give either PROMPTS or --num-samples")

        from ..batch.crew import Crew, check_reachable

        crew = Crew(
            workers=self.workers,
            address=self.address,
            threads=self.threads,
            gpus=self.gpus,
        )
        source = _source(self)
        _check_before_loading(self)
        check_reachable(crew.address)
        job = _job(source, self)
        with _progress(self.quiet) as (report, latest):
            try:
                summary = job.run(crew, report, lambda line: note(line, self.quiet))
            except KeyboardInterrupt:
                without = " without --overwrite" if self.overwrite and latest().drawn else ""
                typer.echo(f"{_report(latest())}; the same command{without} resumes", err=True)
                raise
        print_line(json.dumps(asdict(summary)) if self.as_json else _report(summary))
        if summary.failed:
            _show_failures(job.manifest)
            raise typer.Exit(3)


def _source(options: BatchCommand) -> PromptList | int:
    from ..batch import PromptList
    from ..checks import check_count

    if options.prompts is None:
        if options.num_images != 1:
            raise ValueError("num_images: with --num-samples, each sample is one picture")
        return check_count("num_samples", options.num_samples, most=_MOST_SAMPLES)
    return PromptList(options.prompts)


def _check_before_loading(options: BatchCommand) -> None:
    """Refuse wrong options before the heavy imports, which take seconds."""
    from ..checks import check_count
    from ..generate import GenerationSettings
    from ..generate.finding import find_prompt_or_pixel_model

    given = options.generation_arguments().items()
    settings = GenerationSettings(**{n: value for n, value in given if value is not None})
    options.defaults(settings, takes_prompts=True)
    check_sampling(options, options.num_images)
    if options.shard_size is not None:
        check_count("shard_size", options.shard_size)
    check_count("together", options.together, most=_MOST_TOGETHER)
    options.loading_arguments()
    find_prompt_or_pixel_model(options.model)
    _check_uses(options)


def _check_uses(options: BatchCommand) -> None:
    """Refuse options that a model without prompts has no use for."""
    from ..generate.finding import is_pixel_model

    shared = {"max_size", *(each.name for each in fields(SamplingOptions))}
    for each in fields(PromptOptions) if is_pixel_model(options.model) else ():
        if each.name not in shared and getattr(options, each.name) != each.default:
            raise ValueError(
                f"{each.name}: {options.model} takes no prompts, and has no use for it"
            )


def _show_failures(manifest: Manifest) -> None:
    """Print the first rows that failed, with their errors."""
    failures = (row for row in manifest.rows() if row["error"] is not None)
    for row in itertools.islice(failures, _SHOWN_FAILURES):
        typer.echo(f"row {row['row']} (from 0), {row['prompt']!r:.60}: {row['error']}", err=True)
    more = sum(1 for _ in failures)
    if more:
        typer.echo(f"and {more} more: see the column error of manifest.parquet", err=True)


def _job(source: PromptList | int, options: BatchCommand) -> BatchJob:
    from ..batch import BatchJob

    hide_loading_bars()
    model, defaults = _model_and_defaults(options)
    return BatchJob(
        source,
        options.out,
        model,
        defaults,
        batch_size=options.batch_size,
        together=options.together,
        shard_size=options.shard_size,
        overwrite=options.overwrite,
        retry_failed=options.retry_failed,
    )


def _model_and_defaults(options: BatchCommand) -> tuple[Model, Defaults]:
    from ..batch import Model
    from ..generate.finding import is_pixel_model

    model = Model(
        name=options.model,
        **options.loading_arguments(),
        scheduler=options.scheduler,
        fast=options.fast,
        guidance=options.guidance_arguments(),
        max_size=options.max_size,
    )
    settings = model.settings(**options.generation_arguments())
    return model, options.defaults(settings, takes_prompts=not is_pixel_model(options.model))


@contextmanager
def _progress(
    quiet: bool,
) -> Generator[tuple[Callable[[Summary], object], Callable[[], Summary]]]:
    """A bar on stderr, if that is a terminal; yield its update function and its last values."""
    from tqdm import tqdm

    from ..batch import Summary

    latest = Summary(total=0, done=0, failed=0)
    form = (
        "{percentage:3.0f}%|{bar}| {n} of {total} pictures{postfix}, {rate_noinv_fmt},"
        " {elapsed}<{remaining}"
    )
    shown: dict[str, Any] = {"bar_format": form, "smoothing": 0.05, "disable": quiet or None}
    with tqdm(total=0, unit=" pictures", **shown) as bar:

        def report(summary: Summary) -> None:
            nonlocal latest
            if bar.total != summary.total:
                bar.total = summary.total
                bar.initial = bar.n = summary.done + summary.failed
            bar.update(summary.done + summary.failed - bar.n)
            bar.set_postfix_str(f"{summary.failed} failed" if summary.failed else "")
            latest = summary

        yield report, lambda: latest


def _report(summary: Summary) -> str:
    earlier = summary.done - summary.drawn
    parts = [f"{summary.done} of {summary.total} pictures are done"]
    if earlier:
        parts.append(f"{earlier} of them by earlier runs")
    if summary.failed:
        parts.append(f"{summary.failed} failed (see the column error of manifest.parquet)")
    if summary.cut:
        parts.append(f"too long prompts: {summary.cut} (their ends: column unread)")
    rate = f", {summary.drawn / summary.seconds:.3g} a second" if summary.drawn else ""
    return ", ".join(parts) + f"; {summary.seconds:.1f} s{rate}"
