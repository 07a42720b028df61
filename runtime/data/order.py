"""Order and chance that are the same everywhere and for good: a resumed run may have another numpy or torch.

Their random permutations may change with a version, so order is that of hashes instead.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

# Batches among which sequences of like length are put together: more pad less and shuffle less.
_GROUPED = 64


def hashes(count: int, *salt: int) -> NDArray[np.uint64]:
    """A hash of each number below `count`: [count]. `salt`, say seed and epoch, makes others."""
    start = int.from_bytes(hashlib.blake2b(repr(salt).encode(), digest_size=8).digest(), "little")
    # SplitMix64's output function.
    step = np.uint64(0x9E3779B97F4A7C15)
    x = np.uint64(start) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * step
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(count: int, *salt: int) -> NDArray[np.int64]:
    """A permutation of the numbers below `count`: [count]."""
    return np.argsort(hashes(count, *salt), kind="stable")


def epoch_batches(widths: NDArray[np.int64], batch: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Numbers of the sequences in each batch of an epoch: every sequence once, in an order of its own.

    `widths`: tokens that each sequence takes; those of a batch are alike, as far as chance allows. The last batch may
    have fewer sequences.
    """
    order = shuffled(len(widths), seed, epoch)
    span = _GROUPED * batch
    grouped = [
        part[np.argsort(-widths[part], kind="stable")]
        for part in (order[at : at + span] for at in range(0, len(order), span))
    ]
    order = np.concatenate(grouped) if grouped else order
    batches = [order[at : at + batch] for at in range(0, len(order), batch)]
    full = len(order) // batch
    return [batches[i] for i in shuffled(full, seed, epoch, 1)] + batches[full:]


def is_held_out(content: bytes, share: float, seed: int) -> bool:
    """Whether what has this digest is held out: as good as by chance, and always the same whatever else there is, so
    that equal documents are on one side."""
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()[:64]).digest()
    return int.from_bytes(digest, "little") < share * 2.0**64
