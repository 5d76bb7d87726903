"""What the benchmark counts, compares and divides, on tiny networks."""

from __future__ import annotations

import functools
import shutil
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from known_networks import NETWORKS, Network, embedding_inputs, exact_guidance, fast_guidance, load
from measuring import Result, VariantResult, bench, measure, work
from memory import Memory, of_process
from plan import Configuration, plan
from random_networks import sd15_unet, sdxl_unet, stable_diffusion, stable_diffusion_xl
from self_attention_guidance import PerturbedAttentionGuidance, StableDiffusionSAGPipeline
from table import Report, as_json, format_table
from timing import order, ratios, spread, time_rounds
from tiny import TEXT_WIDTH, tiny_pipeline, tiny_unet
from tiny_pixels import one_thread
from tiny_xl import xl_unet
from variants import VARIANTS, Subject

STEPS = 4
TOLERANCE = 1e-4
COMPILE = torch.compile
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def network(
    suits_diffusers: bool = True, widths: dict[str, int] | None = None, make: Any = None
) -> Network:
    widths = widths or {"prompt_embeds": TEXT_WIDTH}
    return Network(
        make=make or (lambda dtype: tiny_pipeline(StableDiffusionSAGPipeline).to(dtype)),
        inputs=lambda configuration: embedding_inputs(configuration, widths),
        steps=STEPS,
        size=64,
        cpu_size=64,
        takes_size=True,
        cfg_scale=5.0,
        suits_diffusers=suits_diffusers,
    )


def configuration(**changes: Any) -> Configuration:
    usual = Configuration(
        network="tiny",
        mode="eager",
        dtype="float32",
        cfg=True,
        device="cpu",
        size=64,
        steps=STEPS,
        batch_size=1,
    )
    return replace(usual, **changes)


def subject(of: Network, **changes: Any) -> Subject:
    wanted = configuration(**changes)
    return Subject(of, wanted, load(of, wanted.dtype, "cpu"))


def result_of(of: Network, **changes: Any) -> tuple[Result, dict[str, VariantResult]]:
    result = measure(subject(of, **changes), pairs=1)
    return result, {found.variant: found for found in result.variants}


def rows_of(variants: dict[str, VariantResult]) -> list[float | None]:
    return [found.rows_per_image for found in variants.values()]


# Rows and agreement


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("cfg", [True, False])
def test_rows_and_agreement(cfg: bool, batch_size: int) -> None:
    result, variants = result_of(network(), cfg=cfg, batch_size=batch_size)
    plain = (2 if cfg else 1) * STEPS
    none, exact, fast, theirs = rows_of(variants)
    assert (none, exact, theirs) == (plain, plain + STEPS, plain + STEPS)
    assert fast is not None
    assert plain < fast < plain + STEPS
    assert result.difference is not None
    assert result.difference < TOLERANCE
    assert variants["exact"].guidance == exact_guidance(None, "sag")
    assert variants["fast"].guidance == fast_guidance(None, "sag")


def test_perturbed_attention_is_measured_against_its_own_class() -> None:
    result, variants = result_of(network(), method="pag")
    assert rows_of(variants) == [2 * STEPS, 3 * STEPS, 2 * STEPS + 1, 3 * STEPS]
    assert variants["exact"].guidance == PerturbedAttentionGuidance()
    assert result.difference is not None
    assert result.difference < TOLERANCE


def test_where_diffusers_has_no_class_the_row_says_so() -> None:
    _, variants = result_of(network(), method="seg")
    assert rows_of(variants)[:2] == [2 * STEPS, 3 * STEPS]
    assert variants["diffusers"].unsuitable == "there is none for seg"


def test_difference_is_seen_in_a_wrong_result() -> None:
    of = network()
    measured = subject(of)
    other = replace(measured.guidance["exact"], scale=1.5)
    measured.guidance["exact"], theirs = other, measured.draw("diffusers")
    ours = measured.draw_ours(other)
    assert (ours - theirs).abs().max() / theirs.abs().max() > 100 * TOLERANCE


def test_variants_draw_different_pictures_of_one_noise() -> None:
    measured = subject(network())
    none, exact, fast = (measured.draw(name) for name in ("none", "exact", "fast"))
    assert torch.equal(none, measured.draw("none"))
    assert none.shape == (1, 4, 8, 8)
    for first, second in ((none, exact), (none, fast), (exact, fast)):
        assert not torch.allclose(first, second)


