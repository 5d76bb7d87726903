"""A process that draws once and prints how much memory it took: see `memory.of_process`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from known_networks import NETWORKS, load
from memory import Memory, peak_of_this_process
from plan import Configuration
from variants import Subject


def main(task: str) -> None:
    """Draws, and prints a `Memory` as JSON.

    Args:
        task: JSON of a configuration and a variant.
    """
    given: dict[str, Any] = json.loads(task)
    configuration = Configuration(**given["configuration"])
    network = NETWORKS[configuration.network]
    pipeline = load(network, configuration.dtype, configuration.device)
    subject = Subject(network, configuration, pipeline)
    before = peak_of_this_process()
    subject.draw(given["variant"])
    print(json.dumps(asdict(Memory(before, peak_of_this_process()))))


if __name__ == "__main__":
    main(sys.argv[1])
