"""Plans as files: what is written reads back, and says what each knob does and why."""

import dataclasses
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.errors import BadFile
from slidetune.field_docs import field_docs
from slidetune.plan_file import plan_text, read_plan, write_plan
from slidetune.plans import Activations, Plan, Recompute, knobs

from ..strategies import models_and_plans

PLAN = Plan(model="llama-3.1-8b", micro_batch=4, activations=Activations(gpu=3), recompute=Recompute(keep=2))
# What reasons may say: words, and what YAML would read as something else.
words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)
sentences = st.lists(words, min_size=1, max_size=40).map(" ".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@given(
    models_and_plans(), st.dictionaries(st.sampled_from(list(knobs(PLAN))), sentences), st.lists(sentences, max_size=3)
)
@settings(max_examples=60, deadline=None)
def test_any_plan_reads_back(folder, case, reasons, heading):
    _, plan = case
    plan = dataclasses.replace(plan, gpu_memory_gib=8.5)
    assert read_plan(write_plan(folder / "plan.yaml", plan, reasons=reasons, heading=heading)) == plan


@pytest.mark.parametrize(
    "name", ["a model.json", "owner/model", "C:\\models\\x", "yes", "1e3", "- x", "#5", "naïve: é"]
)
def test_model_names_of_all_kinds(folder, name):
    plan = Plan(model=name)
    assert read_plan(write_plan(folder / "named.yaml", plan)) == plan


def comments(text: str) -> dict[str, str]:
    """Field -> the comment above it, on one line."""
    found, held = {}, []
    for line in text.splitlines():
        if match := re.match(r"\s*# *(.*)", line):
            held.append(match[1])
        elif match := re.match(r"\s*(\w+):", line):
            found[match[1]] = " ".join(held)
            held = []
        else:
            held = []
    return found


def test_every_knob_has_its_meaning_above_it():
    found = comments(plan_text(PLAN))
    for cls in (Plan, Activations, Recompute):
        for name, meaning in field_docs(cls).items():
            assert found[name] == meaning


def test_reasons_and_heading_are_comments():
    text = plan_text(
        PLAN, reasons={"window": "3 is no faster.", "activations.gpu": "4 is 1 % slower."}, heading=["For me", "today"]
    )
    assert text.startswith("# For me\n# today\n\n")
    found = comments(text)
    assert found["window"].endswith("Here: 3 is no faster.")
    assert found["gpu"].endswith("Here: 4 is 1 % slower.")
    assert "Here:" not in found["nvme"] + found["prefetch"]
    # Comments apart, it is the plan.
    assert yaml.safe_load(text) == dataclasses.asdict(PLAN)


def test_lines_stay_short():
    text = plan_text(PLAN, reasons={"window": "much to say " * 40})
    assert max(map(len, text.splitlines())) <= 100


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(BadFile, match="No such file or directory"):
        write_plan(tmp_path / "missing" / "plan.yaml", PLAN)
    with pytest.raises(BadFile, match="Is a directory"):
        write_plan(tmp_path, PLAN)


def test_a_misspelt_knob_is_named_with_its_file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("model: gpt2\nmicrobatch: 3\n")
    with pytest.raises(BadFile, match="microbatch is not a known field; did you mean micro_batch") as caught:
        read_plan(path)
    assert str(path) in caught.value.message
