"""Original checkpoints: what loads computes what the original does, what doesn't is refused."""

from __future__ import annotations

import argparse
import bz2
import gzip
import lzma
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from original_unet import OriginalUNet
from payload import Payload
from recordings import KINDS, checkpoint, config, difference, network, tensors
from self_attention_guidance import ADMPipeline, ADMUNet2DModel, NoisyClassifier, load_original
from self_attention_guidance.denoiser.attention import received, standing_in
from self_attention_guidance.models.originals import (
    OriginalDiTModel,
    convert_original,
    preset_names,
)
from self_attention_guidance.models.originals.architecture import architecture_of, complete_config
from self_attention_guidance.models.originals.classifier import classifier_arguments
from self_attention_guidance.models.originals.presets import PRESETS
from self_attention_guidance.models.originals.rules import qkv_by_head, qkv_by_part
from self_attention_guidance.models.originals.unet import unet_config
from self_attention_guidance.pipelines.classifier_guidance import log_probability_gradient
from tiny import aligned

# Millions of parameters, as published with the models.
PUBLISHED_SIZES = {
    "64x64_diffusion": 296,
    "128x128_diffusion": 422,
    "256x256_diffusion": 554,
    "512x512_diffusion": 559,
    "lsun_bedroom": 552,
    "imagenet64_cond_270M_250K": 270,
    "64x64_classifier": 65,
    "128x128_classifier": 43,
    "256x256_classifier": 54,
    "512x512_classifier": 54,
}


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "case"),
    [
        ("adm", "adm/forward_inputs", "adm/forward", "case0."),
        ("adm", "adm/forward_inputs", "adm/forward", "case1."),
        ("iddpm", "iddpm/inputs", "iddpm/forward", ""),
        ("dit", "dit/inputs", "dit/outputs", "forward."),
    ],
)
@torch.no_grad()
def test_networks_agree_with_the_original(kind: str, inputs: str, outputs: str, case: str) -> None:
    x, t, y = (tensors(inputs)[case + name] for name in "xty")
    assert difference(network(kind)(x, t, y).sample, tensors(outputs)[f"{case}out"]) < 1e-5


def test_the_classifier_and_its_gradient_agree_with_the_original() -> None:
    x, t, y = (tensors("classifier/inputs")[name] for name in "xty")
    recorded = tensors("classifier/outputs")
    with torch.no_grad():
        logits = network("classifier")(x, t)
    assert difference(logits, recorded["logits"]) < 1e-5
    assert difference(logits.log_softmax(-1), recorded["log_probs"]) < 1e-5
    gradient = log_probability_gradient(network("classifier"), x, t, y)
    assert difference(gradient, recorded["grad_log_p_y"]) < 1e-5


@pytest.mark.parametrize("scale", [1.5, 4.0])
@torch.no_grad()
def test_cfg_of_dit_agrees_with_the_original(scale: float) -> None:
    inputs, model = tensors("dit/inputs"), network("dit")
    x, t, y = (inputs[f"cfg.{name}"] for name in "xty")
    guided = model.forward_with_cfg(x, t, y, scale)
    assert difference(guided, tensors("dit/outputs")[f"cfg{scale}.out"]) < 1e-5
    everywhere = model.forward_with_cfg(x, t, y, scale, channels=None)
    assert torch.equal(everywhere[:, :3], guided[:, :3])
    assert torch.equal(everywhere[:, 4:], guided[:, 4:])
    assert difference(everywhere[:, 3], guided[:, 3]) > 1e-2
    # the second half of the input has no say
    other = torch.cat([x.chunk(2)[0], torch.randn_like(x.chunk(2)[1])])
    assert torch.equal(model.forward_with_cfg(other, t, y, scale), guided)


