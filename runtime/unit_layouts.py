"""Which parameters belong to which unit, in what order, and under which names and hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from slidetune.errors import SlidetuneError
from slidetune.runtime.adam import AdamW
from slidetune.runtime.binding import Parts
from slidetune.runtime.layout import Entry, Layout
from slidetune.runtime.pointing import Target

Rule = Callable[[str, Tensor], AdamW | None]
"""(name, parameter) -> its hyper-parameters, or None to leave it as it is."""


@dataclass(slots=True, kw_only=True)
class UnitLayout:
    """One unit's parameters."""

    owned: Layout
    """What the unit's master holds. Entries are named as in the model's state dict."""
    computed: Layout
    """What must be in a slot to compute: for a tied head, the matrix it doesn't own too."""
    targets: list[Target] = field(default_factory=list)
    """Empty for the embedding, whose rows are gathered."""


def unit_layouts(parts: Parts, rule: Rule) -> list[UnitLayout]:
    """The units' layouts, embedding first, head last."""
    names = {id(p): name for name, p in reversed(list(parts.model.named_parameters(remove_duplicate=False)))}

    def entry(parameter: nn.Parameter) -> Entry:
        name = names[id(parameter)]
        return Entry(name=name, shape=tuple(parameter.shape), hyper=rule(name, parameter))

    tables = [entry(getattr(parts.base, table.name).weight) for table in parts.tables]
    embedding = Layout.in_order(tables)
    if 0 < embedding.trained < embedding.total:
        parts.refuse(f"of its embeddings {', '.join(e.name for e in tables)} some are frozen and some are not")
    units = [UnitLayout(owned=embedding, computed=embedding)]
    for number in range(len(parts.layers)):
        found = parts.layer_parameters(number)
        layout = Layout.packed(entry(p) for _, _, _, p in found)
        places = {e.name: e for e in layout.entries}
        targets = [(module, name, places[names[id(p)]]) for module, name, _, p in found]
        units.append(UnitLayout(owned=layout, computed=layout, targets=targets))
    units.append(_head(parts, entry, names))
    return units


def _head(parts: Parts, entry: Callable[[nn.Parameter], Entry], names: dict[int, str]) -> UnitLayout:
    """The matrix first, then what the head owns beside it; frozen ones last, the matrix last of all."""
    found = parts.head_parameters()
    matrix = entry(parts.head_module.weight)
    own = Layout.packed(entry(p) for _, _, p in found if p is not parts.head_module.weight).entries
    if matrix.hyper is not None:
        computed = Layout.in_order(sorted([matrix, *own], key=lambda e: e.hyper is None))
    else:
        computed = Layout.in_order([*own, matrix])
    places = {e.name: e for e in computed.entries}
    targets = [(module, name, places[names[id(p)]]) for module, name, p in found]
    owned = Layout.in_order(own) if parts.tied else computed
    return UnitLayout(owned=owned, computed=computed, targets=targets)


def frozen_counts(units: list[UnitLayout]) -> list[int]:
    """Frozen parameters a unit. Raises SlidetuneError if there is nothing to train."""
    if not any(unit.owned.trained for unit in units):
        raise SlidetuneError("all parameters are frozen: there is nothing to train.")
    return [unit.owned.total - unit.owned.trained for unit in units]
