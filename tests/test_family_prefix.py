"""What lies before the first weakened block of a U-Net is computed once, with the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

from family import KINDS, METHODS, denoiser_of, difference, draw_prompts, traces
from self_attention_guidance import PerturbedAttentionGuidance, SelfAttentionGuidance, attach
from self_attention_guidance.denoiser.prefix import blocks_before
from self_attention_guidance.guidance import guided_call
from test_stable_diffusion_tasks import TASKS
from test_stable_diffusion_tasks import draw as draw_task

U_NETS = ("Stable Diffusion", "Stable Diffusion XL", "ADM and IDDPM")


def calls_of(pipe: Any) -> list[str]:
    """Notes which of the first down block, the mid block and the last up block compute."""
    called: list[str] = []
    unet = denoiser_of(pipe)
    for name in ("down_blocks.0", "down_blocks.1", "mid_block"):
        part = unet.get_submodule(name).resnets[0]
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    return called


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("name", U_NETS)
@pytest.mark.parametrize("layers", [None, "mid", "down.1", "up"])
def test_it_draws_what_whole_weakened_passes_draw(
    monkeypatch: pytest.MonkeyPatch, name: str, cfg: float, method: str, layers: Any
) -> None:
    if layers == "down.1" and name != "ADM and IDDPM":
        pytest.skip("its second down block has no attention")
    pipe, draw = KINDS[name].make(), KINDS[name].draw
    untouched = traces(pipe)
    guidance = METHODS[method](layers=layers)
    with guidance.attach(pipe):
        found = draw(pipe, (3, 4), cfg)
    assert traces(pipe) == untouched
    monkeypatch.setattr(guided_call, "blocks_before", lambda *_: [])
    with guidance.attach(pipe):
        expected = draw(pipe, (3, 4), cfg)
    if cfg == 1 or name == "ADM and IDDPM":  # no other rows are in the batch of the first pass
        assert torch.equal(found, expected)
    assert difference(found, expected) < 1e-4


def test_down_blocks_run_once_a_step_and_the_mid_block_twice() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    called = calls_of(pipe)
    with PerturbedAttentionGuidance().attach(pipe):
        draw_prompts(pipe, num_inference_steps=1)
    assert called == ["down_blocks.0", "down_blocks.1", "mid_block", "mid_block"]
    called.clear()
    with METHODS["tpg"](layers="down.0").attach(pipe):
        draw_prompts(pipe, num_inference_steps=1)
    assert called == ["down_blocks.0", "down_blocks.1", "mid_block"] * 2


def test_self_attention_guidance_beside_it_computes_all() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    called = calls_of(pipe)
    with attach(pipe, SelfAttentionGuidance(), PerturbedAttentionGuidance()):
        draw_prompts(pipe, num_inference_steps=1)
    assert called.count("down_blocks.0") == 2
    assert called.count("mid_block") == 3


def test_networks_that_are_compiled_or_offloaded_in_part_compute_all() -> None:
    for change in (
        lambda unet: unet.down_blocks[0].compile(backend="eager"),
        lambda unet: cpu_offload(unet, torch.device("cpu")),
    ):
        pipe = KINDS["Stable Diffusion"].make()
        with PerturbedAttentionGuidance().attach(pipe):
            expected = draw_prompts(pipe)
        change(pipe.unet)
        called = calls_of(pipe)
        with PerturbedAttentionGuidance().attach(pipe):
            assert difference(draw_prompts(pipe), expected) < 1e-4
        assert called == ["down_blocks.0", "down_blocks.1", "mid_block"] * 6
    torch.compiler.reset()


def test_compiled_networks_have_no_prefix() -> None:
    unet = denoiser_of(KINDS["Stable Diffusion"].make())
    assert len(blocks_before(unet, ["mid_block.attentions.0"])) == 2
    assert not blocks_before(torch.compile(unet), ["mid_block.attentions.0"])
    unet.compile()
    assert not blocks_before(unet, ["mid_block.attentions.0"])


@pytest.mark.parametrize("task", ["T2I-Adapter", "two ControlNets", "ControlNet, guess mode"])
def test_what_is_added_to_down_blocks_is_added_once(
    monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    pipe, arguments = TASKS[task]()
    drawn: list[Tensor] = []
    for _ in range(2):
        with PerturbedAttentionGuidance().attach(pipe):
            drawn.append(draw_task(pipe, (3, 4), arguments))
        monkeypatch.setattr(guided_call, "blocks_before", lambda *_: [])
    assert difference(*drawn) < 1e-5
