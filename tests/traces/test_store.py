import gzip

import pandas as pd
import pytest

from slidetune.errors import BadFile
from slidetune.trace import to_frame
from slidetune.traces.store import load_trace, save_trace


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_a_trace_comes_back_bit_for_bit(spilled, tmp_path, name):
    frame = to_frame(spilled.trace)
    about = {"plan": {"window": 2, "note": "π # \n ok"}, "machine": "rtx4090", "step_s": spilled.step_s}
    back, metadata = load_trace(save_trace(tmp_path / name, frame, about))
    pd.testing.assert_frame_equal(back, frame, check_exact=True)
    assert metadata == about
    assert metadata["step_s"] == spilled.step_s


def test_the_file_is_plain_text_with_its_header_first(plain, tmp_path):
    lines = save_trace(tmp_path / "t.csv", to_frame(plain.trace)).read_text().splitlines()
    assert lines[0].startswith('# {"slidetune_trace": 1')
    assert lines[1].startswith("step,op,unit,")
    assert len(lines) == 2 + len(plain.trace)


def test_saving_twice_gives_the_same_archive(plain, tmp_path):
    frame = to_frame(plain.trace)
    one, two = (save_trace(tmp_path / name, frame).read_bytes() for name in ("a.csv.gz", "b.csv.gz"))
    assert one == two


def test_an_operation_named_like_a_missing_value_stays_text(plain, tmp_path):
    frame = to_frame([plain.trace[0]._replace(op="NA")])
    assert load_trace(save_trace(tmp_path / "t.csv", frame))[0]["op"].tolist() == ["NA"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"step,op\n1,fetch\n", "not a trace"),
        (b'# {"slidetune_trace": 99}\nstep\n', "99"),
        (b'# {"slidetune_trace": 1}\nstep,op\n1,fetch\n', "columns missing: unit"),
        (b'# {"slidetune_trace": 1}\nstep,op\nx,fetch\n', "not a table of tasks"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path, content, says):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=says) as caught:
        load_trace(path)
    assert str(path) in str(caught.value)


def test_a_broken_archive_is_named(tmp_path):
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(gzip.compress(b"# {}" * 100)[:30])
    with pytest.raises(BadFile, match=r"cut\.csv\.gz"):
        load_trace(path)
