"""The quality study: what it searches, draws, keeps and writes, on the builtin models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bfloat16
import drawing
import methods
import plots
import report
import results
import study
from drawing import FIRST_REPORTED, Drawn, drawn
from judging import QUESTIONS, critic, held_out
from methods import BUDGETS, Point, Trial, candidates, points, search
from results import Result
from self_attention_guidance import (
    BlurGuidance,
    Guidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
)
from self_attention_guidance.models.builtin import builtin_folder, recommended_settings
from settings import Setting, fitting
from tasks import TASKS, asked_with, pairs_of, reference
from tiny_pixels import one_thread

ADM, TEXT = TASKS["adm"], TASKS["text"]
SAG = SelfAttentionGuidance(2.0, start=0.1, layer="mid")


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    return tmp_path


def invented(seed: int, shift: float = 0.0, task: str = "adm", **setting: Any) -> Result:
    """Figures that share their noise with those of the same seed."""
    noise = torch.randn(101, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keys = ("frechet_distance", "precision", "recall", "saturation", *QUESTIONS)
    values = dict.fromkeys(keys, 10 + shift + noise)
    return Result(TASKS[task].description(), Setting(**setting), 256, values)


# What is searched


def test_every_point_has_a_name_of_its_own() -> None:
    names = [point.name for point in points()]
    assert len(set(names)) == len(names)
    assert {point.task for point in points()} == set(TASKS)


@pytest.mark.parametrize("budget", ["every", "cheap"])
def test_every_method_is_searched_with_as_many_candidates_within_the_budget(
    budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a unit of scale is worth is measured by a test of its own.
    monkeypatch.setattr(methods, "size_of_term", lambda task, guidance, cfg: 0.5)
    for task in TASKS.values():
        most = BUDGETS[budget].of[task.has_cfg]
        for point in points():
            if (point.task, point.budget, point.dtype) != (task.name, budget, "bfloat16"):
                continue
            found = candidates(task, point.method, BUDGETS[budget])
            if point.method == "shipped" or (not task.has_cfg and "none" in point.method):
                assert len(found) == 1
                continue
            assert len(set(found)) == methods.CANDIDATES
            assert found == candidates(task, point.method, BUDGETS[budget])
            assert all(most - 4 < setting.evaluations <= most for setting in found)
            assert all(g.start >= task.earliest for s in found for g in s.guidance)


def test_scales_are_searched_by_the_size_of_the_term() -> None:
    """Twice the scale is a term twice as large, and the size at scale 1 is what it says."""
    small = dataclasses.replace(SAG, scale=0.3)
    assert drawing.size_of_term(ADM, SAG, 1.0) == pytest.approx(
        drawing.size_of_term(ADM, small, 1.0), rel=1e-3
    )
    other = PerturbedAttentionGuidance(1.0, start=0.1)
    assert drawing.size_of_term(ADM, other, 1.0) < 0.5 * drawing.size_of_term(ADM, SAG, 1.0)


def test_the_shipped_preset_is_the_best_cheap_one_of_the_study() -> None:
    """With the model's own scheduler, which the preset leaves as it is."""
    rows = [row for row in report.rows_of("adm", "cheap") if row.result.setting.scheduler is None]
    shipped = recommended_settings(builtin_folder("emoji-adm")).make_fast_guidance()
    assert rows[0].result.setting.guidance == (shipped,)


def test_the_search_gives_more_samples_to_what_is_better() -> None:
    asked: list[tuple[int, int]] = []

    def distance(setting: Setting, count: int) -> float:
        asked.append((setting.steps, count))
        return abs(setting.steps - 7)

    found = search([Setting((), steps) for steps in range(1, 13)], distance)
    assert found[0].setting.steps == 7
    assert {steps for steps, count in asked if count == 64} <= {6, 7, 8, 5, 9}
    assert [len(trial.distances) for trial in found] == [2] * 3 + [1] * 9


def test_captions_and_seeds_of_the_search_are_not_reported() -> None:
    searched, reported = pairs_of(is_search=True), pairs_of(is_search=False)
    named = [{(p.label, p.style) for p in part.pictures} for part in (searched, reported)]
    assert not named[0] & named[1]
    assert len(named[0] | named[1]) == len(held_out().pictures)
    assert methods.ROUNDS[-1][1] < FIRST_REPORTED


