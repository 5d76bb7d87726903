"""Compiled denoisers are guided, or refused; never silently unguided."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from torch._dynamo.utils import counters

from self_attention_guidance import SelfAttentionGuidance, StableDiffusionSAGPipeline
from test_guidance import LAYER, difference, draw, own_loop
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet
from tiny_transformers import TRANSFORMERS
from tiny_transformers import draw as draw_image

BACKEND = "eager"
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def small_unet() -> Any:
    """A denoiser that is compiled in about a second."""
    return tiny_unet(levels=1, layers_per_block=0, heads=2)


def small_pipeline(cls: type = StableDiffusionPipeline) -> Any:
    return tiny_pipeline(cls, unet=small_unet())


@pytest.fixture
def pipe() -> Any:
    return small_pipeline()


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return draw(small_pipeline())


@pytest.fixture(scope="module")
def guided() -> Tensor:
    pipe = small_pipeline()
    with SelfAttentionGuidance(1.0).attach(pipe):
        return draw(pipe)


def compile_a_wrapper(pipe: Any, **settings: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, **{"backend": BACKEND, **settings})


def compile_in_place(pipe: Any, **settings: Any) -> None:
    pipe.unet.compile(**{"backend": BACKEND, **settings})


def compile_blocks(pipe: Any, **settings: Any) -> None:
    pipe.unet.compile_repeated_blocks(**{"backend": BACKEND, **settings})


def compile_forward(pipe: Any, **settings: Any) -> None:
    pipe.unet.forward = torch.compile(pipe.unet.forward, **{"backend": BACKEND, **settings})


def graphs() -> int:
    """How many graphs were compiled; raises if one was broken up."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("way", "runs_before"),
    [
        (compile_a_wrapper, 1),
        (compile_in_place, 0),
        (compile_in_place, 1),
        (compile_blocks, 1),
        (compile_forward, 1),
    ],
)
def test_guidance_attached_to_a_compiled_unet(
    pipe: Any, guided: Tensor, plain: Tensor, way: Callable[..., None], runs_before: int
) -> None:
    way(pipe, fullgraph=True)
    for _ in range(runs_before):
        draw(pipe)
    compiled = []
    for _ in range(3):
        with SelfAttentionGuidance(1.0).attach(pipe) as handle:
            assert difference(draw(pipe), guided) < 1e-4
        assert handle.steps == 3
        compiled.append(graphs())
    assert 0 < compiled[0] == compiled[1] == compiled[2]
    assert difference(draw(pipe), plain) < 1e-4


@pytest.mark.parametrize("way", [compile_a_wrapper, compile_in_place, compile_blocks])
def test_compiling_a_guided_unet_until_guidance_is_removed(
    pipe: Any, guided: Tensor, plain: Tensor, way: Callable[..., None]
) -> None:
    with SelfAttentionGuidance(1.0).attach(pipe) as handle:
        way(pipe, fullgraph=True)
        assert difference(draw(pipe), guided) < 1e-4
        compiled = graphs()
        assert difference(draw(pipe), guided) < 1e-4
    assert handle.steps == 6
    assert 0 < compiled == graphs()
    assert difference(draw(pipe), plain) < 1e-4
    with SelfAttentionGuidance(1.0).attach(pipe):
        assert difference(draw(pipe), guided) < 1e-4


def test_a_guided_unet_is_lowered(pipe: Any, guided: Tensor) -> None:
    """As far as "aot_eager" goes: the code generator of "inductor" takes minutes here."""
    compile_in_place(pipe, fullgraph=True, backend="aot_eager")
    with SelfAttentionGuidance(1.0).attach(pipe):
        assert difference(draw(pipe), guided) < 1e-4
    assert graphs()


def test_the_pipeline_with_a_compiled_unet(guided: Tensor, plain: Tensor) -> None:
    sag = small_pipeline(StableDiffusionSAGPipeline)
    compile_a_wrapper(sag, fullgraph=True)
    for _ in range(2):
        assert difference(draw(sag, sag_scale=0), plain) < 1e-4
        assert difference(draw(sag, sag_scale=1.0), guided) < 1e-4
        compiled = graphs()
    assert difference(draw(sag, sag_scale=1.0), guided) < 1e-4
    assert graphs() == compiled == 3  # plain, read, and the second pass of half the batch


