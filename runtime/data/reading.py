"""Rows of files, directories and hub datasets, numbered, one after the other; what is no row is a fault with a place.

- .jsonl: an object a line. Blank lines are no rows.
- .json: a list of objects, or an object a line.
- .parquet: a row group at a time (needs pyarrow).
- .txt: the whole file is one row's `text`.
- a directory: its files of these kinds, those in subdirectories too, in the order of their paths; or what
  `Dataset.save_to_disk` wrote (needs datasets).
- anything else that is no path: a dataset of the hub (needs datasets).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidetune.errors import BadFile, SlidetuneError

KINDS = (".jsonl", ".json", ".parquet", ".txt")
_BLANK = re.compile(r"[ \t\r\n,]*")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is."""

    source: str
    unit: str
    """line, or row where a format has no lines."""
    number: int
    """From 1."""

    def __str__(self) -> str:
        return f"{self.source} {self.unit} {self.number:,}"


@dataclass(frozen=True, slots=True)
class Row:
    place: Place
    fields: dict[str, Any]
    whole_file: bool = False
    """A text file: one row, however long."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that should be a row and can't be used."""

    place: Place
    what: str
    """Continues a sentence that the place begins: `is not JSON`."""

    def __str__(self) -> str:
        return f"{self.place} {self.what}"


def read_rows(source: str | Path, *, split: str = "train", config: str | None = None) -> Iterator[Row | Fault]:
    """The rows of `source`, as they are read. `split` and `config`: of a hub dataset.

    What can be refused without reading is refused at once. Raises BadFile for a source that is missing or as a whole
    unreadable, SlidetuneError where the library it needs is not installed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return _datasets_rows(str(source), lambda library: library.load_from_disk(str(path)), split)
        files = files_of(path)
        return (row for file in files for row in _READERS[file.suffix.lower()](file))
    if path.is_file():
        return _reader(path)(path)
    if path.exists() or path.suffix.lower() in KINDS or not _HUB_ID.fullmatch(str(source)):
        raise BadFile(f"{source}: no such file or directory.", f"Give {_choices()}.")
    return _datasets_rows(str(source), lambda library: library.load_dataset(str(source), config, split=split), split)


def files_of(folder: Path) -> list[Path]:
    """The files of known kinds under a directory, hidden ones left out, in the order of their paths. Raises BadFile
    if there are none."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in KINDS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise BadFile(f"{folder}: no data in this directory.", f"It takes files that end in {', '.join(KINDS)}.")
    return found


def _choices() -> str:
    return f"a file that ends in {', '.join(KINDS)}, a directory of such files, or a hub dataset as owner/name"


def _reader(path: Path) -> Callable[[Path], Iterator[Row | Fault]]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadFile(f"{path}: what kind of file it is can't be told from its name.", f"Give {_choices()}.")
    return reader


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.", "Look at the file and its permissions.") from None


def _lines(path: Path) -> Iterator[Row | Fault]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _line(Place(str(path), "line", number), line)
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.", "Look at the file and its permissions.") from None


def _line(place: Place, line: bytes) -> Row | Fault:
    try:
        return _row(place, json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return Fault(place, f"is not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return Fault(place, f"is not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Fault(place, f"is not JSON that can be read ({error})")


def _row(place: Place, value: Any) -> Row | Fault:
    return Row(place, value) if isinstance(value, dict) else Fault(place, "is no object")


def _json(path: Path) -> Iterator[Row | Fault]:
    """A list is read with the line on which each element begins."""
    with_lines = "Give a list of objects, or an object a line; `jq -c '.FIELD[]'` takes a list out of an object."
    try:
        text = _bytes(path).decode("utf-8-sig")
        is_list = text.lstrip().startswith("[")
        # An object over several lines shows on the first one.
        begins = text if is_list else text.lstrip().partition("\n")[0]
        if begins:
            json.loads(begins)
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise BadFile(f"{path}: not JSON ({error.msg} at line {error.lineno}).", with_lines) from None
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: not JSON that can be read ({error}).", with_lines) from None
    if not is_list:
        yield from _lines(path)
        return
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while text[at := _BLANK.match(text, at).end()] != "]":
        line += text.count("\n", counted, at)
        counted = at
        value, at = decoder.raw_decode(text, at)
        yield _row(Place(str(path), "line", line), value)


def _text(path: Path) -> Iterator[Row | Fault]:
    content = _bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Fault(Place(str(path), "line", line), f"is not UTF-8 (byte {error.start} of the file)")
        return
    yield Row(Place(str(path), "line", 1), {"text": text}, whole_file=True)


def _parquet(path: Path) -> Iterator[Row | Fault]:
    _need("pyarrow", f"{path}: reading .parquet")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(Place(str(path), "row", number), fields)
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadFile(f"{path}: not a Parquet file that can be read ({reason}).", "Write it anew.") from None


def _datasets_rows(source: str, load: Callable[[Any], Any], split: str) -> Iterator[Row | Fault]:
    _need("datasets", f"{source} is no path here; reading it as a dataset of the hub")
    import datasets

    try:
        data = load(datasets)
    # Each cause has a class of its own, from several libraries: not found, no network, gated, no such config.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SlidetuneError(
            f"{source}: no path here, and no dataset could be loaded by that name ({reason}).",
            f"Give {_choices()}; a gated dataset needs `hf auth login`.",
        ) from None
    if isinstance(data, dict):
        if split not in data:
            raise BadFile(f"{source}: it has no split {split}.", f"It has {', '.join(data)}.")
        data = data[split]
    return (Row(Place(source, "row", number), fields) for number, fields in enumerate(data, start=1))


def _need(library: str, what: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise SlidetuneError(f"{what} needs {library}, which is not installed.", 'pip install "slidetune[data]"')


_READERS: dict[str, Callable[[Path], Iterator[Row | Fault]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _text,
}
