"""Text, rows of JSON and random tokens become batches; files that can't say which row is at fault."""

from __future__ import annotations

import json
from itertools import islice

import pytest

torch = pytest.importorskip("torch")

from slidetune.errors import BadFile
from slidetune.plans import Plan
from slidetune.runtime.data import as_bytes, read_samples, synthetic

PLAN = Plan(model="any", seq_len=4, micro_batch=2, accumulation=1)


def read(path, **options):
    return read_samples(path, as_bytes, 4, **({"vocab_size": 256} | options))


def put(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_text_is_one_stream(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("abcdefghij")
    samples = read(path)
    assert samples.input_ids.tolist() == [list(b"abcd"), list(b"efgh")]
    assert samples.labels is samples.input_ids
    assert samples.attention_mask is None


def test_rows_of_text_are_one_stream_too(tmp_path):
    samples = read(put(tmp_path, {"text": "abc"}, "", {"text": "de"}, {"text": "f"}), end=0)
    assert samples.input_ids.tolist() == [[*b"abc", 0], [*b"de", 0, *b"f"]]


def test_a_prompt_gets_no_loss(tmp_path):
    samples = read(put(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "abc", "completion": "defg"}), end=9)
    assert samples.input_ids.tolist() == [[*b"ab", 9, 0], [*b"abcd"]]
    assert samples.labels.tolist() == [[-100, *b"b", 9, -100], [-100, -100, -100, *b"d"]]
    assert samples.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_ids_are_taken_as_they_are(tmp_path):
    samples = read(put(tmp_path, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4]}))
    assert samples.input_ids.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
    assert samples.labels.tolist() == [[-100, 2, 3, -100], [4, -100, -100, -100]]


def test_every_sequence_once_a_round(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("".join(chr(ord("a") + i) * 4 for i in range(5)))
    seen = [tuple(batch["input_ids"][:, 0].tolist()) for batch in islice(read(path).batches(PLAN, seed=1), 5)]
    first = [token for pair in seen for token in pair]
    assert sorted(first[:5]) == sorted(first[5:]) == list(b"abcde")
    assert first[:5] != first[5:]
    again = [tuple(batch["input_ids"][:, 0].tolist()) for batch in islice(read(path).batches(PLAN, seed=1), 5)]
    assert seen == again


def test_synthetic_tokens():
    first, second = islice(synthetic(7, PLAN, seed=3), 2)
    assert first["input_ids"].shape == (2, 4)
    assert int(first["input_ids"].max()) < 7
    assert not torch.equal(first["input_ids"], second["input_ids"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"  \n ", "empty"),
        (b"abc", "3 tokens are too few for one sequence of 4"),
        (b"abc\xff", r"not UTF-8 \(byte 3\)"),
    ],
)
def test_files_that_can_not_be_used(content, message, tmp_path):
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadFile, match=message):
        read(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "row 2 is not JSON"),
        ("[1]", "row 2 is no object"),
        ({"words": "a"}, "row 2 has no text"),
        ({"text": ""}, "row 2 has an empty text"),
        ({"input_ids": [1, 256]}, "row 2 has 256 in its input_ids"),
        ({"input_ids": [1, "a"]}, "row 2 has 'a' in its input_ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "row 2 has labels that are not as many"),
        ({"input_ids": [1], "labels": [-7]}, "row 2 has -7 in its labels"),
    ],
)
def test_malformed_rows_are_named(row, message, tmp_path):
    with pytest.raises(BadFile, match=message):
        read(put(tmp_path, {"text": "fine"}, row, {"text": "fine"}))


def test_many_malformed_rows(tmp_path):
    with pytest.raises(BadFile, match=r"row 1 .*row 10 .*and 5 rows more"):
        read(put(tmp_path, *["{"] * 15))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_row_ends_at_newlines_only(separator, tmp_path):
    row = json.dumps({"text": f"a{separator}b"}, ensure_ascii=False)
    path = tmp_path / "data.jsonl"
    path.write_bytes(f"{row}\r\n{row}\n".encode())
    both = list(f"a{separator}b".encode() * 2)
    assert read(path).input_ids.flatten().tolist() == both[: len(both) // 4 * 4]


def test_rows_that_are_cut_off_are_counted(tmp_path):
    rows = ({"input_ids": [1, 2, 3, 4]}, {"prompt": "ab", "completion": "cdef"}, {"text": "abcdefgh"})
    assert read(put(tmp_path, *rows)).truncated == 2
    assert read(put(tmp_path, *rows[:1])).truncated == 0


def test_rows_with_nothing_left_to_learn_are_named(tmp_path):
    long = {"prompt": "abcd", "completion": "e"}
    with pytest.raises(BadFile, match="row 2 has 5 tokens, and none to learn in its first 4; row 4 has") as caught:
        read(put(tmp_path, {"prompt": "abc", "completion": "de"}, long, "", long))
    assert "--seq-len" in caught.value.hint
    with pytest.raises(BadFile, match=r"row 11 .*and 2 rows more"):
        read(put(tmp_path, {"input_ids": [1]}, *[long] * 12))
