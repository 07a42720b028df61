"""Rows come with their places, from every kind of source; what is no row is a fault with one."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from slidetune.errors import BadFile, SlidetuneError
from slidetune.runtime.data import reading
from slidetune.runtime.data.reading import Fault, Row, read_rows


def read(path):
    """(place's number, fields) of rows, (number, what) of faults."""
    return [(r.place.number, r.what if isinstance(r, Fault) else r.fields) for r in read_rows(path)]


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines(tmp_path):
    path = put(
        tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\n[1]\n{"text": "\xff"}\n{"te\n{"text": "b\xe2\x80\xa8"}'
    )
    rows = read(path)
    assert [rows[0], rows[1], rows[-1]] == [(1, {"text": "a"}), (3, "is no object"), (6, {"text": "b\u2028"})]
    assert rows[2] == (4, "is not UTF-8 (byte 11 of the line)")
    assert rows[3][0] == 5
    assert rows[3][1].startswith("is not JSON (")
    assert str(next(iter(read_rows(path))).place) == f"{path} line 1"


def test_deep_json_is_a_fault(tmp_path):
    ((number, what),) = read(put(tmp_path / "a.jsonl", "[" * 500_000))
    assert number == 1
    assert "JSON" in what


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_no_rows(content, suffix, tmp_path):
    assert read(put(tmp_path / f"a{suffix}", content)) == []


def test_a_list_of_json_has_lines_too(tmp_path):
    text = '\n[\n  {"text": "a]"}, {"text": "b"},\n\n  {"text":\n "c"}, 4\n]\n'
    rows = [(3, {"text": "a]"}), (3, {"text": "b"}), (5, {"text": "c"}), (6, "is no object")]
    assert read(put(tmp_path / "a.json", text)) == rows
    assert read(put(tmp_path / "b.json", "[]")) == []


def test_json_may_be_lines(tmp_path):
    first, (number, what) = read(put(tmp_path / "a.json", '{"text": "a"}\n{"\n'))
    assert first == (1, {"text": "a"})
    assert number == 2
    assert what.startswith("is not JSON")


@pytest.mark.parametrize("text", ['{\n"data": [{"text": "a"}]\n}', '[{"text": "a"}', '[{"text": "a"} {"text": "b"}]'])
def test_json_that_is_neither(text, tmp_path):
    with pytest.raises(BadFile, match="line 1") as caught:
        read(put(tmp_path / "a.json", text))
    assert "jq" in caught.value.hint


def test_text(tmp_path):
    (row,) = read_rows(put(tmp_path / "a.txt", "one\n\ntwo"))
    assert row == Row(row.place, {"text": "one\n\ntwo"}, whole_file=True)
    assert read(put(tmp_path / "b.txt", b"a\n\xff")) == [(2, "is not UTF-8 (byte 2 of the file)")]


def test_a_directory(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "sub/a.TXT", ".hidden/c.txt", ".d.txt", "README.md"):
        put(tmp_path / name, name)
    assert [row.fields["text"] for row in read_rows(tmp_path)] == ["b.txt", "sub/a.TXT"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFile, match="no data in this directory"):
        read_rows(tmp_path / "empty")


@pytest.mark.parametrize("name", ["none.jsonl", "./none", "a b", "none/of/it"])
def test_what_is_not_there(name):
    with pytest.raises(BadFile, match="no such file or directory") as caught:
        read_rows(name)
    assert ".parquet" in caught.value.hint


def test_a_file_of_another_kind(tmp_path):
    with pytest.raises(BadFile, match="what kind of file"):
        read_rows(put(tmp_path / "a.csv", "a"))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None], "input_ids": [[1, 2], []]}), path, row_group_size=1)
    assert read(path) == [(1, {"text": "a", "input_ids": [1, 2]}), (2, {"text": None, "input_ids": []})]
    assert "row 1" in str(next(iter(read_rows(path))).place)
    with pytest.raises(BadFile, match="not a Parquet file that can be read"):
        read(put(tmp_path / "b.parquet", "abc"))


@pytest.mark.parametrize(("source", "library"), [("a.parquet", "pyarrow"), ("owner/name", "datasets")])
def test_a_library_that_is_missing(source, library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.parquet", "abc")
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SlidetuneError, match=f"needs {library}") as caught:
        read(source)
    assert "slidetune[data]" in caught.value.hint


def test_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = list(read_rows("owner/name", split="test", config="main"))
    assert asked == [("owner/name", "main", "test")]
    assert [str(row.place) for row in rows] == ["owner/name row 1", "owner/name row 2"]


def test_the_hub_has_no_such_dataset(monkeypatch):
    def load_dataset(*_, **__):
        raise FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub.\nmore")

    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(SlidetuneError, match=r"no path here.*doesn't exist on the Hub\)"):
        read_rows("owner/name")


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "split")
    assert read(tmp_path / "one") == [(1, {"text": "a"}), (2, {"text": "b"})]
    assert [row.fields for row in read_rows(tmp_path / "split", split="test")] == [{"text": "b"}]
    with pytest.raises(BadFile, match="no split dev") as caught:
        read_rows(tmp_path / "split", split="dev")
    assert caught.value.hint == "It has train, test."


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = put(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": str(i)}) for i in range(1000)))
    rows = read_rows(path)
    assert next(rows).fields == {"text": "0"}
    with path.open("a") as file:
        file.write('\n{"text": "late"}')
    assert list(rows)[-1].fields == {"text": "late"}