def test_a_budget_is_spent_on_as_many_steps_as_it_allows() -> None:
    assert fitting(Setting(), 50).steps == 50
    assert fitting(Setting(cfg=3.0), 75).steps == 37
    assert fitting(Setting((SelfAttentionGuidance(1.0),), cfg=3.0), 75).steps == 25
    assert fitting(Setting((SelfAttentionGuidance(1.0, start=0.5),)), 30).steps == 20


def test_the_better_sampler_is_searched_with_guidance_as_fast_methods_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods, "size_of_term", lambda task, guidance, cfg: 0.5)
    for budget, method in (("every", "tpg-fast"), ("cheap", "tpg")):
        own, better = (
            candidates(ADM, name, BUDGETS[budget]) for name in (method, f"{method}-dpm++")
        )
        assert [dataclasses.replace(each, scheduler="dpm++ 2m") for each in own] == better
    assert not any("sag" in p.method and "dpm" in p.method for p in points() if p.task == "text")


# What is drawn


@pytest.mark.parametrize(
    "guidance",
    [(), (SAG,), (dataclasses.replace(SAG, every=2),), (SAG, PerturbedAttentionGuidance(1.0))],
)
def test_samples_cost_what_was_planned(guidance: tuple[Guidance, ...], tmp_path: Path) -> None:
    """Drawing counts the network's evaluations, and raises where the plan says otherwise."""
    setting = Setting(guidance, 3)
    found = drawn(ADM, setting, range(2), tmp_path)
    assert found.features.shape == (2, 64)
    assert found.right.shape == (2, 0)
    assert 0 < float(found.saturation.min()) <= float(found.saturation.max()) < 1


def test_a_plan_that_is_wrong_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "evaluations", 4)
    with pytest.raises(RuntimeError, match="6 evaluations, where 8 were expected"):
        drawn(ADM, Setting((), 3), range(2), tmp_path)


def test_captions_are_asked_for_and_judged(tmp_path: Path) -> None:
    found = drawn(TEXT, Setting((BlurGuidance(0.5),), 4, 3.0), range(4), tmp_path)
    assert found.right.shape == (4, len(QUESTIONS))
    other = drawn(TEXT, Setting((BlurGuidance(0.5),), 4, 3.0), range(4, 8), tmp_path)
    assert not torch.equal(found.features, other.features)
    pairs, backgrounds = asked_with(range(4), is_search=True)
    assert len(set(pairs.captions(backgrounds))) == 4


def test_the_judge_knows_the_held_out_pictures() -> None:
    pairs = held_out().part(list(range(0, 600, 6)))
    backgrounds = torch.arange(100) % 11
    right = critic().right(pairs.shown(backgrounds), pairs.pictures, backgrounds).float().mean(0)
    assert right[QUESTIONS.index("background")] > 0.98
    assert right[QUESTIONS.index("style")] > 0.85
    assert right[QUESTIONS.index("thing_top5")] > 0.8
    wrong = critic().right(pairs.shown(backgrounds), pairs.pictures, (backgrounds + 1) % 11)
    assert float(wrong[:, QUESTIONS.index("background")].float().mean()) < 0.05


def test_a_sample_depends_on_its_seed_alone(tmp_path: Path) -> None:
    """The batches are as large, as kernels round otherwise when there are more pictures."""
    setting = Setting((SAG,), 3)
    one = drawn(ADM, setting, range(5, 7), tmp_path)
    other = drawn(ADM, setting, range(6, 8), tmp_path)
    assert torch.equal(one.features[1], other.features[0])
    assert not torch.equal(one.features[0], other.features[0])


def test_what_was_drawn_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting((), 2)
    first = drawn(ADM, setting, range(2), tmp_path)
    asked: list[Setting] = []
    real = drawing._draw

    def noted(task: Any, setting: Setting, seeds: range) -> Drawn:
        asked.append(setting)
        return real(task, setting, seeds)

    monkeypatch.setattr(drawing, "_draw", noted)
    assert torch.equal(drawn(ADM, setting, range(2), tmp_path).features, first.features)
    assert asked == []
    drawn(ADM, Setting((SAG,), 2), range(2), tmp_path)
    drawn(TASKS["adm-class"], setting, range(2), tmp_path)
    other = drawn(ADM, Setting((), 2, scheduler="dpm++ 2m"), range(2), tmp_path)
    assert not torch.allclose(other.features, first.features, atol=1e-3)
    assert len(asked) == 3


PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x.flatten(2), x[0].flatten(1), x[0, :, 0, 0]),
    "conv2d": lambda x: F.conv2d(x, x[:, :, :3, :3]),
    "matmul": lambda x: x @ x.mT,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}


