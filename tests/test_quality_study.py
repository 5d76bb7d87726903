"""The quality study: what it draws, keeps and writes, on the builtin models with few steps."""

from __future__ import annotations

import argparse
import dataclasses
import json
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
import plots
import report
import results
import study
from controls import RandomMaskGuidance
from points import MODELS, UNGUIDED, Point, points
from results import Result
from self_attention_guidance import BlurGuidance, SelfAttentionGuidance
from self_attention_guidance.evaluate import estimate
from self_attention_guidance.models.builtin import builtin_folder, recommended_settings
from tiny_pixels import one_thread

EXACT = {name: model.exact for name, model in MODELS.items()}


@pytest.fixture(autouse=True, scope="module")
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    return tmp_path


def point(model: str = "emoji-adm", guidance: Any = None, **arguments: Any) -> Point:
    chosen = EXACT[model] if guidance is None else guidance
    return Point(model, "a group", "a label", chosen, **{"steps": 3, **arguments})


def invented(seed: int, shift: float = 0.0, scale: float = 1.0) -> Result:
    """Figures of a point that share their noise with those of the same seed."""
    noise = torch.randn(101, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = dict.fromkeys(results.KEYS, 10 + shift + noise)
    return Result(point().description(), 2000, scale, 25.0, None, values)


def test_every_point_has_a_name_and_settings_of_its_own() -> None:
    known = points()
    assert len({p.name for p in known}) == len(known)
    assert len({(json.dumps(p.description()), p.times) for p in known}) == len(known)
    assert {p.model for p in known} == set(MODELS)


def test_every_point_can_be_compared_with_an_unguided_one() -> None:
    known = [(p, invented(0)) for p in points()]
    # It is there to be compared with what the model recommends.
    but = ["emoji/recommended-exact"]
    assert [p.name for p, _ in known if report.unguided(known, p) is None] == but


@pytest.mark.parametrize("name", MODELS)
def test_the_shipped_settings_are_those_of_the_study(name: str) -> None:
    shipped, model = recommended_settings(builtin_folder(name)), MODELS[name]
    assert shipped.make_guidance() == model.recommended
    assert shipped.make_fast_guidance() == model.fast
    assert shipped.num_inference_steps == model.recommended_steps


def test_a_random_mask_blurs_as_much_elsewhere_and_does_not_depend_on_the_batch() -> None:
    attention = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2
    true, shuffled = SelfAttentionGuidance().mask(attention), RandomMaskGuidance().mask(attention)
    assert torch.equal(true.sum((1, 2)), shuffled.sum((1, 2)))
    assert 0.3 < (true == shuffled).float().mean() < 0.7
    assert torch.equal(RandomMaskGuidance().mask(attention[2:3])[0], shuffled[2])


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (SelfAttentionGuidance(0.0), 3),
        (dataclasses.replace(EXACT["emoji-adm"], start=0.0), 6),
        (dataclasses.replace(EXACT["emoji-adm"], start=0.0, every=2), 5),
        (EXACT["emoji-adm"], 5),
    ],
)
def test_rows_of_a_sample_are_counted(guidance: SelfAttentionGuidance, rows: int) -> None:
    drawn = drawing.draw(point(guidance=guidance), guidance, range(2))
    assert drawn.rows == 2 * rows
    assert drawn.features.shape == (2, 64)
    assert drawn.term_squares[1] == rows - 3


def test_a_sample_depends_on_its_seed_alone() -> None:
    """The batches are as large, as kernels round otherwise when there are more pictures."""
    one = drawing.draw(point(), EXACT["emoji-adm"], [5, 6])
    other = drawing.draw(point(), EXACT["emoji-adm"], [7, 6])
    assert torch.equal(one.features[1], other.features[1])
    assert not torch.equal(one.features[0], other.features[0])


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


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("control", [RandomMaskGuidance, BlurGuidance])
def test_controls_of_equal_strength_have_a_term_as_large(
    model: str, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "MATCHING_SEEDS", range(4))
    exact = EXACT[model]
    settings = {"blur_sigma": exact.blur_sigma, "start": exact.start}
    if control is RandomMaskGuidance:
        settings["layer"] = exact.layer
    chosen = point(model, control(1.0, **settings), like=exact)
    found = drawing.matched(chosen)
    wanted = drawing.term_size(chosen, exact)
    assert drawing.term_size(chosen, found) == pytest.approx(wanted, rel=0.05)
    assert drawing.term_size(chosen, chosen.guidance) != pytest.approx(wanted, rel=0.05)


def test_a_term_that_no_scale_gives_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MATCHING_SEEDS", range(1))
    monkeypatch.setattr(drawing, "_MOST_CORRECTIONS", 1)
    chosen = point(guidance=BlurGuidance(0.01), like=EXACT["emoji-adm"])
    with pytest.raises(RuntimeError, match="no scale gives a term"):
        drawing.matched(chosen)


