"""Documents that share sequences: best fit, the longest first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence


def pack(lengths: Sequence[int], seq_len: int, order: Iterable[int] | None = None) -> list[list[int]]:
    """Numbers of the documents in each sequence; every document is in one, and no sequence is longer than `seq_len`.

    Each goes where the least room is left after it. `order`: of documents of one length, by default as they come.
    Raises ValueError for a document that is longer than a sequence or empty.
    """
    if any(not 0 < length <= seq_len for length in lengths):
        raise ValueError(f"a document must have 1 to {seq_len} tokens")
    sequences: list[list[int]] = []
    # Sequences by the room left in them; the rooms that there are, sorted: at most as many as a sequence has tokens.
    by_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []
    for number in sorted(range(len(lengths)) if order is None else order, key=lambda n: -lengths[n]):
        length = lengths[number]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, found = seq_len, len(sequences)
            sequences.append([])
        else:
            room = rooms[at]
            found = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        sequences[found].append(number)
        left = room - length
        if left:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(found)
    return sequences
