"""Warnings about too few pictures, or pictures unlike those that the features were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .encoder import farther_than_art
from .features import FeatureSet

# With fewer pictures, a single one changes a share by more than a hundredth.
FEWEST_FOR_SHARES = 100


def advice(sets: Mapping[str, FeatureSet]) -> list[str]:
    """Warnings for the reader of the figures of some sets, one sentence each.

    Args:
        sets: Features of the samples and of the reference, by the names of the sets.

    Raises:
        ValueError: The features of a set are not from the encoder that it names.
    """
    notes: list[str] = []
    for count in sorted({len(one.features) for one in sets.values()}):
        alike = [name for name, one in sets.items() if len(one.features) == count]
        notes += _of_few(_listed(alike), sets[alike[0]])
    emoji = {name: one.features for name, one in sets.items() if one.encoder == "emoji"}
    far = [name for name, features in emoji.items() if farther_than_art(features) > 0.5]
    if far:
        notes.append(
            f"{_listed(far)}: most pictures are unlike the art that the features emoji were made"
            " for; for photographs, use --features inception (pip install torch-fidelity)"
        )
    return notes


def _of_few(names: str, like: FeatureSet) -> list[str]:
    count = len(like.features)
    notes: list[str] = []
    if count < FEWEST_FOR_SHARES:
        notes.append(
            f"{names}: precision and recall are left out, {count} pictures are too few; they need"
            f" {FEWEST_FOR_SHARES}"
        )
    columns = {
        "Fréchet distance ({} features)": like.features,
        "sFID ({} features)": like.spatial,
        "Inception Score ({} classes)": like.probabilities,
    }
    few = [
        title.format(values.shape[1])
        for title, values in columns.items()
        if values is not None and count <= values.shape[1]
    ]
    if few:
        notes.append(
            f"{names}: {count} pictures are few for {_listed(few)}; compare only sets with the same"
            " number of pictures"
        )
    return notes


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
