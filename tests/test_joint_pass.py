"""For one picture, the weakened network's rows join the pass of the network itself."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from family import KINDS, METHODS, denoiser_of, difference, draw_prompts, traces
from self_attention_guidance import (
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    attach,
)
from self_attention_guidance.denoiser import joint
from self_attention_guidance.generate.counting import counted_rows
from self_attention_guidance.guidance import guided_call
from test_stable_diffusion_parent import noise
from test_stable_diffusion_pipeline import ip_adapter_weights
from test_stable_diffusion_tasks import TASKS
from test_stable_diffusion_tasks import draw as draw_task
from tiny import TEXT_WIDTH, tiny_image_encoder, tiny_pipeline, tiny_scheduler, tiny_unet

U_NETS = ("Stable Diffusion", "Stable Diffusion XL", "Kolors")
PAG = PerturbedAttentionGuidance()


@contextmanager
def in_two_passes(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(guided_call, "joint_pass", lambda *_: None)
        yield


class Rows(TorchFunctionMode):
    """The rows of each call of a convolution of the U-Net; a hook would change what guidance does.

    Attributes:
        found: The numbers of rows.
    """

    def __init__(
        self, pipe: Any, layer: str = "conv_out", act: Callable[[], object] | None = None
    ) -> None:
        """`act` is called before each call."""
        super().__init__()
        self.found: list[int] = []
        self.act, self.weight = act, denoiser_of(pipe).get_submodule(layer).weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and args[1] is self.weight:
            self.found.append(len(args[0]))
            if self.act is not None:
                self.act()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("name", U_NETS)
@pytest.mark.parametrize("layers", [None, "mid", "down", "up", ("mid", "up")])
def test_it_draws_what_two_passes_draw(
    monkeypatch: pytest.MonkeyPatch, name: str, cfg: float, method: str, layers: Any
) -> None:
    pipe, draw = KINDS[name].make(), KINDS[name].draw
    plain, untouched, guidance = draw(pipe, cfg=cfg), traces(pipe), METHODS[method](layers=layers)
    with guidance.attach(pipe) as handle:
        found = draw(pipe, cfg=cfg)
    assert traces(pipe) == untouched
    with in_two_passes(monkeypatch), guidance.attach(pipe) as separate:
        expected = draw(pipe, cfg=cfg)
    assert difference(found, expected) < 1e-4
    assert difference(found, plain) > 1e-2
    assert handle.steps == separate.steps
    assert handle.x0 is not None and separate.x0 is not None
    assert difference(handle.x0, separate.x0) < 1e-4
    assert handle.term is not None and separate.term is not None
    # A term is a small difference of predictions, whose rounding it has.
    assert (handle.term - separate.term).abs().max() < 1e-5 * handle.x0.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", U_NETS)
def test_what_comes_before_the_weakened_rows_join_is_the_same_by_a_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    pipe, draw, guidance = KINDS[name].make(), KINDS[name].draw, METHODS[method](layers="up")
    with guidance.attach(pipe):
        found = draw(pipe)
    monkeypatch.setattr(joint, "part_of", lambda network, _: network.down_blocks[0])
    with guidance.attach(pipe):
        assert torch.equal(draw(pipe), found)


@pytest.mark.parametrize(
    ("layers", "expected"), [("down.0", [2, 3, 3, 3]), ("mid", [2, 2, 3, 3]), ("up", [2, 2, 2, 3])]
)
def test_the_rows_join_where_the_first_weakened_block_begins(
    layers: str, expected: list[int]
) -> None:
    pipe, found = KINDS["Stable Diffusion"].make(), []
    for part in ("conv_in", "down_blocks.1.resnets.0.conv1", "mid_block.resnets.0.conv1"):
        with METHODS["tpg"](layers=layers).attach(pipe), Rows(pipe, part) as rows:
            draw_prompts(pipe, num_inference_steps=1)
        found += rows.found
    with METHODS["tpg"](layers=layers).attach(pipe), Rows(pipe) as rows:
        draw_prompts(pipe, num_inference_steps=1)
    assert [*found, *rows.found] == expected


def test_they_join_at_guided_steps_only() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    guidance = PerturbedAttentionGuidance(start=0.25, stop=0.75, every=2)
    with guidance.attach(pipe) as handle, Rows(pipe) as rows:
        draw_prompts(pipe, num_inference_steps=8)
    assert rows.found == [2, 2, 3, 2, 3, 2, 2, 2]
    assert handle.steps == 2


def test_rows_that_join_are_counted() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    with counted_rows(pipe.unet) as rows, PAG.attach(pipe):
        draw_prompts(pipe, num_inference_steps=2)
    assert sum(rows) == 2 * 3
    with PAG.attach(pipe):
        draw_prompts(pipe, num_inference_steps=2)
    assert sum(rows) == 2 * 3


def with_ip_adapter(pipe: Any) -> None:
    weights = ip_adapter_weights(pipe.unet)
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)


def with_hook(part: str) -> Callable[[Any], None]:
    return lambda pipe: pipe.unet.get_submodule(part).register_forward_hook(lambda *_: None)


def with_own_forward(pipe: Any) -> None:
    block = pipe.unet.up_blocks[0].resnets[0]
    block.forward = torch.compile(block.forward, backend="eager")


class Own(UNet2DConditionModel):
    """A network that may do anything with its output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnLayer(nn.Linear):
    """A layer that may mix the rows of a batch."""


