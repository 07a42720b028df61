"""What a training needs, made of a recipe and of what its output folder holds."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidetune.errors import BadFile, SlidetuneError
from slidetune.plans import Plan
from slidetune.recipe import Recipe
from slidetune.runtime.adam import AdamW
from slidetune.runtime.binding import Parts
from slidetune.runtime.checkpoint import checkpoints, load_into, read_manifest
from slidetune.runtime.counted_spec import spec_of
from slidetune.runtime.data import Prepared, Tokens, prepare, why_not_packed
from slidetune.runtime.skeleton import skeleton
from slidetune.runtime.trainer import SlidingTrainer
from slidetune.runtime.training.callbacks import Note

PLAN, MODEL = "plan.yaml", "model"
"""In the output folder: the plan that is followed, and the trained model."""
# Steps whose tasks' times are kept, to explain one that took too long by those before it.
_TRACED_STEPS = 6


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a training goes on."""

    checkpoint: Path
    step: int
    """The last one made."""
    schedule: Mapping[str, Any]
    """Of the learning rate, by which it was trained."""
    position: Mapping[str, Any]
    """In the data."""


def to_resume(directory: Path, *, resume: bool) -> list[Resumed]:
    """Where training can go on, the newest first; none for a training that begins.

    Raises SlidetuneError for a folder with checkpoints if `resume` was not asked for.
    """
    found = checkpoints(directory)
    if found and not resume:
        raise SlidetuneError(
            f"{directory} holds checkpoints already, the last one {found[-1].name}.",
            "--resume (in Python: fit(resume=True)) goes on from it; with another --output training begins anew.",
        )
    return [_resumed(path) for path in reversed(found)]


def _resumed(path: Path) -> Resumed:
    extra = read_manifest(path).extra
    try:
        return Resumed(path, int(extra["step"]), dict(extra["schedule"]), extra["data"])
    except (KeyError, TypeError, ValueError):
        raise BadFile(
            f"{path}: it was not saved by `slidetune train`, which can't tell where in the data it stands.",
            "Train from its weights in another --output: `slidetune export` writes them as a model.",
        ) from None