def test_results_are_kept_until_settings_or_samples_change(kept: Path) -> None:
    first = point()
    assert results.read(first) is None
    result = dataclasses.replace(invented(0), description=first.description())
    results.write(first, result)
    found = results.read(first, 2000)
    assert found is not None
    assert found.rows == result.rows
    torch.testing.assert_close(found.values, result.values, atol=1e-4, rtol=0)
    assert results.read(first, 1000) is None
    assert results.read(dataclasses.replace(first, steps=4)) is None


def test_an_interrupted_point_goes_on_where_it_was(kept: Path) -> None:
    options = argparse.Namespace(work=kept / "work", count=4)
    chosen = point(steps=2)
    jobs = study.jobs_of(chosen, options, 1.0)
    path = study.run(jobs[0])
    drawn = path.read_bytes()
    path.write_bytes(b"kept")
    assert study.run(study.jobs_of(chosen, options, 1.0)[0]).read_bytes() == b"kept"
    again = study.jobs_of(dataclasses.replace(chosen, steps=3), options, 1.0)[0]
    assert study.run(again).read_bytes() not in (b"kept", drawn)


def test_more_samples_begin_with_the_seeds_of_other_points(kept: Path) -> None:
    options = argparse.Namespace(work=kept / "work", count=100)
    once, more = (study.jobs_of(point(times=times), options, 1.0) for times in (1, 3))
    assert sum(len(job.seeds) for job in more) == 300
    assert [job.seeds for job in more[: len(once)]] == [job.seeds for job in once]


def test_a_point_of_more_samples_is_compared_with_one_of_as_many() -> None:
    known = [(point(guidance=UNGUIDED, times=times), invented(times)) for times in (1, 3)]
    assert report.unguided(known, point(times=3)) is known[1][1]


def test_plots_show_no_point_twice(tmp_path: Path) -> None:
    """A point that was measured again with more samples stays out of them."""
    known = [(p, invented(number)) for number, p in enumerate(points())]
    for name, chosen in (("all", known), ("once", [m for m in known if m[0].times == 1])):
        (tmp_path / name).mkdir()
        plots.write(chosen, tmp_path / name)
    for name in ("frontier.png", "scales.png"):
        drawn = [(tmp_path / kind / name).read_bytes() for kind in ("all", "once")]
        assert drawn[0] == drawn[1]


def test_figures_of_real_samples() -> None:
    """As they are, the reference's pictures are perfect; drawn in three steps, nothing is."""
    drawn = drawing.draw(point(), EXACT["emoji-adm"], range(12))
    found = results.measured(point(), 1.0, [drawn])
    assert found.count == 12
    assert found.rows == 5
    assert found.estimate("frechet_distance").value > 20
    assert found.term_size is not None
    assert found.term_size > 0


def test_differences_are_paired() -> None:
    """Two points that share their noise differ by much less than each of them is uncertain."""
    one, other = invented(0), invented(0, shift=0.5)
    gain = other.gain("kid", one)
    assert gain.value == pytest.approx(0.5)
    assert gain.high is not None
    assert gain.high - gain.value < 1e-6
    alone = estimate(one.values["kid"], 0)
    assert alone.high is not None
    assert alone.high - alone.value > 1


def test_a_table_tells_what_changed_and_whether_chance_explains_it() -> None:
    plain = point(guidance=SelfAttentionGuidance(0.0))
    better, same = point(), point(guidance=SelfAttentionGuidance(0.1))
    rows = list(
        report.table(
            [(plain, invented(0)), (better, invented(0, -3)), (same, invented(1))], "a group"
        )
    )
    assert len(rows) == 5
    assert "**-3.00 [-3.00, -3.00]**" in rows[3]
    assert "**" not in rows[4]


def test_pages_keep_their_text_and_get_the_tables(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept / "docs" / "images").mkdir(parents=True)
    (kept / "page.md").write_text("before\n<!-- study: scale -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "ROOT", kept)
    monkeypatch.setattr(report, "PAGES", ("page.md",))
    for chosen in points():
        result = dataclasses.replace(invented(0), description=chosen.description())
        results.write(chosen, result)
    report.write_report()
    first = (kept / "page.md").read_text()
    assert first.startswith("before\n<!-- study: scale -->\n\n| Model |")
    assert first.endswith("<!-- end -->\nafter\n")
    assert "old" not in first
    assert "scale 0.75" in first
    for name in ("frontier", "scales"):
        assert (kept / "docs" / "images" / f"{name}.png").stat().st_size > 10_000
    report.write_report()
    assert (kept / "page.md").read_text() == first
