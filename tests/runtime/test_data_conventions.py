"""Each convention of a row becomes the tokens and labels that TRL's users expect."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from slidetune.errors import SlidetuneError
from slidetune.runtime.data.conventions import Conventions, convention_of, unused_fields
from slidetune.runtime.data.tokens import Tokens, as_bytes, byte_tokens, tokens_of

TURNS = (
    "{%% for m in messages %%}{{ '<|start|>' + m.role + '\n' }}%s{{ '\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|start|>assistant\n' }}{%% endif %%}"
)
PLAIN = TURNS % "{{ m.content + '<|end|>' }}"
MARKED = TURNS % (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}"
)
# The mark is around the words alone.
BARE = MARKED.replace(" + '<|end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|end|>' }}")
# As those of reasoning models: thoughts are kept in the last turn only.
FORGETS = TURNS % "{{ ('<think>' if loop.last and m.role == 'assistant' else '') + m.content + '<|end|>' }}"
# The prompt opens a thought that a later turn doesn't have.
OPENS = PLAIN.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello  there"},
    {"role": "assistant", "content": "\n hi"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so soon?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte pairs that join spaces and newlines, with offsets that leave spaces out, as real ones do."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trained.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|start|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["hello there so soon bye assistant user\n\n\n hi brief system"] * 10, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def document(tokenizer):
    def make(fields, template=None, **options):
        tokens = tokens_of(tokenizer, 400)
        return Conventions(tokens, chat_template=template, **options).document(fields, convention_of(fields))

    return make


def learned(tokenizer, document):
    """Text of each stretch of tokens that has a loss."""
    stretches, before = [], False
    for token, label in zip(document.ids, document.labels, strict=True):
        assert label in (token, -100)
        if label != -100:
            stretches = stretches if before else [*stretches, []]
            stretches[-1].append(token)
        before = label != -100
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(
    ("fields", "convention", "unused"),
    [
        ({"text": "a", "source": "b"}, "text", ["source"]),
        ({"text": "a", "prompt": "b", "completion": "c"}, "prompt/completion", ["text"]),
        ({"prompt": "a", "completion": None, "messages": []}, "messages", ["prompt", "completion"]),
        ({"input_ids": [1], "labels": [1], "text": "a"}, "input_ids", ["text"]),
    ],
)
def test_which_convention(fields, convention, unused):
    assert convention_of(fields) == convention
    assert unused_fields(fields, convention) == unused


def test_no_convention():
    with pytest.raises(ValueError, match=r"has no text, .* but conversations, id"):
        convention_of({"conversations": [], "id": 1})


def test_text_of_bytes():
    assert Conventions(byte_tokens(256)).document({"text": "aé"}, "text").ids == list("aé".encode())
    with pytest.raises(SlidetuneError, match="can't hold bytes"):
        byte_tokens(100)


def test_a_document_ends_once(document, tokenizer):
    found = document({"text": "hello"})
    assert tokenizer.decode(found.ids) == "hello</s>"
    assert found.labels is None
    assert document({"text": "hello</s>"}).ids == found.ids


def test_a_document_begins_as_the_model_is_used_to():
    class Beginning:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    conventions = Conventions(tokens_of(Beginning(), 256))
    assert conventions.document({"text": "ab"}, "text").ids == [1, 97, 98, 2]
    both = conventions.document({"prompt": "a", "completion": "b"}, "prompt/completion")
    assert (both.ids, both.labels) == ([1, 97, 98, 2], [-100, -100, 98, 2])


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("hello", " there", " there</s>"),
        ("", "hello", "hello</s>"),
        # One token spans the seam: it is learned.
        ("hello t", "here", " there</s>"),
    ],
)
def test_a_completion_is_learned(prompt, completion, text, document, tokenizer):
    found = document({"prompt": prompt, "completion": completion})
    assert tokenizer.decode(found.ids) == f"{prompt}{completion}</s>"
    assert learned(tokenizer, found) == [text]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_assistants_turns_are_learned(template, document, tokenizer):
    found = document({"messages": CHAT}, template)
    whole = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert tokenizer.decode(found.ids) == whole
    assert [text.strip() for text in learned(tokenizer, found)] == ["hi<|end|>", "so soon?<|end|>"]


@pytest.mark.parametrize("said", ["hi", " hi", "hi  ", "  ", "hi\n    bye", "hi \U0001f600", ""])
def test_marked_words_are_learned_to_their_edges(said, document, tokenizer):
    chat = [*CHAT[:2], {"role": "assistant", "content": said}, *CHAT[3:]]
    assert learned(tokenizer, document({"messages": chat}, BARE)) == ([said] if said else []) + ["so soon?"]


def test_marks_need_a_fast_tokenizer(tokenizer):
    class Slow(transformers.PreTrainedTokenizerFast):
        is_fast = False

    conventions = Conventions(tokens_of(Slow(tokenizer_object=tokenizer.backend_tokenizer), 400), chat_template=MARKED)
    with pytest.raises(SlidetuneError, match="not a fast one"):
        conventions.document({"messages": CHAT}, "messages")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("assistant_only", [True, False])
def test_messages_with_half_a_surrogate_pair(template, assistant_only, document):
    broken = [*CHAT[:4], {"role": "assistant", "content": "a\ud800"}]
    with pytest.raises(ValueError, match="half a surrogate pair"):
        document({"messages": broken}, template, assistant_only=assistant_only)


def test_a_prompt_that_later_turns_do_not_keep(document, tokenizer):
    assert [text.strip() for text in learned(tokenizer, document({"messages": CHAT}, OPENS))] == [
        "<|start|>assistant\n\n hi<|end|>",
        "<|start|>assistant\nso soon?<|end|>",
    ]


def test_every_turn_if_asked(document):
    found = document({"messages": CHAT}, FORGETS, assistant_only=False)
    assert found.labels == found.ids


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_last_word_of_the_user_is_not_learned(template, document, tokenizer):
    found = document({"messages": CHAT[:4]}, template)
    assert [text.strip() for text in learned(tokenizer, found)] == ["hi<|end|>"]
    assert learned(tokenizer, document({"messages": CHAT[:2]}, template)) == []


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_completions_of_messages(template, document, tokenizer):
    found = document({"prompt": CHAT[:4], "completion": CHAT[4:]}, template)
    assert found.ids == document({"messages": CHAT}, template).ids
    assert [text.strip() for text in learned(tokenizer, found)] == ["so soon?<|end|>"]


def test_a_template_that_forgets_is_refused(document, tokenizer):
    with pytest.raises(SlidetuneError, match=r"message 3 of 5.*can't be told") as caught:
        document({"messages": CHAT}, FORGETS)
    assert "{% generation %}" in caught.value.hint
    assert learned(tokenizer, document({"messages": CHAT[1:3]}, FORGETS))[0].strip() == "<think>\n hi<|end|>"


@pytest.mark.parametrize("assistant_only", [True, False])
def test_a_template_that_is_not_jinja_is_no_fault_of_the_row(assistant_only, document):
    with pytest.raises(SlidetuneError, match=r"the chat template is not Jinja: .* \(line 2 of it\)"):
        document({"messages": CHAT}, "{% if messages %}\n{{ messages }", assistant_only=assistant_only)


def test_content_in_parts_and_empty_fields_of_parquet(document):
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "hi", "tool_calls": None},
    ]
    template = PLAIN.replace("m.content +", "m.content + ('!' if m.tool_calls is defined else '') +")
    plain = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]
    assert document({"messages": parts}, template).ids == document({"messages": plain}, PLAIN).ids


def test_tools(document):
    template = "{{ tools[0].name if tools else '' }}" + PLAIN
    assert (
        document({"messages": CHAT, "tools": '[{"name": "clock"}]'}, template).ids
        == document({"messages": CHAT, "tools": [{"name": "clock", "more": None}]}, template).ids
        != document({"messages": CHAT}, template).ids
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ""}, "an empty text"),
        ({"text": 3}, "a text that is no text"),
        ({"text": "a\ud800"}, "half a surrogate pair"),
        ({"prompt": "a", "completion": ""}, "an empty completion"),
        ({"prompt": [], "completion": "a"}, "a prompt that is no text"),
        ({"input_ids": []}, "an empty input_ids"),
        ({"input_ids": [400]}, "400 in its input_ids"),
        ({"input_ids": "1"}, "no list"),
        ({"input_ids": [1], "labels": [1, 2]}, "labels that are not as many"),
        ({"input_ids": [1], "labels": [-7]}, "-7 in its labels"),
        ({"messages": []}, "an empty one"),
        ({"messages": "a"}, "no list"),
        ({"messages": ["a"]}, "no object with a role"),
        ({"messages": [{"role": "user"}]}, "without a content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "other than text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"its chat template refuses \(no tools here\)"),
        ({"messages": CHAT, "tools": "{"}, "tools that are no list and no JSON"),
    ],
)
def test_rows_that_can_not_be_used(fields, message, document):
    template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + PLAIN
    with pytest.raises(ValueError, match=message):
        document(fields, template)


@pytest.mark.parametrize("has", [True, False])
def test_messages_need_a_template(has, tokenizer):
    tokens = tokens_of(tokenizer, 400) if has else byte_tokens(256)
    with pytest.raises(SlidetuneError, match="no chat template" if has else "no tokenizer") as caught:
        Conventions(tokens).document({"messages": CHAT}, "messages")
    assert "instruct" in caught.value.hint


def test_long_texts_are_encoded_in_parts(monkeypatch):
    monkeypatch.setattr("slidetune.runtime.data.tokens._AT_ONCE", 10)
    parts = []

    def encode(text):
        parts.append(text)
        return as_bytes(text)

    text = "one line\nand\n\n  another\nend" * 3
    assert Tokens(encode=encode, vocab_size=256).text(text) == list(text.encode())
    assert len(parts) > 3
    assert all(part[:1].strip() for part in parts)
