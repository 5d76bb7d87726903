"""Between the page and the studio: cancelling, progress, and errors in one plain sentence."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from .limits import VisitorSettings
from .studio import Watch

SETTINGS = tuple(VisitorSettings.__dataclass_fields__)
_TEXTS = ("prompt", "negative_prompt", "scheduler", "method", "layers")
_WHOLE = ("seed", "steps", "every", "size")
_log = logging.getLogger(__name__)


class Cancelled(Exception):  # it is no error
    """A visitor pressed the button."""


class Visits:
    """Who is drawing, so that each can be stopped."""

    def __init__(self) -> None:
        """Nobody is drawing."""
        self._running: dict[str, threading.Event] = {}
        self._turn = threading.Lock()

    def cancel(self, request: gr.Request) -> None:
        """Stop what this visitor draws, at its next step."""
        with self._turn:
            stopped = self._running.get(str(request.session_hash))
        if stopped is not None:
            stopped.set()

    def begin(self, visitor: str) -> threading.Event:
        """A new drawing; what the visitor drew before is stopped."""
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
        """What gradio calls for a button.

        Args:
            draw: Called with the visitor's settings, the values of `extra`, and whom to tell the
                progress; returns the outputs.
            outputs: How many there are; they stay as they are after a cancelled drawing.
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
                raise gr.Error(_sentence(error), print_exception=False) from error
            except Exception as error:
                _log.exception("a drawing failed")
                told = "The picture could not be drawn; the log of the server says why."
                raise gr.Error(told, print_exception=False) from error
            finally:
                self.end(visitor, stopped)

        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, positional) for name in (*SETTINGS, *extra)]
        parameters.append(inspect.Parameter("request", positional, annotation=gr.Request))
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
    """The values of the controls; those that count things as whole numbers."""
    typed: dict[str, Any] = {}
    for name, value in zip(SETTINGS, values, strict=True):
        if value is None:
            if name not in _TEXTS:
                raise ValueError(f"{name} is empty")
            value = ""
        typed[name] = int(value) if name in _WHOLE and _is_whole(value) else value
    return VisitorSettings(**typed)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
