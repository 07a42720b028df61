"""kill -9 at random moments of `slidetune train`, from its first moment on: each run goes on where the last checkpoint
is, and in the end losses and weights are those of a training that was never killed."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from slidetune.recipe import write_recipe
from slidetune.runtime.checkpoint import latest, read_manifest, verify

from .small_training import events, masters, same, small_recipe

KILLS = 20
STEPS, EVERY = 70, 2

# All is imported once; each run is the command in a fork of that. A line says when to kill it: so long after its start
# or after its first step, or never. What is answered is how it ended.
RUNS = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
import slidetune.cli.app, slidetune.training, slidetune.runtime.training.loop
import transformers.models.llama.modeling_llama

def steps(log):
    return open(log, "rb").read().count(b'"event": "step"') if os.path.exists(log) else 0

for line in sys.stdin:
    recipe, log, moment, awaited, delay = line.split()
    before = steps(log)
    child = os.fork()
    if not child:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = ["slidetune", "train", recipe, "--resume"]
        code = 1
        try:
            slidetune.cli.app.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            os._exit(code)
    ended = 0
    while moment == "step" and not ended and steps(log) < before + int(awaited):
        time.sleep(0.01)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        if moment != "never":
            time.sleep(float(delay))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.timeout(400)
def test_killed_at_random_moments(tmp_path):
    recipe = small_recipe(tmp_path, steps=STEPS, save_every=EVERY, evaluate_every=50)
    alone = small_recipe(tmp_path, steps=STEPS, save_every=EVERY, evaluate_every=50, output=str(tmp_path / "alone"))
    chance = random.Random(9)
    command = [sys.executable, "-c", RUNS]
    runs = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def run(recipe, moment, awaited=0, delay=0.0):
        file = write_recipe(Path(f"{recipe.output}.yaml"), recipe)
        runs.stdin.write(f"{file} {recipe.output}/log.jsonl {moment} {awaited} {delay}\n")
        return runs.stdout.readline().strip()

    found = set()
    with runs:
        for kill in range(KILLS):
            # Half of them while the run gets ready; the others while it trains, some steps on: so it gets somewhere on
            # the slowest machine, and never to its end.
            awaited = chance.randint(1, EVERY + 1)
            moment = ("start", 0, chance.uniform(0, 1)) if kill % 2 else ("step", awaited, chance.uniform(0, 0.02))
            ended = run(recipe, *moment)
            if ended == "0":
                # On a fast machine it got to its end before its time.
                break
            assert ended == "-9"
            checkpoint = latest(recipe.output)
            told = max((line["step"] for line in events_whole(recipe, "checkpoint")), default=0)
            if checkpoint is not None:
                verify(checkpoint)
            step = 0 if checkpoint is None else read_manifest(checkpoint).extra["step"]
            assert step >= told, "a checkpoint that was told of is lost"
            found.add(step)
        assert run(recipe, "never") == "0"
        assert run(alone, "never") == "0"
        runs.stdin.close()
    assert len(found) > 2, "the runs made progress"
    begun = [line["first_step"] for line in events(recipe, "start")]
    assert {first - 1 for first in begun} <= {0, *range(EVERY, STEPS, EVERY)}
    expected = {line["step"]: line["loss"] for line in events(alone, "step")}
    assert len(expected) == STEPS
    assert {(line["step"], line["loss"]) for line in events(recipe, "step")} == set(expected.items())
    assert {(line["step"], line["loss"]) for line in events(recipe, "evaluation")} == {
        (line["step"], line["loss"]) for line in events(alone, "evaluation")
    }
    assert same(masters(recipe.output, tmp_path / "a"), masters(alone.output, tmp_path / "b"))


def events_whole(recipe, kind):
    """The log's events while its last line may be half of one."""
    log = Path(recipe.output) / "log.jsonl"
    if log.exists():
        text = log.read_text()
        log.write_text(text[: text.rfind("\n") + 1])
    return events(recipe, kind) if log.exists() else []
