"""The `slidetune` command, run as a person runs it: as a process in some folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """What was printed, on one line: pages and errors wrap where the terminal ends."""
        return " ".join(f"{self.out} {self.err}".split())


def slidetune(*arguments: object, cwd: Path, columns: int = 100) -> Ran:
    """Run the command; a traceback is a failure whatever the test is about."""
    environment = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "slidetune", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "Traceback" not in run.stderr, run.stderr
    return Ran(run.returncode, run.stdout, run.stderr)


def refused(*arguments: object, cwd: Path, saying: str) -> Ran:
    """Run a command that a user got wrong: exit code 2, and words that say what is wrong."""
    ran = slidetune(*arguments, cwd=cwd)
    assert ran.code == 2, ran
    assert re.search(saying, ran.words), ran.words
    return ran
