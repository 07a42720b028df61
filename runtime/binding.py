"""A Hugging Face decoder-only model taken apart at its own seams, with nothing of it written anew.

Embedding, layers and head stay transformers' modules. What each layer is called with (masks, rotary embeddings,
position ids) is recorded by running the model's own forward with recorders in the layers' places; what comes before
the first layer and after the last is run by the model's own forward too, with everything else stubbed out.

A stubbed forward runs on a *clone*: a shallow copy of the module with children of its own, so that threads of
different lanes don't see each other's stubs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from slidetune.errors import SlidetuneError
from slidetune.model import ModelSpec

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a layer after the hidden states, and its keyword arguments."""


def clone_module(module: nn.Module, **children: nn.Module | None) -> nn.Module:
    """A copy that shares everything with `module` but the children named."""
    twin = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[kind] = dict(getattr(module, kind))
    twin._modules.update(children)
    return twin


@dataclass(frozen=True, slots=True)
class Table:
    """An embedding whose rows are gathered on the host."""

    name: str
    """Of the child of the base model."""
    rows: int
    padding_row: int | None
    """A row that gets no gradient."""


class Parts:
    """The parts of a model. Raises SlidetuneError, naming what is in the way, for a model of another structure."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self.model = model
        self.base = getattr(model, model.base_model_prefix, None)
        if self.base is None or self.base is model or model.get_output_embeddings() is None:
            self.refuse("it is no language model with a head on a base model")
        if getattr(model.config, "output_router_logits", False):
            self.refuse("output_router_logits adds a loss that needs every layer's router at once; set it to false")
        self.layers_name, self.layers = self._find_layers(len(spec.layers))
        self.head_module = model.get_output_embeddings()
        self.tied = self.head_module.weight is self.base.get_input_embeddings().weight
        if self.tied != spec.tied:
            self.refuse(f"its head is {'' if self.tied else 'not '}tied, its config says otherwise")
        self.tables = self._find_tables()
        self.tail = self._find_tail()
        if len(self.tail) > 1:
            self.refuse(f"between its last layer and its head are {' and '.join(self.tail)}, where one norm may be")
        self._check_sizes(spec)

    # ---- structure ----------------------------------------------------------------------------------------

    def refuse(self, why: str) -> NoReturn:
        """Raise SlidetuneError: this model can't be trained here, because of `why`."""
        raise SlidetuneError(f"{type(self.model).__name__} cannot be trained by sliding: {why}.")

    def _find_layers(self, count: int) -> tuple[str, nn.ModuleList]:
        found = [(n, c) for n, c in self.base.named_children() if isinstance(c, nn.ModuleList) and len(c) == count]
        if len(found) != 1:
            self.refuse(f"its base model has {len(found)} lists of {count} layers, where one is needed")
        return found[0]

    def _find_tables(self) -> list[Table]:
        tokens = self.base.get_input_embeddings()
        children = {n: c for n, c in self.base.named_children() if isinstance(c, nn.Embedding)}
        first = next((n for n, c in children.items() if c is tokens), None)
        if first is None:
            self.refuse("its token embedding is no direct child of the base model")
        tables = []
        for name in (first, *(n for n in children if n != first)):
            module = children[name]
            if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
                self.refuse(f"its embedding {name} uses max_norm, sparse or scale_grad_by_freq")
            if module.embedding_dim != tokens.embedding_dim:
                self.refuse(f"its embedding {name} is not as wide as the token embedding")
            tables.append(Table(name, module.num_embeddings, module.padding_idx))
        return tables

    def _find_tail(self) -> list[str]:
        """Children of the base model that run after the last layer, found by running it with stubs around them."""
        width = self.base.get_input_embeddings().embedding_dim
        last = _Recorder(self.layers[-1])
        layers = [_Identity() for _ in self.layers[:-1]] + [last]
        probes = {
            name: _Probe(child, last)
            for name, child in self.base.named_children()
            if name != self.layers_name and name not in {t.name for t in self.tables}
        }
        asked = {t.name: _AskedIds(width) for t in self.tables}
        base = clone_module(self.base, **asked, **probes, **{self.layers_name: nn.ModuleList(layers)})
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            base(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        tail = [name for name, probe in probes.items() if probe.after_layers]
        loose = [
            n
            for n, c in self.base.named_children()
            if n in probes and n not in tail and any(True for _ in c.parameters())
        ]
        if loose:
            self.refuse(f"{', '.join(loose)} has parameters and does not run after the layers")
        return tail

    def _check_sizes(self, spec: ModelSpec) -> None:
        """Every parameter belongs to a unit, and the units are the schedule's."""
        loose = [name for name, _ in self.base.named_parameters(recurse=False)]
        outside = [
            name
            for name, child in self.model.named_children()
            if child not in (self.base, self.head_module) and any(True for _ in child.parameters())
        ]
        if loose or outside:
            self.refuse(f"it has parameters outside embedding, layers and head: {', '.join(loose + outside)}")
        counts = [
            sum(getattr(self.base, t.name).weight.numel() for t in self.tables),
            *(sum(p.numel() for p in layer.parameters()) for layer in self.layers),
            sum(p.numel() for _, _, p in self.head_parameters() if not (self.tied and p is self.head_module.weight)),
        ]
        for unit, count in zip(spec.units, counts, strict=True):
            if unit.owned != count:
                self.refuse(f"unit {unit.index} ({unit.kind}) has {count} parameters, its config says {unit.owned}")

    def head_parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """(module, name in it, parameter) of the head's matrix, its bias and the modules after the last layer."""
        modules = [self.head_module, *(m for name in self.tail for m in getattr(self.base, name).modules())]
        return [(m, name, p) for m in modules for name, p in m.named_parameters(recurse=False)]

    def layer_parameters(self, layer: int) -> list[tuple[nn.Module, str, str, nn.Parameter]]:
        """(module, name in it, name in the layer, parameter)."""
        return [
            (m, name, f"{path}.{name}" if path else name, p)
            for path, m in self.layers[layer].named_modules()
            for name, p in m.named_parameters(recurse=False)
        ]

    # ---- what transformers itself builds ------------------------------------------------------------------

    def record_calls(self, device: torch.device, inputs: Mapping[str, Tensor]) -> tuple[list[Call], list[Tensor]]:
        """What each layer is called with for these inputs, and the ids each embedding table is asked for.

        `inputs` as the model's forward takes them, on `device`; no weights are read.
        """
        width = self.base.get_input_embeddings().embedding_dim
        asked = {t.name: _AskedIds(width) for t in self.tables}
        recorders = [_Recorder(layer) for layer in self.layers]
        # No random number may be drawn here: other lanes draw theirs meanwhile.
        drops = [name for name, child in self.base.named_children() if isinstance(child, nn.Dropout)]
        idle = {name: _Identity() for name in (*self.tail, *drops)}
        base = clone_module(self.base, **asked, **idle, **{self.layers_name: nn.ModuleList(recorders)})
        with torch.no_grad():
            base(**inputs, use_cache=False)
        missed = [i for i, recorder in enumerate(recorders) if recorder.call is None]
        if missed:
            self.refuse(f"its forward pass does not call layer {missed[0]} with the hidden states first")
        ids = []
        for table in self.tables:
            if len(asked[table.name].ids) != 1:
                self.refuse(f"its forward pass uses the embedding {table.name} {len(asked[table.name].ids)} times")
            ids.append(asked[table.name].ids[0])
        return [recorder.call for recorder in recorders], ids

    def prelude(self) -> Callable[[list[Tensor], list[Tensor], Mapping[str, Tensor]], Tensor]:
        """A function (rows of each table, their numbers among those rows, inputs) -> the first layer's input.

        It runs on the host and is differentiable in the rows. One caller at a time.
        """
        stop = _Stop()
        looked_up = {t.name: _Rows(getattr(self.base, t.name)) for t in self.tables}
        # Only layers use rotary embeddings, and theirs are recorded.
        idle = {name: _Nothing() for name, child in self.base.named_children() if "Rotary" in type(child).__name__}
        layers = {self.layers_name: nn.ModuleList([stop] * len(self.layers))}
        base = clone_module(self.base, **looked_up, **idle, **layers)

        def run(rows: list[Tensor], numbers: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
            for module, table, number in zip(looked_up.values(), rows, numbers, strict=True):
                module.table, module.number = table, number
            # Masks are recorded too, and tables are told their rows: the mask would only be worked out again.
            needed = {name: value for name, value in inputs.items() if name != "attention_mask"}
            try:
                base(**needed, use_cache=False)
            except _Reached as reached:
                return reached.hidden
            finally:
                for module in looked_up.values():
                    module.table = module.number = None
            raise AssertionError("the first layer was never called")

        return run

    def head(self, linear: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
        """A function: the last layer's output [1, tokens, hidden] -> logits [1, tokens, vocabulary]; with `linear` in
        the place of the head's own module, if given."""
        given = _Given()
        places = {self.model.base_model_prefix: given}
        if linear is not None:
            places |= {name: linear for name, child in self.model.named_children() if child is self.head_module}
        model = clone_module(self.model, **places)
        tail = [getattr(self.base, name) for name in self.tail]

        def run(hidden: Tensor) -> Tensor:
            for module in tail:
                hidden = module(hidden)
            given.hidden = hidden
            try:
                ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
                return model(input_ids=ids, use_cache=False).logits
            finally:
                given.hidden = None

        return run

    def loss(self, logits: Tensor, shifted_labels: Tensor, items: int) -> Tensor:
        """The model's own loss: the sum over these tokens, divided by all labels of the step."""
        return self.model.loss_function(
            logits=logits,
            labels=None,
            vocab_size=logits.shape[-1],
            num_items_in_batch=items,
            shift_labels=shifted_labels,
        )


class _Recorder(nn.Module):
    """Stands in for a layer: notes what it is called with and hands the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Not a child: attributes that the model's forward reads from a layer are looked up on it.
        self.__dict__["layer"] = layer
        self.call: Call | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return kwargs.get("hidden_states")
        self.call = (args[1:], kwargs)
        return args[0]


class _Probe(nn.Module):
    """Notes whether a module is called after the last layer; if so it hands the hidden states on unchanged."""

    def __init__(self, child: nn.Module, last: _Recorder) -> None:
        super().__init__()
        self.__dict__["child"], self.__dict__["last"] = child, last
        self.after_layers = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__["last"].call is None:
            return self.__dict__["child"](*args, **kwargs)
        self.after_layers = True
        return args[0]


class _AskedIds(nn.Module):
    """Stands in for an embedding: notes the ids, gives zeros that take no memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.ids: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.ids.append(ids)
        return torch.zeros((), dtype=torch.bfloat16, device=ids.device).expand(*ids.shape, self.width)


class _Identity(nn.Module):
    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


class _Nothing(nn.Module):
    """Stands in for a module whose output, a pair, nobody uses."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[None, None]:
        return None, None


class _Reached(Exception):
    """Carries the first layer's input out of the model's forward."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Stop(nn.Module):
    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(hidden)


class _Rows(nn.Module):
    """An embedding over some of its rows: the module's own forward (scaling and all), the ids renumbered."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        twin = clone_module(embedding)
        for name, buffer in twin._buffers.items():
            twin._buffers[name] = None if buffer is None else buffer.cpu()
        # Its number would be that of another row here; whoever uses the rows' gradient leaves the row out.
        twin.padding_idx = None
        self.__dict__["twin"] = twin
        self.table: Tensor | None = None
        self.number: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        twin = self.__dict__["twin"]
        twin._parameters["weight"] = self.table
        try:
            return twin(self.number)
        finally:
            twin._parameters["weight"] = None


class _Given(nn.Module):
    """Stands in for the base model: its output is given."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Output(self.hidden)


class _Output:
    """A base model's output of which only the last hidden state is there."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> Any:
        return None
