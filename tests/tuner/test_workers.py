"""Processes side by side give what one process gives, in the same order."""

import subprocess
import sys
import textwrap
import threading

import pytest

from slidetune.plans import Plan
from slidetune.tuner.workers import Workers, _usable_cores

from .small_spaces import an_evaluator

# Forking is for a process of one thread, which a test runner need not be.
SCRIPT = """
    import os
    from slidetune.machines import machine
    from slidetune.models import load_model
    from slidetune.plans import Plan
    from slidetune.tuner.evaluate import Evaluator
    from slidetune.tuner.workers import Workers

    def here(evaluator, plan):
        return plan.micro_batch, evaluator.model.name, os.getpid()

    def fails(evaluator, plan):
        if plan.micro_batch == 3:
            raise ValueError("three")
        return plan.micro_batch

    evaluator = Evaluator(load_model("qwen3-0.6b"), machine("rtx4090"))
    plans = [Plan(model="qwen3-0.6b", micro_batch=n) for n in range(1, 9)]
    with Workers(evaluator, count=2) as workers:
        found = workers.map(here, plans)
        assert [batch for batch, _, _ in found] == list(range(1, 9))
        assert {name for _, name, _ in found} == {"qwen3-0.6b"}
        assert os.getpid() not in {pid for _, _, pid in found}
        # One item isn't worth the way there and back.
        assert workers.map(here, plans[:1])[0][2] == os.getpid()
        assert workers.map(here, []) == []
        assert evaluator.worths(plans, workers) == [Evaluator.simulate(evaluator, plan) for plan in plans]
    try:
        with Workers(evaluator, count=2) as workers:
            workers.map(fails, plans)
    except ValueError as error:
        print("failed with", error)
"""


def test_processes_keep_order_hand_on_errors_and_simulate_alike():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout) == (0, "failed with three\n"), run.stderr


def _batch(evaluator, plan):
    return evaluator.model.name, plan.micro_batch


def test_without_processes_it_is_the_same():
    plans = [Plan(model="qwen3-0.6b", micro_batch=n) for n in (3, 1, 2)]
    with Workers(an_evaluator(), count=1) as workers:
        assert workers.map(_batch, plans) == [("qwen3-0.6b", n) for n in (3, 1, 2)]


def test_no_fork_beside_another_thread():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert _usable_cores() == 1
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_no_fork_where_it_is_not_safe(monkeypatch, platform):
    monkeypatch.setattr("slidetune.tuner.workers.sys.platform", platform)
    assert _usable_cores() == 1
