"""The demo, launched in the test's own process."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from self_attention_guidance.demo import Limits, build_page
from self_attention_guidance.generate import LoadedPipeline, load_pipeline

SETTINGS: dict[str, Any] = {
    "prompt": "cat",
    "negative_prompt": "",
    "seed": 4,
    "steps": 4,
    "scheduler": "",
    "guidance_scale": 3.0,
    "sag_scale": 2.0,
    "blur_sigma": 3.0,
    "threshold": 1.0,
    "start": 0.0,
    "stop": 1.0,
    "every": 1,
    "size": 0,
}


@contextmanager
def running(**limits: int) -> Iterator[tuple[str, LoadedPipeline]]:
    """The address of a running demo, and the model that it draws with."""
    model = load_pipeline("emoji", "cpu")
    model.pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = build_page(model, Limits(**limits))
        page.app.launch(
            server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **page.launch_settings
        )
    try:
        yield page.app.local_url, model
    finally:
        page.app.close(verbose=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()  # gradio leaves event loops open, which later tests would be warned of
