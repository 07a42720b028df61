"""Training by a recipe: what `slidetune train` does, for scripts and notebooks.

    trained = slidetune.Trainer("recipe.yaml").fit()
    print(trained.losses[-1], trained.model)

Callbacks watch it: see `slidetune.Callback`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slidetune import api
from slidetune.errors import SlidetuneError
from slidetune.hardware import HardwareProfile
from slidetune.installed import check_runtime
from slidetune.machines import PROFILE_HERE, adapted, catalog_card, load_profile, machine
from slidetune.models import in_catalog, load_model
from slidetune.plan_file import read_plan, write_plan
from slidetune.plans import Plan
from slidetune.recipe import AUTO, Recipe, plan_to_follow, problems, read_recipe, total_steps
from slidetune.units import GB, GIB, format_seconds

if TYPE_CHECKING:
    from slidetune.model import ModelSpec
    from slidetune.runtime.trainer import SlidingTrainer
    from slidetune.runtime.training.callbacks import Callback, Predicted, Trained

_MEASURE_DRIVE = "`slidetune profile --nvme-dir DIR` measures it too."


class Trainer:
    """Trains a model by a recipe.

    Args:
        recipe: a `slidetune.recipe.Recipe`, or its file.
        callbacks: who watches, beside the log and what the recipe reports to.
        profile: this machine, or its profile's file or name; by default ./profile.yaml if that is there.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        *,
        callbacks: Sequence[Callback] = (),
        profile: HardwareProfile | str | Path | None = None,
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
        found = problems(self.recipe)
        if found:
            raise SlidetuneError("this is no recipe to train by: " + " ".join(found))
        self._callbacks = list(callbacks)
        if profile is None and PROFILE_HERE.is_file():
            profile = PROFILE_HERE
        self._profile = load_profile(profile) if isinstance(profile, str | Path) else profile

    def fit(self, *, resume: bool = False) -> Trained:
        """Train to the last step; returns what came of it.

        `resume` goes on from the newest whole checkpoint in the output folder, or begins where there is none. SIGTERM
        and the first Ctrl-C save after the step under way and return, `ended` being SIGTERM or SIGINT; so does what a
        callback calls `Started.stop` with.

        Raises:
            SlidetuneError: for a recipe, data, model or machine that don't go together, before a step is made; for an
                output folder that another run uses, or that holds checkpoints without `resume`.
            DoesNotFit: no plan, or not this one, fits the machine.
            NonFiniteLoss: the loss was NaN or infinite; the last checkpoint is intact, and the message says how to go
                on.
            CheckpointFailed: the last checkpoint could not be saved.
        """
        check_runtime("training")
        from slidetune.runtime.checkpoint import Checkpoints
        from slidetune.runtime.training import loop, setup
        from slidetune.runtime.training.callbacks import Callbacks, Note
        from slidetune.runtime.training.log import JsonLog, log_folder
        from slidetune.runtime.training.pretrained import model_directory, tokens_for
        from slidetune.runtime.training.reporters import reporters

        recipe, folder = self.recipe, log_folder(self.recipe)
        watching = Callbacks([JsonLog(folder), *reporters(recipe.report, folder), *self._callbacks])
        # What can be refused is, before a model is loaded for minutes.
        output = Path(recipe.output).expanduser()
        with Checkpoints(output, keep=recipe.keep) as checkpoints, contextlib.ExitStack() as stack:
            resumable = setup.to_resume(output, resume=resume)
            watching.on_prepare(f"model {recipe.model}")
            home = model_directory(recipe.model, with_code=recipe.trust_remote_code)
            # The catalog's name: by that a profile knows a model's measured layers.
            spec = load_model(recipe.model if in_catalog(recipe.model) else str(home))
            tokens = tokens_for(home, spec.vocab_size, trust_remote_code=recipe.trust_remote_code)
            plan = self._plan(spec, output / setup.PLAN, bool(resumable), watching)
            watching.on_prepare(f"data {recipe.data.source}")
            # Not where temporary files go: that may be RAM, of which the plan needs all.
            data = setup.data_for(recipe, plan, home, tokens, store=output)
            total = total_steps(recipe, len(data.train))
            watching.on_prepare("weights")
            trainer, resumed, notes = setup.sliding_trainer(recipe, plan, home, resumable)
            stack.enter_context(trainer)
            predicted = None
            if self._profile is not None and self._profile.nvme is None and any(trainer.schedule.pools_of("nvme")):
                text = f"No prediction: {self._profile.name} has no drive, and the plan uses one. {_MEASURE_DRIVE}"
                notes.append(Note(step=0, kind="no_prediction", text=text))
            elif self._profile is not None:
                predicted = _predicted(trainer, self._profile)
            job = loop.Job(
                recipe=recipe,
                plan=plan,
                data=data,
                total_steps=total,
                trainer=trainer,
                checkpoints=checkpoints,
                resumed=resumed,
                predicted=predicted,
                notes=notes,
            )
            return loop.train(job, watching)

    def _plan(self, spec: ModelSpec, kept: Path, resumes: bool, watching: Callback) -> Plan:
        """The plan to follow, which is also written to `kept`; a run that goes on takes the one that lies there."""
        recipe = self.recipe
        if recipe.plan != AUTO:
            plan = plan_to_follow(recipe, read_plan(recipe.plan))
            if Path(recipe.plan).resolve() == kept.resolve():
                return plan
            write_plan(kept, plan, heading=[f"The plan of {recipe.plan}, as it was followed."])
            return plan
        if resumes and kept.is_file():
            # Only to predict by: what nobody knows is not missed.
            with contextlib.suppress(SlidetuneError):
                self._profile = self._profile or _guessed_machine(recipe)
            return plan_to_follow(dataclasses.replace(recipe, plan=str(kept)), read_plan(kept))
        watching.on_prepare("a plan")
        self._profile = self._profile or _guessed_machine(recipe)
        planned = api.plan(
            spec,
            self._profile,
            seq_len=recipe.seq_len or min(api.DEFAULT_SEQ_LEN, spec.max_seq_len),
            batch=recipe.batch,
            clip_norm=recipe.clip_norm,
        )
        predicted = (
            f"{planned.prediction.tokens_per_s:,.0f} tokens/s, {format_seconds(planned.prediction.step_s)} a step"
        )
        heading = [f"slidetune: {spec.name} on {self._profile.name}.", f"Predicted: {predicted}."]
        write_plan(kept, planned.plan, reasons=planned.reasons, heading=heading)
        return planned.plan


