"""Recipes as files: what is written reads back, and faults are named all at once."""

import dataclasses
import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.errors import BadFile, SlidetuneError
from slidetune.field_docs import field_docs
from slidetune.plans import Plan
from slidetune.recipe import (
    REPORTS,
    Data,
    Recipe,
    batch_text,
    changed,
    lr_factor,
    plan_to_follow,
    problems,
    read_recipe,
    recipe_text,
    total_steps,
    write_recipe,
)
from slidetune.schedules import KINDS

RECIPE = Recipe(model="some/model", data=Data(source="rows.jsonl"), steps=100)
GOOD = {"model": "some/model", "data": {"source": "rows.jsonl"}, "steps": 100}

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
counts = st.integers(1, 10**9)
shares = st.floats(0, 1, exclude_max=True)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
data = st.builds(
    Data,
    source=names,
    split=names,
    held_out=st.floats(0.001, 0.9),
    max_faulty=shares,
    packed=st.booleans(),
    assistant_only=st.booleans(),
    chat_template=st.none() | names,
)


@st.composite
def recipes(draw):
    """Any sound recipe."""
    length = draw(
        st.fixed_dictionaries({"steps": st.integers(100, 10**6)}) | st.fixed_dictionaries({"epochs": positive})
    )
    return draw(
        st.builds(
            Recipe,
            model=names,
            data=data,
            plan=st.just("auto") | names,
            seq_len=st.none() | counts,
            batch=st.none() | counts,
            lr=positive,
            schedule=st.sampled_from(KINDS),
            warm_up_steps=st.integers(0, 50),
            decay_share=st.floats(0.001, 0.5),
            weight_decay=st.floats(0, allow_infinity=False),
            betas=st.tuples(shares, shares),
            eps=positive,
            clip_norm=st.none() | positive,
            seed=st.integers(0, 2**63),
            evaluate_every=st.none() | counts,
            save_every=st.none() | counts,
            keep=counts,
            log=st.none() | names,
            report=st.lists(st.sampled_from(REPORTS), unique=True).map(tuple),
            output=names,
            device=st.none() | names,
            nvme_dir=st.none() | names,
            trust_remote_code=st.booleans(),
            **{name: st.just(value) for name, value in length.items()},
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def put(folder, fields):
    path = folder / "recipe.yaml"
    path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields))
    return path


@given(recipes())
@settings(max_examples=100, deadline=None)
def test_any_recipe_reads_back(folder, recipe):
    assert read_recipe(write_recipe(folder / "any.yaml", recipe, heading=["For me", "today"])) == recipe


def test_what_is_not_given_has_its_default(tmp_path):
    assert read_recipe(put(tmp_path, GOOD)) == RECIPE


def test_numbers_as_people_write_them(tmp_path):
    """YAML takes 1e-5 for text."""
    recipe = read_recipe(put(tmp_path, "model: m\ndata: {source: d}\nlr: 1e-5\nepochs: 3\nbetas: [0.9, 0.95]\n"))
    assert (recipe.lr, recipe.epochs, recipe.betas) == (1e-5, 3.0, (0.9, 0.95))


def test_every_field_has_its_meaning_above_it():
    said = re.sub(r"\n *# +", " ", recipe_text(RECIPE))
    for cls in (Recipe, Data):
        docs = field_docs(cls)
        assert set(docs) == {field.name for field in dataclasses.fields(cls)}
        for name, meaning in docs.items():
            assert re.search(rf"{re.escape(meaning)}\n *{name}:", said), name
    assert max(map(len, recipe_text(RECIPE).splitlines())) <= 100


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"learning_rate": 1}, "learning_rate is not a known field"),
        ({"warmup_steps": 1}, "warmup_steps is not a known field; did you mean warm_up_steps?"),
        ({"data": {"source": "x", "heldout": 0.1}}, "data.heldout is not a known field; did you mean held_out?"),
        ({"data": "rows.jsonl"}, "data is 'rows.jsonl'; expected fields: source, split"),
        ({"data": {}}, "data.source is missing"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; allowed: 'constant', 'linear', 'cosine' or 'wsd'"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"betas": [0.9]}, "betas.1 is missing"),
        ({"lr": math.inf}, "finite"),
    ],
)
def test_what_is_no_recipe(tmp_path, change, part):
    path = put(tmp_path, GOOD | change)
    with pytest.raises(BadFile) as caught:
        read_recipe(path)
    assert all(line.startswith(f"{path}: ") for line in caught.value.message.splitlines())
    assert part in caught.value.message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": " "}, "model is empty"),
        ({"data.source": ""}, "data.source is empty"),
        ({"data.chat_template": ""}, "data.chat_template is empty"),
        ({"plan": ""}, "plan is empty"),
        ({"output": ""}, "output is empty"),
        ({"data.held_out": 1.0}, "data.held_out must be from 0 to less than 1, not 1.0"),
        ({"data.max_faulty": -0.1}, "data.max_faulty must be"),
        ({"betas": (0.9, 1.0)}, "betas.1 must be from 0 to less than 1"),
        ({"betas": (math.nan, 0.9)}, "betas.0 must be"),
        ({"seq_len": 0}, "seq_len must be at least 1, not 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"warm_up_steps": -1}, "warm_up_steps must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"epochs": 0.0}, "epochs must be a number above 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"evaluate_every": 0, "data.held_out": 0.1}, "evaluate_every must be at least 1"),
        ({"evaluate_every": 10}, "give data.held_out a share"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"lr": 0.0}, "lr must be a number above 0"),
        ({"lr": math.inf}, "lr must be a number above 0"),
        ({"eps": 0.0}, "eps must be a number above 0"),
        ({"clip_norm": -1.0}, "clip_norm must be a number above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a number of at least 0"),
        ({"decay_share": 0.0}, "decay_share must be above 0"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; allowed: constant, linear, cosine, wsd"),
        ({"steps": 5, "epochs": 1.0}, "either steps or epochs"),
        ({"steps": None, "epochs": None}, "either steps or epochs"),
        ({"warm_up_steps": 101}, "warm_up_steps (101) exceeds the 100 steps"),
        ({"schedule": "wsd", "warm_up_steps": 90}, "exceed the 100 steps of training"),
    ],
)
def test_one_fault_is_one_sentence(changes, part):
    (fault,) = problems(changed(RECIPE, changes))
    assert part in fault


