"""Transformers that take lists, count the time backwards, or lay the picture behind its text."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from self_attention_guidance import (
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    TokenPerturbationGuidance,
)
from self_attention_guidance.denoiser.noise import Schedule
from tiny_transformers import TRANSFORMERS, WIDTH, draw, texts

REVERSED = ("Z-Image", "Lumina 2")


def network_and_scheduler(name: str) -> tuple[Any, Any]:
    pipe = TRANSFORMERS[name].make()
    pipe.scheduler.set_timesteps(4, **({"mu": 0.5} if name == "FLUX.2" else {}))
    return pipe.transformer, pipe.scheduler


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", [*REVERSED, "HiDream"])
@torch.no_grad()
def test_the_negative_of_a_network_is_guided_as_the_network(name: str, every: int) -> None:
    """A term has the sign of its network's output, also where it is held as noise."""
    scheduler = TRANSFORMERS[name].make().scheduler
    scheduler.set_timesteps(4)
    one = Schedule(scheduler).prediction(1, [], torch.empty(0))
    later = Schedule(scheduler).prediction(1 + every, [], torch.empty(0))
    x, u, weak, change = torch.randn(4, 2, 3, 4, 5)
    assert torch.equal(one.negated().x0(x, -u), one.x0(x, u))
    term = one.term(u, weak, change)
    torch.testing.assert_close(one.negated().term(-u, -weak, change), -term)
    noise, negated = one.noise(term), one.negated().noise(-term)
    assert noise is not None
    assert negated is not None
    torch.testing.assert_close(negated, noise)
    torch.testing.assert_close(later.negated().held(negated), -later.held(noise))


def test_truncated_cfg_of_z_image_is_guided_with_and_without_it() -> None:
    pipe = TRANSFORMERS["Z-Image"].make()
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    arguments: dict[str, Any] = {"num_inference_steps": 4, "cfg_truncation": 0.3}
    for guidance in (SelfAttentionGuidance(1.0), PerturbedAttentionGuidance()):
        rows.clear()
        with guidance.attach(pipe) as handle:
            draw("Z-Image", pipe, (3, 4), 3.0, **arguments)
        assert handle.steps == 4
        assert {*rows[::2]} == {4, 2}
        assert rows[1::2] == [2] * 4


@pytest.mark.parametrize("name", REVERSED)
def test_another_timestep_than_the_scheduler_s_is_refused(name: str) -> None:
    pipe = TRANSFORMERS[name].make()
    other = type(pipe.scheduler)(shift=3.0)
    other.set_timesteps(7)
    with (
        pytest.raises(ValueError, match=r"is not at timestep [0-9.e+]+, with which"),
        SelfAttentionGuidance(1.0).attach(
            pipe.transformer, scheduler=other, batch_layout="cond_call_first"
        ),
    ):
        draw(name, pipe, (3,), 1.0, num_inference_steps=3)


def z_image_call(scheduler: Any, pictures: list[Tensor]) -> tuple[Any, ...]:
    time = (1 - scheduler.timesteps[0] / 1000).expand(len(pictures))
    return pictures, time, list(texts([*range(len(pictures))]))


def test_lists_of_pictures_of_several_sizes_or_frames_are_refused() -> None:
    network, scheduler = network_and_scheduler("Z-Image")
    sizes = [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 12)]
    guidance = SelfAttentionGuidance(1.0)
    with guidance.attach(network, scheduler=scheduler, batch_layout="single"):
        with pytest.raises(ValueError, match="pictures of several sizes, frames or parts"):
            network(*z_image_call(scheduler, sizes))
        with pytest.raises(ValueError, match="pictures of several sizes, frames or parts"):
            network(*z_image_call(scheduler, [torch.randn(4, 2, 8, 8)]))


def test_two_halves_in_a_list_need_a_layout() -> None:
    network, scheduler = network_and_scheduler("Z-Image")
    picture = torch.randn(4, 1, 8, 8)
    with (
        pytest.raises(ValueError, match="does not say whether its batch holds pictures"),
        SelfAttentionGuidance(1.0).attach(network, scheduler=scheduler),
    ):
        network(*z_image_call(scheduler, [picture, picture]))