class _Computed(TorchDispatchMode):
    """Notes in which type products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in bfloat16.PRODUCTS:
            self.products.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_without_instructions_for_bfloat16_products_are_rounded_ones_of_float32(
    product: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    computed = _Computed()
    with torch.no_grad(), computed, bfloat16.autocast():
        found = product(x)
        untouched = x.double() @ x.double()
    expected = product(x.bfloat16().float())
    assert computed.products == [torch.float32, torch.float64]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    assert not torch.equal(found.float(), product(x))
    assert torch.equal(untouched, x.double() @ x.double())


# What is kept and written


def test_claims_are_against_what_costs_as_much(kept: Path) -> None:
    shifts = {"every/none": 2, "every/sag": 0, "few/sag": 3, "cheap/tpg": 0.5}
    shifts |= {"cheap/none": 4, "cheap/tpg-dpm++": 1, "cheap/none-dpm++": 2.5, "cheap/shipped": 1}
    for name, shift in shifts.items():
        results.write(f"adm/{name}", invented(1, shift))
    assert [line.replace(" with 25 evaluations", "") for line in report.claims("adm")] == [
        "- SAG against no guidance: **-2.00 [-2.00, -2.00]**",
        "- TPG against DPM-Solver++ alone: **-2.00 [-2.00, -2.00]**",
        "- TPG against no guidance: **-3.50 [-3.50, -3.50]**",
        "- TPG against SAG at every step: **-2.50 [-2.50, -2.50]**",
        "- TPG against SAG: **+0.50 [+0.50, +0.50]**",
        "- TPG against no guidance: **-1.50 [-1.50, -1.50]**",
        "- the model's own settings against DPM-Solver++ alone: **-1.50 [-1.50, -1.50]**",
        "- the model's own settings against no guidance: **-3.00 [-3.00, -3.00]**",
        "- the model's own settings against SAG at every step: **-2.00 [-2.00, -2.00]**",
        "- the model's own settings against SAG: **+1.00 [+1.00, +1.00]**",
        "- the model's own settings against no guidance: **-1.00 [-1.00, -1.00]**",
        "- TPG with DPM-Solver++ against DPM-Solver++ alone: **-1.50 [-1.50, -1.50]**",
    ]


def test_figures_of_real_samples(tmp_path: Path) -> None:
    """Held-out pictures are their own reference; what is drawn in three steps is far from it."""
    features = reference("adm", is_search=False)
    same = results.measured(
        ADM, Setting(), Drawn(features, torch.zeros(len(features), 0), torch.ones(len(features)))
    )
    assert same.estimate("frechet_distance").value < 1e-3
    assert same.estimate("precision").value == 1
    poor = results.measured(ADM, Setting(), drawn(ADM, Setting((), 3), range(12), tmp_path))
    assert poor.estimate("frechet_distance").value > 20
    assert poor.count == 12


def test_shares_of_right_answers_are_those_of_the_samples() -> None:
    right = torch.zeros(40, len(QUESTIONS), dtype=torch.bool)
    right[:10, 0] = True
    features = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    found = results.measured(TEXT, Setting(), Drawn(features, right, torch.full((40,), 0.3)))
    assert found.estimate("thing").value == pytest.approx(0.25)
    assert found.estimate("style").value == 0
    assert found.estimate("saturation").value == pytest.approx(0.3)


def test_results_are_kept_until_weights_or_samples_change(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invented(0, guidance=(SAG, PerturbedAttentionGuidance(1.0, layers="mid")), steps=18)
    results.write("adm/every/sag", result)
    found = results.read("adm/every/sag", ADM, 256)
    assert found is not None
    assert found.setting == result.setting
    torch.testing.assert_close(found.values, result.values, atol=1e-4, rtol=0)
    assert results.read("adm/every/sag", ADM, 512) is None
    trials = [Trial(result.setting, {32: 4.5, 64: 3.25}), Trial(Setting(), {32: 5.0})]
    results.write_trials("adm/every/sag", ADM, trials)
    assert results.read_trials("adm/every/sag", ADM) == trials
    monkeypatch.setattr("tasks._digest_of_weights", lambda model: "others")
    assert results.read("adm/every/sag", ADM) is None
    assert results.read_trials("adm/every/sag", ADM) is None


def test_a_point_is_searched_measured_and_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with few steps and samples; a second run draws nothing."""
    few = methods.Budget("every", "few", {False: 4, True: 6})
    monkeypatch.setitem(BUDGETS, "every", few)
    monkeypatch.setattr(methods, "CANDIDATES", 3)
    monkeypatch.setattr(methods, "ROUNDS", ((3, 4), (2, 8)))
    point = Point("adm", "every", "pag")
    study.measure(point, 8, kept / "work")
    found = results.read(point.name, ADM, 8)
    trials = results.read_trials(point.name, ADM)
    assert found is not None
    assert trials is not None
    assert found.setting == trials[0].setting
    assert sorted(len(trial.distances) for trial in trials) == [1, 2, 2]
    monkeypatch.setattr(drawing, "_draw", lambda *_: pytest.fail("drawn again"))
    study.measure(point, 8, kept / "work")


