"""The U-Net of ADM and IDDPM, written down plainly from how the original behaves.

Its parameters have the original names, so that its state dict is an original checkpoint for any
configuration. It was written without sight of the library's conversion, and shares nothing with it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class Residual(nn.Module):
    def __init__(
        self, width: int, out: int, time: int, scale_shift: bool, resize: str = ""
    ) -> None:
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.in_layers = nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            norm(out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def resized(self, x: Tensor) -> Tensor:
        if self.resize == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0) if self.resize == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[:2](x)))
        x = self.resized(x)
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        tokens = x.flatten(2)
        batch, width, _ = tokens.shape
        qkv = self.qkv(self.norm(tokens))
        if self.new_order:
            parts = [part.unflatten(1, (self.heads, -1)) for part in qkv.chunk(3, dim=1)]
        else:
            parts = list(qkv.unflatten(1, (self.heads, -1)).chunk(3, dim=2))
        q, k, v = parts
        weights = torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(width // self.heads)
        out = torch.einsum("bhts,bhcs->bhct", weights.softmax(-1), v).reshape(batch, width, -1)
        return x + self.proj_out(out).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Stem(nn.Conv2d):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x)


class OriginalUNet(nn.Module):
    def __init__(
        self,
        *,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_ds: tuple[int, ...],
        channel_mult: tuple[float, ...],
        in_channels: int = 3,
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        time = 4 * model_channels
        self.model_channels = model_channels

        def residual(width: int, out: int, resize: str = "") -> Residual:
            return Residual(width, out, time, use_scale_shift_norm, resize)

        def attention(width: int, count: int) -> SelfAttention:
            heads = count if num_head_channels == -1 else width // num_head_channels
            return SelfAttention(width, heads, use_new_attention_order)

        up_heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, time), nn.SiLU(), nn.Linear(time, time)
        )
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, time)
        width = int(channel_mult[0] * model_channels)
        first = width
        self.input_blocks = nn.ModuleList([nn.ModuleList([Stem(in_channels, width, 3, padding=1)])])
        skips = [width]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [residual(width, int(mult * model_channels))]
                width = int(mult * model_channels)
                if 2**level in attention_ds:
                    layers.append(attention(width, num_heads))
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(width)
            if level < len(channel_mult) - 1:
                down = residual(width, width, "down") if resblock_updown else Down(width)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [residual(width, width), attention(width, num_heads), residual(width, width)]
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for number in range(num_res_blocks + 1):
                layers = [residual(width + skips.pop(), int(mult * model_channels))]
                width = int(mult * model_channels)
                if 2**level in attention_ds:
                    layers.append(attention(width, up_heads))
                if level and number == num_res_blocks:
                    layers.append(residual(width, width, "up") if resblock_updown else Up(width))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(
            norm(width), nn.SiLU(), nn.Conv2d(first, out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.model_channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = t[:, None].float() * frequencies[None]
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, emb)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, emb)
        return self.out(x)
