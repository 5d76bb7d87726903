"""The command `demo`."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import socket
from dataclasses import dataclass
from typing import Annotated

import typer

from ..checks import check_count

_OLDEST_GRADIO = 6


@dataclass(frozen=True, kw_only=True)
class DemoCommand:
    """Open a web page that draws with and without guidance, and shows what it does at each step.

    It needs gradio: pip install gradio. Nothing leaves the machine.

    \b
    Examples:
      sag demo
      sag demo --model ./my-stable-diffusion --port 8000
      sag demo --host 0.0.0.0 --max-steps 30 --max-queue 8
    """

    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|FILE|HUB_ID",
            help="A builtin model, a diffusers folder, a .safetensors file or a hub id.",
        ),
    ] = "emoji"
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 7860
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto"
    max_steps: Annotated[int, typer.Option(help="Largest number of sampling steps.")] = 100
    max_size: Annotated[int, typer.Option(help="Largest side, in pixels.")] = 1024
    max_images: Annotated[int, typer.Option(help="Largest number of pictures in a grid.")] = 24
    max_queue: Annotated[int, typer.Option(help="Largest number of waiting visitors.")] = 32

    def run(self) -> None:
        """Serve the page until it is interrupted."""
        _check_gradio()

        from ..generate import check_device_name, check_dtype_name, find_model
        from ..generate.hub import is_hub_id

        check_device_name(self.device)
        check_dtype_name(self.dtype)
        for name in ("max_steps", "max_size", "max_images", "max_queue"):
            check_count(name, getattr(self, name), least=8 if name == "max_size" else 1)
        # A model on this machine is found at once, and one on the hub after all other checks.
        if not is_hub_id(self.model):
            find_model(self.model)
        _check_address(self.host, self.port)
        find_model(self.model)

        from ..demo import Limits, build_page
        from ..generate import load_pipeline
        from .output import hide_loading_bars

        hide_loading_bars()
        limits = Limits(
            max_steps=self.max_steps,
            max_size=self.max_size,
            max_images=self.max_images,
            max_queue=self.max_queue,
        )
        model = load_pipeline(self.model, self.device, self.dtype)
        model.pipeline.set_progress_bar_config(disable=True)
        page = build_page(model, limits)
        page.app.launch(server_name=self.host, server_port=self.port, **page.launch_settings)


def _check_gradio() -> None:
    advice = f"pip install 'gradio>={_OLDEST_GRADIO}'"
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(f"the demo needs gradio: {advice}")
    version = importlib.metadata.version("gradio")
    if int(version.partition(".")[0]) < _OLDEST_GRADIO:
        raise ValueError(
            f"the demo needs gradio {_OLDEST_GRADIO}, and {version} is there: {advice}"
        )


def _check_address(host: str, port: int) -> None:
    """Refuse an address that no page can be served at, before a model is loaded for it."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port={port} must be between 1 and 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host={host!r} is unknown: give a name or an address") from error
    family, kind, *_, address = found[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(f"host={host!r} must be an address of this machine") from error
            raise ValueError(f"port={port} can't be used: {error.strerror}") from error
