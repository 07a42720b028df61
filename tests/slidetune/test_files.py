"""YAML files of dataclasses: what is read, and what people are told about a file that can't be."""

from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slidetune.errors import BadFile
from slidetune.files import dump, json_schema, read, write
from slidetune.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One wheel."""

    radius: float
    """Metres."""
    tyre: Literal["summer", "winter"] = "summer"
    """What is on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cart:
    """A cart."""

    name: str
    wheels: tuple[Wheel, ...]
    spare: Wheel | None = None
    """Carried along."""
    load: int = 0
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        if self.load > 100:
            raise ValueError("load is above 100")


GOOD = {"version": 1, "name": "c", "wheels": [{"radius": 0.5}, {"radius": 1, "tyre": "winter"}]}


def put(tmp_path, data):
    path = tmp_path / "cart.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def message(tmp_path, data):
    path = put(tmp_path, data)
    with pytest.raises(BadFile) as caught:
        read(path, Cart)
    assert str(path) in caught.value.message
    return caught.value.message


def test_reads_nested_dataclasses_with_their_defaults(tmp_path):
    cart = read(put(tmp_path, GOOD), Cart)
    assert cart == Cart(name="c", wheels=(Wheel(radius=0.5), Wheel(radius=1.0, tyre="winter")))
    assert isinstance(cart.wheels, tuple)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"version": 2}, ["version is 2", "reads version 1"]),
        ({"nmae": "c"}, ["nmae is not a known field", "did you mean name?"]),
        ({"zzz": 1}, ["zzz is not a known field", "name, wheels, spare, load, version"]),
        ({"wheels": [{"radius": 1, "tire": "x"}]}, ["wheels.0.tire", "did you mean tyre?"]),
        ({"spare": {"radius": 1, "qq": 0}}, ["spare.qq", "fields here: radius, tyre"]),
        ({"wheels": [{}]}, ["wheels.0.radius is missing"]),
        ({"wheels": [{"radius": "big"}]}, ["wheels.0.radius is 'big'", "valid number"]),
        ({"wheels": [{"radius": float("nan")}]}, ["wheels.0.radius", "finite"]),
        ({"wheels": [{"radius": 1, "tyre": "bald"}]}, ["wheels.0.tyre is 'bald'", "'summer' or 'winter'"]),
        ({"wheels": 3}, ["wheels is 3"]),
        ({"spare": [1]}, ["spare is [1]", "radius, tyre"]),
        ({"name": {"a": 1}}, ["name is a mapping"]),
        ({"load": 101}, ["load is above 100"]),
    ],
)
def test_errors_name_the_field_what_is_there_and_what_is_allowed(tmp_path, change, parts):
    text = message(tmp_path, GOOD | change)
    for part in parts:
        assert part in text


def test_the_misspelt_field_comes_before_the_missing_one(tmp_path):
    lines = message(tmp_path, {"nam": "c", "wheels": []}).splitlines()
    assert "did you mean name?" in lines[0]
    assert "name is missing" in lines[1]


def test_many_errors_are_cut_short(tmp_path):
    lines = message(tmp_path, GOOD | {"wheels": [{}] * 20}).splitlines()
    assert len(lines) == 6
    assert lines[-1].endswith("and 15 more")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("a: [1\n", "not YAML"),
        ("a: 1\nb: 'x\n", "not YAML"),
        ("a: 2024-99-99\n", "not YAML"),
        ("!!python/object:os.system {}\n", "not YAML"),
        ("- 1\n- 2\n", "holds a list"),
        ("just words\n", "holds 'just words'"),
    ],
)
def test_what_is_no_file_of_fields(tmp_path, text, part):
    assert part in message(tmp_path, text)


def test_yaml_errors_name_the_line(tmp_path):
    assert "line 3" in message(tmp_path, "a: 1\nb: 2\nc: d: e\n")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadFile, match="no such file"):
        read(tmp_path / "none.yaml", Cart)
    with pytest.raises(BadFile, match="directory"):
        read(tmp_path, Cart)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(BadFile, match="UTF-8"):
        read(tmp_path / "binary", Cart)


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(BadFile, match="nowhere"):
        write(tmp_path / "nowhere" / "cart.yaml", Cart(name="c", wheels=()))


wheels = st.builds(
    Wheel, radius=st.floats(allow_nan=False, allow_infinity=False), tyre=st.sampled_from(["summer", "winter"])
)
carts = st.builds(
    Cart,
    name=st.text(st.characters(exclude_categories=["Cs"])),
    wheels=st.lists(wheels, max_size=3).map(tuple),
    spare=st.none() | wheels,
    load=st.integers(max_value=100),
)


@given(cart=carts)
def test_anything_written_reads_back(tmp_path_factory, cart):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    write(path, cart)
    assert read(path, Cart) == cart


@given(text=st.text(max_size=200))
def test_any_text_is_a_cart_or_a_bad_file(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadFile):
        read(path, Cart)


def test_dump_drops_none_and_keeps_the_rest():
    plain = dump(Cart(name="c", wheels=(Wheel(radius=1.0),)))
    assert plain == {"name": "c", "wheels": [{"radius": 1.0, "tyre": "summer"}], "load": 0, "version": 1}


def test_schema_describes_fields_by_their_docstrings_also_nested_ones():
    schema = json_schema(Cart)
    assert schema["properties"]["spare"]["description"] == "Carried along."
    assert schema["$defs"]["Wheel"]["properties"]["radius"]["description"] == "Metres."
    assert schema["required"] == ["name", "wheels"]
    assert schema["additionalProperties"] is schema["$defs"]["Wheel"]["additionalProperties"] is False
    assert "Cart" not in schema["$defs"]


def test_schema_of_profiles_describes_every_figure():
    schema = json_schema(HardwareProfile)
    for part in ("Gpu", "Link", "Host", "Nvme"):
        for name, field in schema["$defs"][part]["properties"].items():
            assert field.get("description") or name == "name", (part, name)
