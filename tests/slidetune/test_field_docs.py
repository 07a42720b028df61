"""The text under a field is found, for every field that users see."""

import dataclasses

import pytest

from slidetune.field_docs import field_docs
from slidetune.plans import Activations, Plan, Recompute


@dataclasses.dataclass
class Lamp:
    """A lamp."""

    watts: float
    """Power it draws,
    in watts."""
    colour: str = "white"
    on: bool = False
    """Whether it is on."""

    def switch(self):
        """Not a field."""


def test_text_is_on_one_line_and_fields_without_any_are_left_out():
    assert field_docs(Lamp) == {"watts": "Power it draws, in watts.", "on": "Whether it is on."}


@pytest.mark.parametrize("cls", [Plan, Activations, Recompute])
def test_every_knob_is_explained(cls):
    docs = field_docs(cls)
    assert set(docs) == {field.name for field in dataclasses.fields(cls)}
    assert all(text.endswith(".") and len(text) > 15 for text in docs.values())
