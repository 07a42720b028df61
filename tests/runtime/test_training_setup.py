"""From a recipe to model, tokens, data and trainer: what is taken, what is refused and with which words."""

from __future__ import annotations

import dataclasses
import types

import pytest

torch = pytest.importorskip("torch")
import huggingface_hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import slidetune
from slidetune.errors import BadFile, SlidetuneError
from slidetune.runtime.checkpoint import export
from slidetune.runtime.data import byte_tokens, tokens_of
from slidetune.runtime.training import setup
from slidetune.runtime.training.pretrained import model_directory, tokens_for

from .small_training import put_model, put_rows, small_plan, small_recipe

WORDS = ("a", "b", "c", "d", "e", "<", ">", "user", "assistant", "thought", "?")
# As Qwen's and others' do, it leaves out the thoughts of all answers but the last one.
FORGETFUL = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if loop.last and message.role == 'assistant' %}thought {% endif %}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }} "
    "{% endgeneration %}{% else %}{{ message.content }} {% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes what it is asked for and answers what `hub.answer` does."""
    asked = types.SimpleNamespace(calls=[], answer=lambda: "somewhere")

    def snapshot_download(repo_id, **how):
        asked.calls.append((repo_id, how))
        return asked.answer()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def tokenizer(template=None):
    words = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", chat_template=template)


# --- The model


def test_a_directory_is_taken_as_it_is(tmp_path, hub):
    put_model(tmp_path / "model")
    assert model_directory(str(tmp_path / "model")) == tmp_path / "model"
    assert model_directory(str(tmp_path / "model" / "config.json")) == tmp_path / "model"
    assert not hub.calls


@pytest.mark.parametrize(
    ("ref", "asked"),
    [("some-one/a-model.v2", "some-one/a-model.v2"), ("qwen3-0.6b", "Qwen/Qwen3-0.6B"), ("QWEN/qwen3-0.6b", None)],
)
def test_what_the_hub_has_is_fetched_and_never_a_pickle(tmp_path, monkeypatch, hub, ref, asked):
    monkeypatch.chdir(tmp_path)
    assert str(model_directory(ref)) == "somewhere"
    ((repo_id, how),) = hub.calls
    assert repo_id == (asked or "Qwen/Qwen3-0.6B")
    assert "*.safetensors" in how["allow_patterns"]
    assert not {"*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "*"} & set(how["allow_patterns"])


def test_code_is_fetched_only_when_it_is_trusted(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    model_directory("some-one/model", with_code=True)
    assert "*.py" in hub.calls[0][1]["allow_patterns"]


def test_a_hub_out_of_reach_is_said(tmp_path, monkeypatch, hub):
    def fail():
        raise ConnectionError("no route to host.\nand more")

    monkeypatch.chdir(tmp_path)
    hub.answer = fail
    with pytest.raises(SlidetuneError, match=r"some-one/model could not be fetched from the hub \(no route to host\)"):
        model_directory("some-one/model")


@pytest.mark.parametrize("ref", ["./model", "/nowhere/model", "here/model", "model", "a/b/c", "file.txt"])
def test_what_is_meant_as_a_path_is_not_asked_of_the_hub(tmp_path, monkeypatch, hub, ref):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(SlidetuneError, match="there is no such directory"):
        model_directory(ref)
    assert not hub.calls


# --- Tokens


def test_a_tokenizer_if_there_is_one_else_bytes(tmp_path):
    assert tokens_for(tmp_path, 256).text("é") == list("é".encode())
    tokenizer().save_pretrained(tmp_path)
    assert tokens_for(tmp_path, 256).text("b a") == [1, 0]


def test_a_broken_tokenizer_is_said(tmp_path):
    put_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SlidetuneError, match="its tokenizer can't be read"):
        tokens_for(tmp_path, 256)


def test_code_of_a_tokenizer_is_not_run_unless_it_is_trusted(tmp_path):
    put_model(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}')
    with pytest.raises(SlidetuneError, match="Python code that comes with the model, which is not run") as caught:
        tokens_for(tmp_path, 256)
    assert "--trust-remote-code" in caught.value.hint
    assert not ran.exists()
    tokens_for(tmp_path, 256, trust_remote_code=True)
    assert ran.exists()


# --- Data


def with_data(recipe, **changes):
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, held_out=0.0, **changes))


def test_a_template_that_hides_the_turns_says_what_to_do(tmp_path):
    recipe = with_data(small_recipe(tmp_path), source=str(put_rows(tmp_path / "talk.jsonl", [{"messages": TALK}])))
    plan, home, tokens = small_plan(tmp_path), tmp_path / "model", tokens_of(tokenizer(FORGETFUL), 256)
    with pytest.raises(SlidetuneError, match=r"talk.jsonl line 1: the chat template writes") as caught:
        setup.data_for(recipe, plan, home, tokens)
    assert "--chat-template FILE" in caught.value.hint
    assert "--no-assistant-only" in caught.value.hint
    # Either of them helps.
    assert setup.data_for(with_data(recipe, assistant_only=False), plan, home, tokens).report.learned > 2
    (tmp_path / "marked.jinja").write_text(MARKED)
    marked = with_data(recipe, chat_template=str(tmp_path / "marked.jinja"))
    assert setup.data_for(marked, plan, home, tokens).report.learned == 2


@pytest.mark.parametrize("content", [None, b"\xff\xfe{{"])
def test_a_template_that_can_not_be_read(tmp_path, content):
    file = tmp_path / "template.jinja"
    if content is not None:
        file.write_bytes(content)
    recipe = with_data(small_recipe(tmp_path), chat_template=str(file))
    with pytest.raises(BadFile, match="the chat template can't be read"):
        setup.data_for(recipe, small_plan(tmp_path), tmp_path / "model", byte_tokens(256))


def test_the_recipes_template_goes_with_the_model(tmp_path):
    """Also into one that goes on, and over the tokenizer's own."""
    recipe = small_recipe(tmp_path, steps=1, warm_up_steps=0)
    tokenizer(FORGETFUL).save_pretrained(tmp_path / "model")
    put_rows(tmp_path / "talk.jsonl", [{"messages": TALK}] * 4)
    (tmp_path / "marked.jinja").write_text(MARKED)
    recipe = with_data(recipe, source=str(tmp_path / "talk.jsonl"), chat_template=str(tmp_path / "marked.jinja"))
    for steps in (1, 2):
        trained = slidetune.Trainer(dataclasses.replace(recipe, steps=steps)).fit(resume=True)
        assert AutoTokenizer.from_pretrained(trained.model).chat_template == MARKED
        export(trained.checkpoint, tmp_path / "exported")
        assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template == MARKED


def test_a_model_that_can_not_keep_documents_apart_says_so(tmp_path, monkeypatch):
    recipe = with_data(small_recipe(tmp_path))
    monkeypatch.setattr(setup, "why_not_packed", lambda parts: "its layers carry a state along the sequence")
    with pytest.raises(SlidetuneError, match="carry a state along") as caught:
        setup.data_for(recipe, small_plan(tmp_path), tmp_path / "model", byte_tokens(256))
    assert "--no-packed" in caught.value.hint
    padded = setup.data_for(with_data(recipe, packed=False), small_plan(tmp_path), tmp_path / "model", byte_tokens(256))
    assert not padded.train.packed
