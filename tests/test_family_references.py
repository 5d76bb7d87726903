"""Methods that weaken layers against diffusers' own classes, and against the papers' equations.

The plain implementations here share no code with the library: explicit attention from a layer's own
projections, norms and rotary embeddings, and hooks that change a block's tokens or its result.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    HunyuanDiTPAGPipeline,
    PixArtSigmaPAGPipeline,
    SD3Transformer2DModel,
    StableDiffusion3PAGPipeline,
    StableDiffusionXLPAGPipeline,
)
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn

from family import KINDS, METHODS, denoiser_of, difference
from self_attention_guidance import PerturbedAttentionGuidance, SkipLayerGuidance
from test_transformers import SIDES, rotated, side, starts
from tiny import BETAS, seeded, tiny_scheduler
from tiny_transformers import lively
from tiny_xl import xl_pipeline

GRIDS = {24: (4, 6), 96: (8, 12), 64: (8, 8)}
"""Rows and columns of a layer's tokens, by their number, in the tests' pictures."""

TWO_CALLS = ("Flux", "Chroma", "Qwen-Image", "Lumina 2", "CogView 4")
"""Whose pipelines have two calls a step under classifier-free guidance."""

MASKS_TEXT = hasattr(transformer_qwenimage, "compute_text_seq_len_from_mask")
"""Whether Qwen-Image masks short texts in a batch; older versions of diffusers do not."""

Explicit = Callable[[Tensor, Tensor, Tensor, slice, Any], Tensor]
"""Attention given queries, keys, values (batch, heads, tokens, channels), picture and mask."""


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num() @ v


def identity(q: Tensor, k: Tensor, v: Tensor, picture: slice, mask: Any) -> Tensor:
    """PAG, Eq. 12: between the picture's positions the map is the identity."""
    tokens = torch.arange(q.shape[2])
    inside = (tokens >= picture.start) & (tokens < picture.stop)
    hidden = inside[:, None] & inside & (tokens[:, None] != tokens)
    return softmax_attention(q, k, v, ~hidden if mask is None else mask & ~hidden)


def smoothed(sigma: float) -> Explicit:
    """SEG, Eq. 8: the picture's queries are convolved with a Gaussian over its grid."""

    def attend(q: Tensor, k: Tensor, v: Tensor, picture: slice, mask: Any) -> Tensor:
        own = q[:, :, picture]
        grid = GRIDS[own.shape[2]]
        image = own.transpose(2, 3).reshape(-1, 1, *grid)
        if sigma == math.inf:
            image = image.mean((2, 3), keepdim=True).expand_as(image)
        else:
            radius = math.ceil(6 * sigma) // 2
            taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma) ** 2)
            kernel = torch.outer(taps, taps) / taps.sum() ** 2
            image = F.conv2d(F.pad(image, [radius] * 4, mode="reflect"), kernel[None, None])
        own = image.reshape(*q.shape[:2], q.shape[3], -1).transpose(2, 3)
        q = torch.cat([q[:, :, : picture.start], own, q[:, :, picture.stop :]], dim=2)
        return softmax_attention(q, k, v, mask)

    return attend


class Plain:
    """An attention processor without kernels, for all of the denoisers here."""

    def __init__(self, attend: Explicit, tokens: int, is_picture_first: bool) -> None:
        self.attend, self.tokens, self.is_first = attend, tokens, is_picture_first

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        temb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        **_: Any,
    ) -> Any:
        if hidden_states.ndim == 4:  # a block of its own, of networks of pixels
            normed = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
            result = self(attn, normed).transpose(1, 2).reshape(hidden_states.shape)
            return (result + hidden_states) / attn.rescale_output_factor
        words_states, rotary = encoder_hidden_states, image_rotary_emb
        parts = []
        for which in "qkv":
            picture, words = side(attn, hidden_states, words_states, which)
            if type(rotary[0] if rotary else None) is Tensor and rotary[0].is_complex():  # Qwen
                if which != "v":
                    picture, words = rotated(picture, rotary[0]), rotated(words, rotary[1])
                picture = torch.cat([words, picture], dim=1)
            else:
                if words is not None:
                    both = [picture, words] if self.is_first else [words, picture]
                    picture = torch.cat(both, dim=1)
                if rotary is not None and which != "v":
                    picture = rotated(picture, rotary)
            parts.append(picture.transpose(1, 2))
        total = parts[0].shape[2]
        count = total if words_states is None and total in GRIDS else self.tokens
        start = 0 if self.is_first else total - count
        mask = attention_mask
        if encoder_hidden_states_mask is not None:
            seen = torch.ones(len(hidden_states), count, dtype=torch.bool)
            mask = torch.cat([encoder_hidden_states_mask.bool(), seen], dim=1)[:, None, None]
        mask = None if mask is None else mask.bool()
        result = self.attend(*parts, slice(start, start + count), mask)
        result = result.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        if words_states is None:
            return result if getattr(attn, "pre_only", False) else attn.to_out[0](result)
        words_slice = slice(count, total) if self.is_first else slice(0, start)
        picture_result = attn.to_out[0](result[:, start : start + count])
        words_result = result[:, words_slice]
        add_out = getattr(attn, "to_add_out", None)
        return picture_result, words_result if add_out is None else add_out(words_result)