def test_half_precision_runs() -> None:
    measured = subject(network(), dtype="bfloat16")
    assert measured.draw("exact").dtype == torch.bfloat16
    assert measured.draw("diffusers").dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "blur_sigma"), [("emoji", 3), ("emoji-adm", 1)])
def test_builtin_models_are_guided_at_every_step_exactly(name: str, blur_sigma: float) -> None:
    """With the blur that `emoji` recommends; `emoji-adm` recommends another method."""
    folder = NETWORKS[name].folder
    exact, fast = exact_guidance(folder, "sag"), fast_guidance(folder, "sag")
    assert (exact.start, exact.stop, exact.every, exact.layer) == (0, 1, 1, None)
    assert exact.blur_sigma == blur_sigma
    assert fast != exact


# What diffusers' class can't do


def test_diffusers_class_is_left_out_where_it_does_not_fit() -> None:
    result, variants = result_of(network(suits_diffusers=False))
    theirs = variants["diffusers"]
    assert (theirs.rows_per_image, theirs.seconds, result.difference) == (None, None, None)
    assert theirs.unsuitable is not None
    assert variants["exact"].over_none is not None
    assert variants["exact"].over_diffusers is None
    table = format_table(Report(1, [result]))
    assert f"does not run: {theirs.unsuitable}" in table


@pytest.mark.parametrize("part", ["scheduler", "heads"])
def test_failure_of_diffusers_class_is_reported_and_leaves_nothing(part: str) -> None:
    def make(dtype: torch.dtype) -> Any:
        pipe = tiny_pipeline(StableDiffusionSAGPipeline)
        if part == "scheduler":
            pipe.scheduler = EulerDiscreteScheduler()
        else:  # it fails in the middle of a step on a tuple, its own attention processor in place
            pipe.unet = tiny_unet(heads=(4, 4))
        return pipe

    measured = subject(network(make=make))
    before = dict(measured.denoiser.attn_processors)
    result = measure(measured, pairs=1)
    *ours, theirs = result.variants
    assert theirs.unsuitable is not None
    assert theirs.unsuitable.split(":")[0] in ("ValueError", "TypeError")
    assert [found.rows_per_image for found in ours[:2]] == [2 * STEPS, 3 * STEPS]
    assert measured.denoiser.attn_processors == before


# Compiled


@pytest.fixture
def compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small(dtype: torch.dtype) -> Any:
    unet = tiny_unet(levels=1, layers_per_block=0, heads=2)
    return tiny_pipeline(StableDiffusionSAGPipeline, unet=unet)


@pytest.mark.usefixtures("compiled_code")
def test_compiled_denoisers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = functools.partial(COMPILE, backend="eager")  # without the minutes of inductor
    monkeypatch.setattr(torch, "compile", backend)
    measured = subject(network(make=small), mode="compiled", cfg=False)
    assert hasattr(measured.denoiser, "_orig_mod")
    result = measure(measured, pairs=1)
    variants = {found.variant: found for found in result.variants}
    assert rows_of(variants)[:2] == [STEPS, 2 * STEPS]
    assert variants["exact"].over_none is not None
    if result.difference is not None:
        assert result.difference < TOLERANCE


@pytest.mark.usefixtures("compiled_code")
def test_machines_that_can_not_compile_get_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no compiler\nis here")

    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend=fail))
    with pytest.raises(ValueError, match=r"modes='compiled' does not work here: .*"):
        measure(subject(network(make=small), mode="compiled"), pairs=1)


# Rounds


def test_every_variant_runs_first_and_last() -> None:
    names = list(VARIANTS)
    orders = [order(names, number) for number in range(2 * len(names))]
    assert all(sorted(each) == sorted(names) for each in orders)
    assert {each[0] for each in orders} == set(names)
    assert {each[-1] for each in orders} == set(names)
    assert orders[1] == orders[0][::-1]


