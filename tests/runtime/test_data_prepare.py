"""From files to batches: what is counted, what is said, what stops a run before it begins."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.errors import BadFile, SlidetuneError
from slidetune.runtime.data import Batches, byte_tokens, prepare
from slidetune.runtime.data.documents import Documents
from slidetune.runtime.data.tokens import Tokens, as_bytes

BYTES = byte_tokens(256)
ENDED = Tokens(encode=as_bytes, vocab_size=257, end=256)


def put(folder, *rows, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def ready(path, tokens=BYTES, **options):
    return prepare(path, tokens, **({"seq_len": 8, "batch": 2} | options))


def documents(batches, epoch=0):
    """Ids of each document of an epoch; padding, which has no labels, left out."""
    found = []
    for batch in batches.epoch(epoch):
        for row in range(batch["input_ids"].shape[0]):
            ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
            where = batch["position_ids"][row].tolist() if batches.packed else list(range(len(ids)))
            for at, token in enumerate(ids):
                if where[at] == 0:
                    # No label points across documents.
                    assert labels[at] == -100
                    found.append([])
                found[-1].append((token, labels[at]))
    learned = [part for part in found if any(label != -100 for _, label in part)]
    return [[token for token, _ in part if token] for part in learned]


TEXTS = st.lists(st.text(st.characters(min_codepoint=1, max_codepoint=127), min_size=1, max_size=40), min_size=1)


@settings(deadline=None)
@given(TEXTS.filter(lambda texts: any(len(text) > 1 for text in texts)), st.booleans(), st.integers(0, 9))
def test_every_token_once_an_epoch(tmp_path_factory, texts, packed, seed):
    path = put(tmp_path_factory.mktemp("data"), *[{"text": text} for text in texts])
    data = ready(path, packed=packed, seed=seed)
    expected = sorted(token for text in texts if len(text) > 1 for token in text.encode())
    for epoch in (0, 1):
        found = documents(data.train, epoch)
        assert sorted(token for ids in found for token in ids) == expected
        assert all(len(ids) <= 8 for ids in found)
        # Each is a stretch of one text.
        assert all(any(bytes(ids) in text.encode() for text in texts) for ids in found)
    report = data.report
    assert report.tokens == data.train.tokens == len(expected)
    assert report.learned == sum(int((batch["labels"] != -100).sum()) for batch in data.train.epoch())
    assert report.dropped == sum(len(text) == 1 for text in texts)
    assert report.cut == sum(len(text) > 8 for text in texts)


@settings(deadline=None, max_examples=20)
@given(st.sets(st.text("abcdef", min_size=2, max_size=8), min_size=40, max_size=60), st.integers(0, 5), st.booleans())
def test_the_split_is_disjoint_and_all(tmp_path_factory, texts, seed, packed):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": text} for text in sorted(texts)]
    # Each twice: equal documents are on one side.
    options = {"held_out": 0.5, "seed": seed, "packed": packed}
    data = ready(put(folder, *rows, *rows), **options)
    train, held = ({bytes(ids).decode() for ids in documents(side)} for side in (data.train, data.held_out))
    assert not train & held
    assert train | held == texts
    # Stable, whatever comes before and after.
    more = ready(put(folder, {"text": "zzzz"}, *reversed(rows)), **options)
    assert held - {"zzzz"} == {bytes(ids).decode() for ids in documents(more.held_out)} - {"zzzz"}


def test_all_conventions_in_one_directory(tmp_path):
    put(tmp_path, {"text": "abc", "id": 1}, {"prompt": "ab", "completion": "c"}, name="a.jsonl")
    put(tmp_path, json.dumps([{"input_ids": [1, 2], "labels": [-100, 2]}]), name="b.json")
    put(tmp_path, "some words", name="c.txt")
    data = ready(tmp_path, ENDED)
    assert sorted(documents(data.train)) == sorted(
        [[*b"abc", 256], [*b"abc", 256], [1, 2], [*b"some wor"], [*b"ds", 256]]
    )
    assert data.report.lines() == [
        f"{tmp_path}: 4 rows (2 of text, 1 of prompt/completion, 1 of input_ids).",
        "Not used: id.",
        "1 of 4 rows have more than 8 tokens: cut into pieces, all kept.",
        "An epoch: 21 tokens, 15 with a loss; 5 documents, packed into 3 sequences, 88% full.",
    ]


def test_what_is_cut_off_and_dropped_is_counted(tmp_path):
    rows = [
        {"prompt": "abcd", "completion": "efghij"},
        {"prompt": "abcdefgh", "completion": "ij"},
        {"input_ids": [1, 2], "labels": [1, -100]},
    ]
    report = ready(put(tmp_path, *rows), packed=False).report
    assert (report.truncated, report.dropped, report.pieces) == (1, 2, 1)
    assert report.lines()[1:] == [
        "1 of 3 rows have more than 8 tokens: their ends are cut off.",
        "2 of 3 rows are dropped: nothing to learn is left in them.",
        "An epoch: 8 tokens, 4 with a loss; 1 documents, a sequence each.",
    ]
    with pytest.raises(BadFile, match="nothing to learn is left in any of 2 rows") as caught:
        ready(put(tmp_path, *rows[1:]))
    assert "--seq-len" in caught.value.hint


def test_faults_are_counted_and_shown_with_their_lines(tmp_path):
    good = [{"text": f"text {n}"} for n in range(8)]
    path = put(tmp_path, *good, "{", {"words": "a"})
    report = ready(path, max_faulty=0.2).report
    assert (report.rows, report.faulty) == (10, 2)
    said = report.lines()[1]
    assert said.startswith(f"2 of 10 rows can't be used: {path} line 9 is not JSON (")
    assert said.endswith(
        f"{path} line 10 has no text, no prompt and completion, no messages and no input_ids, but words."
    )
    with pytest.raises(
        BadFile, match=r"2 of 10 rows can't be used, where 0.19 of them may be: .*line 9 is not"
    ) as caught:
        ready(path, max_faulty=0.19)
    assert "allow a larger share: max_faulty (--max-faulty)" in caught.value.hint


def test_many_faults(tmp_path):
    with pytest.raises(BadFile, match=r"line 1 .*line 10 .*and 5 more\."):
        ready(put(tmp_path, *["{"] * 15), max_faulty=0.99)


def test_a_row_that_no_other_could_be_is_named(tmp_path):
    path = put(tmp_path, {"text": "a"}, {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(SlidetuneError, match=r"data.jsonl line 2: rows of messages need a chat template"):
        ready(path)


@pytest.mark.parametrize("name", ["held_out", "max_faulty"])
@pytest.mark.parametrize("share", [-0.1, 1, float("nan")])
def test_shares(name, share, tmp_path):
    with pytest.raises(SlidetuneError, match=f"{name} must be a share"):
        ready(put(tmp_path, {"text": "ab"}), **{name: share})


def test_nothing_there(tmp_path):
    with pytest.raises(BadFile, match="it has no rows"):
        ready(put(tmp_path))


@pytest.mark.parametrize(("share", "what"), [(0.0001, "hold out"), (0.9999, "train on")])
def test_a_side_without_documents(share, what, tmp_path):
    with pytest.raises(BadFile, match=f"leaves none to {what}"):
        ready(put(tmp_path, {"text": "ab"}), held_out=share)


def test_a_book_is_split_by_its_pieces(tmp_path):
    data = ready(put(tmp_path, "".join(map(chr, range(33, 127))) * 4, name="book.txt"), held_out=0.3)
    assert isinstance(data.held_out, Batches)
    assert data.report.held_out + data.report.pieces == 47
    assert 5 < data.report.held_out < 25
    assert "are held out" in " ".join(data.report.lines())


def test_a_position_is_of_its_data_and_settings(tmp_path):
    path = put(tmp_path, {"text": "abc"}, {"text": "defg"})
    position = ready(path).train.position()
    ready(path).train.restore(position)
    changes = ({"seq_len": 9}, {"batch": 1}, {"packed": False}, {"seed": 1}, {"tokens": ENDED})
    others = [ready(path, **change) for change in changes]
    others.append(ready(put(tmp_path, {"text": "abc"}, {"text": "defh"})))
    for other in others:
        with pytest.raises(SlidetuneError, match="other data"):
            other.train.restore(position)


def test_no_room_for_tokens(tmp_path):
    with pytest.raises(BadFile, match="tokens can't be written there") as caught:
        Documents(tmp_path / "none")
    assert "8 bytes a token" in caught.value.hint


def test_parquet_is_as_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "d", "completion": "e"}]
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    lines, table = ready(put(tmp_path, *rows)).train, ready(path).train
    assert lines.position() == table.position()
    assert documents(lines) == documents(table)