@torch.no_grad()
def attention_at(kind: str, layer: str, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    with standing_in(network(kind), layer) as reading:
        network(kind)(x, t, y)
    positions = reading.noted[0].key.shape[-2]
    return received(reading.noted, len(x), slice(0, len(x)), slice(0, positions))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("mid_block.attentions.0", "middle"),
        ("up_blocks.0.attentions.2", "output2"),
        ("up_blocks.2.attentions.2", "output8"),
    ],
)
def test_attention_of_adm_agrees_with_the_original(layer: str, name: str) -> None:
    inputs, recorded = tensors("adm/forward_inputs"), tensors("adm/attention")
    attention = attention_at("adm", layer, *(inputs[f"case0.{field}"] for field in "xty"))
    assert difference(attention, recorded[f"{name}.true_colsum_head_mean"]) < 1e-4
    assert torch.equal(attention > 1, recorded[f"{name}.true_mask"].bool())


@pytest.mark.parametrize("block", range(4))
def test_attention_of_dit_agrees_with_the_original(block: int) -> None:
    inputs, recorded = tensors("dit/inputs"), tensors("dit/attention")
    layer = f"transformer_blocks.{block}.attn1"
    attention = attention_at("dit", layer, *(inputs[f"attn.{field}"] for field in "xty"))
    expected = recorded[f"block{block}.probs"].mean(1).sum(1)
    assert difference(attention, expected) < 1e-5


@pytest.mark.parametrize("heads", [2, 4])
def test_both_row_orders_of_qkv_give_the_recorded_attention(heads: int) -> None:
    recorded = tensors("adm/qkv_split")
    packed = tensors("adm/qkv_split_inputs")["qkv"]
    for name, split in {"legacy": qkv_by_head(heads), "neworder": qkv_by_part}.items():
        sides = [torch.stack(side) for side in zip(*map(split, packed), strict=True)]
        q, k, v = (side.unflatten(1, (heads, -1)).transpose(2, 3) for side in sides)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        out = out.transpose(2, 3).flatten(1, 2)
        assert difference(out, recorded[f"{name}_out_heads{heads}"]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_is_bit_equal(kind: str, tmp_path: Path) -> None:
    model: Any = network(kind)
    model.save_pretrained(tmp_path)
    again = aligned(type(model).from_pretrained(tmp_path)).eval()
    assert {name: again.config[name] for name in model.config if name[0] != "_"} == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in model.config.items()
        if name[0] != "_"
    }
    name = {"adm": "adm/forward_inputs", "classifier": "classifier/inputs"}.get(kind)
    prefix = {"adm": "case1.", "dit": "forward."}.get(kind, "")
    inputs = tensors(name or f"{kind}/inputs")
    arguments = [inputs[prefix + field] for field in ("xt" if kind == "classifier" else "xty")]
    with torch.no_grad():
        before, after = model(*arguments), again(*arguments)
    assert torch.equal(before, after) if kind == "classifier" else torch.equal(before[0], after[0])


SMALL = {"model_channels": 32, "out_channels": 6, "num_res_blocks": 1, "channel_mult": (1, 2)}
CONFIGS: dict[str, dict[str, Any]] = {
    "heads of 16 channels": {"attention_ds": (1, 2), "num_head_channels": 16},
    "new attention order": {
        "attention_ds": (2,),
        "num_head_channels": 16,
        "use_new_attention_order": True,
        "resblock_updown": True,
    },
    "other heads in the decoder": {"attention_ds": (1, 2), "num_heads": 4, "num_heads_upsample": 2},
    "a narrow first level": {
        "attention_ds": (2, 4),
        "channel_mult": (0.5, 1, 1),
        "model_channels": 64,
        "num_head_channels": 32,
        "resblock_updown": True,
        "use_scale_shift_norm": True,
        "num_classes": 7,
    },
    "three blocks, no attention but in the middle": {
        "attention_ds": (),
        "num_res_blocks": 3,
        "out_channels": 3,
        "use_scale_shift_norm": True,
    },
    "classes without scale and shift": {
        "attention_ds": (1,),
        "num_classes": 5,
        "num_heads": 2,
        "resblock_updown": True,
    },
}


