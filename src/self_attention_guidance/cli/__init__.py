"""The command line `sag`.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer

from .. import __version__
from ..checks import GuidanceError
from .batch import BatchCommand
from .compare import CompareCommand
from .config import expand_home
from .convert import convert_command
from .demo import DemoCommand
from .errors import as_typed, machine_failure, wrong_value
from .evaluate import evaluate_command
from .generate import GenerateCommand
from .info import info_command
from .layers import layers_command
from .output import print_error, reason_of, replace_unprintable
from .sample import SampleCommand
from .tune import TuneCommand


class Command(Protocol):
    """A command that is a dataclass of its options."""

    def run(self) -> None:
        """Run the command."""
        ...


# typer does not export the base class of its errors about the command line itself.
_UsageError: Any = typer.BadParameter.__base__


def _run(command: Command | None, **_: object) -> None:
    """Run a command that typer parsed; a command that is a function has run already."""
    if command is not None:
        command.run()


app = typer.Typer(
    name="sag",
    result_callback=_run,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("generate")(GenerateCommand)
app.command("info")(info_command)
app.command("compare")(CompareCommand)
app.command("sample")(SampleCommand)
app.command("batch")(BatchCommand)
app.command("convert")(convert_command)
app.command("layers")(layers_command)
app.command("evaluate")(evaluate_command)
app.command("tune")(TuneCommand)
app.command("demo")(DemoCommand)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"self-attention-guidance {__version__}")
        raise typer.Exit


@app.callback()
def _sag(  # pyright: ignore[reportUnusedFunction]  # typer calls it
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Self-Attention Guidance: better pictures from diffusion models, without training.

    \b
    Examples:
      sag generate "red heart" --seed 7
      sag info out/00000-7.png
      sag compare "grinning face" "" --sag-scales 0,0.5,1
      sag batch prompts.jsonl --out pictures --workers 2
      sag sample --model ./my-pixel-model --num-samples 64
      sag evaluate samples.npz ./training-pictures
      sag tune ./my-model --reference ./training-pictures --budget 30m
      sag layers emoji
      sag demo
    """


@contextmanager
def _quiet_libraries() -> Generator[None]:
    """Hide the libraries' warnings, which are for developers."""
    # Waiting threads sleep: spinning slows small models tenfold where other programs run, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("once", message="no step is guided")
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Show a warning of this package in one line, like an error."""
    typer.echo(f"warning: {message}", err=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments without the program's name; `None` takes those of the process.

    Returns:
        The exit status: 0, 2 after a user's error (one line on stderr), 130 after Ctrl-C. With
        `SAG_DEBUG=1` in the environment, the traceback is printed before the line.
    """
    replace_unprintable()
    command = typer.main.get_command(app)
    expand_home(command)
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with _quiet_libraries():
            status = command.main(args=given, prog_name="sag", standalone_mode=False)
    except _UsageError as error:
        return _fail(wrong_value(error, given) or error.format_message(), 2)
    except (ValueError, OSError, FloatingPointError, GuidanceError) as error:
        return _fail(as_typed(reason_of(error), command, given), 2)
    except typer.Abort as error:  # what click makes of an interrupt, and of a file that is cut off
        if isinstance(error.__cause__, EOFError):
            return _fail(f"a file ends too early: {error.__cause__}", 2)
        return _fail("interrupted", 130)
    except (MemoryError, RuntimeError) as error:
        failure = machine_failure(error, command, given)
        if failure is None:
            raise
        return _fail(failure, 2)
    except KeyboardInterrupt:
        status = 130
    if status == 130:
        return _fail("interrupted", 130)
    return int(status or 0)


def _fail(message: str, status: int) -> int:
    if os.environ.get("SAG_DEBUG") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print_error(message)
    return status
