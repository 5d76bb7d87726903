"""Between the page and the studio: cancelling, progress, and errors in one plain sentence."""

from __future__ import annotations

import html
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from .limits import VisitorSettings
from .studio import Watch

SETTINGS = tuple(VisitorSettings.__dataclass_fields__)
FILES = ("image", "mask")
_TEXTS = ("prompt", "negative_prompt", "scheduler", "method", "layers")
_WHOLE = ("seed", "steps", "every", "size")
_log = logging.getLogger(__name__)


class Cancelled(Exception):  # it is no error
    """A visitor pressed the cancel button."""


class Visits:
    """The drawings of visitors, each of which can be stopped."""

    def __init__(self) -> None:
        """Start without any drawing."""
        self._running: dict[str, threading.Event] = {}
        self._turn = threading.Lock()

    def cancel(self, request: gr.Request) -> None:
        """Stop what this visitor draws, at its next step."""
        with self._turn:
            stopped = self._running.get(str(request.session_hash))
        if stopped is not None:
            stopped.set()

    def begin(self, visitor: str) -> threading.Event:
        """Start a drawing, and stop the visitor's earlier one."""
        stopped = threading.Event()
        with self._turn:
            earlier = self._running.get(visitor)
            self._running[visitor] = stopped
        if earlier is not None:
            earlier.set()
        return stopped

    def end(self, visitor: str, stopped: threading.Event) -> None:
        """Forget a drawing."""
        with self._turn:
            if self._running.get(visitor) is stopped:
                del self._running[visitor]

    def endpoint(
        self,
        draw: Callable[..., Any],
        outputs: int,
        extra: Sequence[str] = (),
    ) -> Callable[..., Any]:
        """The function that gradio calls for a button.

        Args:
            draw: Called with the visitor's settings, the values of `extra`, and a function that
                takes the progress; returns the outputs.
            outputs: Number of outputs; a cancelled drawing does not change them.
            extra: Names of further inputs.

        Returns:
            A function of all controls. Its parameters have their names in the app's API.
        """

        def run(*values: Any) -> Any:
            *inputs, request, progress = values
            visitor = str(request.session_hash)
            stopped = self.begin(visitor)
            try:
                asked = settings_of(inputs[: len(SETTINGS)])
                return draw(asked, *inputs[len(SETTINGS) :], _watch(progress, stopped))
            except Cancelled:
                gr.Info("Cancelled.")
                return [gr.skip()] * outputs if outputs > 1 else gr.skip()
            except (ValueError, TypeError, FloatingPointError) as error:
                message = _sentence(error, dict(zip(SETTINGS, inputs, strict=False)))
                raise gr.Error(message, print_exception=False) from error
            except Exception as error:
                _log.exception("a drawing failed")
                message = "The picture could not be drawn; the log of the server says why."
                raise gr.Error(message, print_exception=False) from error
            finally:
                self.end(visitor, stopped)

        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        # A default of `None` lets the app's API leave out what may be empty on the page.
        parameters = [
            inspect.Parameter(name, positional, default=None)
            for name in (*SETTINGS, *extra, "request")
        ]
        parameters.append(inspect.Parameter("progress", positional, default=gr.Progress()))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {"request": gr.Request}
        return run


def _watch(progress: Any, stopped: threading.Event) -> Watch:
    def watch(share: float) -> None:
        if stopped.is_set():
            raise Cancelled
        progress(share, desc="drawing")

    watch(0.0)
    return watch


def settings_of(values: Sequence[Any]) -> VisitorSettings:
    """The settings from the values of the controls; counts become whole numbers."""
    typed: dict[str, Any] = dict(zip(SETTINGS, values, strict=True))
    for name, value in typed.items():
        if value is None and name in _TEXTS:
            typed[name] = ""
        elif value is None and name not in FILES:
            raise ValueError(f"{name} is empty")
        elif name in _WHOLE and isinstance(value, float) and value.is_integer():
            typed[name] = int(value)
    return VisitorSettings(**typed)


def _sentence(error: Exception, inputs: Mapping[str, Any]) -> str:
    """The error in one line, without the folders of a visitor's files on this machine.

    Messages are shown as HTML, and may quote what stands in a link.
    """
    message = str(error)
    for path in filter(None, (inputs.get(name) for name in FILES)):
        message = message.replace(path, Path(path).name)
    return html.escape(" ".join(message.split())[:300], quote=False)