def test_every_fault_is_named_at_once(tmp_path):
    path = put(tmp_path, GOOD | {"lr": 0, "keep": 0, "epochs": 2, "data": {"source": "x", "held_out": 2}})
    with pytest.raises(BadFile) as caught:
        read_recipe(path)
    lines = caught.value.message.splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{path}: ") for line in lines)


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(BadFile, match="No such file or directory"):
        write_recipe(tmp_path / "missing" / "recipe.yaml", RECIPE)


def test_changes_by_field():
    recipe = changed(RECIPE, {"lr": 2e-5, "data.packed": False})
    assert recipe == dataclasses.replace(RECIPE, lr=2e-5, data=Data(source="rows.jsonl", packed=False))


def test_steps_take_the_place_of_epochs_and_the_other_way_round():
    by_epochs = changed(RECIPE, {"epochs": 2.0})
    assert (by_epochs.steps, by_epochs.epochs) == (None, 2.0)
    assert changed(by_epochs, {"steps": 100}) == RECIPE


@pytest.mark.parametrize(("epochs", "steps"), [(1, 30), (2.5, 75), (0.1, 3), (0.001, 1)])
def test_epochs_become_steps(epochs, steps):
    assert total_steps(changed(RECIPE, {"epochs": epochs}), 30) == steps


def test_a_schedule_too_long_for_its_epochs_is_refused_when_they_are_known():
    recipe = changed(RECIPE, {"epochs": 1.0, "warm_up_steps": 31})
    assert not problems(recipe)
    assert total_steps(recipe, 31) == 31
    with pytest.raises(SlidetuneError, match=r"warm_up_steps \(31\) exceeds the 30 steps"):
        total_steps(recipe, 30)


def test_the_schedule_is_the_recipes():
    recipe = changed(RECIPE, {"warm_up_steps": 10, "schedule": "wsd", "decay_share": 0.5})
    assert [lr_factor(recipe, step, 100) for step in (5, 10, 51)] == [0.5, 1.0, 1.0]
    assert lr_factor(recipe, 100, 100) < 0.02


def test_the_start_says_the_effective_batch():
    plan = Plan(model="m", seq_len=1024, micro_batch=24, accumulation=2)
    recipe = changed(RECIPE, {"epochs": 2.0})
    assert batch_text(recipe, plan, 1500) == (
        "48 sequences a step (micro_batch 24 x accumulation 2), 49,152 tokens a step, 1,500 steps an epoch, "
        "3,000 steps in all"
    )
    assert "up to 49,152 tokens" in batch_text(changed(recipe, {"data.packed": False}), plan, 1500)


def test_a_plan_gets_the_recipes_clipping_or_keeps_its_own():
    plan = Plan(model="m", update="forward", clip_norm=2.0)
    assert plan_to_follow(RECIPE, plan) == plan
    assert plan_to_follow(changed(RECIPE, {"clip_norm": 1.0}), plan).clip_norm == 1.0
    same = changed(RECIPE, {"seq_len": plan.seq_len, "batch": plan.batch})
    assert plan_to_follow(same, plan) == plan


def test_a_recipe_and_a_plan_that_disagree():
    recipe = changed(RECIPE, {"plan": "plan.yaml", "seq_len": 512, "batch": 3, "clip_norm": 1.0})
    with pytest.raises(SlidetuneError) as caught:
        plan_to_follow(recipe, Plan(model="m", micro_batch=2, accumulation=2))
    message = caught.value.message
    for part in ("plan.yaml", "seq_len is 512", "the plan's is 4, micro_batch 2 x accumulation 2", "update: backward"):
        assert part in message
