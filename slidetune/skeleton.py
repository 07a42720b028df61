"""From the shapes of a model's layers to its units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slidetune.kernel_costs import embedding_costs, head_costs, layer_costs
from slidetune.layer_shape import LayerShape, NormKind, norm_params
from slidetune.model import ModelSpec, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """The shapes of a model's layers, and how it begins and ends."""

    layers: list[LayerShape]
    vocab: int
    tied: bool
    max_seq_len: int
    learned_positions: int = 0
    head_bias: bool = False


def assemble(skeleton: Skeleton, name: str, family: str, *, draws: bool) -> ModelSpec:
    """The units of a skeleton, with embedding and head, as a `ModelSpec`. `draws`: training draws random numbers."""
    first = skeleton.layers[0]
    hidden, vocab, norm = first.hidden, skeleton.vocab, first.norm
    costs = {shape: _layer_figures(shape, draws) for shape in set(skeleton.layers)}
    layers = [Unit(index=i, **costs[shape]) for i, shape in enumerate(skeleton.layers, start=1)]
    head = _head(len(layers) + 1, skeleton, hidden, norm, fused=first.fused_kernels)
    return ModelSpec(
        name=name,
        family=family,
        hidden_size=hidden,
        vocab_size=vocab,
        tied=skeleton.tied,
        max_seq_len=skeleton.max_seq_len,
        units=(_embedding(skeleton, hidden), *layers, head),
        same_kernels=not draws and not any(shape.experts for shape in skeleton.layers),
    )


def _layer_figures(shape: LayerShape, draws: bool) -> dict[str, Any]:
    return {
        "kind": "layer",
        "params": shape.params,
        "weight_elements": shape.params,
        "largest_tensor": shape.largest_tensor,
        "matmul_elements": shape.matmul_elements,
        "left_out_elements": 0 if draws else shape.left_out_elements,
        "middle_elements": 0 if draws else shape.middle_elements,
        "product_elements": 0 if draws else shape.product_elements,
        "product_width": 0 if draws else shape.product_width,
        "attention_width": shape.query,
        "attention_span": shape.span,
        "eager": layer_costs(shape, fused=False),
        "liger": layer_costs(shape, fused=shape.fused_kernels),
    }


def _embedding(skeleton: Skeleton, hidden: int) -> Unit:
    costs = embedding_costs(hidden, learned_positions=bool(skeleton.learned_positions))
    return Unit(
        index=0,
        kind="embedding",
        params=(skeleton.vocab + skeleton.learned_positions) * hidden,
        weight_elements=0,
        largest_tensor=skeleton.vocab * hidden,
        matmul_elements=0,
        eager=costs,
        liger=costs,
    )


def _head(index: int, skeleton: Skeleton, hidden: int, norm: NormKind, *, fused: bool) -> Unit:
    matrix = skeleton.vocab * hidden
    own = norm_params(norm, hidden) + skeleton.vocab * skeleton.head_bias
    return Unit(
        index=index,
        kind="head",
        params=own + matrix * (not skeleton.tied),
        weight_elements=own + matrix,
        largest_tensor=matrix,
        matmul_elements=matrix,
        eager=head_costs(norm, hidden, fused=False),
        liger=head_costs(norm, hidden, fused=fused),
    )
