"""What holds for every method that weakens layers, on every kind of network."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from torch import Tensor
from torch._dynamo.utils import counters

from family import KINDS, METHODS, denoiser_of, difference, traces
from self_attention_guidance import Guidance, SelfAttentionGuidance, attach

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
FEW = ("Stable Diffusion", "Stable Diffusion 3.5", "Flux")
"""A U-Net, joint attention, and packed latents with two calls a step."""


every_method = pytest.mark.parametrize("method", METHODS)
every_kind = pytest.mark.parametrize("name", KINDS)
few_kinds = pytest.mark.parametrize("name", FEW)


@pytest.mark.supports("method")
@every_method
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@every_kind
def test_it_has_an_effect_and_scale_zero_and_removal_none(
    method: str, name: str, cfg: float
) -> None:
    pipe, draw, cls = KINDS[name].make(), KINDS[name].draw, METHODS[method]
    plain, untouched = draw(pipe, cfg=cfg), traces(pipe)
    with cls(0.0).attach(pipe) as handle:
        assert torch.equal(draw(pipe, cfg=cfg), plain)
    assert handle.steps == 0
    with cls().attach(pipe) as handle:
        guided = draw(pipe, cfg=cfg)
        assert difference(guided, plain) > 1e-2
        assert torch.equal(draw(pipe, cfg=cfg), guided)
    assert handle.steps in (6, 7)
    assert traces(pipe) == untouched
    assert torch.equal(draw(pipe, cfg=cfg), plain)


@pytest.mark.supports("method")
@every_method
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@every_kind
def test_a_picture_does_not_depend_on_its_batch(method: str, name: str, cfg: float) -> None:
    pipe, draw = KINDS[name].make(), KINDS[name].draw

    def mixed() -> float:
        together = draw(pipe, (3, 4, 5), cfg)
        return difference(torch.cat([draw(pipe, (seed,), cfg) for seed in (3, 4, 5)]), together)

    if mixed() > 1e-3:
        pytest.skip("without guidance, too, this version of diffusers mixes the rows of a batch")
    with METHODS[method](1.0).attach(pipe):
        assert mixed() < 1e-4


@every_method
@few_kinds
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_weakened_pass_leaves_no_trace(method: str, name: str, error: Any) -> None:
    pipe, draw = KINDS[name].make(), KINDS[name].draw
    plain, untouched = draw(pipe), traces(pipe)
    guidance = METHODS[method]()
    passes = itertools.count()

    def fail(*_: Any) -> None:
        if next(passes) == 1:
            raise error("pass failed")

    last = list(denoiser_of(pipe).children())[-1]
    failing = last.register_forward_hook(fail)
    with pytest.raises(error, match="pass failed"), guidance.attach(pipe):
        draw(pipe)
    failing.remove()
    assert traces(pipe) == untouched
    assert torch.equal(draw(pipe), plain)


@contextmanager
def idle(*_: Any) -> Any:
    yield None


@every_method
@every_kind
def test_a_method_made_to_do_nothing_is_caught(
    monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    pipe, cls = KINDS[name].make(), METHODS[method]
    monkeypatch.setattr(cls, "weaken", idle)
    with (
        pytest.raises(RuntimeError, match=f"{cls.__name__}.* had no effect"),
        cls().attach(pipe),
    ):
        KINDS[name].draw(pipe)


@every_method
def test_a_layer_that_does_not_run_is_caught(method: str) -> None:
    pipe = KINDS["Stable Diffusion"].make()

    class Idle(type(pipe.unet.mid_block)):  # type: ignore[misc]
        def forward(self, sample: Tensor, *_: Any, **__: Any) -> Tensor:
            return sample

    pipe.unet.mid_block.__class__ = Idle
    untouched = traces(pipe)
    message = "no (attention was weakened|tokens were changed) at 'mid_block.* did not run"
    with pytest.raises(RuntimeError, match=message), METHODS[method](layers="mid").attach(pipe):
        KINDS["Stable Diffusion"].draw(pipe)
    assert traces(pipe) == untouched


@few_kinds
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_several_are_the_sum_of_each_alone_in_any_order(name: str, cfg: float) -> None:
    pipe, draw = KINDS[name].make(), KINDS[name].draw
    guidances = [SelfAttentionGuidance(0.5), *(cls(1.5) for cls in METHODS.values())]
    singles = []
    for guidance in guidances:
        with guidance.attach(pipe) as handle:
            draw(pipe, (3, 4), cfg, num_inference_steps=1)
        singles.append(handle.term)
    pictures = []
    for order in (guidances, guidances[::-1]):
        with attach(pipe, *order) as handle:
            pictures.append(draw(pipe, (3, 4), cfg))
            draw(pipe, (3, 4), cfg, num_inference_steps=1)
        assert handle.term is not None
        assert difference(handle.term, sum(singles)) < 1e-5
    assert difference(*pictures) < 1e-4


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((method, setting) for method in METHODS for setting in (
        {"scale": -1.0}, {"start": 0.5}, {"stop": 0.5}, {"every": 2}, {"branch": "uncond"},
        {"layers": "up.1"},
    )),
    ("seg", {"blur_sigma": 0.5}),
    ("seg", {"blur_sigma": 1e6}),
    ("tpg", {"seed": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "setting"), SETTINGS)
def test_every_setting_has_an_effect(method: str, setting: dict[str, Any]) -> None:
    pipe, draw = KINDS["Stable Diffusion"].make(), KINDS["Stable Diffusion"].draw
    with METHODS[method](1.0).attach(pipe):
        usual = draw(pipe, prompt=["a round apple"])
    with METHODS[method](**{"scale": 1.0, **setting}).attach(pipe):
        least = 1e-7 if setting.get("blur_sigma") == 1e6 else 1e-4
        assert difference(draw(pipe, prompt=["a round apple"]), usual) > least


@every_method
@few_kinds
def test_every_picture_is_guided_while_weights_are_offloaded(method: str, name: str) -> None:
    pipe, draw = KINDS[name].make(), KINDS[name].draw
    plain, denoiser = draw(pipe), denoiser_of(pipe)
    with METHODS[method]().attach(pipe):
        guided = draw(pipe)
        for offload in (cpu_offload_with_hook, cpu_offload):
            for _ in range(2):
                offload(denoiser, torch.device("cpu"))
                # Not equal by a bit: U-Nets compute their encoder anew (see test_family_prefix).
                assert difference(draw(pipe), guided) < 1e-4
                remove_hook_from_module(denoiser, recurse=True)
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((method, "Stable Diffusion") for method in METHODS),
        *(("pag", "Stable Diffusion 3.5"), ("tpg", "Stable Diffusion 3.5")),
        *(("seg", "Flux"), ("slg", "Flux")),
    ],
)
def test_a_compiled_denoiser_is_guided_in_whole_graphs(method: str, name: str) -> None:
    counters.clear()
    pipe, draw = KINDS[name].make(), KINDS[name].draw
    try:
        with METHODS[method]().attach(pipe):
            guided = draw(pipe)
            denoiser_of(pipe).compile(backend="eager")
            compiled = []
            for _ in range(3):
                assert difference(draw(pipe), guided) < 1e-3
                compiled.append(counters["stats"]["unique_graphs"])
        assert 0 < compiled[1] == compiled[2]
        assert not counters["graph_break"]
    finally:
        torch.compiler.reset()


@every_method
def test_settings_are_plain_data_and_back(method: str) -> None:
    for guidance in (METHODS[method](), METHODS[method](2.0, layers=["mid", "up.1"], every=3)):
        settings = guidance.to_dict()
        assert settings["method"] == method
        assert Guidance.from_dict(settings) == guidance
        assert "inf" not in [value for value in settings.values() if isinstance(value, float)]


@every_method
def test_the_fast_preset_costs_a_sixth(method: str) -> None:
    pipe, draw = KINDS["Stable Diffusion"].make(), KINDS["Stable Diffusion"].draw
    with METHODS[method].fast().attach(pipe) as handle:
        draw(pipe, num_inference_steps=25)
    assert handle.steps == 4
    assert handle.guidance.scale == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        *((method, {"layers": []}, "must be a dotted module path") for method in METHODS),
        *((method, {"branch": "both"}, "branch='both' must be") for method in METHODS),
        ("seg", {"blur_sigma": 0}, "blur_sigma=0 must be above 0: 0 smooths nothing"),
        ("seg", {"blur_sigma": -1}, "blur_sigma=-1 must be at least 0"),
        ("seg", {"blur_sigma": float("nan")}, "blur_sigma=nan must be a finite number"),
        ("seg", {"blur_sigma": "much"}, "blur_sigma='much' must be a finite number"),
        ("tpg", {"seed": -1}, "seed=-1 must be a whole number, at least 0"),
    ],
)
def test_settings_that_are_wrong_are_refused(method: str, setting: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[method](**setting)
