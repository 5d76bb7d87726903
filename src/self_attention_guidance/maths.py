"""The arithmetic of Self-Attention Guidance: tensors in, tensors out.

Equations are those of Hong et al., "Improving Sample Quality of Diffusion Models Using
Self-Attention Guidance", ICCV 2023, arXiv 2210.00939.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# Attention over many tokens is summed in slices of about this many probabilities.
_PROBABILITIES_AT_ONCE = 2**26


def attention_received(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    picture: slice | None = None,
) -> Tensor:
    """Compute how much self-attention each position receives: (batch, positions) float32, >= 0.

    The attention map softmax(Q K^T * scale + bias) is averaged over heads and summed over queries
    (Sec. 4.2), so that the mean over positions is exactly 1. In joint attention with text, only
    attention between the picture's positions counts, divided by its mean.

    The query is (batch, heads, queries, channels), the key (batch, heads, positions, channels).
    `scale` is 1 / sqrt(channels) if `None`. `bias` broadcasts to (batch, heads, queries,
    positions). `picture` selects the picture's queries and positions; `None` selects all.
    """
    batch, heads, queries, channels = query.shape
    positions = key.shape[2]
    keys = key.float().transpose(-1, -2) * (channels**-0.5 if scale is None else scale)
    if bias is not None:
        bias = bias.expand(batch, heads, queries, positions)
    first, end = (0, queries) if picture is None else (picture.start, picture.stop)
    rows = max(1, _PROBABILITIES_AT_ONCE // (batch * heads * positions))
    parts: list[Tensor] = []
    with torch.autocast(query.device.type, enabled=False):
        for start in range(first, end, rows):
            part = slice(start, min(start + rows, end))
            scores = query[:, :, part].float() @ keys
            if bias is not None:
                scores = scores + bias[:, :, part]
            parts.append(scores.softmax(dim=-1).sum(dim=(1, 2)))
    received = functools.reduce(torch.add, parts)
    if picture is None:
        return received * (positions / (heads * queries))
    received = received[:, picture]
    return received / received.mean(dim=1, keepdim=True)


def gaussian_blur(image: Tensor, sigma: float, kernel_size: int) -> Tensor:
    """Blur an image by a Gaussian with mirrored borders (G_sigma of Sec. 4.1).

    The kernel has `kernel_size` taps, an odd number. It is sampled at whole pixels and normalised
    to sum 1. Borders are mirrored without repeating the edge, as often as needed, so the image,
    (batch, channels, height, width), may be smaller than the kernel. `sigma` is in pixels; 0
    changes nothing.
    """
    if sigma == 0 or kernel_size == 1:
        return image
    height, width = image.shape[-2:]
    with torch.autocast(image.device.type, enabled=False):
        over_rows = _blur_matrix(height, sigma, kernel_size, image.device)
        over_columns = _blur_matrix(width, sigma, kernel_size, image.device)
        blurred = over_rows @ image.float() @ over_columns.T
    return blurred.to(image.dtype)


# Small depthwise convolutions are slow on CPU, and a run blurs pictures of one size only. A cached
# matrix must not be an inference tensor, because autograd refuses those.
@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _blur_matrix(size: int, sigma: float, kernel_size: int, device: torch.device) -> Tensor:
    """Make the matrix that blurs a column of `size` pixels; row i has the weights of pixel i."""
    radius = kernel_size // 2
    taps = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (taps.double() / sigma) ** 2)
    period = max(2 * (size - 1), 1)
    index = (torch.arange(size)[:, None] + taps) % period
    mirrored = torch.minimum(index, period - index)
    weights = (kernel / kernel.sum()).expand(size, -1)
    matrix = torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, mirrored, weights)
    return matrix.to(device, torch.float32)


def degrade(x0: Tensor, mask: Tensor | None, blur_sigma: float, kernel_size: int) -> Tensor:
    """Blur a predicted clean sample only where the mask is true (Eq. 15).

    The sample is (batch, channels, height, width). The mask is bool, (batch, rows, columns) on any
    coarser grid, and enlarged by nearest neighbours; `None` blurs everywhere.
    """
    blurred = gaussian_blur(x0, blur_sigma, kernel_size)
    if mask is None:
        return blurred
    enlarged = F.interpolate(mask[:, None].float(), size=x0.shape[-2:], mode="nearest")
    return torch.where(enlarged.bool(), blurred, x0)


def limiting(change: Tensor, limit: float) -> Tensor:
    """Compute the factor that limits the change of each picture, (pictures, 1, 1, 1), at most 1.

    Times the factor, the change, (pictures, channels, height, width), has a root mean square of at
    most `limit`. (Sadat et al., "Eliminating Oversaturation and Artifacts of High Guidance Scales
    in Diffusion Models", arXiv 2410.02416, Sec. 3; they use the sum of squares.)
    """
    size = change.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    # A size of 0 gives the factor 1, and so does NaN, which is possible where there is no signal.
    return torch.where(size > limit, limit / size, 1.0)


def rescaling(prediction: Tensor, guided: Tensor, rescale: float) -> Tensor:
    """Compute the factor that rescales each picture's guided prediction, (pictures, 1, 1, 1).

    With `rescale` 1, the guided prediction gets the standard deviation of the plain prediction;
    with 0, it does not change (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are
    Flawed", WACV 2024, arXiv 2305.08891, Eq. 15 and 16). Both predictions are (pictures, channels,
    height, width).
    """
    plain, moved = (each.std(dim=(1, 2, 3), keepdim=True) for each in (prediction, guided))
    # A prediction with only one value has no deviation to rescale.
    ratio = torch.where(moved > 0, plain / moved, 1.0)
    return 1 + rescale * (ratio - 1)
