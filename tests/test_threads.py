"""Threads that share a denoiser: each is refused, or draws what it draws alone; never a mixture."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance, StableDiffusionSAGPipeline, builtin_model
from tiny_transformers import TRANSFORMERS
from tiny_transformers import draw as draw_transformer

STEPS = 4
REFUSED = "two threads call one guided denoiser"


@pytest.fixture(scope="module")
def shared() -> Any:
    """A model whose U-Net several pipelines share."""
    pipe: Any = builtin_model("emoji")
    pipe.guidance = SelfAttentionGuidance(3.0, blur_sigma=3.0)
    return pipe


def pipeline_on(shared: Any) -> Any:
    """Another pipeline with the same components, but a scheduler of its own."""
    components = dict(shared.components)
    components["scheduler"] = type(shared.scheduler).from_config(shared.scheduler.config)
    pipe: Any = StableDiffusionSAGPipeline(**components)
    pipe.guidance = shared.guidance
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, scale: float, on_step: Callable[[int], object] = lambda step: None) -> Tensor:
    def report(_: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step)
        return tensors

    return pipe(
        "cat",
        num_inference_steps=STEPS,
        sag_scale=scale,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=report,
    ).images


class Pause:
    """Holds a thread at a step until it is let on."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, step: int) -> None:
        if step == self.step:
            self.reached.set()
            assert self.go_on.wait(60)


@contextmanager
def paused(step: int, work: Callable[[Pause], Tensor]) -> Generator[Future[Tensor]]:
    """Another thread's work, which waits at a step until the block ends."""
    pause = Pause(step)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, pause)
        assert pause.reached.wait(60)
        try:
            yield future
        finally:
            pause.go_on.set()


def test_an_unguided_call_is_refused_while_another_is_guided(shared: Any) -> None:
    alone = draw(pipeline_on(shared), 3.0)
    with paused(1, lambda pause: draw(pipeline_on(shared), 3.0, pause)) as guided:
        with pytest.raises(RuntimeError, match=REFUSED):
            draw(pipeline_on(shared), 0.0)
        with pytest.raises(ValueError, match="guided already"):
            draw(pipeline_on(shared), 3.0)
    assert torch.equal(guided.result(), alone)
    draw(pipeline_on(shared), 0.0)


def test_an_unguided_call_that_was_there_first_is_refused_in_its_middle(shared: Any) -> None:
    alone = draw(pipeline_on(shared), 3.0)
    first, second = Pause(1), Pause(1)
    with ThreadPoolExecutor(2) as pool:
        unguided = pool.submit(draw, pipeline_on(shared), 0.0, first)
        assert first.reached.wait(60)
        guided = pool.submit(draw, pipeline_on(shared), 3.0, second)
        assert second.reached.wait(60)
        first.go_on.set()
        with pytest.raises(RuntimeError, match=REFUSED):
            unguided.result()
        second.go_on.set()
        assert torch.equal(guided.result(), alone)


def test_a_pass_that_began_before_guidance_is_not_read(shared: Any) -> None:
    """Both are held before the layer, then the unguided pass goes through it first."""
    alone = draw(pipeline_on(shared), 3.0)
    pauses: dict[int, Pause] = {}

    def hold(module: object, args: object, kwargs: object) -> None:
        pause = pauses.pop(threading.get_ident(), None)
        if pause is not None:
            pause(0)

    def held(pause: Pause, scale: float) -> Tensor:
        pauses[threading.get_ident()] = pause
        return draw(pipeline_on(shared), scale)

    layer = shared.unet.down_blocks[-1]
    unguided, guided = Pause(0), Pause(0)
    with (
        layer.register_forward_pre_hook(hold, with_kwargs=True),
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(held, unguided, 0.0)
        assert unguided.reached.wait(60)
        second = pool.submit(held, guided, 3.0)
        assert guided.reached.wait(60)
        unguided.go_on.set()
        with pytest.raises(RuntimeError, match=REFUSED):
            first.result()  # at its next step
        guided.go_on.set()
        assert torch.equal(second.result(), alone)


def test_threads_may_take_turns_with_one_handle(shared: Any) -> None:
    pipe: Any = pipeline_on(shared)
    alone = draw(pipe, 3.0)
    with pipe.guidance.attach(pipe):
        for _ in range(3):
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(draw, pipe, 0.0).result(), alone)


def test_a_run_in_another_thread_ends_the_one_that_it_interrupts(shared: Any) -> None:
    pipe: Any = pipeline_on(shared)
    alone = draw(pipe, 3.0)
    with pipe.guidance.attach(pipe):
        with paused(1, lambda pause: draw(pipe, 0.0, pause)) as first:
            assert torch.equal(draw(pipe, 0.0), alone)
        with pytest.raises(RuntimeError, match=REFUSED):
            first.result()


def test_unsynchronised_threads_are_never_mixed(shared: Any) -> None:
    pipes = [pipeline_on(shared) for _ in range(3)]
    scales = (3.0, 0.0, 1.0)
    alone = [draw(pipe, scale) for pipe, scale in zip(pipes, scales, strict=True)]

    def work(number: int) -> list[bool]:
        right = []
        for _ in range(6):
            try:
                found = draw(pipes[number], scales[number])
            except (RuntimeError, ValueError) as error:
                assert REFUSED in str(error) or "guided already" in str(error)
                continue
            right.append(torch.equal(found, alone[number]))
        return right

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, range(3)))
    assert all(all(right) for right in results)
    assert any(results)


def test_deep_copies_of_a_guided_pipeline_may_have_a_thread_each(shared: Any) -> None:
    """Both are held inside each pass, where one could read the other's attention."""
    pipe = pipeline_on(shared)
    alone = draw(pipe, 3.0)
    both_inside = threading.Barrier(2)

    def wait(*_: object) -> None:
        both_inside.wait(10)

    with pipe.guidance.attach(pipe), ThreadPoolExecutor(2) as pool, ExitStack() as undo:
        pipes = [pipe, copy.deepcopy(pipe)]
        for each in pipes:
            block = each.unet.mid_block
            undo.enter_context(block.register_forward_pre_hook(wait))
        found = [pool.submit(draw, each, 0.0) for each in pipes]
        assert all(torch.equal(each.result(), alone) for each in found)
    assert torch.equal(draw(pipes[1], 3.0), alone)


@pytest.mark.parametrize("step", [1, STEPS - 1])
def test_a_thread_between_the_two_calls_of_a_step_is_named_as_that(step: int) -> None:
    """Also at the last step, where the first prediction would stay unguided."""
    pipe = TRANSFORMERS["Flux"].make()
    other = copy.copy(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    calls = itertools.count()  # three a step, the second one is the weakened pass
    main = threading.current_thread()

    def interrupt(*_: object) -> None:
        if threading.current_thread() is main and next(calls) == 3 * step:
            drawn = pool.submit(draw_transformer, "Flux", other, (3,), 3.0, num_inference_steps=1)
            assert drawn.exception() is None

    with SelfAttentionGuidance(1.5).attach(pipe), ThreadPoolExecutor(1) as pool:
        pipe.transformer.register_forward_hook(interrupt)
        with pytest.raises(RuntimeError, match=REFUSED):
            draw_transformer("Flux", pipe, (3,), 3.0, num_inference_steps=STEPS)
