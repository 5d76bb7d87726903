"""What lies before the first weakened block is computed once, with the same result."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel, ZImagePipeline
from torch import Tensor

import tiny_transformers
from family import KINDS, METHODS, denoiser_of, difference, draw_prompts, traces
from self_attention_guidance import PerturbedAttentionGuidance, SelfAttentionGuidance, attach
from self_attention_guidance.denoiser.layers import block_names
from self_attention_guidance.denoiser.prefix import blocks_before
from self_attention_guidance.guidance import guided_call
from test_stable_diffusion_tasks import TASKS
from test_stable_diffusion_tasks import draw as draw_task
from tiny import tiny_scheduler

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
    assert len(blocks_before(unet)) == 2
    assert not blocks_before(torch.compile(unet))
    unet.compile()
    assert not blocks_before(unet)


TRANSFORMERS = [name for name in KINDS if name not in (*U_NETS, "Kolors")]
TWO_HALVES = ("DiT", "PixArt-Sigma", "Stable Diffusion 3.5", "Hunyuan-DiT", "AuraFlow", "HiDream")
"""Whose weakened pass has fewer rows under classifier-free guidance, and texts of one length."""


def block_calls(pipe: Any) -> list[str]:
    """Notes which blocks compute, by what they hold; those that are replayed do not."""
    called: list[str] = []
    network = denoiser_of(pipe)
    for name in block_names(network):
        layer = next(m for m in network.get_submodule(name).children() if [*m.parameters()])
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    return called


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("layers", ["default", "last", "first"])
def test_a_transformer_draws_what_whole_weakened_passes_draw(
    monkeypatch: pytest.MonkeyPatch, name: str, cfg: float, method: str, layers: str
) -> None:
    pipe, draw = KINDS[name].make(), KINDS[name].draw
    network = denoiser_of(pipe)
    own = {"default": None, "last": block_names(network)[-1], "first": block_names(network)[0]}
    guidance = METHODS[method](layers=own[layers])
    called = block_calls(pipe)
    draw(pipe, (3,), cfg, num_inference_steps=2)
    untouched = traces(pipe)
    called.clear()
    with torch.no_grad(), guidance.attach(pipe):
        found = draw(pipe, (3, 4), cfg, num_inference_steps=2)
        computed = len(called)
    monkeypatch.setattr(guided_call, "blocks_before", lambda *_: [])
    called.clear()
    with torch.no_grad(), guidance.attach(pipe) as handle:
        expected = draw(pipe, (3, 4), cfg, num_inference_steps=2)
    chosen = guidance.chosen(network)[0]
    order = list(dict.fromkeys(called))
    before = next(n for n, block in enumerate(order) if f"{chosen}.".startswith(f"{block}."))
    assert layers == "default" or (before == 0) == (layers == "first")
    assert len(called) - computed == before * handle.steps
    assert difference(found, expected) < 1e-4
    if cfg == 1 or name not in (*TWO_HALVES, "Z-Image"):
        assert torch.equal(found, expected)
    assert traces(pipe) == untouched


def saved_calls(pipe: Any, **more: Any) -> int:
    """By how many calls of blocks a step's weakened pass of the last block is shorter."""
    draw, called = tiny_transformers.draw, block_calls(pipe)
    guidance = PerturbedAttentionGuidance(layers=block_names(denoiser_of(pipe))[-1])
    with guidance.attach(pipe):
        draw(NAME_OF[type(pipe)], pipe, (3, 4), num_inference_steps=2, **more)
    return 2 * 2 * len(set(called)) - len(called)


NAME_OF = {PixArtSigmaPipeline: "PixArt-Sigma", ZImagePipeline: "Z-Image"}


