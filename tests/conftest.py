"""What a test run says about supported pipelines: `pytest --support-report=FILE`.

Tests marked `supports` are about one pipeline: the one that the mark names, that of their
parameter `name`, or the `task` of one. The property "method" is the short name of a guidance, the
first word of the parameter `method`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

pytest_plugins = ["start_pictures"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-report", type=Path, help="JSON file to write")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "supports(property, pipeline=None): a cell of docs/support.md"
    )
    path = config.getoption("--support-report")
    if path is not None:
        config.pluginmanager.register(SupportReport(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("supports"):
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            pipeline = mark.kwargs.get("pipeline") or parameters["name"]
            if "task" in parameters:
                pipeline = f"{pipeline}, {parameters['task']}"
            for name in mark.args:
                name = parameters["method"].split(",")[0] if name == "method" else name
                item.user_properties.append(("supports", (pipeline, name)))


class SupportReport:
    """Gathers the outcomes of marked tests, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, dict[str, bool]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or report.skipped:
            return
        for key, value in report.user_properties:
            if key == "supports":
                pipeline, name = value
                cells = self.outcomes.setdefault(pipeline, {})
                cells[name] = cells.get(name, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        versions = {module.__name__: module.__version__ for module in (diffusers, transformers)}
        report: dict[str, Any] = {
            "versions": {**versions, "torch": torch.__version__.split("+")[0]},
            "pipelines": self.outcomes,
        }
        self.path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
