"""`rescale` and `norm_limit`: what they make of a guided prediction, whatever runs around it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from family import KINDS, METHODS, denoiser_of, difference
from self_attention_guidance import (
    BlurGuidance,
    Guidance,
    GuidanceGuider,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    SkipLayerGuidance,
    attach,
)
from self_attention_guidance.guidance.text import parse_guidance
from self_attention_guidance.maths import rescaling
from test_devices import draw_on_device
from test_guider import draw_modular, modular_xl
from test_stable_diffusion_xl import draw as draw_xl
from test_stable_diffusion_xl import pipe as pipe
from tiny import tiny_scheduler, tiny_unet

ALL: dict[str, Any] = {"sag": SelfAttentionGuidance, "blur": BlurGuidance, **METHODS}


def predict(
    *guidances: Guidance,
    rows: int = 2,
    layout: Any = "single",
    seed: int = 0,
    kind: str = "epsilon",
) -> Tensor:
    """A prediction of a tiny network in the middle of a run."""
    unet, scheduler = tiny_unet(), tiny_scheduler(prediction_type=kind)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(seed)
    pictures = rows // 2 if layout == "uncond_first" else rows
    x = torch.randn(pictures, 4, 8, 8, generator=generator)
    x = torch.cat([x] * (rows // pictures))
    texts = torch.randn(rows, 7, 32, generator=generator)
    with torch.no_grad():
        if not guidances:
            return unet(x, scheduler.timesteps[2], texts).sample
        with attach(unet, *guidances, scheduler=scheduler, batch_layout=layout):
            return unet(x, scheduler.timesteps[2], texts).sample


def spread(prediction: Tensor) -> Tensor:
    return prediction.flatten(1).std(dim=1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", ALL)
def test_the_guided_prediction_has_the_plain_ones_spread(method: str, kind: str) -> None:
    cls = ALL[method]
    plain, strong = predict(kind=kind), predict(cls(20.0), kind=kind)
    full, half = (predict(cls(20.0, rescale=each), kind=kind) for each in (1.0, 0.5))
    assert (spread(strong) > 1.05 * spread(plain)).all()
    assert torch.allclose(spread(full), spread(plain), rtol=1e-5)
    # Lin et al., Eq. 15 and 16, written out by hand
    expected = strong * (spread(plain) / spread(strong)).view(-1, 1, 1, 1)
    assert difference(full, expected) < 1e-5
    assert difference(half, (expected + strong) / 2) < 1e-5


@pytest.mark.parametrize("branch", ["uncond", "cond"])
def test_both_halves_get_the_same(branch: Any) -> None:
    """So that it is the same for every weight of classifier-free guidance."""
    guidances = [SelfAttentionGuidance(20.0, rescale=r, branch=branch) for r in (1.0, 0.0)]
    plain = predict(rows=4, layout="uncond_first")
    full, strong = (predict(each, rows=4, layout="uncond_first") for each in guidances)
    terms = [part.chunk(2) for part in (full - plain, strong - plain)]
    for uncond, cond in terms:
        assert difference(uncond, cond) < 1e-4
    half = slice(0, 2) if branch == "uncond" else slice(2, 4)
    assert torch.allclose(spread(full[half]), spread(plain[half]), rtol=1e-4)
    assert difference(full, strong) > 1e-2


def test_several_are_rescaled_together() -> None:
    def both(rescale: float) -> list[Any]:
        classes = (SelfAttentionGuidance, PerturbedAttentionGuidance, SkipLayerGuidance)
        return [cls(9.0, branch="cond", rescale=rescale) for cls in classes]

    plain, strong, full = predict(), predict(*both(0.0)), predict(*both(1.0))
    expected = strong * (spread(plain) / spread(strong)).view(-1, 1, 1, 1)
    assert difference(full, expected) < 1e-5
    assert torch.allclose(spread(full), spread(plain), rtol=1e-5)
    assert difference(predict(*reversed(both(1.0))), full) < 1e-5


@pytest.mark.parametrize(
    "other", [{"rescale": 0.0, "branch": "cond"}, {"rescale": 0.7, "branch": "uncond"}]
)
def test_several_that_differ_are_refused(other: dict[str, Any]) -> None:
    first = PerturbedAttentionGuidance(1.0, rescale=0.7)
    message = "rescaled together: give them one rescale, one norm_limit and one branch, not resc"
    with pytest.raises(ValueError, match=message):
        predict(first, SelfAttentionGuidance(1.0, **other))
    predict(first, SelfAttentionGuidance(0.0, **other))  # which is off


def clean(prediction: Tensor, kind: str) -> Tensor:
    """The clean samples that a prediction of `predict` says, but for what all of them share."""
    scheduler = tiny_scheduler(prediction_type=kind)
    scheduler.set_timesteps(4)
    alpha_2 = scheduler.alphas_cumprod[scheduler.timesteps[2]]
    sigma = (1 - alpha_2).sqrt()
    weights = {"epsilon": -sigma / alpha_2.sqrt(), "v_prediction": -sigma, "sample": 1.0}
    return weights[kind] * prediction


def size(change: Tensor) -> Tensor:
    return change.flatten(1).square().mean(dim=1).sqrt()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", ALL)
def test_the_clean_sample_moves_no_further_than_the_limit(method: str, kind: str) -> None:
    cls = ALL[method]
    plain, strong = predict(kind=kind), predict(cls(20.0), kind=kind)
    moved = clean(strong - plain, kind)
    limit = float(size(moved).min()) / 3
    limited = predict(cls(20.0, norm_limit=limit), kind=kind) - plain
    expected = (strong - plain) * (limit / size(moved)).view(-1, 1, 1, 1)
    assert difference(limited, expected) < 1e-4
    between = float(size(moved).mean())  # one picture is limited, the other is not
    assert size(moved).min() < between < size(moved).max()
    one = size(clean(predict(cls(20.0, norm_limit=between), kind=kind) - plain, kind))
    assert torch.allclose(one, size(moved).clamp(max=between), rtol=1e-4)
    assert torch.equal(predict(cls(20.0, norm_limit=1e9), kind=kind), strong)


def test_several_are_limited_together() -> None:
    def both(limit: float | None) -> list[Any]:
        classes = (SelfAttentionGuidance, PerturbedAttentionGuidance)
        return [cls(9.0, branch="cond", norm_limit=limit) for cls in classes]

    plain, strong = predict(), predict(*both(None))
    moved = clean(strong - plain, "epsilon")
    limited = predict(*both(0.01)) - plain
    expected = (strong - plain) * (0.01 / size(moved)).view(-1, 1, 1, 1)
    assert difference(limited, expected) < 1e-4
    with pytest.raises(ValueError, match="one norm_limit and one branch"):
        predict(both(0.01)[0], both(None)[1])


@pytest.mark.parametrize("limit", [0, -1, math.nan, "much"])
def test_a_limit_is_above_0(limit: Any) -> None:
    with pytest.raises(ValueError, match="norm_limit="):
        SelfAttentionGuidance(norm_limit=limit)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_limit_acts_on_every_network(name: str, cfg: float) -> None:
    made, draw = KINDS[name].make(), KINDS[name].draw
    plain = draw(made, (3, 4), cfg)
    moved: list[float] = []
    for limit in (None, 1e-3, 1e-5):
        with PerturbedAttentionGuidance(9.0, norm_limit=limit).attach(made):
            moved.append(difference(draw(made, (3, 4), cfg), plain))
    assert moved[0] > 5 * moved[1] > 25 * moved[2] > 0


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_it_acts_on_every_network_and_0_is_bit_equal(name: str, cfg: float) -> None:
    made, draw = KINDS[name].make(), KINDS[name].draw
    with PerturbedAttentionGuidance(9.0).attach(made):
        strong = draw(made, (3, 4), cfg)
    with PerturbedAttentionGuidance(9.0, rescale=0.0).attach(made):
        assert torch.equal(draw(made, (3, 4), cfg), strong)
    with PerturbedAttentionGuidance(9.0, rescale=1.0).attach(made):
        assert difference(draw(made, (3, 4), cfg), strong) > 1e-4


@pytest.mark.parametrize("name", ["Stable Diffusion", "Stable Diffusion 3.5", "Flux"])
def test_the_spread_of_every_network_is_kept(name: str) -> None:
    """Packed latents and joint attention, too; without classifier-free guidance."""
    made, draw = KINDS[name].make(), KINDS[name].draw
    seen: list[Tensor] = []
    own = denoiser_of(made).register_forward_hook(lambda *call: seen.append(call[-1][0]))
    with PerturbedAttentionGuidance(9.0, rescale=1.0).attach(made):
        after = denoiser_of(made).register_forward_hook(lambda *call: seen.append(call[-1][0]))
        draw(made, (3, 4), 1.0)
    own.remove()
    after.remove()
    # Of each step: the plain prediction, the weakened one twice, and what comes out.
    steps = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert len(steps) == 3
    for plain, _, _, guided in steps:
        assert torch.allclose(spread(guided), spread(plain), rtol=1e-3)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_picture_does_not_depend_on_its_batch(method: str, cfg: float) -> None:
    made, draw = KINDS["Stable Diffusion"].make(), KINDS["Stable Diffusion"].draw
    with ALL[method](1.0, rescale=0.8).attach(made):
        together = draw(made, (3, 4, 5), cfg, prompt=["red"] * 3)
        alone = torch.cat([draw(made, (seed,), cfg, prompt=["red"]) for seed in (3, 4, 5)])
    assert difference(alone, together) < 1e-4


def test_held_terms_are_rescaled_where_they_are_added() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    x, texts = (torch.randn(2, *each, generator=generator) for each in ((4, 8, 8), (7, 32)))
    guidance = PerturbedAttentionGuidance(20.0, every=3, rescale=1.0)
    for t in scheduler.timesteps:
        with torch.no_grad():
            plain = unet(x, t, texts).sample
    with (
        torch.no_grad(),
        guidance.attach(unet, scheduler=scheduler, batch_layout="single") as handle,
    ):
        for t in scheduler.timesteps:
            guided = unet(x, t, texts).sample
            assert handle.term is not None
            plain = guided - handle.term
            assert torch.allclose(spread(guided), spread(plain), rtol=1e-4)
    assert handle.steps == 2


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_guiders_do_what_attach_does(pipe: Any, guidance_scale: float) -> None:
    guidance = PerturbedAttentionGuidance(3.0, rescale=0.7)
    with guidance.attach(pipe):
        expected = draw_xl(pipe, (3, 4), guidance_scale=guidance_scale)
    made = modular_xl(pipe, GuidanceGuider(guidance, guidance_scale))
    assert difference(draw_modular(made, (3, 4)), expected) < 1e-4


def test_it_waits_for_the_device_no_more_often() -> None:
    for layout in ("single", "uncond_first"):
        counts = [
            draw_on_device(
                (SelfAttentionGuidance(1.0, rescale=rescale),), "DDIMScheduler", batch_layout=layout
            )[1]
            for rescale in (0.0, 0.7)
        ]
        assert counts[0] == counts[1]


def test_a_picture_of_one_value_is_left_alone() -> None:
    flat, other = torch.ones(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert (rescaling(other, flat, 1.0) == 1).all()
    assert (rescaling(flat, other, 1.0) == 0).all()
    assert rescaling(other, other, 0.3).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("rescale", [-0.1, 1.1, math.nan, "1"])
def test_it_is_checked(rescale: Any) -> None:
    with pytest.raises(ValueError, match=r"^rescale=.* must be "):
        SelfAttentionGuidance(rescale=rescale)
    given = parse_guidance("slg:rescale=0.7")
    assert Guidance.from_dict(given) == SkipLayerGuidance(rescale=0.7)