def _predicted(trainer: SlidingTrainer, profile: HardwareProfile) -> Predicted:
    """What the simulator foresees."""
    from slidetune.runtime.training.callbacks import Predicted
    from slidetune.runtime.training.slow_steps import work_by_step
    from slidetune.simulator.predict import predict

    here = api.within_cap(adapted(profile, kernels=trainer.kernels), trainer.plan)
    found = predict(trainer.schedule, here)
    # The steady step's tasks, some of which run beside the step before.
    work: Counter[tuple[str, str]] = Counter()
    for step in work_by_step(found.trace).values():
        work.update(step)
    return Predicted(step_s=found.step_s, work_s=work, machine=profile.name)


def _guessed_machine(recipe: Recipe) -> HardwareProfile:
    """The machine at hand as the catalog has it. Raises SlidetuneError for a device that is not in it."""
    import psutil
    import torch

    from slidetune.runtime.arena import available_bytes
    from slidetune.runtime.trainer import chosen_device

    device = chosen_device(recipe.device)
    card, why = None, "no profile of it is here"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = catalog_card(properties.name, properties.total_memory / GIB)
        why = f"{properties.name} is not in the catalog"
    if card is None:
        raise SlidetuneError(
            f"plan: auto needs to know the machine, and {why}.",
            f"`slidetune profile --device {device}` measures it in a minute; then train again, beside {PROFILE_HERE}.",
        )
    drive = "none"
    if recipe.nvme_dir is not None:
        try:
            free = shutil.disk_usage(Path(recipe.nvme_dir).expanduser()).free
        except OSError as error:
            raise SlidetuneError(f"{recipe.nvme_dir}: {error.strerror}.", "Give a folder that is there.") from None
        preset = machine(card).nvme
        drive = f"{free / GB:.0f}GB:{preset.read_gbs.value:g}/{preset.write_gbs.value:g}"
    guessed = machine(
        card,
        ram_gib=available_bytes() / GIB,
        cores=min(psutil.cpu_count(logical=False) or 1, len(psutil.Process().cpu_affinity())),
        nvme=drive,
    )
    return dataclasses.replace(guessed, name=f"the catalog's guess of {guessed.gpu.name}")
