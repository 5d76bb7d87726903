"""Inception-v3 as FID uses it, through torch-fidelity, which fetches the weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .encoder import Encoded

# ADM's evaluator uses 7 channels of mixed_6/conv for sFID, which is this layer.
_SPATIAL_LAYER = "branch1x1"
_SPATIAL_CHANNELS = 7


class Inception:
    """2,048 pooled features, 7 x 17 x 17 spatial ones, and 1,008 class probabilities.

    These are the quantities of ADM's evaluator, computed on a GPU if there is one. They are
    float32, so the batch size changes features by rounding errors.
    """

    name = "inception"

    def __init__(self) -> None:
        """Load the network, and download its weights unless they are cached.

        Raises:
            ValueError: torch-fidelity or the weights are not available.
        """
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network = _load().to(self._device).eval()
        self._spatial: list[Tensor] = []
        getattr(self._network.Mixed_6d, _SPATIAL_LAYER).register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        # Channels last, as in the statistics that ADM published.
        kept = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        self._spatial.append(kept.flatten(1).cpu())

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Encoded:
        """Features as in `Encoder`."""
        features, logits = self._network(pictures.to(self._device))
        return Encoded(features.cpu(), self._spatial.pop(), logits.cpu())


def _load() -> Any:
    try:
        module: Any = import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise ValueError(
            f"the features inception need torch-fidelity: pip install torch-fidelity ({error})"
        ) from error
    try:
        return module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"]
        )
    except Exception as error:  # a download fails in as many ways as there are networks
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"torch-fidelity could not fetch the weights of inception: {reason}"
        ) from error
