"""Run the command line: inside the test's own process, or in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def help_without_torch(command: str) -> str:
    """The help of a command, by a process that fails if a heavy library was imported for it."""
    code = (
        "import sys; from self_attention_guidance.cli import main;"
        f"main(['{command}', '--help']);"
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_a_process(*arguments: object) -> subprocess.Popen[str]:
    """Starts a command, as a shell does: Ctrl-C reaches it."""
    command = [sys.executable, "-m", "self_attention_guidance.cli", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def interrupted(process: subprocess.Popen[str], folder: Path) -> str:
    """Sends Ctrl-C when there is a picture below a folder; returns what the command said."""
    deadline = time.monotonic() + 120
    while not any(folder.rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[1]