def test_differences_are_paired_and_ranks_have_ties() -> None:
    """Rows that share their noise differ by much less than each of them is uncertain."""
    rows = [
        report.Row(Point("adm", "every", method), invented(seed, shift))
        for method, seed, shift in (("pag", 0, -3.0), ("sag", 1, -2.9), ("none", 0, 0.0))
    ]
    assert [report.rank(row, rows) for row in rows] == [1, 1, 2]
    gain = rows[0].result.gain("frechet_distance", rows[2].result)
    assert gain.value == pytest.approx(-3)
    assert gain.high is not None
    assert gain.high - gain.value < 1e-6


def test_pages_keep_their_text_and_get_the_tables(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = kept / "page.md"
    blocks = ("answers every", "table text every", "settings text every", "table plain every")
    page.write_text(
        "before\n" + "".join(f"<!-- study: {b} -->\nold\n<!-- end -->\n" for b in blocks)
    )
    monkeypatch.setattr(report, "ROOT", kept)
    monkeypatch.setattr(report, "PAGES", ("page.md",))
    for method, shift in (("none", 0.0), ("pag", -3.0), ("sag", 0.0)):
        guidance = () if method == "none" else (Guidance.from_dict({"method": method}),)
        result = invented(0 if method != "sag" else 1, shift, "text", guidance=guidance, cfg=2.5)
        results.write(f"text/every/{method}", result)
    report.write_report()
    first = page.read_text()
    assert first.startswith("before\n<!-- study: answers every -->\n\n| Model |")
    assert "old" not in first
    assert "| 1 | PAG | 25 | 75 |" in first
    assert "**-3.00 [-3.00, -3.00]**" in first
    assert "- PAG: `--steps 25 --guidance pag:scale=3 --guidance-scale 2.5`" in first
    assert first.count("Not measured yet.") == 1
    assert (kept / "docs" / "images" / "quality-text.png").stat().st_size > 10_000
    report.write_report()
    assert page.read_text() == first


def test_points_of_plots_stand_at_their_cost_and_differ() -> None:
    every = [point for point in points() if (point.task, point.budget) == ("adm", "every")]
    names = list(dict.fromkeys(point.method for point in every))
    rows = [
        report.Row(Point("adm", "every", name), invented(seed, steps=20 + seed % 3))
        for seed, name in enumerate(names)
    ]
    by_cost, by_row = plots.frontier("title", [("every", rows), ("double", rows[:1])]).axes
    expected = {
        (row.result.setting.evaluations, row.result.estimate("frechet_distance").value)
        for row in rows
    }
    drawn = {tuple(line.get_xydata()[0]) for line in by_cost.lines if len(line.get_xdata()) == 1}
    assert drawn == expected
    labels = [label.get_text() for label in by_row.get_yticklabels()]
    assert labels[1:] == [f"{row.title}, {row.result.setting.evaluations}" for row in rows]
    assert len({plots.look(name) for name in names}) == len(names)
    assert plots.look("sag")[0] == plots.look("sag-fast-dpm++")[0] != plots.look("pag")[0]
    assert plots.look("sag-fast")[1] == plots.look("pag-fast")[1] != plots.look("sag")[1]


def test_the_summary_names_the_best_cheap_method_whichever_it_is(kept: Path) -> None:
    sag = (SelfAttentionGuidance(1.0),)
    results.write("text/every/none", invented(0, task="text"))
    results.write("text/every/sag", invented(0, task="text", guidance=sag))
    assert list(report.summary(""))[-1].endswith(" | not measured |")
    results.write("text/cheap/sag", invented(0, task="text", guidance=sag))
    *_, plain, dear, cheap, _ = list(report.summary(""))[-1].split("|")
    assert cheap == f" SAG:{dear}"
    assert "SAG" not in plain + dear
