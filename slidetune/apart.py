"""A function in a process of its own: whatever ends it ends nothing else, and its peak of RAM is its own.

    ended = apart.run(record, plan, "run.json.gz", timeout_s=900)
    print(ended.error or ended.result)

On Linux the process is forked from a small server that has imported already what every run imports: torch and
transformers alone take seconds, far more than the few steps of a run. The server ends with the process that started it,
and so do its forks. Elsewhere each process starts from nothing.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from slidetune.errors import SlidetuneError

# What a run imports whatever its model. None of it may ask for CUDA devices while it is imported: a fork of a process
# that has can't use them. Liger does, and is left to those who use it.
PRELOADED = (
    "slidetune.grid",
    "slidetune.runtime.data",
    "slidetune.runtime.run",
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.modeling_layers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "psutil",
    "pydantic.dataclasses",
    "yaml",
)
# Of a process that failed, the last lines say why.
_LAST_LINES = 8
# A killed process may have to wait for a device's driver; after so long nobody waits for it.
_KILLED_S = 30.0
_CALL, _RESULT, _SPOILED, _OUT, _ERR = "call", "result", "spoiled", "stdout", "stderr"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: `result` is what its function returned, or `error` says why there is none."""

    result: Any = None
    error: str = ""


def get_ready() -> None:
    """Let the server import in the background what runs will need; without it the first run does."""
    if _method() == "forkserver":
        from multiprocessing import forkserver

        with _without_main(True):
            _context()
            forkserver.ensure_running()


def run(function: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Ended:
    """Call a function, which stands at the top of a module, in a process of its own.

    What it prints is shown to nobody; the last lines of it are in the error, if there is one. After `timeout_s`
    the process is killed. An exception in it is an error too; none is raised here for it.
    """
    call = pickle.dumps((function, args))
    while True:
        method = _method()
        with tempfile.TemporaryDirectory(prefix="slidetune-") as name:
            folder = Path(name)
            (folder / _CALL).write_bytes(call)
            try:
                process = _started(folder, b"__main__" in call)
            except (OSError, EOFError):
                if method == "spawn":
                    raise
                _give_up_server("it didn't survive its imports")
                continue
            late = _waited(process, timeout_s)
            if (folder / _SPOILED).exists():
                _give_up_server("its imports asked for CUDA devices")
                continue
            if (folder / _RESULT).exists():
                return Ended(pickle.loads((folder / _RESULT).read_bytes()))
            end = f"ended after {timeout_s:g} s, all the time it had." if late else _ending(process.exitcode)
            return Ended(error=" ".join([end, *_last_lines(folder)]))


# --- The caller's side

_broken: list[str] = []
"""The server, once it has turned out not to work here: it is not tried again."""


def _method() -> str:
    # Elsewhere there is none, or system libraries don't bear being forked.
    return "forkserver" if sys.platform == "linux" and "forkserver" not in _broken else "spawn"


def _give_up_server(why: str) -> None:
    _broken.append("forkserver")
    _log.warning("Runs start slowly: their server can't be used, %s.", why)


def _context() -> Any:
    context = multiprocessing.get_context(_method())
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _started(folder: Path, needs_main: bool) -> BaseProcess:
    process = _context().Process(target=_serve, args=(str(folder), dict(os.environ)), name="apart")
    with _without_main(not needs_main):
        process.start()
    return process


@contextlib.contextmanager
def _without_main(left_out: bool) -> Iterator[None]:
    """New processes import the caller's script again. Few calls need that, and a script may lack the guard against
    doing its work twice."""
    main = sys.modules["__main__"]
    if left_out:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _waited(process: BaseProcess, timeout_s: float | None) -> bool:
    """Wait until it has ended; whether it had to be killed for the time."""
    try:
        process.join(timeout_s)
        return process.is_alive()
    finally:
        # Also after Ctrl-C.
        if process.is_alive():
            process.kill()
            process.join(_KILLED_S)


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}."
    name = signal.Signals(-code).name
    return f"ended by {name}{' (out of RAM?)' if name == 'SIGKILL' else ''}."


def _last_lines(folder: Path) -> list[str]:
    """The end of stderr, or of stdout where nothing stands there."""
    for path in (folder / _ERR, folder / _OUT):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if lines := [line for line in text.splitlines() if line.strip()]:
            return lines[-_LAST_LINES:]
    return []


# --- The new process's side


def _serve(name: str, environment: Mapping[str, str]) -> None:
    """Make the call that lies in a folder, and leave there what comes of it."""
    folder = Path(name)
    for path, descriptor in ((folder / _OUT, 1), (folder / _ERR, 2)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    if multiprocessing.get_start_method() == "forkserver" and _cuda_is_spoiled():
        (folder / _SPOILED).touch()
        return
    # The server has the environment in which it was started.
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function, args = pickle.loads((folder / _CALL).read_bytes())
    try:
        result = pickle.dumps(function(*args))
    except SlidetuneError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    unfinished = folder / f"{_RESULT}.part"
    unfinished.write_bytes(result)
    unfinished.replace(folder / _RESULT)


def _cuda_is_spoiled() -> bool:
    """Whether a module that the server imported has asked for CUDA devices, which no fork can use then."""
    torch = sys.modules.get("torch")
    # torch doesn't notice all of its own calls; the driver opens this file when it is initialised.
    return (torch is not None and torch.cuda._is_in_bad_fork()) or "/dev/nvidia-uvm" in _open_files()


def _open_files() -> set[str]:
    """Paths of the files that this process holds open; none where the system doesn't tell."""
    found = set()
    for path in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(path))
    return found


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
