"""TensorBoard and Weights & Biases: the same figures as in the log, through their own libraries."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slidetune import files
from slidetune.errors import SlidetuneError
from slidetune.runtime.training.callbacks import Callback, Evaluated, Started, StepDone, Trained


def reporters(names: Sequence[str], folder: Path) -> list[Callback]:
    """A callback for each of `names`, in order; what they write goes to `folder`.

    Raises SlidetuneError for one that is unknown or whose library is not installed.
    """
    missing, reasons = [], []
    for name in dict.fromkeys(names):
        if name not in _KINDS:
            raise SlidetuneError(f"report is {name!r}; allowed: {', '.join(_KINDS)}.")
        try:
            importlib.import_module(_LIBRARIES[name])
        # Also one that is here without what it needs itself.
        except ImportError as error:
            missing.append(name)
            reasons.append(str(error))
    if missing:
        raise SlidetuneError(
            f"the recipe reports to {' and '.join(missing)}, which can't be imported here ({'; '.join(reasons)}).",
            f"pip install {' '.join(missing)}, or leave it out of `report`: the log of every step is written anyway.",
        )
    return [_KINDS[name](folder) for name in dict.fromkeys(names)]


def figures(done: StepDone) -> dict[str, float]:
    """What is drawn of a step, by name."""
    found = {
        "train/loss": done.loss,
        "train/lr": done.lr,
        "train/epoch": done.epoch,
        "speed/tokens_per_s": done.tokens_per_s,
        "speed/waited_for_data_s": done.waited_s,
    }
    if done.grad_norm is not None:
        found["train/grad_norm"] = done.grad_norm
    if done.predicted_tokens_per_s is not None:
        found["speed/predicted_tokens_per_s"] = done.predicted_tokens_per_s
    return found


class TensorBoard(Callback):
    """Writes event files to the folder `tensorboard`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._writer = folder / "tensorboard", None

    def on_start(self, started: Started) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a run that was killed wrote beyond its checkpoint is hidden.
        self._writer = SummaryWriter(str(self._folder), purge_step=started.first_step)

    def on_step(self, done: StepDone) -> None:
        for name, value in figures(done).items():
            self._writer.add_scalar(name, value, done.step)

    def on_evaluate(self, found: Evaluated) -> None:
        self._writer.add_scalar("evaluation/loss", found.loss, found.step)

    def on_end(self, trained: Trained) -> None:
        self._writer.close()


class WeightsAndBiases(Callback):
    """Logs to the project `slidetune`, unless WANDB_PROJECT names another; a run that goes on is the same run there."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._run = folder, None

    def on_start(self, started: Started) -> None:
        import wandb

        noted = self._folder / "wandb-run"
        goes_on = started.resumed_from is not None and noted.is_file()
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "slidetune"),
                name=started.output.resolve().name,
                dir=str(self._folder),
                config={"recipe": files.dump(started.recipe), "plan": files.dump(started.plan)},
                **({"id": noted.read_text().strip(), "resume": "allow"} if goes_on else {}),
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise SlidetuneError(
                f"Weights & Biases can't begin a run ({reason}).",
                "`wandb login`, set WANDB_MODE=offline, or leave wandb out of `report`.",
            ) from error
        noted.write_text(f"{self._run.id}\n")

    def on_step(self, done: StepDone) -> None:
        self._run.log(figures(done), step=done.step)

    def on_evaluate(self, found: Evaluated) -> None:
        self._run.log({"evaluation/loss": found.loss}, step=found.step)

    def on_end(self, trained: Trained) -> None:
        self._run.finish(exit_code=0 if trained.finished else 1)


_LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
_KINDS: dict[str, Callable[[Path], Any]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