class Own(PixArtTransformer2DModel):
    """A network of one's own, which may do anything between its blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def with_own_class(network: Any) -> None:
    network.__class__ = Own


FALLBACKS: dict[str, Callable[[Any], Any]] = {
    "a compiled block": lambda network: network.transformer_blocks[1].compile(backend="eager"),
    "weights moved by layers": lambda network: cpu_offload(network, torch.device("cpu")),
    "a forward of one's own": with_own_class,
    "a hook on a block": lambda network: network.transformer_blocks[0].register_forward_hook(
        lambda *_: None
    ),
    "a replaced forward": lambda network: vars(network.transformer_blocks[0]).update(
        forward=network.transformer_blocks[0].forward
    ),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_transformers_compute_all_where_blocks_may_do_something_else(reason: str) -> None:
    pipe = KINDS["PixArt-Sigma"].make()
    assert saved_calls(pipe) == 2 * 2
    with PerturbedAttentionGuidance().attach(pipe):
        expected = KINDS["PixArt-Sigma"].draw(pipe)
    FALLBACKS[reason](pipe.transformer)
    assert saved_calls(pipe) == 0
    with PerturbedAttentionGuidance().attach(pipe):
        assert difference(KINDS["PixArt-Sigma"].draw(pipe), expected) < 1e-4
    torch.compiler.reset()


def test_gradient_checkpoints_compute_all_where_gradients_are_kept() -> None:
    network = denoiser_of(KINDS["PixArt-Sigma"].make())
    assert len(blocks_before(network)) == 3
    network.enable_gradient_checkpointing()
    assert not blocks_before(network)
    with torch.no_grad():
        assert len(blocks_before(network)) == 3


def test_rows_with_shorter_texts_than_the_longest_compute_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = KINDS["Z-Image"].make()
    assert saved_calls(pipe) == 2 * 3
    # The network fills texts up to 32 tokens, or 64.
    longer = list(tiny_transformers.texts([50, 51], tokens=40))
    assert saved_calls(pipe, prompt_embeds=longer) == 2 * 3
    assert saved_calls(pipe, negative_prompt_embeds=longer) == 0
    drawn: list[Tensor] = []
    for _ in range(2):
        with PerturbedAttentionGuidance().attach(pipe):
            drawn.append(KINDS["Z-Image"].draw(pipe, (3, 4), negative_prompt_embeds=longer))
        monkeypatch.setattr(guided_call, "blocks_before", lambda *_: [])
    assert difference(*drawn) < 1e-4


def with_block(block: Any, forward: Callable[..., Tensor]) -> None:
    """Let a block be of a class of its own, whose forward gets the block's, and its arguments."""
    cls = type(block)

    def own(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward(functools.partial(cls.forward, self), hidden_states, *args, **kwargs)

    block.__class__ = type("OwnBlock", (cls,), {"forward": own})


def test_a_result_that_was_changed_in_place_is_not_used_again() -> None:
    pipes = [KINDS["PixArt-Sigma"].make() for _ in range(2)]
    last = [pipe.transformer.transformer_blocks[2] for pipe in pipes]
    with_block(last[0], lambda run, states, *args, **more: run(states.mul_(1.5), *args, **more))
    with_block(last[1], lambda run, states, *args, **more: run(states * 1.5, *args, **more))
    drawn: list[Tensor] = []
    for pipe, saved in zip(pipes, (0, 2 * 2), strict=True):
        with PerturbedAttentionGuidance(layers="blocks.2").attach(pipe):
            drawn.append(KINDS["PixArt-Sigma"].draw(pipe))
        assert saved_calls(pipe) == saved
    assert difference(*drawn) < 1e-4


def test_it_is_the_same_in_inference_mode_and_with_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = KINDS["PixArt-Sigma"].make()
    with PerturbedAttentionGuidance().attach(pipe):
        expected = KINDS["PixArt-Sigma"].draw(pipe)
        # There a whole weakened pass runs: torch counts no changes of such tensors.
        with torch.inference_mode():
            assert difference(KINDS["PixArt-Sigma"].draw(pipe), expected) < 1e-4
    network, scheduler = pipe.transformer, tiny_scheduler()
    scheduler.set_timesteps(2)
    text, timestep = torch.randn(2, 6, tiny_transformers.WIDTH), scheduler.timesteps[0].expand(2)
    x, gradients = torch.randn(2, 4, 8, 8), list[Tensor]()
    guidance = PerturbedAttentionGuidance(layers="blocks.2")
    for _ in range(2):
        given = x.clone().requires_grad_()
        with guidance.attach(network, scheduler=scheduler, batch_layout="single"):
            output = network(given, timestep=timestep, encoder_hidden_states=text)[0]
        (gradient,) = torch.autograd.grad(output.square().sum(), given)
        gradients.append(gradient)
        monkeypatch.setattr(guided_call, "blocks_before", lambda *_: [])
    assert difference(*gradients) < 1e-4


def test_few_results_are_kept() -> None:
    pipe = KINDS["PixArt-Sigma"].make()
    blocks, kept = pipe.transformer.transformer_blocks, list[int]()
    blocks.extend(copy.deepcopy(blocks[0]) for _ in range(5))
    returned: list[weakref.ref[Tensor]] = []

    def watched(run: Any, states: Tensor, *args: Any, **more: Any) -> Tensor:
        result: Tensor = run(states, *args, **more)
        returned.append(weakref.ref(result))
        return result

    for block in blocks[:-1]:
        with_block(block, watched)
    blocks[-1].attn1.register_forward_hook(
        lambda *_: kept.append(sum(each() is not None for each in returned))
    )
    with PerturbedAttentionGuidance(layers="blocks.7").attach(pipe):
        KINDS["PixArt-Sigma"].draw(pipe, num_inference_steps=1)
    assert kept == [1, 1]


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