def test_removal_leaves_a_unet_that_was_compiled_in_place_as_it_was(pipe: Any) -> None:
    compile_in_place(pipe)
    before, call = draw(pipe), pipe.unet._compiled_call_impl
    compiled = graphs()
    SelfAttentionGuidance(1.0).attach(pipe).remove()
    assert pipe.unet._compiled_call_impl is call
    assert torch.equal(draw(pipe), before)
    assert graphs() == compiled


def test_a_copy_of_a_unet_that_was_compiled_in_place_is_guided(pipe: Any, guided: Tensor) -> None:
    compile_in_place(pipe)
    with SelfAttentionGuidance(1.0).attach(pipe):
        pipe.unet = copy.deepcopy(pipe.unet)
        assert difference(draw(pipe), guided) < 1e-4


def test_sliced_attention_is_read_in_a_compiled_unet(pipe: Any, guided: Tensor) -> None:
    pipe.enable_attention_slicing(1)
    compile_a_wrapper(pipe, fullgraph=True)
    with SelfAttentionGuidance(1.0).attach(pipe):
        assert difference(draw(pipe), guided) < 1e-4


def test_joint_attention_is_read_in_a_compiled_transformer() -> None:
    pipe = TRANSFORMERS["Flux"].make()
    with SelfAttentionGuidance(1.0).attach(pipe):
        expected = draw_image("Flux", pipe, (0,))
    pipe.transformer.compile(backend=BACKEND, fullgraph=True)
    with SelfAttentionGuidance(1.0).attach(pipe):
        assert difference(draw_image("Flux", pipe, (0,)), expected) < 1e-4


class Keyword(AttnProcessor2_0):
    """Attention with a keyword of its own; diffusers drops those that it can't find."""

    breaks_graph = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        strength: float = 0.0,
    ) -> Tensor:
        if self.breaks_graph:
            torch._dynamo.graph_break()
        return strength * super().__call__(attn, hidden_states, encoder_hidden_states)


@pytest.mark.parametrize("breaks_graph", [False, True])
def test_another_processor_with_its_keyword_in_a_compiled_unet(
    pipe: Any, guided: Tensor, breaks_graph: bool
) -> None:
    pipe.unet.set_attn_processor(Keyword())
    processor = Keyword()
    processor.breaks_graph = breaks_graph
    pipe.unet.get_submodule(LAYER).set_processor(processor)
    compile_a_wrapper(pipe, fullgraph=not breaks_graph)
    with SelfAttentionGuidance(1.0).attach(pipe):
        latents = draw(pipe, cross_attention_kwargs={"strength": 1.0})
    assert difference(latents, guided) < 1e-4


def test_a_guided_unet_behind_a_compiled_one_is_found(pipe: Any) -> None:
    with SelfAttentionGuidance(1.0).attach(pipe):
        compile_a_wrapper(pipe)
        with pytest.raises(ValueError, match="guided already"):
            SelfAttentionGuidance(1.0).attach(pipe)


def guided_loop(fullgraph: bool | None) -> Tensor:
    """A sampling loop that calls a guided denoiser from code that is compiled, or not if `None`."""
    unet, scheduler = small_unet(), tiny_scheduler()

    def call(*args: Any, **kwargs: Any) -> Any:
        return unet(*args, **kwargs)

    if fullgraph is not None:
        call = torch.compile(call, backend=BACKEND, fullgraph=fullgraph)
    states = torch.ones(2, 7, unet.config.cross_attention_dim)
    with SelfAttentionGuidance(1.0).attach(unet, scheduler=scheduler):
        return own_loop(call, scheduler, states, "uncond_first")


def test_compiled_code_that_calls_a_guided_unet() -> None:
    assert difference(guided_loop(fullgraph=False), guided_loop(None)) < 1e-4


def test_guidance_inside_of_a_whole_graph_is_refused() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the denoiser itself, before"):
        guided_loop(fullgraph=True)


@torch._dynamo.config.patch(wrap_top_frame=True)
def test_hooks_that_torch_would_ignore_are_refused(pipe: Any) -> None:
    compile_in_place(pipe)
    with pytest.raises(ValueError, match="which ignores later hooks; attach first"):
        SelfAttentionGuidance(1.0).attach(pipe)