class PlainOfJoint:
    """The same for those of `SIDES`, whose layers see one sequence of text and picture."""

    def __init__(self, name: str, call: dict[str, Any], attend: Explicit) -> None:
        self.name, self.call, self.attend = name, call, attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states: Tensor | None = None,
        hidden_states_masks: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Any:
        given = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "hidden_states_masks": hidden_states_masks,
            "image_rotary_emb": image_rotary_emb if freqs_cis is None else freqs_cis,
        }
        sides = [each.transpose(1, 2) for each in SIDES[self.name](attn, given)]
        rows = []
        for row, start in enumerate(starts(self.name, self.call, sides[0].shape[2])):
            own = [each[row : row + 1] for each in sides]
            mask = None if attention_mask is None else attention_mask[row].bool()
            rows.append(self.attend(*own, slice(start, start + 24), mask))
        result = torch.cat(rows).transpose(1, 2).flatten(2).to(hidden_states.dtype)
        if self.name == "FLUX.2":
            mlp = attn.to_qkv_mlp_proj(hidden_states)[..., 3 * attn.inner_dim :]
            return attn.to_out(torch.cat([result, attn.mlp_act_fn(mlp)], dim=-1))
        if self.name == "HiDream":
            return attn.to_out(result)
        result = attn.to_out[0](result)
        return (result[:, -24:], result[:, :-24]) if self.name == "CogView 4" else result


@contextmanager
def plainly(
    name: str, call: dict[str, Any], denoiser: Any, layers: Any, attend: Explicit
) -> Generator[None]:
    """Let layers compute attention by a plain implementation."""
    kept = {layer: denoiser.get_submodule(layer).processor for layer in layers}
    for layer in layers:
        tokens = 24  # of the picture, where there is text, too
        plain: Any = Plain(attend, tokens, name == "Stable Diffusion 3.5")
        if name in SIDES:
            plain = PlainOfJoint(name, call, attend)
        denoiser.get_submodule(layer).set_processor(plain)
    yield
    for layer, processor in kept.items():
        denoiser.get_submodule(layer).set_processor(processor)


@contextmanager
def hooked(denoiser: Any, blocks: Any, weaken: Callable[[str, nn.Module], Any]) -> Generator[None]:
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(weaken(block, denoiser.get_submodule(block)))
        yield


