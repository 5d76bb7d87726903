"""What guidance costs: time, network evaluations and memory, against none and diffusers' own class.

    python benchmarks/cost/bench.py
    python benchmarks/cost/bench.py --networks emoji --modes eager,compiled --json bench.json
    python benchmarks/cost/bench.py --networks sd15,sdxl --dtypes bfloat16 --cfg on --pairs 5
    python benchmarks/cost/bench.py --networks sd15 --methods pag --cfg on --steps 25

Time, network evaluations per picture and peak memory of the pipeline without guidance, with exact
guidance, with the fast preset, and of diffusers' own class on the same weights. All take turns in
one run; what counts are the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from measuring import bench, work
from plan import plan
from ratio_plot import check_plotting, write_plot
from self_attention_guidance.checks import check_count
from self_attention_guidance.cli.options import check_outputs
from self_attention_guidance.cli.output import hide_loading_bars, progress
from self_attention_guidance.generate import find_device
from self_attention_guidance.guidance import METHODS
from table import Report, as_json, format_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write what was asked for.

    Args:
        arguments: Of the command line; `None` is that of the process.

    Returns:
        The exit status: 0, or 2 after a user's error.
    """
    options = parse_arguments(arguments)
    try:
        measure(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def measure(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Args:
        options: Of `parse_arguments`.

    Raises:
        ValueError: One is unknown or out of its range.
    """
    check_outputs({"json": options.json, "plot": options.plot}, options.overwrite)
    check_count("pairs", options.pairs)
    if options.plot is not None:
        check_plotting()
    configurations = plan(
        options.networks.split(","),
        options.modes.split(","),
        options.dtypes.split(","),
        device=str(find_device(options.device)),
        cfg=options.cfg,
        size=options.size,
        steps=options.steps,
        batch_size=options.batch_size,
        methods=options.methods.split(","),
    )
    hide_loading_bars()
    total = work(configurations, options.pairs, options.memory)
    with progress(total, "measuring") as advance:
        results = bench(configurations, options.pairs, options.memory, advance)
    report = Report(options.pairs, results)
    if options.json is not None:
        text = json.dumps(as_json(report), indent=2, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot is not None:
        write_plot(options.plot, report)
    print(format_table(report))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Args:
        arguments: `None` is that of the process.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    named = "default: %(default)s"
    add(
        "--networks",
        metavar="NAMES",
        default="emoji,emoji-adm",
        help="of emoji, emoji-adm (builtin), sd15, sdxl (random weights, 4 and 11 GB); " + named,
    )
    add("--modes", metavar="NAMES", default="eager", help="of eager, compiled; " + named)
    add(
        "--dtypes",
        metavar="NAMES",
        default="float32",
        help="of float32, bfloat16, float16; " + named,
    )
    add(
        "--methods",
        metavar="NAMES",
        default="sag",
        help=f"of {', '.join(METHODS)}; diffusers has classes for sag and pag; " + named,
    )
    add("--cfg", default="both", help="both, on or off; emoji-adm has none; " + named)
    add("--pairs", type=int, default=7, help="timed rounds, of every variant once; " + named)
    add("--steps", type=int, help="sampling steps; default: the builtin model's, else 8")
    add(
        "--size",
        type=int,
        help="pixels of the side for sd15 and sdxl; default: 256 on a CPU, else 512 and 1024",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...; " + named)
    add("--batch-size", type=int, default=1, help="pictures made at once; " + named)
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory; on a CPU in a process for each variant; " + named,
    )
    add("--json", type=Path, metavar="FILE.json", help="write the figures here, too")
    add("--plot", type=Path, metavar="FILE.png", help="draw the time ratios")
    add("--overwrite", action="store_true", help="replace existing files")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