def extra_of(step: int, schedule: Mapping[str, Any], position: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint must hold beside the trainer's state, for `to_resume`."""
    return {"step": step, "schedule": dict(schedule), "data": dict(position)}


def schedule_of(recipe: Recipe, total_steps: int) -> dict[str, Any]:
    """All that the learning rate of a step depends on, beside `lr`."""
    share = {"decay_share": recipe.decay_share} if recipe.schedule == "wsd" else {}
    return {"schedule": recipe.schedule, "steps": total_steps, "warm_up_steps": recipe.warm_up_steps, **share}


def schedule_note(resumed: Resumed, schedule: Mapping[str, Any]) -> Note | None:
    """What should be said where a training goes on with another schedule than it had."""
    names = [name for name in {**resumed.schedule, **schedule} if resumed.schedule.get(name) != schedule.get(name)]
    if not names:
        return None
    changed = "; ".join(f"{name} was {resumed.schedule.get(name)} and is {schedule.get(name)}" for name in names)
    text = f"The learning rate goes on by another schedule than before {resumed.checkpoint.name}: {changed}."
    return Note(step=resumed.step, kind="resumed", text=text)


def data_for(recipe: Recipe, plan: Plan, folder: Path, tokens: Tokens, *, store: Path | None = None) -> Prepared:
    """The recipe's data as batches of the plan's. `folder` is the model's; tokens are kept in a file in `store`, which
    nobody sees and which is gone with the process.

    Raises what `prepare` raises, and SlidetuneError where the model can't take them as the recipe has them.
    """
    data = recipe.data
    if data.packed:
        model = skeleton(folder)
        why = why_not_packed(Parts(model, spec_of(model, plan.model)))
        if why is not None:
            raise SlidetuneError(
                f"{recipe.model}: documents can't share a sequence of this model: {why}.",
                "Give data: {packed: false} (--no-packed), which pads each document instead.",
            )
    try:
        return prepare(
            data.source,
            tokens,
            seq_len=plan.seq_len,
            batch=plan.batch,
            packed=data.packed,
            seed=recipe.seed,
            held_out=data.held_out,
            max_faulty=data.max_faulty,
            split=data.split,
            assistant_only=data.assistant_only,
            chat_template=_template(data.chat_template),
            folder=store,
        )
    except SlidetuneError as error:
        if "chat template writes a conversation's beginning differently" not in error.message:
            raise
        raise SlidetuneError(
            error.message,
            "Copy the template to a file, put {% generation %} and {% endgeneration %} around the assistant's words "
            "there, and give it as chat_template (--chat-template FILE); or learn all turns with assistant_only: false "
            "(--no-assistant-only).",
        ) from None


class _Trainer(SlidingTrainer):
    """What it saves speaks as it was taught: with the recipe's chat template, where that has one."""

    chat_template: str | None = None

    def save_config(self, folder: str | Path) -> None:
        super().save_config(folder)
        if self.chat_template is not None:
            # transformers takes this file rather than what the tokenizer's other files say.
            (Path(folder) / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def optimizer_of(recipe: Recipe) -> AdamW:
    """The optimizer's hyper-parameters."""
    beta1, beta2 = recipe.betas
    return AdamW(lr=recipe.lr, beta1=beta1, beta2=beta2, eps=recipe.eps, weight_decay=recipe.weight_decay)


def sliding_trainer(
    recipe: Recipe, plan: Plan, folder: Path, resumable: list[Resumed]
) -> tuple[SlidingTrainer, Resumed | None, list[Note]]:
    """The trainer, at the newest checkpoint that is whole; which one that is, and what should be said about it."""
    template = _template(recipe.data.chat_template)
    trainer, resumed, notes = _trainer(recipe, plan, folder, resumable)
    trainer.chat_template = template
    return trainer, resumed, notes


def _trainer(
    recipe: Recipe, plan: Plan, folder: Path, resumable: list[Resumed]
) -> tuple[_Trainer, Resumed | None, list[Note]]:
    how = {
        "optimizer": optimizer_of(recipe),
        "device": recipe.device,
        "nvme_folder": Path(recipe.nvme_dir or tempfile.gettempdir()).expanduser(),
        "seed": recipe.seed,
        "trace": _TRACED_STEPS,
    }
    notes: list[Note] = []
    for at, resumed in enumerate(resumable):
        try:
            trainer, changed = _resumed_trainer(folder, plan, resumed.checkpoint, how)
        except BadFile as error:
            if at == len(resumable) - 1:
                raise
            notes.append(Note(step=0, kind="resumed", text=f"{error.message} The checkpoint before it is taken."))
            continue
        if changed:
            text = f"Training goes on otherwise than {resumed.checkpoint.name} was trained: {'; '.join(changed)}."
            notes.append(Note(step=resumed.step, kind="resumed", text=text))
        return trainer, resumed, notes
    return _Trainer(folder, plan, **how), None, notes


def _resumed_trainer(folder: Path, plan: Plan, checkpoint: Path, how: dict[str, Any]) -> tuple[_Trainer, list[str]]:
    changed = _changed_optimizer(checkpoint, how["optimizer"])
    if not changed:
        return _Trainer(folder, plan, checkpoint=checkpoint, **how), []
    # The checkpoint's hyper-parameters are refused otherwise; here new ones are meant.
    trainer = _Trainer(folder, plan, **how)
    try:
        load_into(trainer, checkpoint, same_optimizer=False)
    except BaseException:
        trainer.close()
        raise
    return trainer, changed


def _changed_optimizer(checkpoint: Path, optimizer: AdamW) -> list[str]:
    """What of the hyper-parameters differs from a checkpoint's; norms and biases have no weight decay in either."""
    groups = read_manifest(checkpoint).groups
    mine = dataclasses.asdict(optimizer)
    theirs = {name: max((group[name] for group in groups), default=value) for name, value in mine.items()}
    return [f"{name} was {theirs[name]:g} and is {mine[name]:g}" for name in mine if theirs[name] != mine[name]]


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise BadFile(
            f"{file}: the chat template can't be read ({reason}).", "Give a file with a Jinja template."
        ) from None
