"""Writing arrays larger than memory to uncompressed `.npz` files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..generate.files import whole_file


class StreamedArray(NamedTuple):
    """An array that is written piece by piece.

    Attributes:
        shape: Shape of the whole array.
        dtype: Its type, for example "uint8".
        pieces: Parts along the first axis, in order; together they have `shape`.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: Iterable[NDArray[Any]]


def write_npz(
    path: str | Path, arrays: Mapping[str, StreamedArray], folder: Path | None = None
) -> None:
    """Write arrays as `numpy.savez` does, with one piece at a time in memory.

    Equal arrays give equal files, byte for byte.

    Args:
        path: The file.
        arrays: Arrays by name, for example "arr_0".
        folder: As in `whole_file`.

    Raises:
        ValueError: The pieces of an array do not add up to its shape.
    """
    with (
        whole_file(path, folder=folder) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, array in arrays.items():
            _write_array(archive, name, array)


def _write_array(archive: zipfile.ZipFile, name: str, array: StreamedArray) -> None:
    dtype = np.dtype(array.dtype)
    header: dict[str, Any] = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": array.shape,
    }
    rows = 0
    # ZipInfo's own date is always 1980; the size is not known yet and may pass 4 GiB.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for piece in array.pieces:
            if piece.shape[1:] != array.shape[1:] or piece.dtype != dtype:
                raise ValueError(
                    f"{name}: a piece is {piece.dtype} of shape {piece.shape}, the array is"
                    f" {dtype} of shape {array.shape}"
                )
            member.write(np.ascontiguousarray(piece).tobytes())
            rows += len(piece)
    if rows != array.shape[0]:
        raise ValueError(f"{name}: the pieces have {rows} rows, the array {array.shape[0]}")
