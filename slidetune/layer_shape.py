"""The structure of one decoder layer, and the counts that follow from it alone.

`slidetune.families` reads a `LayerShape` out of a Hugging Face config; parameter counts live here, memory and
traffic of its kernels in `slidetune.kernel_costs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "rms_fp32", "rms_offset", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer. Sizes are counts of elements; hashable, so equal layers are worked out once."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Width of the MLP; of one expert in a mixture."""
    activation: str = "silu"
    gated: bool = True
    """Gate, up and down projection; else up and down."""
    experts: int = 0
    """Experts of a mixture; 0 where the layer has one dense MLP."""
    active: int = 0
    """Experts a token is routed to."""
    clamped_glu: bool = False
    """gpt-oss: gate and up are clamped and the sigmoid has a gain."""
    norm: NormKind = "rms"
    """`rms` multiplies the weight after rounding to the model's dtype, `rms_fp32` before, `rms_offset` too,
    but with one added to the weight (Gemma); `layer` has a bias."""
    pre_norms: int = 2
    """Norms in front of a sub-block. One alone feeds attention and MLP side by side (phi)."""
    post_norms: int = 0
    """Norms on a sub-block's output, before the residual is added."""
    qk_norm: Literal["", "head", "full"] = ""
    """Norm of queries and keys: over each head or over all heads together."""
    rotary: Literal["", "full", "cat", "fp32"] = "full"
    """Rotary embedding: none, in the model's dtype, of a part of each head with the rest concatenated behind
    it, or in fp32."""
    fused_qkv: bool = False
    """Queries, keys and values are slices of one projection's output."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    router_bias: bool = False
    sinks: bool = False
    """A learned logit per head in the softmax (gpt-oss)."""
    span: int | None = None
    """Tokens a query may look back on, itself included; None for all."""
    linear_modules: bool = True
    """Its products are torch's linear modules', and without a norm behind them only added to the residual."""
    fused_kernels: bool = True
    """Liger has kernels for this family."""

    @property
    def query(self) -> int:
        """Elements of a token's queries, all heads together."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Elements of a token's keys (its values are as many)."""
        return self.kv_heads * self.head_dim

    @property
    def _up(self) -> int:
        """Columns of the MLP's first product: gate and up together where there is a gate."""
        return (2 if self.gated else 1) * self.inner

    @property
    def attention_matmul(self) -> int:
        return self.hidden * (self.query + 2 * self.key) + self.query * self.hidden

    @property
    def mlp_matmul(self) -> int:
        """Weight elements of one MLP or expert."""
        return self.hidden * self._up + self.inner * self.hidden

    @property
    def matmul_elements(self) -> int:
        """Weight elements one token is multiplied with: attention, and the MLP or router + active experts."""
        if not self.experts:
            return self.attention_matmul + self.mlp_matmul
        return self.attention_matmul + self.hidden * self.experts + self.active * self.mlp_matmul

    @property
    def left_out_elements(self) -> int:
        """Weight elements of the last product, if no gradient depends on what comes of it."""
        if self.experts or self.post_norms or not self.linear_modules:
            return 0
        return self.inner * self.hidden

    @property
    def middle_elements(self) -> int:
        """Weight elements of attention's last product, if a linear module's, which is only added to the layer's input,
        and that sum is what the MLP begins with."""
        if self.pre_norms < 2 or self.post_norms or not self.linear_modules:
            return 0
        return self.query * self.hidden

    @property
    def product_elements(self) -> int:
        """Weight elements of the products between that sum and the last product: gate and up."""
        return self.hidden * self._up if self.middle_elements and self.left_out_elements else 0

    @property
    def product_width(self) -> int:
        """Elements a token of what comes of them."""
        return self._up if self.product_elements else 0

    @property
    def params(self) -> int:
        """Every trainable element of the layer."""
        attention = self.attention_matmul
        attention += (self.query + 2 * self.key) * self.qkv_bias + self.hidden * self.out_bias
        attention += self.heads * self.sinks + self._qk_norm_params
        mlp = self.mlp_matmul + (self._up + self.hidden) * self.mlp_bias
        if self.experts:
            mlp = self.experts * (mlp + self.hidden + self.router_bias)
        return attention + mlp + (self.pre_norms + self.post_norms) * norm_params(self.norm, self.hidden)

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest weight tensor, as transformers stores them: experts in one tensor, gate and
        up in one where the family fuses them."""
        qkv = self.query + 2 * self.key if self.fused_qkv else max(self.query, self.key)
        # Families that fuse queries, keys and values fuse gate and up too.
        up = self._up if self.fused_qkv or self.experts else self.inner
        return max(self.hidden * qkv, self.query * self.hidden, max(1, self.experts) * self.hidden * up)

    @property
    def _qk_norm_params(self) -> int:
        if self.qk_norm == "full":
            return norm_params(self.norm, self.query) + norm_params(self.norm, self.key)
        return 2 * norm_params(self.norm, self.head_dim) if self.qk_norm else 0


def norm_params(kind: NormKind, width: int) -> int:
    """Parameters of a norm over `width` elements: a weight, and a bias for LayerNorm."""
    return 2 * width if kind == "layer" else width
