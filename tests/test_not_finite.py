"""NaN and infinity: reported with step and cause, and no black picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import tiny_pixels
from command_line import run
from self_attention_guidance import SelfAttentionGuidance, StableDiffusionSAGPipeline
from self_attention_guidance.generate.finite import refuse_not_finite
from tiny import tiny_pipeline


def poison(module: torch.nn.Module) -> None:
    """Make every output of a model NaN."""
    weight = next(p for name, p in module.named_parameters() if name.startswith("conv_out"))
    with torch.no_grad():
        weight[0] = torch.nan


def last_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says, below its progress bar, when it fails as a user's error."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def draw(pipe: Any, **arguments: Any) -> torch.Tensor:
    usual: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipe("a", generator=generator, **usual, **arguments).images


def test_a_prediction_is_reported_with_its_step_and_cause() -> None:
    pipe = tiny_pipeline(StableDiffusionSAGPipeline)
    poison(pipe.unet)
    message = r"^step 0 \(timestep \d+\): the denoiser's prediction is not finite; the weights are"
    with pytest.raises(FloatingPointError, match=message):
        draw(pipe)


def test_a_later_step_differs_from_the_first() -> None:
    pipe = tiny_pipeline(StableDiffusionSAGPipeline)

    def spoil(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * (torch.nan if step == 1 else 1)}

    message = r"^step 2 \(timestep \d+\): the denoiser's input is not finite"
    with pytest.raises(FloatingPointError, match=message):
        draw(pipe, callback_on_step_end=spoil)


def test_the_second_pass_alone_is_reported_and_leaves_the_model_as_it_was() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    before = draw(pipe)
    calls: list[int] = []

    def spoil(_module: Any, _inputs: Any, output: Any) -> Any:
        calls.append(len(output[0]))
        return (output[0] * torch.nan,) if len(calls) == 2 else None

    message = "step 0 .* its prediction in the weakened pass is not finite"
    # A hook that is there first sees both passes before guidance does.
    hook = pipe.unet.register_forward_hook(spoil)
    with SelfAttentionGuidance().attach(pipe), pytest.raises(FloatingPointError, match=message):
        draw(pipe)
    hook.remove()
    assert calls == [2, 1]
    assert torch.equal(draw(pipe), before)


def test_half_precision_is_named_as_the_cause() -> None:
    overflown = torch.full((1, 1), 70000.0).half()
    with pytest.raises(FloatingPointError, match="the sample is not finite; float16 overflows"):
        refuse_not_finite("the sample", overflown, 3, torch.tensor(7))


@pytest.mark.parametrize("scale", [0, 1])
def test_generate_says_so_in_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: int
) -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    poison(pipe.unet)
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    message = last_line(
        *(capsys, "generate", "a", "--model", tmp_path / "model", "--out", out),
        *("--steps", 2, "--sag-scale", scale),
    )
    assert "step 0 (timestep" in message and "is not finite" in message
    assert list(out.glob("*")) == []


def test_generate_notices_a_decoder_that_overflows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    poison(pipe.vae.decoder)
    pipe.save_pretrained(tmp_path / "model")
    command = ("generate", "a", "--model", tmp_path / "model", "--steps", 2)
    message = last_line(capsys, *command, "--out", tmp_path / "out")
    assert "the decoded picture is not finite" in message
    assert list((tmp_path / "out").glob("*")) == []


@pytest.mark.parametrize("scale", [0, 1])
def test_sample_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: int
) -> None:
    pipe = tiny_pixels.tiny_pipeline()
    poison(pipe.unet)
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "samples.npz"
    message = last_line(
        *(capsys, "sample", "--model", tmp_path / "model", "--out", out, "--num-samples", 2),
        *("--steps", 2, "--sag-scale", scale),
    )
    assert "step 0 (timestep" in message and "is not finite" in message
    assert not out.exists()