def with_own_layer(pipe: Any) -> None:
    pipe.unet.up_blocks[0].resnets[0].time_emb_proj.__class__ = OwnLayer


class Scaled(torch.Tensor):
    """Weights that may scale a batch by its largest value."""


def with_own_weights(pipe: Any) -> None:
    layer = pipe.unet.up_blocks[0].resnets[0].time_emb_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Scaled))


def with_own_class(pipe: Any) -> None:
    pipe.unet.__class__ = Own


def with_other_processors(pipe: Any) -> None:
    pipe.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())


class Shared(AttnProcessor2_0):
    """A processor that looks at all rows."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = super().__call__(attn, hidden_states, *args, **kwargs)
        return own + 0.1 * own.mean(dim=0, keepdim=True)


Shared.__name__ = Shared.__qualname__ = "AttnProcessor2_0"


def with_shared_processor(pipe: Any) -> None:
    pipe.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(Shared())


class Quantized(nn.Linear):
    """A layer whose class is where torch has those that scale a batch by its largest value."""

    __module__ = "torch.ao.nn.quantized.dynamic.modules.linear"


def quantized(pipe: Any) -> None:
    pipe.unet.up_blocks[0].resnets[0].time_emb_proj.__class__ = Quantized


def with_later_hook(pipe: Any) -> None:
    pipe.unet.register_forward_pre_hook(lambda *_: None)


IMAGE_PROMPT = {"ip_adapter_image_embeds": [noise(9, 2, 1, TEXT_WIDTH)]}
ALONE: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "an image prompt": (with_ip_adapter, IMAGE_PROMPT),
    "a hook on a block": (with_hook("mid_block"), {}),
    "a hook in a block": (with_hook("up_blocks.0.resnets.0"), {}),
    "a hook on the network": (with_hook(""), {}),
    "a forward of one's own": (with_own_forward, {}),
    "a class of one's own": (with_own_class, {}),
    "a layer of one's own": (with_own_layer, {}),
    "another processor": (with_other_processors, {}),
    "a processor named alike": (with_shared_processor, {}),
    "weights of one's own": (with_own_weights, {}),
    "a quantized layer": (quantized, {}),
    "a hook before the network": (with_later_hook, {}),
    "two pictures": (lambda _: None, {"seeds": (3, 4)}),
}


@pytest.mark.parametrize("name", ALONE)
def test_otherwise_the_weakened_network_has_a_pass_of_its_own(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, arguments = ALONE[name]
    pipe = tiny_pipeline(StableDiffusionPipeline, image_encoder=tiny_image_encoder())
    change(pipe)
    with PAG.attach(pipe), Rows(pipe) as rows:
        found = draw_prompts(pipe, **arguments)
    pictures = len(found)
    assert rows.found == [2 * pictures, pictures] * 3
    with in_two_passes(monkeypatch), PAG.attach(pipe):
        assert torch.equal(draw_prompts(pipe, **arguments), found)
    torch.compiler.reset()


def test_layers_that_change_between_runs_are_seen() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    with PerturbedAttentionGuidance(start=0.5).attach(pipe):
        with Rows(pipe) as rows:
            draw_prompts(pipe, num_inference_steps=2)
        assert rows.found == [2, 3]
        with_own_layer(pipe)
        with Rows(pipe) as rows:
            draw_prompts(pipe, num_inference_steps=2)
        assert rows.found == [2, 2, 1]


def test_a_hook_on_all_modules_needs_a_pass_of_its_own() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    hook = register_module_forward_hook(lambda *_: None)
    try:
        with PAG.attach(pipe), Rows(pipe) as rows:
            draw_prompts(pipe, num_inference_steps=1)
    finally:
        hook.remove()
    assert rows.found == [2, 1]


@pytest.mark.parametrize("name", ["attention_mask", "encoder_attention_mask"])
def test_masks_of_each_head_need_a_pass_of_their_own(name: str) -> None:
    unet = tiny_unet(levels=1, heads=2)
    text = noise(4, 1, 3, unet.config.cross_attention_dim)
    tokens = 80 if name == "attention_mask" else 3
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(4)
    given = {"scheduler": scheduler, "batch_layout": "single"}
    for rows, expected in ((1, [2]), (2, [1, 1])):
        mask = {name: torch.ones(rows, tokens, dtype=torch.bool)}
        with PAG.attach(unet, **given), Rows(SimpleNamespace(components={"unet": unet})) as calls:
            unet(noise(3, 1, 4, 8, 10), scheduler.timesteps[0], text, **mask)
        assert calls.found == expected


def test_nothing_is_kept_after_a_run() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    with PAG.attach(pipe):
        draw_prompts(pipe)
    block = weakref.ref(pipe.unet.up_blocks[0])
    pipe.unet.up_blocks = nn.ModuleList()
    assert block() is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [0, 2])
def test_guidance_can_be_removed_in_the_middle_of_a_pass(method: str, step: int) -> None:
    pipe = KINDS["Stable Diffusion"].make()
    plain, untouched = draw_prompts(pipe), traces(pipe)
    handle = METHODS[method](layers="down").attach(pipe)
    passed = iter(range(3))

    def remove() -> None:
        if next(passed) == step:
            in_thread(handle.remove)
            assert not handle.attached

    with Rows(pipe, act=remove):
        found = draw_prompts(pipe)
    assert found.shape == plain.shape
    assert torch.equal(found, plain) == (step == 0)
    assert handle.steps == step
    assert traces(pipe) == untouched


def in_thread(act: Callable[[], object]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


def test_guidance_can_be_removed_while_a_pass_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = KINDS["Stable Diffusion"].make()
    plain, untouched = draw_prompts(pipe), traces(pipe)
    handle = PAG.attach(pipe)

    def joined(*given: Any) -> Any:
        found = joint.joint_pass(*given)
        in_thread(handle.remove)
        return found

    monkeypatch.setattr(guided_call, "joint_pass", joined)
    assert torch.equal(draw_prompts(pipe), plain)
    assert traces(pipe) == untouched


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_on_when_another_one_ends(method: str) -> None:
    pipe = KINDS["Stable Diffusion"].make()
    plain = draw_prompts(pipe, num_inference_steps=1)
    handle = METHODS[method](layers="down").attach(pipe)
    other = StableDiffusionPipeline(**{**pipe.components, "unet": copy.deepcopy(pipe.unet)})
    other.scheduler = copy.deepcopy(pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    found: list[Tensor] = []

    def draw_and_remove() -> None:
        found.append(draw_prompts(pipe, num_inference_steps=1))
        handle.remove()

    with Rows(other, act=lambda: in_thread(draw_and_remove)):
        found.append(draw_prompts(other, num_inference_steps=1))
    guided, unguided = found
    assert difference(guided, plain) > 1e-2
    assert torch.equal(unguided, plain)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_for_one_call", [False, True])
@pytest.mark.parametrize("is_removed", [False, True])
def test_the_next_call_after_an_interruption_is_whole(
    method: str, is_for_one_call: bool, is_removed: bool
) -> None:
    pipe = KINDS["Stable Diffusion"].make()
    plain, untouched = draw_prompts(pipe, (4, 5, 6), 1.0), traces(pipe)
    handle = METHODS[method](layers="down").attach(pipe)
    if is_for_one_call:
        handle.remove_after_call()

    def stop() -> None:
        if is_removed:
            handle.remove()
        raise KeyboardInterrupt

    with Rows(pipe, act=stop), pytest.raises(KeyboardInterrupt):
        draw_prompts(pipe)
    if not is_for_one_call:
        handle.remove()
        assert traces(pipe) == untouched
    assert torch.equal(draw_prompts(pipe, (4, 5, 6), 1.0), plain)
    assert traces(pipe) == untouched


@pytest.mark.parametrize("method", METHODS)
def test_a_network_can_be_copied_after_an_interruption(method: str) -> None:
    pipe = KINDS["Stable Diffusion"].make()
    with METHODS[method](layers="down").attach(pipe):
        expected = draw_prompts(pipe)
        with Rows(pipe, act=interrupt), pytest.raises(KeyboardInterrupt):
            draw_prompts(pipe)
        other = StableDiffusionPipeline(**{**pipe.components, "unet": copy.deepcopy(pipe.unet)})
        other.set_progress_bar_config(disable=True)
        assert torch.equal(draw_prompts(pipe), expected)
        assert difference(draw_prompts(other), expected) < 1e-4


def test_a_network_needs_no_mid_block(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline, unet=tiny_unet(mid_block_type=None))
    guidance = PerturbedAttentionGuidance(layers="up")
    with guidance.attach(pipe), Rows(pipe) as rows:
        found = draw_prompts(pipe)
    assert rows.found == [3, 3, 3]
    with in_two_passes(monkeypatch), guidance.attach(pipe):
        assert difference(draw_prompts(pipe), found) < 1e-4


@pytest.mark.parametrize("name", ["one ControlNet", "ControlNet, guess mode", "T2I-Adapter"])
def test_residuals_of_other_networks_need_a_pass_of_their_own(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pipe, arguments = TASKS[name]()
    plain = draw_task(pipe, (3,), arguments)
    with PAG.attach(pipe), Rows(pipe) as rows:
        found = draw_task(pipe, (3,), arguments)
    assert 3 not in rows.found
    assert difference(found, plain) > 1e-2
    with in_two_passes(monkeypatch), PAG.attach(pipe):
        assert torch.equal(draw_task(pipe, (3,), arguments), found)


def test_two_weakened_networks_have_a_pass_each() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    with attach(pipe, PAG, SelfAttentionGuidance()), Rows(pipe) as rows:
        draw_prompts(pipe, num_inference_steps=1)
    assert rows.found == [2, 1, 1]


def test_a_method_that_needs_the_first_pass_waits_for_it() -> None:
    class Late(PerturbedAttentionGuidance):
        @contextmanager
        def weaken(self, step: Any) -> Generator[Tensor | None]:
            assert step.x0.isfinite().all()
            with super().weaken(step) as x0:
                yield x0

    class Mixin:
        @contextmanager
        def weaken(self, step: Any) -> Generator[Tensor | None]:
            assert step.x0.isfinite().all()
            with step.skipping(["mid_block.attentions.0.transformer_blocks.0"]):
                yield None

    class Mixed(Mixin, PerturbedAttentionGuidance):
        pass

    class Unchanged(PerturbedAttentionGuidance):
        pass

    class Flag:
        needs_first_pass = False

    class Flagged(Flag, PerturbedAttentionGuidance):
        pass

    pipe = KINDS["Stable Diffusion"].make()
    for method, expected in ((Late, [2, 1]), (Mixed, [2, 1]), (Unchanged, [3]), (Flagged, [3])):
        with method().attach(pipe), Rows(pipe) as rows:
            draw_prompts(pipe, num_inference_steps=1)
        assert rows.found == expected


def test_methods_of_ones_own() -> None:
    class Own(PerturbedAttentionGuidance):
        needs_first_pass = False
        layers_weakened: Any = None

        def weakens(self, denoiser: Any) -> Any:
            return self.layers_weakened

        @contextmanager
        def weaken(self, step: Any) -> Generator[Tensor | None]:
            step.noted["seen"] = torch.ones(1)
            with super().weaken(step):
                yield None

    class Worse(Own):
        needs_first_pass = False

        @contextmanager
        def weaken(self, step: Any) -> Generator[Tensor | None]:
            yield step.x0

    pipe = KINDS["Stable Diffusion"].make()
    mid = "mid_block.attentions.0.transformer_blocks.0.attn1"
    for layers, expected in ((mid,), [3]), ((mid, "conv_out"), [2, 1]), ((), [2, 1]):
        Own.layers_weakened = layers
        with Own().attach(pipe) as handle, Rows(pipe) as rows:
            draw_prompts(pipe, num_inference_steps=1)
        assert rows.found == expected
        assert handle.noted["seen"] == 1
    Own.layers_weakened = (mid,)
    untouched = traces(pipe)
    with Worse().attach(pipe), pytest.raises(RuntimeError, match="it needs the first pass"):
        draw_prompts(pipe)
    assert traces(pipe) == untouched


@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_the_pass_leaves_nothing_behind(method: str) -> None:
    pipe = KINDS["Stable Diffusion"].make()
    guidance = METHODS[method](layers="up")
    with guidance.attach(pipe):
        expected = draw_prompts(pipe)
    untouched = traces(pipe)
    weight = pipe.unet.mid_block.resnets[0].conv1.weight
    for _ in range(2):
        with guidance.attach(pipe) as handle:
            guided = traces(pipe)
            pipe.unet.mid_block.resnets[0].conv1.weight = nn.Parameter(weight[:, 1:])
            with pytest.raises(RuntimeError, match="channels"):
                draw_prompts(pipe)
            assert traces(pipe) == guided
            pipe.unet.mid_block.resnets[0].conv1.weight = weight
            assert torch.equal(draw_prompts(pipe), expected)
        assert handle.steps == 3
    assert traces(pipe) == untouched


class Silent(Attention):
    """Attention without a kernel."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def test_a_layer_that_was_not_weakened_is_an_error() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    plain, untouched = draw_prompts(pipe), traces(pipe)
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with PAG.attach(pipe):
        attention.__class__ = Silent
        with pytest.raises(RuntimeError, match="no attention was weakened at 'mid_block"):
            draw_prompts(pipe)
        attention.__class__ = Attention
    assert traces(pipe) == untouched
    assert torch.equal(draw_prompts(pipe), plain)


def test_it_has_gradients() -> None:
    pipe = KINDS["Stable Diffusion"].make()
    sample = noise(3, 2, 4, 8, 10).requires_grad_()
    text = noise(4, 2, 3, pipe.unet.config.cross_attention_dim)
    pipe.scheduler.set_timesteps(4)
    layout: Any = {"scheduler": pipe.scheduler, "batch_layout": "uncond_first"}
    halves = torch.cat([sample[:1]] * 2)
    found = {}
    for scale in (0.0, 3.0):
        with PerturbedAttentionGuidance(scale).attach(pipe.unet, **layout):
            output = pipe.unet(halves, pipe.scheduler.timesteps[0], text).sample
        found[scale] = torch.autograd.grad(output.square().sum(), sample, retain_graph=True)[0]
    assert difference(found[3.0], found[0.0]) > 1e-3
