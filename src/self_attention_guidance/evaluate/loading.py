"""Sets to compare: pictures that are encoded, or statistics that an earlier run saved."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..generate.files import whole_file
from .features import Encoder, FeatureSet, extract
from .pairs import PairReference
from .sources import PICTURES_KEY, FolderSource, NpzSource, PictureSource, npz_keys
from .statistics import Moments, moments_of

# With fewer pictures, a half would have too few neighbours.
FEWEST_PICTURES = 10

_OPTIONAL = ("spatial", "probabilities")


@dataclass(frozen=True)
class SavedStatistics:
    """An `.npz` file with `mu` and `sigma`, ours or another tool's.

    Attributes:
        path: The file.
        arrays: Arrays by name: `mu`, `sigma`, perhaps `mu_s`, `sigma_s`; in ours also the features.
    """

    path: Path
    arrays: dict[str, NDArray[Any]]

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the pictures; `None` if only moments were saved."""
        return _size(self) if "features" in self.arrays else None


@dataclass(frozen=True)
class LoadedSet:
    """A set that can be a reference, and also samples if it has features.

    Attributes:
        path: The folder or file.
        moments: Moments of the features.
        spatial_moments: Moments of the spatial features, or `None`.
        features: The features; `None` if only moments were saved.
    """

    path: Path
    moments: Moments
    spatial_moments: Moments | None
    features: FeatureSet | None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the pictures; `None` without features."""
        return None if self.features is None else self.features.size

    @cached_property
    def pairs(self) -> PairReference | None:
        """The features, prepared for comparisons of pairs; `None` without features."""
        return None if self.features is None else PairReference(self.features.features)


def open_set(path: Path) -> PictureSource | SavedStatistics:
    """Find out what a path holds, without encoding pictures.

    Args:
        path: A folder of pictures, or an `.npz` file with `arr_0` or with `mu` and `sigma`.

    Raises:
        ValueError: It is something else, cannot be read, or holds too few pictures.
    """
    if path.is_dir():
        return _enough(FolderSource(path))
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist: give a folder of pictures or an .npz file")
    keys = npz_keys(path)
    if PICTURES_KEY in keys:
        return _enough(NpzSource(path))
    if {"mu", "sigma"} <= keys:
        return SavedStatistics(path, _read_arrays(path))
    found = ", ".join(sorted(keys)) or "nothing"
    raise ValueError(
        f"{str(path)!r} holds {found}: it must hold {PICTURES_KEY} (pictures), or mu and sigma"
        " (statistics)"
    )


def _enough(source: PictureSource) -> PictureSource:
    _check_count(source.path, source.count)
    return source


def _check_count(path: Path, count: int) -> None:
    if count < FEWEST_PICTURES:
        raise ValueError(
            f"{str(path)!r} holds {count} pictures: at least {FEWEST_PICTURES} are needed"
        )


def _read_arrays(path: Path, names: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of these names that the file holds; without names, all of them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            # What is no array comes as bytes, and is refused where numbers are needed.
            return {name: np.asarray(file[name]) for name in file if name in (names or file)}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def load_set(
    opened: PictureSource | SavedStatistics,
    encoder: Encoder,
    batch_size: int,
    advance: Callable[[int], object] = lambda pictures: None,
) -> LoadedSet:
    """Encode pictures, or use saved statistics.

    Args:
        opened: What `open_set` returned.
        encoder: The encoder of the features.
        batch_size: Pictures encoded at once.
        advance: Called with the number of pictures after each batch.

    Raises:
        ValueError: A picture cannot be read, or the statistics are from another encoder.
    """
    if isinstance(opened, SavedStatistics):
        return _from_saved(opened, encoder.name)
    # Before pictures are encoded, which takes long.
    published = _published_moments(opened.path) if encoder.name == "inception" else None
    loaded = _from_features(opened.path, extract(opened, encoder, batch_size, advance))
    return loaded if published is None else replace(published, features=loaded.features)


def _from_features(path: Path, features: FeatureSet) -> LoadedSet:
    spatial = None if features.spatial is None else moments_of(features.spatial)
    return LoadedSet(path, moments_of(features.features), spatial, features)


def _published_moments(path: Path) -> LoadedSet | None:
    """The moments in ADM's reference files, which are of the whole training set; else `None`."""
    if path.is_dir() or not {"mu", "sigma"} <= npz_keys(path):
        return None
    arrays = _read_arrays(path, ("mu", "sigma", "mu_s", "sigma_s"))
    return _from_saved(SavedStatistics(path, arrays), "inception")


