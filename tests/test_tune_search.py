"""The search for settings, without a model: plans, halving, the space of settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from self_attention_guidance import PerturbedAttentionGuidance, SelfAttentionGuidance
from self_attention_guidance.guidance import METHODS, Guidance, guidance_of
from self_attention_guidance.guidance.seg import SmoothedEnergyGuidance
from self_attention_guidance.guidance.text import guidance_text
from self_attention_guidance.tune import (
    Budget,
    Candidate,
    Plan,
    Space,
    fewest_pictures,
    make_plan,
    parse_budget,
    prefer_cheaper,
    search,
    settings_content,
    space_of,
)
from tiny_pixels import tiny_unet
from tiny_transformers import stable_diffusion_3

OWN = SelfAttentionGuidance(0.5, blur_sigma=9.0, blur_kernel_size=31)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("90s", Budget(seconds=90)),
        ("30m", Budget(seconds=1800)),
        ("1.5h", Budget(seconds=5400)),
        ("500", Budget(pictures=500)),
    ],
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "0", "0m", "-5", "3 days", "1.5", "m", "nan"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a time like 90s"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["9" * 30, "1000001", "300h"])
def test_budgets_that_nobody_can_wait_for_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be at most 1,000,000 pictures or seconds"):
        parse_budget(text)


@given(
    pictures=st.integers(1, 20_000),
    unit=st.sampled_from([1, 2, 3, 4, 8, 16]),
    anchors=st.integers(2, 9),
)
def test_plans_keep_to_their_budget(pictures: int, unit: int, anchors: int) -> None:
    try:
        plan = make_plan(pictures, unit, anchors, wanted=24)
    except ValueError:
        assert pictures < fewest_pictures(unit, anchors)
        return
    assert plan.pictures <= pictures
    assert plan.rungs[0].settings - plan.neighbours >= anchors
    assert all(rung.seeds % unit == 0 for rung in plan.rungs)
    for rung, later in zip(plan.rungs, plan.rungs[1:], strict=False):
        assert later.settings <= rung.settings
        assert later.seeds == 2 * rung.seeds


def test_more_pictures_are_for_more_seeds() -> None:
    plans = [make_plan(pictures, 8, 8, wanted=24) for pictures in (800, 2000, 8000)]
    assert [plan.seeds for plan in plans] == sorted({plan.seeds for plan in plans})
    assert all(plan.rungs[0].settings >= 24 for plan in plans)


def test_the_number_of_seeds_can_be_given() -> None:
    assert make_plan(2000, 8, 8, wanted=24, count=64).seeds == 32
    with pytest.raises(ValueError, match=r"count=60 must be a multiple of .* \(16\), at least 16"):
        make_plan(2000, 8, 8, wanted=24, count=60)


class Numbers:
    """Scores of numbers: how far they are from the best one, with noise that seeds average out."""

    def __init__(self, best: float, most: int = 10**9) -> None:
        self.best, self.most = best, most
        self.drawn: dict[float, int] = {}

    def __call__(self, numbers: Sequence[float], seeds: int) -> Mapping[float, float]:
        reached = min(seeds, self.most)
        for number in numbers:
            self.drawn[number] = max(self.drawn.get(number, 0), reached)
        noise = {n: torch.randn(1, generator=_dice(n, reached)).item() for n in numbers}
        return {n: abs(n - self.best) + noise[n] / reached**0.5 for n in numbers}

    def neighbours(self, parents: Sequence[float], count: int) -> list[float]:
        near = [parent + step for parent in parents for step in (-0.5, 0.5)]
        return [each for each in near if each not in self.drawn][:count]


def _dice(number: float, seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(number * 2) * 1000 + seeds)


PLAN = make_plan(1600, 8, 4, wanted=24)


def test_the_best_is_found_by_way_of_its_neighbours() -> None:
    numbers = Numbers(best=7.5)
    ranked = search([float(n) for n in range(20)], PLAN, numbers, numbers.neighbours)
    assert ranked[0] in (7.0, 7.5, 8.0)
    assert 7.5 in numbers.drawn  # which was not listed


def test_later_rungs_draw_fewer_settings_on_more_seeds() -> None:
    numbers = Numbers(best=3.0)
    ranked = search([float(n) for n in range(20)], PLAN, numbers, numbers.neighbours)
    assert len(ranked) == PLAN.rungs[-1].settings
    assert all(numbers.drawn[number] == PLAN.seeds for number in ranked)
    assert sorted(set(numbers.drawn.values())) == [rung.seeds for rung in PLAN.rungs]


def test_a_search_that_is_short_of_time_goes_on_with_fewer_seeds() -> None:
    numbers = Numbers(best=3.0, most=8)
    ranked = search([float(n) for n in range(20)], PLAN, numbers, numbers.neighbours)
    assert len(ranked) == PLAN.rungs[-1].settings
    assert set(numbers.drawn.values()) == {8}


def test_shares_of_a_plan_end_with_its_report() -> None:
    shares = [PLAN.share(rung.seeds) for rung in PLAN.rungs]
    assert shares == sorted(shares)
    left = PLAN.reported * PLAN.seeds
    assert shares[-1] == pytest.approx(1 - left / PLAN.pictures)


def test_of_what_is_as_good_the_cheaper_is_preferred() -> None:
    noise = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = {
        "best": torch.cat([torch.tensor([1.0], dtype=torch.float64), 1 + noise[1:] * 0]),
        "near": torch.cat([torch.tensor([1.5], dtype=torch.float64), 1.5 + noise[1:]]),
        "far": torch.cat([torch.tensor([4.0], dtype=torch.float64), 4 + noise[1:]]),
    }
    ranked = ["best", "near", "far"]
    assert prefer_cheaper(ranked, values, {"best": 50, "near": 30, "far": 25}) == "near"
    assert prefer_cheaper(ranked, values, {"best": 50, "near": 48, "far": 25}) == "best"
    whole = {name: each[:1] for name, each in values.items()}
    assert prefer_cheaper(ranked, whole, {"best": 50, "near": 30, "far": 25}) == "best"


@pytest.fixture(scope="module")
def space() -> Space:
    return space_of(tiny_unet(), 20, OWN, cfg=4.0)


def test_no_guidance_the_own_and_all_defaults_are_tried(space: Space) -> None:
    listed = space.listed(60, seed=0)
    assert len(set(listed)) == 60
    assert listed[0].is_unguided and listed[0].cfg == 4.0
    assert listed[1].guidance == OWN
    defaults = [Candidate(cls(), 4.0) for name, cls in METHODS.items() if name in space.layers]
    assert set(defaults) <= set(listed)
    assert {each.guidance.method for each in listed} == set(space.layers)
    assert {each.cfg for each in listed} == {4.0, 1.0, 2.0, 3.0, 6.0}


def test_lists_depend_on_their_seed_alone(space: Space) -> None:
    assert space.listed(40, seed=1) == space.listed(40, seed=1)
    assert space.listed(40, seed=1) == space.listed(60, seed=1)[:40]
    assert space.listed(40, seed=1) != space.listed(40, seed=2)
    keys = [each.key for each in space.listed(60, seed=1)]
    assert len(set(keys)) == len(keys)


def test_every_setting_suits_the_network_and_is_read_back(space: Space) -> None:
    network = tiny_unet()
    listed = space.listed(60, seed=3)
    near = space.neighbours(listed[1:6], 20, 0, listed)
    assert len(near) == 20
    assert not set(near) & set(listed)
    for candidate in [*listed, *near]:
        candidate.guidance.reads(network)
        assert guidance_of(candidate.guidance.to_dict()) == candidate.guidance
        assert space.acts(candidate)


def test_neighbours_are_near(space: Space) -> None:
    parent = Candidate(PerturbedAttentionGuidance(4.0, start=0.2), 4.0)
    for near in space.neighbours([parent], 12, 0, [parent]):
        assert near.guidance.method == "pag"
        assert 4 / 1.5**2 * 0.9 < near.guidance.scale < 4 * 1.5**2 * 1.1
        settings, own = near.guidance.to_dict(), parent.guidance.to_dict()
        changed = sum(settings[name] != own[name] for name in own) + (near.cfg != parent.cfg)
        assert 1 <= changed <= 2


@pytest.mark.parametrize(
    "own",
    [
        SelfAttentionGuidance(2.0, start=0.1, stop=0.3),
        SelfAttentionGuidance(2.0, start=0.05, stop=0.1),
        SelfAttentionGuidance(2.0, start=0.7),
        SelfAttentionGuidance(2.0, start=0.9, stop=0.95, blur_sigma=1e6),
        SelfAttentionGuidance(9e8),
        SmoothedEnergyGuidance(2.0, start=0.3, stop=0.35, blur_sigma=1e6),
    ],
)
def test_any_settings_of_a_model_have_neighbours(own: Guidance) -> None:
    space = space_of(tiny_unet(), 100, own)
    listed = space.listed(40, seed=0)
    near = space.neighbours([space.as_it_is], 10, 0, listed)
    assert len(near) == 10
    assert all(space.acts(each) for each in near)


def test_windows_without_a_step_are_left_out() -> None:
    space = space_of(tiny_unet(), 1, OWN)
    assert all(space.acts(each) for each in space.listed(30, seed=0))
    late = Candidate(SelfAttentionGuidance(1.0, start=0.3))
    assert not space.acts(late)


def test_methods_can_be_chosen() -> None:
    space = space_of(tiny_unet(), 20, OWN, methods=("pag",))
    methods = {each.guidance.method for each in space.listed(20, seed=0)}
    assert methods == {"sag", "pag"}  # no guidance, and the model's own, are of sag
    assert all(each.cfg is None for each in space.listed(20, seed=0))


def test_a_transformer_has_layers_from_first_to_last() -> None:
    network: Any = stable_diffusion_3().transformer
    space = space_of(network, 20, OWN, methods=("pag",))
    assert space.layers["pag"][0] is None
    for candidate in space.listed(16, seed=0):
        candidate.guidance.reads(network)


def test_a_model_of_one_cfg_scale_keeps_it() -> None:
    assert space_of(tiny_unet(), 20, OWN, cfg=1.0).cfg == (1.0,)


@pytest.mark.parametrize(
    ("earlier", "kept"),
    [
        ({"guidance": {"method": "pag"}}, {"prompts": ["a"], "sag_scales": [0, 2]}),
        ({"guidance": {"method": "sag"}}, {"prompts": ["a"]}),
        ({"guidance": {"scale": 2.0}}, {"prompts": ["a"]}),
        ({}, {"prompts": ["a"]}),
    ],
)
def test_scales_of_another_method_are_not_kept(
    tmp_path: Path, earlier: dict[str, Any], kept: dict[str, Any]
) -> None:
    path = tmp_path / "sag_settings.json"
    path.write_text(json.dumps({**earlier, "compare": {"prompts": ["a"], "sag_scales": [0, 2]}}))
    found = settings_content(Candidate(PerturbedAttentionGuidance(2.0)), 20, path)
    assert found["compare"] == kept


@pytest.mark.parametrize("text", ["[", "7", '{"compare": 7}', '{"guidance": []}', "[" * 100_000])
def test_damaged_earlier_settings_are_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sag_settings.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^out=.* is damaged \("):
        settings_content(Candidate(PerturbedAttentionGuidance(2.0)), 20, path)


def test_texts_tell_what_a_model_would_fill_in() -> None:
    plain = SelfAttentionGuidance(2.0).to_dict()
    assert guidance_text(plain) == "sag:scale=2"
    assert guidance_text({**plain, "scale": 0.1234567}) == "sag:scale=0.1234567"
    assert guidance_text(plain, {"start", "layer"}) == "sag:scale=2,start=0,layer=none"
    plain.pop("scale")
    assert guidance_text(plain) == "sag"
    assert guidance_text({"guidances": [{**plain, "every": 2, "scale": 3.0}]}) == "sag:every=2"


def test_a_plan_says_what_it_is() -> None:
    plan: Plan = make_plan(1000, 8, 8, wanted=24)
    assert str(plan).endswith(f"at most {plan.pictures} pictures")
