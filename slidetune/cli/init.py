"""`slidetune init`: write a recipe to train by; and a recipe's fields as flags."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from slidetune import api
from slidetune.cli import console
from slidetune.cli.results import check_writable
from slidetune.errors import BadFile, SlidetuneError
from slidetune.field_docs import field_docs
from slidetune.recipe import Data, Recipe, changed, problems, write_recipe

_HEADING = (
    "A recipe for `slidetune train`: all that is decided about a training.",
    "Paths are relative to the folder that the command runs in. Every field is also a flag.",
)
# What a recipe needs and nobody gave, by field.
_ASSUMED = {"model": api.DEFAULT_MODEL, "data.source": "data.jsonl", "epochs": 1.0}


def with_recipe(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command a flag for every field of a recipe; it gets those that were given, by field, as its parameter
    `given`."""
    own = inspect.signature(command, eval_str=True).parameters
    fields, flags = _flags()

    @functools.wraps(command)
    def wrapped(**values: Any) -> Any:
        named = {field: values.pop(flag) for flag, field in fields.items()}
        # A flag that may be given several times comes as a list, empty where it wasn't.
        named = {field: tuple(value) if isinstance(value, list) else value for field, value in named.items()}
        return command(given={field: value for field, value in named.items() if value not in (None, ())}, **values)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for n, p in own.items() if n != "given"] + flags
    wrapped.__signature__ = inspect.Signature(parameters)
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _flags() -> tuple[dict[str, str], list[inspect.Parameter]]:
    """Fields ("data.held_out") by the name of their flag ("held_out"), and the flags as parameters."""
    fields, parameters = {}, []
    for cls, prefix, panel in ((Recipe, "", "Recipe"), (Data, "data.", "Data")):
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        for name, hint in hints.items():
            if hint is Data:
                continue
            flag = "data" if (cls, name) == (Data, "source") else name
            kind = _flag_kind(hint)
            option = typer.Option(help=escape(docs[name]), rich_help_panel=panel, show_default=False)
            parameters.append(
                inspect.Parameter(
                    flag, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
                )
            )
            fields[flag] = f"{prefix}{name}"
    return fields, parameters


def _flag_kind(hint: Any) -> Any:
    """What the command line takes for a field: it has no word for choices, and calls several of them a list."""
    if typing.get_origin(hint) is typing.Literal:
        return str
    several = typing.get_origin(hint) is tuple and typing.get_args(hint)[-1] is Ellipsis
    return list[str] if several else hint


@with_recipe
def init(
    *,
    given: dict[str, Any],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the recipe is written.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a recipe for a training, with a comment on what each field does."""
    check_writable(file)
    if file.exists() and not force:
        raise BadFile(f"{file}: is there already.", "Name another file, or give --force to write over it.")
    open_fields = {name: value for name, value in _ASSUMED.items() if name not in given}
    if "steps" in given:
        open_fields.pop("epochs", None)
    recipe = changed(Recipe(model="", data=Data(source="")), open_fields | given)
    found = problems(recipe)
    if found:
        raise SlidetuneError("this is no recipe to train by: " + " ".join(found))
    write_recipe(file, recipe, heading=_HEADING)
    console.out.print(f"Written: {file}", markup=False)
    if open_fields:
        console.out.print(f"Assumed: {', '.join(_phrase(*pair) for pair in open_fields.items())}", markup=False)


def _phrase(field: str, value: object) -> str:
    flag = "data" if field == "data.source" else field
    return f"{value} (--{flag})" if isinstance(value, str) else f"{flag} {value:g} (--{flag})"