def test_rounds_alternate() -> None:
    ran: list[str] = []
    done: list[float] = []
    runs = {name: functools.partial(ran.append, name) for name in ("a", "b")}
    seconds = time_rounds(runs, 3, torch.device("cpu"), done.append)
    assert ran == ["a", "b", "b", "a", "b", "a"]
    assert sum(done) == pytest.approx(3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_the_same_round() -> None:
    found = ratios([2.0, 40.0, 3.0], [1.0, 20.0, 1.0])  # the second round was slow for both
    assert (found.median, found.low, found.high) == (2, 2, 3)
    assert (found.lower_quartile, found.upper_quartile) == (2, 2.5)


def test_spread_of_one_value_is_that_value() -> None:
    found = spread([1.5])
    assert set(vars(found).values()) == {1.5}


# Networks


def test_a_network_is_let_go_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []

    def make(dtype: torch.dtype) -> Any:
        alive.append(sum(each() is not None for each in made))
        pipe = tiny_pipeline(StableDiffusionSAGPipeline)
        made.append(weakref.ref(pipe.unet))
        return pipe

    done: list[float] = []
    for name in ("first", "second"):
        monkeypatch.setitem(cast("dict[str, Network]", NETWORKS), name, network(make=make))
    configurations = plan(["first", "second"], device="cpu", size=64, cfg="off", steps=2)
    results = bench(configurations, 1, with_memory=False, advance=done.append)
    assert alive == [0, 0]
    assert [result.configuration for result in results] == configurations
    assert sum(done) == pytest.approx(work(configurations, 1, with_memory=False))


def test_random_networks_have_the_published_sizes() -> None:
    with torch.device("meta"):
        counts = [
            sum(weight.numel() for weight in make().parameters()) for make in (sd15_unet, sdxl_unet)
        ]
    assert counts == [859_520_964, 2_567_463_684]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_random_networks_draw(name: str, dtype: str) -> None:
    makes = {"sd15": (stable_diffusion, tiny_unet), "sdxl": (stable_diffusion_xl, xl_unet)}
    make, unet = makes[name]
    widths = {"prompt_embeds": TEXT_WIDTH}
    if name == "sdxl":
        widths = {"prompt_embeds": 2 * TEXT_WIDTH, "pooled_prompt_embeds": TEXT_WIDTH}
    of = network(name == "sd15", widths, lambda kind: make(unet, kind))
    measured = subject(of, dtype=dtype, batch_size=2, size=128)
    assert {weight.dtype for weight in measured.denoiser.parameters()} == {getattr(torch, dtype)}
    none, exact = measured.draw("none"), measured.draw("exact")
    assert none.shape == (2, 4, 16, 16)
    assert not torch.equal(none, exact)


def test_making_networks_leaves_torch_as_it_was() -> None:
    state = torch.random.get_rng_state()
    stable_diffusion(tiny_unet, torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


# Plans


def test_plan_is_every_combination_that_there_is() -> None:
    found = plan(["emoji", "emoji-adm"], ["eager", "compiled"], ["float32"], device="cpu")
    assert [(each.network, each.mode, each.cfg) for each in found] == [
        ("emoji", "eager", True),
        ("emoji", "eager", False),
        ("emoji", "compiled", True),
        ("emoji", "compiled", False),
        ("emoji-adm", "eager", False),
        ("emoji-adm", "compiled", False),
    ]
    assert {(each.network, each.size, each.steps) for each in found} == {
        ("emoji", 64, 40),
        ("emoji-adm", 32, 23),
    }


def test_large_networks_are_small_pictures_on_a_cpu_only() -> None:
    sizes = [
        [each.size for each in plan(["sd15", "sdxl"], device=device, cfg="on", size=size)]
        for device, size in (("cpu", None), ("cuda", None), ("cpu", 384))
    ]
    assert sizes == [[256, 256], [512, 1024], [384, 384]]


# Memory and JSON


def test_memory_of_a_process_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (wanted,) = plan(["emoji-adm"], device="cpu", steps=1)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    message = of_process(wanted, "none")
    assert message == "process ended with 1"
    variants = [VariantResult(variant="none", memory=message)]
    result = Result(configuration=wanted, variants=variants, difference=None)
    assert f"memory of no guidance: {message}" in format_table(Report(1, [result]))


def test_json_holds_what_was_measured() -> None:
    result, variants = result_of(network())
    none = replace(variants["none"], memory=Memory(1.0, 2.0))
    content = as_json(Report(1, [replace(result, variants=[none, *result.variants[1:]])]))
    (found,) = content["results"]
    assert found["configuration"]["network"] == "tiny"
    assert [each["variant"] for each in found["variants"]] == list(VARIANTS)
    assert found["variants"][0]["memory"] == {"before": 1.0, "peak": 2.0}
    assert found["variants"][1]["guidance"]["scale"] == 0.75
    assert content["machine"]["torch"] == torch.__version__
