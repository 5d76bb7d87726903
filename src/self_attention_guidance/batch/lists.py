"""Lists of prompts: JSON Lines, CSV and Parquet, on this machine or in an object store."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from lzma import LZMAError
from typing import Any, cast

import fsspec
import fsspec.core

from .tasks import TableFloat

Row = Mapping[str, Any] | ValueError

# What the libraries raise for damaged files.
_DAMAGE = (
    *(OSError, EOFError, ValueError, ImportError, LookupError, MemoryError, ArithmeticError),
    *(NotImplementedError, csv.Error, zlib.error, LZMAError),
)
_COMPRESSED = (".gz", ".bz2", ".xz")
# The short types of floats hold all whole numbers below these.
_EXACT = {"halffloat": 2**11, "float": 2**24}


class PromptList:
    """A list of prompts, read row by row; it can be read several times.

    Attributes:
        path: A file, or a URL that fsspec knows: JSON Lines (`.jsonl`, `.ndjson`), CSV (`.csv`)
            or Parquet (`.parquet`). Text files may be compressed: `.jsonl.gz`.
        columns: Names of the columns that were read, as keys; rows of JSON Lines may have others.
    """

    def __init__(self, path: str) -> None:
        """Check the path; read nothing yet.

        Args:
            path: The file or URL.

        Raises:
            ValueError: Its name has no known ending, or there is no such file.
        """
        self.path = path
        self.columns: dict[str, None] = {}
        name = path.lower()
        for ending in _COMPRESSED:
            name = name.removesuffix(ending)
        self._format = name.rsplit(".", 1)[-1]
        if self._format not in ("jsonl", "ndjson", "csv", "parquet"):
            raise ValueError(f"prompts={path!r} must end in .jsonl, .csv or .parquet")
        with _explained(path):
            filesystem, place = cast("tuple[Any, str]", fsspec.core.url_to_fs(path))
            if not filesystem.isfile(place):
                raise ValueError(f"prompts={path!r} must be a file: there is none")

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows; an error replaces a single row that cannot be read.

        Yields:
            Cells by column; `None` is an empty cell.

        Raises:
            ValueError: The rest of the file cannot be read: it is cut off or in another format.
        """
        with _explained(self.path):
            for row in self._parquet() if self._format == "parquet" else self._text():
                if not isinstance(row, ValueError):
                    self.columns.update(dict.fromkeys(row))
                yield row

    def _text(self) -> Iterator[Row]:
        is_csv = self._format == "csv"
        text = {"encoding": "utf-8-sig", "newline": ""} if is_csv else {}
        opened: Any = fsspec.open(self.path, "rt" if is_csv else "rb", compression="infer", **text)
        with opened as file:
            yield from self._csv(file) if is_csv else self._json_lines(file)

    def _json_lines(self, file: Any) -> Iterator[Row]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _json_row(line, number)
            if isinstance(row, ValueError) and not line.endswith(b"\n"):
                raise ValueError(f"ends in the middle of line {number}: is the file complete?")
            yield row

    def _csv(self, file: Any) -> Iterator[Row]:
        text = _WatchedLines(file)
        reader = csv.DictReader(text, strict=True)
        self._check_columns(reader.fieldnames or ())
        for cells in reader:
            row = _csv_row(cast("dict[Any, Any]", cells), reader.line_num)
            if isinstance(row, ValueError) and not text.last.endswith("\n"):
                raise ValueError(
                    f"ends in the middle of line {reader.line_num}: is the file complete?"
                )
            yield row

    def _parquet(self) -> Iterator[Row]:
        import pyarrow.parquet as parquet

        opened: Any = fsspec.open(self.path, "rb")
        with opened as file:
            table: Any = parquet.ParquetFile(file)
            self._check_columns(table.schema_arrow.names)
            exact = {each.name: _EXACT.get(_kind(each.type)) for each in table.schema_arrow}
            short = {name: limit for name, limit in exact.items() if limit is not None}
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    for name, limit in short.items():
                        if row[name] is not None:
                            row[name] = TableFloat.of(row[name], limit)
                    yield row

    def _check_columns(self, names: Sequence[str]) -> None:
        if "prompt" not in names:
            raise ValueError(f"has no column prompt: its columns are {', '.join(names)[:200]}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"has several columns {twice[0]}: names must differ")


def _json_row(line: bytes, number: int) -> Row:
    try:
        # Files that are joined have the byte order marks of the parts in the middle.
        row: object = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except KeyError as error:
        return ValueError(f"line {number} has several columns {error.args[0]}: names must differ")
    except (ValueError, RecursionError) as error:
        return ValueError(f"line {number} is not JSON: {error}")
    if not isinstance(row, dict):
        return ValueError(f"line {number} must be a JSON object")
    return cast("dict[str, Any]", row)


def _once(cells: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a line; of two values with one name, neither may be lost."""
    found: dict[str, Any] = {}
    for name, value in cells:
        if name in found:
            raise KeyError(name)
        found[name] = value
    return found


def _csv_row(cells: dict[Any, Any], line: int) -> Row:
    if None in cells:
        return ValueError(f"line {line} has more cells than there are columns")
    if None in cells.values():
        return ValueError(f"line {line} has fewer cells than there are columns")
    return cells


def _kind(column: Any) -> str:
    """The name of the type of a column's cells; a dictionary has each of its values once."""
    return str(column.value_type if str(column).startswith("dictionary") else column)


class _WatchedLines:
    """Lines of a text; the last one that was read is in `last`."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = lines
        self.last = "\n"

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.last = line
            yield line.removeprefix("\ufeff")


@contextmanager
def _explained(path: str) -> Generator[None]:
    """Turn the libraries' errors for unreadable files into one line that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"prompts={path!r} must be a file: there is none") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:300]
        if reason.startswith("prompts="):
            raise
        raise ValueError(f"prompts={path!r} {_reason(error)}{reason}") from error


def _reason(error: Exception) -> str:
    return "" if type(error) is ValueError else "cannot be read: "