def original(changes: dict[str, Any]) -> tuple[OriginalUNet, dict[str, Any]]:
    """A random network as the original builds it, and its arguments."""
    arguments = {**SMALL, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OriginalUNet(**arguments).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(1.5)  # attention should matter
    return model, arguments


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["adm", "iddpm"])
@torch.no_grad()
def test_other_configurations_agree_with_a_plain_reference(
    kind: str, name: str, tmp_path: Path
) -> None:
    model, arguments = original(CONFIGS[name])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = load_original(kind, tmp_path / "model.pt", {**arguments, "image_size": 16})
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([7, 803])
    labels = (torch.tensor([1, 3]),) if "num_classes" in arguments else ()
    assert difference(loaded(x, t, *labels).sample, model(x, t, *labels)) < 1e-5
    loaded.save_pretrained(tmp_path / "saved")
    again = aligned(ADMUNet2DModel.from_pretrained(tmp_path / "saved"))
    assert torch.equal(again(x, t, *labels).sample, loaded(x, t, *labels).sample)


def test_script_and_constructor_arguments_mean_the_same() -> None:
    script = {
        "image_size": 32,
        "num_channels": 64,
        "num_res_blocks": 2,
        "channel_mult": "1,2",
        "attention_resolutions": "16",
        "class_cond": True,
        "learn_sigma": True,
        "num_heads": 4,
        "use_scale_shift_norm": True,
    }
    constructor = {
        "image_size": 32,
        "model_channels": 64,
        "num_res_blocks": 2,
        "channel_mult": [1, 2],
        "attention_ds": [2],
        "num_classes": 1000,
        "out_channels": 6,
        "num_heads": 4,
        "use_scale_shift_norm": True,
    }
    by_name = {**constructor, "attention_resolutions": (2,)}  # as the constructor calls them
    del by_name["attention_ds"]
    forms = (script, constructor, by_name)
    first, *others = (architecture_of(complete_config("adm", form)) for form in forms)
    assert others == [first, first]


def test_iddpm_scripts_rescale_timesteps_by_default() -> None:
    script = {"image_size": 64, "diffusion_steps": 4000}
    assert architecture_of(complete_config("iddpm", script)).timestep_scale == 0.25
    assert architecture_of(complete_config("adm", script)).timestep_scale == 1
    changed = {**script, "rescale_timesteps": False}
    assert architecture_of(complete_config("iddpm", changed)).timestep_scale == 1


@torch.no_grad()
def test_half_precision_torsos_compute_in_float16(tmp_path: Path) -> None:
    model = load_original("adm", checkpoint("adm"), {**config("adm"), "use_fp16": True})
    x, t, y = (tensors("adm/forward_inputs")[f"case1.{name}"] for name in "xty")
    out = model(x, t, y).sample
    assert out.dtype == torch.float32
    assert 1e-5 < difference(out, tensors("adm/forward")["case1.out"]) < 2e-2
    halved = {name: tensor.half() for name, tensor in torch.load(checkpoint("adm")).items()}
    torch.save(halved, tmp_path / "half.pt")
    loaded = load_original("adm", tmp_path / "half.pt", config("adm"))
    assert loaded.dtype == torch.float32
    assert difference(loaded(x, t, y).sample, tensors("adm/forward")["case1.out"]) < 2e-2


def test_safetensors_and_averaged_weights_load_too(tmp_path: Path) -> None:
    state = torch.load(checkpoint("dit"))
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"model": {}, "ema": state}, tmp_path / "ema.pt")
    for name in ("model.safetensors", "ema.pt"):
        loaded = load_original("dit", tmp_path / name, config("dit"))
        for mine, theirs in zip(loaded.parameters(), network("dit").parameters(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "ema", "module", "model_state_dict", "ema_model"]
)
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "_fsdp_wrapped_module.", "blocks"],
)
def test_what_training_scripts_write_loads(tmp_path: Path, key: str, prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in torch.load(checkpoint("dit")).items()}
    if prefix == "blocks":
        in_block = r"^blocks(blocks\.\d+\.)?"
        state = {re.sub(in_block, r"\1_orig_mod.", name): state[name] for name in state}
    rest = {"opt": {"param_groups": [{"lr": 1e-4}]}, "args": argparse.Namespace(model="DiT-XL/2")}
    torch.save({key: state, **rest}, tmp_path / "0050000.pt")
    assert is_the_network(tmp_path / "0050000.pt")