@pytest.mark.parametrize("name", REVERSED)
def test_blocks_that_see_text_alone_are_no_layers(name: str) -> None:
    network, scheduler = network_and_scheduler(name)
    with pytest.raises(ValueError, match="layer 'context_refiner' is not a self-attention layer"):
        PerturbedAttentionGuidance(layers="context_refiner").attach(network, scheduler=scheduler)
    assert PerturbedAttentionGuidance(layers="noise_refiner").chosen(network)


@pytest.mark.parametrize("guidance", [PerturbedAttentionGuidance, TokenPerturbationGuidance])
@torch.no_grad()
def test_halves_with_texts_of_several_lengths_are_weakened_where_their_pictures_lie(
    guidance: Any,
) -> None:
    network, scheduler = network_and_scheduler("Lumina 2")
    mask = (torch.arange(6) < torch.tensor([6, 2, 3, 5])[:, None]).long()
    half, text = torch.randn(2, 4, 8, 12), texts([0, 1, 2, 3])
    time = (1 - scheduler.timesteps[0] / 1000).expand(4)

    def terms(rows: slice, layout: Any) -> Tensor:
        sample = torch.cat([half, half])[rows]
        with guidance(2.0).attach(network, scheduler=scheduler, batch_layout=layout) as handle:
            network(sample, time[rows], text[rows], mask[rows])
        assert handle.term is not None
        return handle.term

    together = terms(slice(0, 4), "uncond_first")
    for row in (2, 3):
        alone = terms(slice(row, row + 1), "single")
        assert (alone - together[row - 2]).abs().max() < 1e-4 * alone.abs().max()


@torch.no_grad()
def test_pictures_that_flux_2_is_shown_are_left_alone() -> None:
    network, scheduler = network_and_scheduler("FLUX.2")
    grid = torch.cartesian_prod(
        torch.zeros(1), torch.arange(4.0), torch.arange(6.0), torch.zeros(1)
    )
    shown = grid + torch.tensor([10.0, 0, 0, 0])
    seen: list[Tensor] = []
    network.register_forward_pre_hook(
        lambda *given: seen.append(given[-1]["hidden_states"]), with_kwargs=True
    )
    guidance = SelfAttentionGuidance(1.0)
    with guidance.attach(network, scheduler=scheduler, batch_layout="single") as handle:
        network(
            hidden_states=torch.randn(1, 48, 16),
            encoder_hidden_states=torch.randn(1, 5, WIDTH),
            timestep=scheduler.timesteps[:1] / 1000,
            img_ids=torch.cat([grid, shown])[None],
            txt_ids=torch.zeros(1, 5, 4),
            guidance=torch.ones(1),
        )
    assert handle.term is not None
    assert handle.term[:, 24:].abs().max() == 0
    assert handle.term[:, :24].abs().max() > 0
    assert torch.equal(seen[0][:, 24:], seen[1][:, 24:])


@pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinPipeline"), reason="a newer diffusers has it")
@pytest.mark.parametrize("branch", ["uncond", "cond"])
def test_flux_2_klein_has_two_calls_a_step(branch: Any) -> None:
    made = TRANSFORMERS["FLUX.2"].make()
    klein: Any = diffusers.Flux2KleinPipeline
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    pipe = klein(**{**made.components, "vae": vae.eval()}, is_distilled=False)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"negative_prompt_embeds": texts([53])}
    plain = draw("FLUX.2", pipe, (3,), 3.0, **arguments)
    with SelfAttentionGuidance(1.0, branch=branch).attach(pipe) as handle:
        guided = draw("FLUX.2", pipe, (3,), 3.0, **arguments)
    assert handle.steps == 3
    assert (guided - plain).abs().max() > 1e-2 * plain.abs().max()
    assert torch.equal(draw("FLUX.2", pipe, (3,), 3.0, **arguments), plain)
