"""The command `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checks import check_count, seeds_of
from .options import check_outputs
from .output import print_line, progress
from .tune import Features

# More halves change no digit of an interval.
_MOST_HALVES = 10_000

if TYPE_CHECKING:
    from ..evaluate import LoadedSet, PictureSource, Report, SampleReport, SavedStatistics


def evaluate_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SAMPLES... REFERENCE",
            help="Folders of pictures, .npz files with arr_0, or saved statistics; the others are"
            " compared with the last one.",
        ),
    ],
    features: Annotated[
        str, typer.Option(help="emoji (pictures of the builtin models) or inception.")
    ] = "emoji",
    bootstrap: Annotated[
        int, typer.Option(help="Random halves for the 95 % intervals; 0 is none.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the halves.")] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Pictures encoded at once; results do not depend on it.")
    ] = 64,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw all sets in one figure.")
    ] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Save the reference's features for later runs."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Measure how good samples are against a reference, and print a table.

    Fréchet distance (FID with Inception's features), sFID, KID, Inception Score, precision and
    recall (k = 3), each with a 95 % interval. A single path with --save-statistics is encoded
    and saved.

    \b
    Examples:
      sag evaluate samples.npz ./emoji-art
      sag evaluate unguided.npz guided.npz ./emoji-art --plot compare.png --json compare.json
      sag evaluate in256.npz VIRTUAL_imagenet256_labeled.npz --features inception
    """
    outputs = {"json_file": json_file, "plot": plot, "save_statistics": save_statistics}
    check_outputs(outputs, overwrite)
    _check_values(features, bootstrap, seed, batch_size)
    if len(paths) < 2 and save_statistics is None:
        raise ValueError("SAMPLES and REFERENCE must be given: one path needs --save-statistics")
    for name in ("json_file", "plot"):
        file = outputs[name]
        if len(paths) < 2 and file is not None:
            raise ValueError(f"{name}={str(file)!r} needs samples: one path is only the reference")

    for path in paths:
        if not path.exists():
            raise ValueError(
                f"{str(path)!r} does not exist: give a folder of pictures or an .npz file"
            )

    from .. import evaluate

    if plot is not None:
        evaluate.check_plotting()
    *samples, reference = _load(paths, features, batch_size, save_statistics is not None)
    if save_statistics is not None:
        evaluate.write_statistics(save_statistics, reference)
        print_line(save_statistics)
    if samples:
        measured = _measure(samples, reference, bootstrap, seed)
        sets = {one.name: sample.features for one, sample in zip(measured, samples, strict=True)}
        sets["the reference"] = reference.features
        notes = evaluate.advice({name: one for name, one in sets.items() if one is not None})
        report = evaluate.Report(reference, features, bootstrap, seed, measured, notes)
        _show(report, json_file, plot)


def _check_values(features: str, bootstrap: int, seed: int, batch_size: int) -> None:
    encoders = [each.value for each in Features]
    if features not in encoders:
        raise ValueError(f"--features={features!r} must be one of {', '.join(encoders)}")
    check_count("--bootstrap", bootstrap, least=0, most=_MOST_HALVES)
    if bootstrap == 1:
        raise ValueError("--bootstrap=1 has no spread: it must be 0, for no intervals, or above 1")
    seeds_of(seed, 1)
    check_count("--batch-size", batch_size)


def _load(
    paths: Sequence[Path], features: str, batch_size: int, is_saving: bool
) -> list[LoadedSet]:
    from ..evaluate import check_savable, check_sizes, load_encoder, load_set, open_set

    opened = {path: open_set(path) for path in paths}
    *samples, reference = paths
    for path in samples:
        check_sizes(opened[path], opened[reference])
    if is_saving:
        check_savable(opened[reference])
    encoder = load_encoder(features)
    # Saved statistics first: what is wrong with them must not be seen after hours of encoding.
    ordered = sorted(opened.values(), key=_pictures)
    with progress(sum(map(_pictures, ordered)), "encoding") as advance:
        loaded = {one.path: load_set(one, encoder, batch_size, advance) for one in ordered}
    return [loaded[path] for path in paths]


def _pictures(opened: PictureSource | SavedStatistics) -> int:
    from ..evaluate import SavedStatistics

    return 0 if isinstance(opened, SavedStatistics) else opened.count


def _measure(
    samples: Sequence[LoadedSet], reference: LoadedSet, bootstrap: int, seed: int
) -> list[SampleReport]:
    from ..evaluate import SampleReport, check_fit, measure, short_names, work

    names = short_names([sample.path for sample in samples])
    counts = [len(check_fit(sample, reference).features) for sample in samples]
    total = sum(work(sample, reference) for sample in samples)
    reports: list[SampleReport] = []
    with progress(total, "measuring") as advance:
        for name, sample, count in zip(names, samples, counts, strict=True):
            metrics = measure(sample, reference, bootstrap, seed, advance)
            reports.append(SampleReport(name, sample.path, count, metrics))
    return reports


def _show(report: Report, json_file: Path | None, plot: Path | None) -> None:
    from ..evaluate import as_json, format_table, write_plot
    from ..generate.files import whole_file

    # First, so that figures of hours are seen even if a file cannot be written.
    print_line(format_table(report))
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if json_file is not None:
        text = json.dumps(as_json(report), indent=2, ensure_ascii=False)
        with whole_file(json_file) as file:
            # Names of files may be no UTF-8; JSON has the same escapes.
            file.write((text + "\n").encode("utf-8", "backslashreplace"))
    if plot is not None:
        write_plot(plot, report)
