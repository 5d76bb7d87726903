"""A worker that dies at once. Importing it takes no time, which every new process of it would."""

from __future__ import annotations

import os
import signal
from typing import Any


def die() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)