def is_the_network(path: Path) -> bool:
    loaded = load_original("dit", path, config("dit")).parameters()
    pairs = zip(loaded, network("dit").parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_averaged_weights_are_taken_wherever_they_are(tmp_path: Path) -> None:
    state = torch.load(checkpoint("dit"))
    other = {name: value + 1 for name, value in state.items()}
    averaged = {f"module.{name}": value for name, value in state.items()}
    for content in (
        {"state_dict": other, "state_dict_ema": state},
        {"model": other, "model_ema": state},
        {"model": other, "ema": {"model": state}},
        {"model": state, "ema": {}},
        {"model": state, "ema": None},
        {"n_averaged": torch.tensor(3), **averaged},
    ):
        torch.save(content, tmp_path / "a.pt")
        assert is_the_network(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_of_dit_load(tmp_path: Path, dtype: torch.dtype) -> None:
    state = torch.load(checkpoint("dit"))
    torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "a.pt")
    loaded = load_original("dit", tmp_path / "a.pt", config("dit"))
    for mine, theirs in zip(loaded.parameters(), network("dit").parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=0.01)
    state["pos_embed"] = state["pos_embed"] + 0.01
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="other values than the sines and cosines"):
        load_original("dit", tmp_path / "a.pt", config("dit"))


@pytest.mark.parametrize(
    ("compress", "kind"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")]
)
def test_compressed_checkpoints_are_named(tmp_path: Path, compress: Any, kind: str) -> None:
    (tmp_path / "a.pt.x").write_bytes(compress(checkpoint("dit").read_bytes()))
    with pytest.raises(ValueError, match=f"is compressed by {kind}: decompress it first"):
        load_original("dit", tmp_path / "a.pt.x", config("dit"))


def test_more_than_tensors_is_named_with_what_to_do(tmp_path: Path) -> None:
    rest = {"args": argparse.Namespace(results=tmp_path)}
    torch.save({"ema": torch.load(checkpoint("dit")), **rest}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"\(pathlib\..*Path\): .* save its state dict alone$"):
        load_original("dit", tmp_path / "a.pt", config("dit"))


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_presets_have_the_published_sizes(name: str) -> None:
    kind = next(kind for kind, presets in PRESETS.items() if name in presets)
    architecture = architecture_of(complete_config(kind, PRESETS[kind][name]))
    with torch.device("meta"):
        if kind == "classifier":
            model: Any = NoisyClassifier(**classifier_arguments(architecture))
        else:
            model = ADMUNet2DModel(**unet_config(architecture))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED_SIZES[name], rel=0.015)


@pytest.mark.parametrize(("name", "side"), [("DiT-XL-2-256x256", 32), ("DiT-XL-2-512x512", 64)])
def test_presets_of_dit(name: str, side: int) -> None:
    assert PRESETS["dit"][name]["input_size"] == side


def test_presets_are_found_by_the_name_of_the_published_file(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "cifar10_uncond_50M_500K.pt")
    # it is looked for, and the content is then the wrong one
    with pytest.raises(ValueError, match=r"as iddpm: .*time_embed.0.weight is missing"):
        load_original("iddpm", tmp_path / "cifar10_uncond_50M_500K.pt")
    with pytest.raises(ValueError, match="not a published file of adm; those are 64x64_diffusion"):
        load_original("adm", tmp_path / "cifar10_uncond_50M_500K.pt")
    with pytest.raises(ValueError, match="config='cifar' must be a preset of iddpm"):
        load_original("iddpm", tmp_path / "cifar10_uncond_50M_500K.pt", "cifar")
    assert "lsun_uncond_100M_2400K_bs64" in preset_names("iddpm")


