"""Layers by name: what short names mean, what methods weaken by default, and `sag layers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
)
from torch import nn

from command_line import error_of, help_without_torch, run
from family import KINDS, METHODS, denoiser_of, difference
from self_attention_guidance import (
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TokenPerturbationGuidance,
)
from self_attention_guidance.denoiser.families import FAMILIES, family_of, register_family
from test_guidance import LAYER, draw
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

SMALL: dict[str, Any] = {
    "num_attention_heads": 1,
    "attention_head_dim": 8,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
}


def deep(cls: Any, blocks: int) -> Any:
    """A network of so many narrow blocks, without memory for its weights."""
    with torch.device("meta"):
        return cls(**SMALL, num_layers=blocks)


def xl() -> Any:
    return denoiser_of(KINDS["Stable Diffusion XL"].make())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("mid", [f"mid_block.attentions.0.transformer_blocks.{n}.attn1" for n in (0, 1)]),
        ("mid_block", [f"mid_block.attentions.0.transformer_blocks.{n}.attn1" for n in (0, 1)]),
        ("mid.attentions.0.transformer_blocks.1", [LAYER.replace("s.0.attn1", "s.1.attn1")]),
        (LAYER, [LAYER]),
        (["down.0", LAYER], ["down_blocks.0.attentions.0.transformer_blocks.0.attn1", LAYER]),
        ("up", [f"up_blocks.1.attentions.{n}.transformer_blocks.0.attn1" for n in (0, 1)]),
    ],
)
def test_names_of_layers_of_a_u_net(names: Any, expected: list[str]) -> None:
    assert list(PerturbedAttentionGuidance(layers=names).chosen(xl())) == expected


def test_names_of_blocks() -> None:
    flux = denoiser_of(KINDS["Flux"].make())
    for names, expected in (
        ("blocks.0", ["transformer_blocks.0"]),
        ("single.2", ["single_transformer_blocks.2"]),
        (["single.2", "single.0"], [f"single_transformer_blocks.{n}" for n in (0, 2)]),
        ("single_transformer_blocks.1.attn", None),
    ):
        guidance = SkipLayerGuidance(layers=names)
        if expected is None:
            with pytest.raises(ValueError, match="is not a block with self-attention of FluxTr"):
                guidance.chosen(flux)
        else:
            assert list(guidance.chosen(flux)) == expected
            assert guidance.chosen(torch.compile(flux)) == guidance.chosen(flux)


def test_a_name_means_whole_parts() -> None:
    network = deep(PixArtTransformer2DModel, 12)
    for cls, end in ((PerturbedAttentionGuidance, ".attn1"), (SkipLayerGuidance, "")):
        assert cls(layers="blocks.1").chosen(network) == (f"transformer_blocks.1{end}",)
        assert cls(layers="blocks.11").chosen(network) == (f"transformer_blocks.11{end}",)
        with pytest.raises(ValueError, match=r"layer 'block' is not a .*, for short blocks\.0, "):
            cls(layers="block").chosen(network)


def test_short_names_draw_what_paths_draw() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    for cls, path in ((PerturbedAttentionGuidance, LAYER), (SelfAttentionGuidance, LAYER)):
        key = "layer" if cls is SelfAttentionGuidance else "layers"
        with cls(1.0, **{key: path}).attach(pipe):
            expected = draw(pipe)
        with cls(1.0, **{key: "mid"}).attach(pipe):
            assert torch.equal(draw(pipe), expected)


def test_self_attention_guidance_reads_one_layer() -> None:
    with pytest.raises(ValueError, match=r"layer='mid' means .* and .*: name one of them"):
        SelfAttentionGuidance(layer="mid").attach(xl(), scheduler=tiny_scheduler())


@pytest.mark.parametrize(
    ("cls", "blocks", "guidance", "expected"),
    [
        (PixArtTransformer2DModel, 28, PerturbedAttentionGuidance, [14]),
        (HunyuanDiT2DModel, 40, PerturbedAttentionGuidance, [14]),
        (SD3Transformer2DModel, 24, PerturbedAttentionGuidance, [13]),
        (SD3Transformer2DModel, 38, PerturbedAttentionGuidance, [20]),
        (SD3Transformer2DModel, 24, SmoothedEnergyGuidance, [7, 8, 9]),
        (SD3Transformer2DModel, 24, SkipLayerGuidance, [7, 8, 9]),
        (SD3Transformer2DModel, 24, TokenPerturbationGuidance, [12]),
        (PixArtTransformer2DModel, 28, SkipLayerGuidance, [14]),
    ],
)
def test_defaults_of_transformers_of_the_published_depth(
    cls: Any, blocks: int, guidance: Any, expected: list[int]
) -> None:
    found = guidance().chosen(deep(cls, blocks))
    assert [int(path.split(".")[1]) for path in found] == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_network_without_attention_is_refused_by_name(method: str) -> None:
    bare = tiny_unet(
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
    )
    message = f"layers=None: {METHODS[method].__name__} has no default here: .*there is none"
    with pytest.raises(ValueError, match=message):
        METHODS[method]().attach(bare, scheduler=tiny_scheduler())
    assert not bare._forward_hooks


@pytest.mark.parametrize("method", METHODS)
def test_a_denoiser_of_ones_own_has_the_default_of_its_family(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    network = denoiser_of(KINDS["PixArt-Sigma"].make())
    network.__class__ = type("Mine", (type(network),), {})
    monkeypatch.setitem(FAMILIES, "Mine", family_of(network))
    register_family("Mine", family_of(network))
    assert all("transformer_blocks.1" in path for path in METHODS[method]().chosen(network))


def lines_of(capsys: pytest.CaptureFixture[str], model: object) -> list[list[str]]:
    assert run("layers", model) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_command_marks_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, "emoji")
    assert lines[0] == ["UNet2DConditionModel", "of", "emoji"]
    assert ["mid.attentions.0.transformer_blocks.0.attn1", "sag", "pag", "seg"] in lines
    assert ["mid.attentions.0.transformer_blocks.0", "slg"] in lines
    assert ["down.1.attentions.0.transformer_blocks.0", "tpg"] in lines
    assert ["up.1.attentions.0.transformer_blocks.0"] in lines
    assert ["mid.attentions.0", "slg"] in lines_of(capsys, "emoji-adm")


@pytest.mark.parametrize("name", KINDS)
def test_the_command_reads_configs_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    denoiser: nn.Module = denoiser_of(KINDS[name].make())
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Any"}))
    part = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
    denoiser.save_config(tmp_path / part)  # type: ignore[operator]
    lines = lines_of(capsys, tmp_path)
    users = [method for line in lines for method in line[1:] if method in METHODS]
    assert set(users) == set(METHODS)
    names = [line[0] for line in lines if line and line[1:] and line[1] in ("sag", *METHODS)]
    for listed in names:  # each is a name that the methods take
        has_blocks = "att" not in listed.rpartition(".")[2]
        (SkipLayerGuidance if has_blocks else PerturbedAttentionGuidance)(layers=listed).chosen(
            denoiser
        )


def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "does not exist" in error_of(capsys, "layers", tmp_path / "none")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Any"}))
    assert "neither unet/config.json nor" in error_of(capsys, "layers", tmp_path)
    (tmp_path / "unet").mkdir()
    for config, message in (
        ("[", "is not the config of a denoiser"),
        ("{}", "is not the config of a denoiser"),
        ('{"_class_name": "Nothing"}', "there is no denoiser 'Nothing' in diffusers"),
        ('{"_class_name": "AutoencoderKL"}', "AutoencoderKL is not supported"),
    ):
        (tmp_path / "unet" / "config.json").write_text(config)
        assert message in error_of(capsys, "layers", tmp_path)
    assert "--guidance pag:layers" in " ".join(help_without_torch("layers").split())


@pytest.mark.parametrize(
    "guidance",
    ["seg:blur_sigma=2", "seg:blur_sigma=inf", "slg:layers=mid+up.1", "tpg:seed=3,scale=1", "pag"],
)
def test_the_command_line_draws_with_every_method(tmp_path: Path, guidance: str) -> None:
    assert run(
        *("generate", "red heart", "--steps", "2", "--out", tmp_path),
        *("--guidance", guidance),
    ) == 0  # fmt: skip
    assert list(tmp_path.rglob("*.png"))


def test_finite_blur_tends_to_the_mean_of_the_queries() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    drawn = []
    for sigma in (0.5, 2.0, 1e6, float("inf")):
        with SmoothedEnergyGuidance(2.0, blur_sigma=sigma).attach(pipe):
            drawn.append(draw(pipe))
    distances = [difference(each, drawn[-1]) for each in drawn[:-1]]
    assert distances[0] > 3 * distances[1]
    assert distances[1] >= distances[2]
    assert distances[2] < 0.02  # mirrored borders count half
