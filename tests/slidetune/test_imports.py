"""Who imports whom, and what loads when: planning happens on machines without torch."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "matplotlib", "pandas", "safetensors")


# --- Layers, by reading the imports


def layer(module: str) -> str:
    """vocabulary, simulator, runtime, traces, tuner or top."""
    parts = module.split(".")
    second = parts[1] if len(parts) > 1 else ""
    if second in ("simulator", "runtime", "traces", "tuner"):
        return second
    top = ("cli", "api", "reporting", "training", "validating", "grid", "tuning_loop", "__main__")
    return "top" if second in top else "vocabulary"


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """Our own modules that a module's code imports, anywhere but for type checkers."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if only_for_types(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "slidetune"}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            if node.module.split(".")[0] == "slidetune":
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in known else node.module for name in names}
        else:
            found |= imported(node, known)
    return found


@cache
def imports() -> dict[str, set[str]]:
    files = {}
    for folder in ("slidetune", "simulator", "runtime", "traces", "tuner"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "slidetune" else ("slidetune", *parts))
            files[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return {name: imported(tree, set(files)) for name, tree in files.items()}


MAY_IMPORT = {
    "vocabulary": {"vocabulary"},
    "simulator": {"vocabulary", "simulator"},
    "runtime": {"vocabulary", "runtime"},
    "traces": {"vocabulary", "traces"},
    "tuner": {"vocabulary", "simulator", "traces", "tuner"},
    "top": {"vocabulary", "simulator", "runtime", "traces", "tuner", "top"},
}


@pytest.mark.parametrize("whose", MAY_IMPORT)
def test_layers_import_only_what_is_below_them(whose):
    modules = {name: found for name, found in imports().items() if layer(name) == whose}
    assert modules
    wrong = {
        f"{name} imports {other}"
        for name, found in modules.items()
        for other in found
        if layer(other) not in MAY_IMPORT[whose]
    }
    assert not wrong


def test_every_module_that_is_imported_is_there():
    assert len(imports()) > 60
    assert {other for found in imports().values() for other in found} <= set(imports())


# --- What loads when, by running it


def loaded(code: str, cwd: Path) -> set[str]:
    """Names of the top-level modules loaded after some code ran in a fresh process."""
    code += "\nimport sys; sys.stderr.write('LOADED ' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stderr.rsplit("LOADED ", 1)[1].split())


def command(*arguments: str) -> str:
    """Code that runs a command as the entry point does, and goes on after it."""
    return f"""
import sys
from slidetune.cli.app import main
sys.argv = ["slidetune", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def test_importing_the_package_loads_next_to_nothing(tmp_path):
    found = loaded("import slidetune", tmp_path)
    assert "slidetune" in found
    assert not found & {*HEAVY, "numpy", "optuna", "simpy", "pydantic", "yaml", "typer", "rich"}


def test_help_loads_nothing_heavy(tmp_path):
    assert not loaded(command("--help"), tmp_path) & {*HEAVY, "numpy", "optuna", "pydantic"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--model", "qwen3-0.6b", "--trials", "5"),
        ("simulate", "--policy", "slideformer", "--model", "qwen3-0.6b"),
        ("fit", "--model", "gpt2", "--trials", "3"),
        ("gpus",),
        ("schema", "plan"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_planning_loads_no_torch_and_nothing_to_draw_with(tmp_path, arguments):
    assert not loaded(command(*arguments), tmp_path) & set(HEAVY)


def test_every_public_name_is_there():
    import slidetune

    assert all(getattr(slidetune, name) is not None for name in slidetune.__all__)
    assert set(dir(slidetune)) == set(slidetune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        slidetune.nonsense  # noqa: B018