def altered(tmp_path: Path, change: Any) -> Path:
    state = torch.load(checkpoint("adm"))
    change(state)
    torch.save(state, tmp_path / "altered.pt")
    return tmp_path / "altered.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("middle_block.1.qkv.bias"), "middle_block.1.qkv.bias is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is left over"),
        (
            lambda state: state.update({"out.2.bias": torch.zeros(3)}),
            r"out.2.bias has shape \(3,\), which does not give the \(6,\)",
        ),
        (
            lambda state: state.update({"middle_block.1.qkv.weight": torch.zeros(7, 64, 1)}),
            r"middle_block.1.qkv.weight has shape \(7, 64, 1\)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_original("adm", altered(tmp_path, change), config("adm"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_another_kinds_checkpoint_is_refused(kind: str, other: str) -> None:
    if kind == other:
        return
    with pytest.raises(ValueError, match="does not fit the config") as caught:
        load_original(kind, checkpoint(other), config(kind))
    assert len(str(caught.value)) < 1000


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"weight": Payload(trace)}, tmp_path / "code.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(trace)))
    for name in ("code.pt", "bare.pt"):
        with pytest.raises(ValueError, match="refused and nothing was executed") as caught:
            load_original("adm", tmp_path / name, config("adm"))
        assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoints_are_refused(
    content: bytes, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no checkpoint") as caught:
        load_original("adm", path, config("adm"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    whole = checkpoint("dit").read_bytes()
    (tmp_path / "part.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        load_original("dit", tmp_path / "part.pt", config("dit"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("adm", {"colour": 3}, "colour unknown; known names are"),
        ("adm", {"attention_resolutions": "a"}, "must be like '32,16,8'"),
        ("adm", {"channel_mult": "x"}, "must be like '1,2,4'"),
        ("adm", {"channel_mult": ""}, None),
        ("adm", {"image_size": 48, "channel_mult": ""}, "channel_mult is missing"),
        ("adm", {"num_heads": 5}, "num_heads=5 must divide"),
        ("classifier", {"pool": "spatial"}, "pool='spatial' must be 'attention'"),
        ("classifier", {"num_head_channels": -1}, "num_head_channels is missing"),
        ("dit", {"mlp_ratio": 2}, "mlp_ratio=2 must be 4"),
        ("dit", {"num_heads": 5}, "multiple of num_heads"),
        ("dit", {"colour": 3}, "colour unknown"),
        ("dit", {"input_size": 32}, "pos_embed has shape"),
    ],
)
def test_configs_without_sense_are_refused(
    kind: str, changes: dict[str, Any], message: str | None
) -> None:
    with pytest.raises(ValueError, match=message or "does not fit"):
        load_original(kind, checkpoint(kind), {**config(kind), **changes})


def test_unknown_kinds_and_missing_files_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='unet' must be one of adm, classifier, iddpm, dit"):
        load_original("unet", "model.pt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a file, but there is none"):
        load_original("adm", "nowhere.pt", config("adm"))


@pytest.mark.parametrize("kind", ["adm", "iddpm"])
def test_a_converted_folder_is_a_pipeline(kind: str, tmp_path: Path) -> None:
    folder = convert_original(kind, checkpoint(kind), tmp_path / "out", config(kind))
    pipe = ADMPipeline.from_pretrained(folder)
    assert isinstance(pipe.unet, ADMUNet2DModel)
    assert pipe.scheduler.config.num_train_timesteps == config(kind)["diffusion_steps"]
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert not list(folder.rglob("*.bin"))


def test_converted_classifiers_and_transformers_are_models(tmp_path: Path) -> None:
    for kind, model in {"classifier": NoisyClassifier, "dit": OriginalDiTModel}.items():
        folder = convert_original(kind, checkpoint(kind), tmp_path / kind, config(kind))
        again = model.from_pretrained(folder)
        for mine, theirs in zip(again.parameters(), network(kind).parameters(), strict=True):
            assert torch.equal(mine, theirs)
