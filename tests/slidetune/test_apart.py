"""Functions in processes of their own, however these end."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from slidetune import apart


# Importing these here gives functions that a new process can find: a test module has no name there.
def here(code: str, **values: object) -> apart.Ended:
    timeout_s = values.pop("timeout_s", None)
    return apart.run(exec, textwrap.dedent(code), values, timeout_s=timeout_s)


def test_what_it_returns_comes_back_and_what_it_prints_does_not(capfd):
    assert apart.run(sorted, [3, 1, 2]) == apart.Ended([1, 2, 3])
    assert here("print('to nobody')") == apart.Ended()
    assert apart.run(os.getpid).result != os.getpid()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ValueError('of no use')", ["exit code 1.", "ValueError: of no use"]),
        (
            "from slidetune.errors import DoesNotFit; raise DoesNotFit('too large.', 'Buy more.')",
            ["exit code 2. Error:"],
        ),
        ("import sys; print('the end', file=sys.stderr); sys.exit(3)", ["exit code 3.", "the end"]),
        ("import os; os._exit(0)", ["exit code 0."]),
        ("import os; os.write(1, b'only here'); os.kill(os.getpid(), 9)", ["SIGKILL (out of RAM?)", "only here"]),
        ("import os; os.abort()", ["ended by SIGABRT."]),
    ],
)
def test_however_it_ends_the_error_says_how(code, says):
    ended = here(code)
    assert ended.result is None
    for words in says:
        assert words in ended.error


def test_what_hangs_is_ended():
    began = time.perf_counter()
    ended = here("import time, sys; print('waiting', file=sys.stderr); time.sleep(60)", timeout_s=20 if slow() else 2)
    assert "ended after" in ended.error
    assert time.perf_counter() - began < 40


def slow() -> bool:
    """Whether the server is still to be started."""
    return apart.run(os.getpid).result is None


def test_a_result_that_cannot_be_sent_is_an_error():
    assert "pickle" in apart.run(compile, "1", "x", "eval").error


def test_folder_and_environment_are_the_callers_now(tmp_path, monkeypatch):
    apart.run(os.getpid)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIDETUNE_TEST", "now")
    assert apart.run(os.getcwd).result == str(tmp_path)
    assert apart.run(os.getenv, "SLIDETUNE_TEST").result == "now"


@pytest.mark.skipif(sys.platform != "linux", reason="forks are Linux's")
def test_each_has_a_peak_of_ram_of_its_own():
    def peak() -> int:
        return apart.run(resource.getrusage, resource.RUSAGE_SELF).result.ru_maxrss

    before = peak()
    mine = b"x" * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    assert not here("b'x' * (600 << 20)").error
    assert peak() == pytest.approx(before, rel=0.05)
    del mine


SCRIPT = """
import os, sys
from slidetune import apart

print("script runs")
print(apart.run(os.getppid).error, apart.run(os.getppid).result)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the server is Linux's")
def test_a_script_without_a_guard_is_not_run_twice_and_takes_the_server_with_it(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = ran.stdout.splitlines()
    assert first == "script runs"
    server = int(second.split()[-1])
    for _ in range(100):
        if not Path(f"/proc/{server}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the server is still there")


OF_MAIN = """
from slidetune import apart

def double(x):
    return 2 * x

if __name__ == "__main__":
    print("script runs")
    print(apart.run(double, 21))
"""


def test_a_scripts_own_functions_can_be_run(tmp_path):
    (tmp_path / "script.py").write_text(OF_MAIN)
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["script runs", "Ended(result=42, error='')"]


def test_after_ctrl_c_nothing_goes_on(tmp_path):
    code = f"import time; open({str(tmp_path / 'begun')!r}, 'w').close(); time.sleep(60)"
    script = f"from slidetune import apart; apart.run(exec, {code + chr(10) + ''!r})"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    # Its stderr is the server's too: it closes when both have ended.
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]


SPY = """
import torch
def spy(*_): raise AssertionError("asked for CUDA devices")
for name in ("is_available", "device_count", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, spy)
torch.accelerator.is_available = torch.accelerator.device_count = spy
import importlib
from slidetune.apart import PRELOADED
for name in PRELOADED:
    importlib.import_module(name)
"""


def test_what_the_server_imports_is_there_and_asks_for_no_cuda_device(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    ran = subprocess.run([sys.executable, "-c", SPY], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_without_a_server_that_can_be_used_processes_start_from_nothing(monkeypatch):
    monkeypatch.setattr(apart, "_broken", [])
    apart._give_up_server("as a test")
    assert apart.run(sorted, [2, 1]) == apart.Ended([1, 2])
    assert "exit code 1. " in here("raise ValueError").error
