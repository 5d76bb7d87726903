"""The manifest: a Parquet file with a row for each picture.

A run adds parts, each a complete file, and joins them when it ends. At any moment, the file and the
parts together hold every finished picture; while they are being joined, they hold some twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from .storage import Storage
from .tasks import clean

MANIFEST = "manifest.parquet"
PARTS = "manifest.parts"

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("image", pa.int32()),
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("seed", pa.uint64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("sag_scale", pa.float64()),
        ("start_image", pa.string()),
        ("mask", pa.string()),
        ("strength", pa.float64()),
        ("guidance", pa.string()),
        ("scheduler", pa.string()),
        ("model", pa.string()),
        ("together", pa.int32()),
        ("file", pa.string()),
        ("member", pa.string()),
        ("sha256", pa.string()),
        ("flagged", pa.bool_()),
        ("unread", pa.string()),
        ("seconds", pa.float32()),
        ("finished", pa.timestamp("ms", tz="UTC")),
        ("error", pa.string()),
        ("digest", pa.uint64()),
        ("weakened_predictions", pa.int32()),
    ]
)

# By row and image: the digest of the task, and whether there is an error instead of a picture.
Finished = dict[tuple[int, int], tuple[int, bool]]

_ROWS_IN_MEMORY = 10_000
# Of version 0.2.0, which did not count weakened predictions.
_FEWEST_COLUMNS = len(SCHEMA) - 1
# What pyarrow raises for damaged files.
_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, MemoryError, ArithmeticError)


class Manifest:
    """The manifest of a folder, for one run at a time."""

    def __init__(self, storage: Storage) -> None:
        """Store the folder; read nothing yet.

        Args:
            storage: The folder.
        """
        self.storage = storage
        self._parts = 0

    def files(self) -> dict[tuple[int, int], str | None]:
        """The file of each picture, by its row and image; `None` if it failed."""
        files: dict[tuple[int, int], str | None] = {}
        for batch in self._batches(["row", "image", "file"]):
            row, image, file = (column.to_pylist() for column in batch.columns)
            files.update(zip(zip(row, image, strict=True), file, strict=True))
        return files

    def finished(self) -> Finished:
        """The pictures it holds; if one has several rows, the newest counts."""
        found: Finished = {}
        for batch in self._batches(["row", "image", "digest", "error"]):
            known = [batch.column(name).to_pylist() for name in ("row", "image", "digest")]
            failed = batch.column("error").is_valid().to_pylist()
            for row, image, digest, is_bad in zip(*known, failed, strict=True):
                found[row, image] = digest, is_bad
        return found

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add rows as a part.

        Args:
            rows: Values by the names in `SCHEMA`; missing values are empty.
        """
        if not rows:
            return
        names = self.storage.names(PARTS) if not self._parts else []
        if names:
            self._parts = int(names[-1].rsplit("/", 1)[-1].split(".")[0])
        self._parts += 1
        try:
            table = pa.Table.from_pylist(rows, SCHEMA)
        except UnicodeEncodeError:  # names of files, and errors about them, may be no UTF-8
            table = pa.Table.from_pylist([_writable(row) for row in rows], SCHEMA)
        with self.storage.writing(f"{PARTS}/{self._parts:08d}.parquet") as file:
            parquet.write_table(table, file)

    def join(self) -> None:
        """Join the file and its parts into one file with the newest row of each picture."""
        parts = self.storage.names(PARTS)
        if not parts:
            return
        keys = np.concatenate([_keys(batch) for batch in self._batches(["row", "image"])])
        newest = np.zeros(len(keys), np.bool_)
        newest[len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1]] = True
        first = 0
        with self.storage.writing(MANIFEST) as file, parquet.ParquetWriter(file, SCHEMA) as writer:
            for batch in self._batches():
                end = first + batch.num_rows
                writer.write_batch(batch.filter(pa.array(newest[first:end])))
                first = end
        # Later files count as newer: an older row of a picture must not outlive its newer ones.
        # Where pictures have one row, the order is free, and object stores are faster.
        self.storage.remove(*([] if newest.all() else parts), PARTS)
        self._parts = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, in stored order; values by the names in `SCHEMA`."""
        for batch in self._batches():
            yield from batch.to_pylist()

    def row_of(self, row: int, image: int) -> dict[str, Any]:
        """The newest row of a picture; empty if there is none.

        Args:
            row: Number of the row in the list.
            image: Number of the picture in the row.
        """
        found: dict[str, Any] = {}
        for batch in self._batches():
            for place in np.flatnonzero(_keys(batch) == (row << 20 | image)):
                found = batch.slice(int(place), 1).to_pylist()[0]
        return found

    def _batches(self, columns: list[str] | None = None) -> Iterator[Any]:
        """The rows, oldest first."""
        joined = [MANIFEST] if self.storage.exists(MANIFEST) else []
        for name in joined + self.storage.names(PARTS):
            with self.storage.open(name) as file:
                yield from self._of_file(file, name, columns)

    def _of_file(self, file: Any, name: str, columns: list[str] | None) -> Iterator[Any]:
        try:
            table: Any = parquet.ParquetFile(file)
            known = len(table.schema_arrow)  # an earlier version had only the first columns
            if known < _FEWEST_COLUMNS or list(table.schema_arrow) != list(SCHEMA)[:known]:
                raise ValueError("it has other columns")
            for batch in table.iter_batches(batch_size=_ROWS_IN_MEMORY, columns=columns):
                yield batch if columns else _with_all_columns(batch)
        except _DAMAGE as error:
            remedy = "delete it, and what it records is drawn again"
            raise self.storage.damaged(name, error, remedy) from error


def _with_all_columns(batch: Any) -> Any:
    missing = list(SCHEMA)[batch.num_columns :]
    empty = [pa.nulls(batch.num_rows, field.type) for field in missing]
    return pa.RecordBatch.from_arrays([*batch.columns, *empty], schema=SCHEMA)


def _writable(row: dict[str, Any]) -> dict[str, Any]:
    return {n: clean(value) if isinstance(value, str) else value for n, value in row.items()}


def _keys(batch: Any) -> NDArray[np.uint64]:
    """Row (below 2**44) and image (below 2**20) as one number that sorts in list order."""
    row, image = (batch.column(name).to_numpy().astype(np.uint64) for name in ("row", "image"))
    return row << np.uint64(20) | image
