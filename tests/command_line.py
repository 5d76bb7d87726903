"""Run the command line inside the test's own process."""

from __future__ import annotations

import pytest

from self_attention_guidance.cli import main


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must fail as a user's error, and returns its one line."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err