def _from_saved(saved: SavedStatistics, encoder: str) -> LoadedSet:
    arrays = saved.arrays
    made_by = str(arrays.get("encoder", encoder))
    if made_by != encoder:
        raise ValueError(f"{str(saved.path)!r} holds features of {made_by}, not of {encoder}")
    if "features" in arrays:
        return _from_features(saved.path, _saved_features(saved, encoder))
    moments = _moments(saved, "mu", "sigma")
    spatial = _moments(saved, "mu_s", "sigma_s") if "mu_s" in arrays else None
    return LoadedSet(saved.path, moments, spatial, None)


def _saved_features(saved: SavedStatistics, encoder: str) -> FeatureSet:
    features = _numbers(saved, "features", None, None)
    _check_count(saved.path, len(features))
    parts = {
        name: _numbers(saved, name, len(features), None)
        for name in _OPTIONAL
        if name in saved.arrays
    }
    return FeatureSet(encoder, _size(saved), features, **parts)


def _size(saved: SavedStatistics) -> tuple[int, int]:
    width, height = _numbers(saved, "size", 2).int().tolist()
    return width, height


def _moments(saved: SavedStatistics, mean: str, covariance: str) -> Moments:
    mu = _numbers(saved, mean, None)
    sigma = _numbers(saved, covariance, len(mu), len(mu))
    return Moments(mu.double(), sigma.double())


def _numbers(saved: SavedStatistics, name: str, *shape: int | None) -> Tensor:
    """An array as float32 or float64, checked to have a shape; `None` is any length."""
    array = saved.arrays.get(name)
    if array is None:
        raise ValueError(f"{str(saved.path)!r}: {name} is missing")
    fits = len(shape) == array.ndim and all(
        wanted in (None, length) for wanted, length in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(
            f"{str(saved.path)!r}: {name} is {array.dtype} of shape {array.shape}; it must be"
            f" finite numbers of shape ({wanted})"
        )
    kind = np.float32 if array.dtype.itemsize <= 4 and array.dtype.kind == "f" else np.float64
    return torch.from_numpy(array.astype(kind))


def check_savable(found: PictureSource | SavedStatistics | LoadedSet) -> None:
    """Refuse a set that `write_statistics` can't save.

    Args:
        found: The set, or what `open_set` returned for it.

    Raises:
        ValueError: It has no features.
    """
    if found.size is None:
        raise ValueError(f"{str(found.path)!r} holds statistics already, and no features to save")


def write_statistics(path: Path, loaded: LoadedSet) -> None:
    """Save a set, so that later runs need not encode it again.

    Args:
        path: The `.npz` file. Other tools can also read its `mu` and `sigma`.
        loaded: A set with features.

    Raises:
        ValueError: It has no features.
    """
    check_savable(loaded)
    features: Any = loaded.features
    arrays: dict[str, Any] = {
        "encoder": np.array(features.encoder),
        "size": np.array(features.size),
        "features": features.features.numpy(),
        **_named("mu", "sigma", loaded.moments),
    }
    if loaded.spatial_moments is not None:
        arrays |= _named("mu_s", "sigma_s", loaded.spatial_moments)
    for name in _OPTIONAL:
        values = getattr(features, name)
        arrays |= {} if values is None else {name: values.numpy()}
    with whole_file(path) as file:
        np.savez(file, **arrays)


def _named(mean: str, covariance: str, moments: Moments) -> dict[str, NDArray[Any]]:
    return {mean: moments.mean.numpy(), covariance: moments.covariance.numpy()}
