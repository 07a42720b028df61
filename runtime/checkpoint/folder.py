"""The directory that holds a run's checkpoints, each in a folder of its own that appears complete or not at all.

`step-00000120` is whole. What is under way or on its way out has a suffix, and no reader looks at it: a crash at any
moment leaves at most such a rest, which the next save removes.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from slidetune.errors import BadFile
from slidetune.runtime.checkpoint.manifest import read_manifest

_log = logging.getLogger(__name__)
# A step saved again (by a run that went back to an earlier checkpoint) gets a number behind it.
_WHOLE = re.compile(r"step-\d+(\.\d+)?")
_PARTIAL, _TRASH = ".partial", ".trash"


def checkpoints(directory: str | Path) -> list[Path]:
    """The complete checkpoints of a directory in the order in which they were saved; none if it isn't there."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = []
    for path in sorted(directory.iterdir()):
        if _WHOLE.fullmatch(path.name) and path.is_dir():
            try:
                found.append((read_manifest(path).serial, path))
            except BadFile as error:
                _log.warning("%s", error)
    return [path for _, path in sorted(found)]


def latest(directory: str | Path) -> Path | None:
    """The checkpoint saved last, None if there is none. Its tensors are checked when they are loaded, not here."""
    return next(reversed(checkpoints(directory)), None)


def chosen(path: str | Path) -> Path:
    """A checkpoint: `path` itself, or the latest in it. Raises BadFile if it is neither."""
    path = Path(path)
    if _WHOLE.fullmatch(path.name):
        return path
    found = latest(path)
    if found is None:
        raise BadFile(f"{path}: no checkpoint is here.", "Give a folder step-..., or the directory that holds them.")
    return found


def new_partial(directory: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of a step to. Raises OSError."""
    name, again = f"step-{step:08d}", 0
    path = directory / name
    while path.exists():
        again += 1
        path = directory / f"{name}.{again}"
    partial = path.with_name(path.name + _PARTIAL)
    partial.mkdir()
    return partial


def complete(partial: Path) -> Path:
    """Give a folder, all of whose files are on the disk, its name. Raises OSError."""
    for folder in (*(path for path in partial.iterdir() if path.is_dir()), partial):
        sync_folder(folder)
    path = partial.with_name(partial.name.removesuffix(_PARTIAL))
    partial.rename(path)
    sync_folder(path.parent)
    return path


def keep_last(directory: Path, count: int) -> None:
    """Delete all but the last so many. What can't be deleted is only logged."""
    for path in checkpoints(directory)[:-count]:
        trash = path.with_name(path.name + _TRASH)
        try:
            # Away as a whole before its files go one by one.
            path.rename(trash)
            sync_folder(directory)
            shutil.rmtree(trash)
        except OSError as error:
            _log.warning("%s can't be deleted: %s", path, error)


def remove_rests(directory: Path) -> None:
    """Delete what interrupted saves have left."""
    for path in directory.glob("step-*"):
        if path.suffix in (_PARTIAL, _TRASH):
            shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file; it is on the disk afterwards. Raises OSError."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
