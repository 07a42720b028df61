"""Training data: files, directories and hub datasets become batches, the same ones whenever a run is resumed.

`prepare` does it all: rows are read (`reading`), become tokens and labels (`conventions`, `chat`), are cut to length
and stored (`documents`), share sequences (`packing`, where `isolation` says the model keeps documents apart), and come
in a shuffled order with a position (`order`, `batches`). `samples` is the simpler reader of `slidetune run`.
"""

from slidetune.runtime.data.batches import Batches
from slidetune.runtime.data.isolation import why_not_packed
from slidetune.runtime.data.prepare import Prepared, prepare
from slidetune.runtime.data.report import Report
from slidetune.runtime.data.samples import Batch, Samples, read_samples, synthetic
from slidetune.runtime.data.tokens import Encode, Tokens, as_bytes, byte_tokens, tokens_of

__all__ = [
    "Batch",
    "Batches",
    "Encode",
    "Prepared",
    "Report",
    "Samples",
    "Tokens",
    "as_bytes",
    "byte_tokens",
    "prepare",
    "read_samples",
    "synthetic",
    "tokens_of",
    "why_not_packed",
]
