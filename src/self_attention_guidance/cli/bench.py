"""The command `bench`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import check_count
from .options import check_outputs, parse_names, with_options
from .output import print_line, work_progress

if TYPE_CHECKING:
    from ..bench import Configuration, Report


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The options of `bench`; `None` was not given."""

    networks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Of emoji, emoji-adm (builtin), sd15, sdxl (random weights, 4 and 11 GB).",
        ),
    ] = "emoji,emoji-adm"
    modes: Annotated[str, typer.Option(metavar="NAMES", help="Of eager, compiled.")] = "eager"
    dtypes: Annotated[str, typer.Option(metavar="NAMES", help="Of float32, bfloat16, float16.")] = (
        "float32"
    )
    cfg: Annotated[
        str, typer.Option(help="Classifier-free guidance: both, on or off; emoji-adm has none.")
    ] = "both"
    pairs: Annotated[int, typer.Option(help="Timed rounds; every variant runs once in each.")] = 7
    steps: Annotated[
        int | None,
        typer.Option(
            help="Sampling steps; the fast preset guides a part of them. [default: the builtin"
            " model's, else 8]"
        ),
    ] = None
    size: Annotated[
        int | None,
        typer.Option(
            help="Pixels of the side for sd15 and sdxl. [default: 256 on a CPU, else 512 and 1024]"
        ),
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto"
    batch_size: Annotated[int, typer.Option(help="Pictures made at once.")] = 1
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory; on a CPU in a process for each variant.")
    ] = True
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE.json", help="Write the figures here, too."),
    ] = None
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the time ratios.")] = (
        None
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False


@with_options(BenchOptions)
def bench_command(*, options: BenchOptions) -> None:
    """Measure what guidance costs, and print a table.

    Time, network rows per picture and peak memory of the pipeline without guidance, with exact
    guidance, with the fast preset, and of diffusers' own class on the same weights. All take turns
    in one run; what counts are the ratios within a round.

    \b
    Examples:
      sag bench
      sag bench --networks emoji --modes eager,compiled --plot bench.png --json bench.json
      sag bench --networks sd15,sdxl --dtypes bfloat16 --cfg on --pairs 5
    """
    check_outputs({"json": options.json_file, "plot": options.plot}, options.overwrite)
    check_count("pairs", options.pairs)

    from .. import bench
    from .output import hide_loading_bars

    if options.plot is not None:
        bench.check_plotting()
    hide_loading_bars()
    configurations = _plan(options)
    total = bench.work(configurations, options.pairs, options.memory)
    with work_progress("measuring", total) as advance:
        results = bench.bench(configurations, options.pairs, options.memory, advance)
    _show(bench.Report(options.pairs, results), options)


def _plan(options: BenchOptions) -> list[Configuration]:
    from ..bench import plan
    from ..generate import find_device

    return plan(
        parse_names(options.networks),
        parse_names(options.modes),
        parse_names(options.dtypes),
        device=str(find_device(options.device)),
        cfg=options.cfg,
        size=options.size,
        steps=options.steps,
        batch_size=options.batch_size,
    )


def _show(report: Report, options: BenchOptions) -> None:
    from ..bench import as_json, format_table, write_plot

    if options.json_file is not None:
        content: dict[str, Any] = as_json(report)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        options.json_file.write_text(text + "\n", encoding="utf-8")
    if options.plot is not None:
        write_plot(options.plot, report)
    print_line(format_table(report))