@contextmanager
def left_out(_: str, block: nn.Module) -> Generator[None]:
    """SLG: the block's result is its input."""

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        tokens = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, tuple):
            return tokens
        return args[:2] if args else (kwargs["encoder_hidden_states"], tokens)

    handle = block.register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def shuffled(
    name: str, seed: int, step: int, call: dict[str, Any]
) -> Callable[[str, nn.Module], Any]:
    """TPG, Algorithm 1: H <- S H before the block, S a permutation of the picture's tokens."""

    @contextmanager
    def weaken(path: str, block: nn.Module) -> Generator[None]:
        own_seed = random.Random(f"{seed} {step} {path}").getrandbits(63)

        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            tokens = given.flatten(2).transpose(1, 2) if given.ndim == 4 else given
            is_grid = tokens.shape[1] in GRIDS and name not in SIDES
            count = tokens.shape[1] if is_grid else 24
            generator = torch.Generator().manual_seed(own_seed)
            matrix = torch.eye(count)[torch.randperm(count, generator=generator)]
            tokens = tokens.clone()
            has_text = tokens.shape[1] > count and name in SIDES
            first = starts(name, call, tokens.shape[1]) if has_text else []
            for row, start in enumerate(first or [tokens.shape[1] - count] * len(tokens)):
                own = slice(start, start + count)
                tokens[row, own] = matrix @ tokens[row, own]
            if given.ndim == 4:
                tokens = tokens.transpose(1, 2).reshape(given.shape)
            if args:
                return (tokens, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": tokens}

        handle = block.register_forward_pre_hook(hook, with_kwargs=True)
        yield
        handle.remove()

    return weaken


@dataclass
class Pass:
    """A call of the denoiser by its pipeline, and what it got."""

    args: Any
    kwargs: Any
    output: Any


@contextmanager
def watched(denoiser: Any) -> Generator[list[Pass]]:
    """Note the pipeline's own calls, guided; attach before."""
    passes: list[Pass] = []
    depth: list[int] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        depth.append(0)

    def after(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        depth.pop()
        if not depth:
            passes.append(Pass(args, dict(kwargs), output[0]))

    hooks = [
        denoiser.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        denoiser.register_forward_hook(after, with_kwargs=True),
    ]
    yield passes
    for hook in hooks:
        hook.remove()


def conditional(name: str, cfg: float, batch: int) -> slice:
    """The rows of a call that are conditional."""
    if cfg == 1 or name in ("ADM and IDDPM", "FLUX.2", *TWO_CALLS):
        return slice(0, batch)
    return slice(0, batch // 2) if name in ("DiT", "Z-Image") else slice(batch // 2, batch)


def predicted(denoiser: Any, found: Pass) -> Tensor:
    """What a network returns, with pictures in a list as one tensor."""
    output = denoiser(*found.args, **found.kwargs)[0]
    return (torch.stack(output).squeeze(2) if isinstance(output, list) else output).double()


REFERENCES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "pag": (METHODS["pag"], lambda name, step, *rest: plainly(name, *rest, identity)),
    "seg, infinite": (METHODS["seg"], lambda name, step, *r: plainly(name, *r, smoothed(math.inf))),
    "seg, finite": (
        lambda scale: METHODS["seg"](scale, blur_sigma=0.7),
        lambda name, step, *rest: plainly(name, *rest, smoothed(0.7)),
    ),
    "slg": (METHODS["slg"], lambda name, step, call, *rest: hooked(*rest, left_out)),
    "tpg": (
        lambda scale: METHODS["tpg"](scale, seed=5),
        lambda name, step, call, *rest: hooked(*rest, shuffled(name, 5, step, call)),
    ),
}


@pytest.mark.supports("method")
@torch.no_grad()
@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", KINDS)
def test_guided_predictions_are_those_of_a_plain_implementation(
    name: str, cfg: float, method: str
) -> None:
    pipe, (make, plain) = KINDS[name].make(), REFERENCES[method]
    denoiser, guidance = denoiser_of(pipe), make(2.0)
    with guidance.attach(pipe), watched(denoiser) as passes:
        KINDS[name].draw(pipe, (3, 4) if name != "Qwen-Image" or MASKS_TEXT else (3, 7), cfg)
    layers = guidance.chosen(denoiser)
    has_two_calls = cfg > 1 and name in TWO_CALLS
    assert len(passes) == 3 * (1 + has_two_calls)
    worst, term = 0.0, torch.empty(0)
    for number, found in enumerate(passes):
        step = number // (1 + has_two_calls)
        u = predicted(denoiser, found)
        if number % (1 + has_two_calls) == 0:
            call = {"hidden_states": found.args[0] if found.args else None, **found.kwargs}
            with plain(name, step, call, denoiser, layers):
                weak = predicted(denoiser, found)
            term = 2.0 * (u - weak)[conditional(name, cfg, len(u))]
            if u.ndim == 4:
                term[:, 4:] = 0  # a variance that is learned is not guided
        expected = u + torch.cat([term] * (len(u) // len(term)))
        assert term.abs().max() > 1e-3 * u.abs().max()
        output: Any = found.output
        guided = torch.stack(output).squeeze(2) if isinstance(output, list) else output
        worst = max(worst, difference(guided.double(), expected))
    print(f"{method} on {name}, cfg {cfg}: {worst:.1e}")
    assert worst < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["DiT", "PixArt-Sigma", "Stable Diffusion 3.5", "AuraFlow"])
def test_tokens_that_know_their_place_from_the_input_alone_come_out_shuffled(name: str) -> None:
    pipe = KINDS[name].make()
    with METHODS["tpg"](2.0).attach(pipe) as handle, watched(denoiser_of(pipe)) as passes:
        KINDS[name].draw(pipe, (3,), 1.0, num_inference_steps=1)
    assert handle.term is not None
    u = denoiser_of(pipe)(*passes[0].args, **passes[0].kwargs)[0][:, :4]
    weak = u - handle.term[:, :4] / 2.0
    patches, weak_patches = (F.unfold(each.double(), 2, stride=2)[0].T for each in (u, weak))
    distances = torch.cdist(weak_patches, patches)
    assert distances.min(dim=1).values.max() < 1e-4
    assert len(distances.argmin(dim=1).unique()) == len(patches)
    assert difference(weak, u) > 0.1


# diffusers' own classes

FLOW = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
USUAL = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
CLASSES = {
    "Stable Diffusion 3": StableDiffusion3PAGPipeline,
    "PixArt-Sigma": PixArtSigmaPAGPipeline,
    "Hunyuan-DiT": HunyuanDiTPAGPipeline,
    "Stable Diffusion XL": StableDiffusionXLPAGPipeline,
}


def flow_scheduler(name: str) -> Any:
    if name.startswith("FlowMatch"):
        return getattr(diffusers, name)(shift=3.0)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return getattr(diffusers, name)(**flow)


def scheduler_for(pipeline: str, name: str) -> Any:
    if pipeline == "Stable Diffusion 3":
        return flow_scheduler(name)
    if pipeline == "Stable Diffusion XL":
        return tiny_scheduler(getattr(diffusers, name))
    settings = {"prediction_type": "v_prediction" if pipeline == "Hunyuan-DiT" else "epsilon"}
    if name == "DDIMScheduler":
        settings["clip_sample"] = False
    return getattr(diffusers, name)(**BETAS, **settings)


def stable_diffusion_3() -> Any:
    """The first one: diffusers' processors for 3 leave out the norms of 3.5's queries and keys."""
    pipe = KINDS["Stable Diffusion 3.5"].make()
    config = {**pipe.transformer.config, "qk_norm": None, "dual_attention_layers": ()}
    with seeded(0):
        pipe.transformer = lively(SD3Transformer2DModel.from_config(config))
    return pipe


def two_pipelines(name: str) -> tuple[Any, Any]:
    """diffusers' pipeline with perturbed attention, and the usual one, of one network."""
    make = stable_diffusion_3 if name == "Stable Diffusion 3" else KINDS[name].make
    ours = make()
    if name == "Stable Diffusion XL":
        return xl_pipeline(CLASSES[name], unet=make().unet, pag_applied_layers="mid"), ours
    known = inspect.signature(CLASSES[name]).parameters
    parts = {n: part for n, part in make().components.items() if n in known}
    theirs = CLASSES[name](**parts, pag_applied_layers=["blocks.1"])
    theirs.set_progress_bar_config(disable=True)
    return theirs, ours


# Without CFG, diffusers' class for Hunyuan-DiT fails; the plain implementation is above.
CASES = [
    (name, cfg) for name in CLASSES for cfg in (1.0, 5.0) if (name, cfg) != ("Hunyuan-DiT", 1.0)
]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("name", "cfg"), CASES)
def test_pag_is_what_diffusers_pipeline_draws(name: str, cfg: float, number: int) -> None:
    theirs, ours = two_pipelines(name)
    scheduler = (FLOW if name == "Stable Diffusion 3" else USUAL)[number]
    theirs.scheduler, ours.scheduler = (scheduler_for(name, scheduler) for _ in range(2))
    kind = KINDS["Stable Diffusion 3.5" if name == "Stable Diffusion 3" else name]
    expected = kind.draw(theirs, (3, 4), cfg, pag_scale=3.0, num_inference_steps=4)
    plain = kind.draw(ours, (3, 4), cfg, num_inference_steps=4)
    with PerturbedAttentionGuidance(3.0).attach(ours):
        found = kind.draw(ours, (3, 4), cfg, num_inference_steps=4)
    print(f"{CLASSES[name].__name__}, {scheduler}, cfg {cfg}: {difference(found, expected):.1e}")
    assert difference(found, expected) < 1e-4
    assert difference(plain, expected) > 1e-2


@pytest.mark.parametrize("window", [(-1.0, 2.0, {}), (0.2, 0.6, {"start": 0.25, "stop": 0.75})])
@pytest.mark.parametrize("name", FLOW)
def test_slg_is_what_diffusers_draws_with_skip_guidance_layers(name: str, window: Any) -> None:
    kind = KINDS["Stable Diffusion 3.5"]
    theirs, ours = kind.make(), kind.make()
    theirs.scheduler, ours.scheduler = flow_scheduler(name), flow_scheduler(name)
    start, stop, own_window = window
    expected = kind.draw(
        theirs,
        (3, 4),
        5.0,
        num_inference_steps=4,
        skip_guidance_layers=[0, 1],
        skip_layer_guidance_scale=2.8,
        skip_layer_guidance_start=start,
        skip_layer_guidance_stop=stop,
    )
    with SkipLayerGuidance(2.8, layers=["blocks.0", "blocks.1"], **own_window).attach(ours):
        found = kind.draw(ours, (3, 4), 5.0, num_inference_steps=4)
    print(f"SLG of StableDiffusion3Pipeline, {name}: {difference(found, expected):.1e}")
    assert difference(found, expected) < 1e-4
    assert difference(kind.draw(ours, (3, 4), 5.0, num_inference_steps=4), expected) > 1e-2
