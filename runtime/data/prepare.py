"""From a source of rows to batches to train on, batches held out, and a report."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from slidetune.errors import BadFile, SlidetuneError
from slidetune.runtime.data.batches import Batches
from slidetune.runtime.data.conventions import Conventions, Document, convention_of, unused_fields
from slidetune.runtime.data.documents import Documents, Piece, cut, packed_bytes
from slidetune.runtime.data.order import is_held_out, shuffled
from slidetune.runtime.data.packing import pack
from slidetune.runtime.data.reading import Fault, Row, read_rows
from slidetune.runtime.data.report import Report
from slidetune.runtime.data.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data, ready to train on."""

    train: Batches
    held_out: Batches | None
    """None where no share was asked for."""
    report: Report


def prepare(
    source: str | Path,
    tokens: Tokens,
    *,
    seq_len: int,
    batch: int,
    packed: bool = True,
    seed: int = 0,
    held_out: float = 0.0,
    max_faulty: float = 0.01,
    split: str = "train",
    config: str | None = None,
    assistant_only: bool = True,
    chat_template: str | None = None,
    folder: str | Path | None = None,
) -> Prepared:
    """Read all rows, and make batches of them.

    Args:
        source: a .jsonl, .json, .parquet or .txt file, a directory of such files, or a hub dataset's id.
        tokens: how text becomes token ids.
        seq_len, batch: tokens of a sequence, sequences of a batch.
        packed: documents share sequences; `why_not_packed` says whether the model allows it. Else they are padded.
        seed: of the order, and of what is held out.
        held_out: this share of the rows, by their content, is not trained on; of a .txt file, of its pieces.
        max_faulty: the share of rows that may be unusable.
        split, config: of a hub dataset.
        assistant_only: of messages, only the assistant's turns are learned.
        chat_template: in the place of the tokenizer's own.
        folder: where the tokens go, 8 bytes each; by default where temporary files do.

    Raises:
        BadFile: for a source that can't be read, has more unusable rows than allowed, or nothing to train on or to
            hold out.
        SlidetuneError: where a library, a tokenizer or a chat template is missing, or the template can't tell the
            assistant's turns.
    """
    _check_share("held_out", held_out)
    _check_share("max_faulty", max_faulty)
    report = Report(source=str(source), seq_len=seq_len, packed=packed)
    conventions = Conventions(tokens, assistant_only=assistant_only, chat_template=chat_template)
    documents = Documents(folder)
    sides: tuple[list[int], list[int]] = ([], [])
    digest = hashlib.blake2b(repr((seq_len, batch, packed, seed, held_out)).encode(), digest_size=16)
    for row in read_rows(source, split=split, config=config):
        report.rows += 1
        document = _document(row, conventions, report)
        if document is None:
            continue
        content = _digest(document.ids, document.labels)
        digest.update(content)
        pieces = cut(document, seq_len)
        _count(document, pieces, seq_len, report)
        for piece in pieces:
            unit = _digest(*piece) if row.whole_file else content
            held = is_held_out(unit, held_out, seed)
            sides[held].append(len(documents))
            documents.add(piece)
            if not held:
                report.learned += piece.learned
    _check_rows(report, max_faulty)
    _check_sides(sides, held_out, report)
    lengths = documents.lengths

    def batches(numbers: list[int]) -> Batches:
        if packed:
            own = lengths[numbers].tolist()
            sequences = [[numbers[i] for i in those] for those in pack(own, seq_len, shuffled(len(own), seed).tolist())]
        else:
            sequences = [[number] for number in numbers]
        return Batches(
            documents,
            sequences,
            batch=batch,
            seq_len=seq_len,
            packed=packed,
            seed=seed,
            fingerprint=digest.hexdigest(),
        )

    train = batches(sides[False])
    report.pieces, report.held_out = len(sides[False]), len(sides[True])
    report.tokens, report.sequences = train.tokens, len(train.sequences)
    return Prepared(train, batches(sides[True]) if held_out else None, report)


def _document(row: Row | Fault, conventions: Conventions, report: Report) -> Document | None:
    if isinstance(row, Fault):
        report.fault(row)
        return None
    try:
        convention = convention_of(row.fields)
        document = conventions.document(row.fields, convention)
    except ValueError as error:
        report.fault(Fault(row.place, str(error)))
        return None
    except SlidetuneError as error:
        raise SlidetuneError(f"{row.place}: {error.message}", error.hint) from None
    report.conventions[convention] += 1
    report.unused_fields.update(unused_fields(row.fields, convention))
    return document


def _digest(ids: list[int], labels: list[int] | None) -> bytes:
    return hashlib.blake2b(packed_bytes(ids, labels or []), digest_size=16).digest()


def _count(document: Document, pieces: list[Piece], seq_len: int, report: Report) -> None:
    report.dropped += not pieces
    if pieces and len(document.ids) > seq_len:
        if document.labels is None:
            report.cut += 1
        else:
            report.truncated += 1


def _check_share(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise SlidetuneError(f"{name} must be a share from 0 to less than 1, not {share!r}.", "0.01 is one percent.")


def _check_rows(report: Report, max_faulty: float) -> None:
    """Raise BadFile where rows are too few, or too many of them can't be used."""
    if not report.rows:
        raise BadFile(f"{report.source}: it has no rows.", "Give data that is not empty.")
    if report.faulty > max_faulty * report.rows or report.faulty == report.rows:
        raise BadFile(
            f"{report.source}: {report.faulty:,} of {report.rows:,} rows can't be used, where {max_faulty:.4g} of them "
            f"may be: {'; '.join(report.fault_lines())}.",
            "A row is an object with text, with prompt and completion, with messages, or with input_ids and perhaps "
            "labels. Correct these rows, or allow a larger share: max_faulty (--max-faulty).",
        )


def _check_sides(sides: tuple[list[int], list[int]], held_out: float, report: Report) -> None:
    """Raise BadFile where nothing is left to train on, or to hold out."""
    total = len(sides[False]) + len(sides[True])
    if not total:
        raise BadFile(
            f"{report.source}: nothing to learn is left in any of {report.rows:,} rows.",
            f"Sequences have {report.seq_len:,} tokens. Plan longer ones (--seq-len), or look at the rows' labels.",
        )
    if not sides[False] or (held_out and not sides[True]):
        raise BadFile(
            f"{report.source}: holding out {held_out:.4g} of {total:,} documents leaves none to "
            f"{'hold out' if sides[False] else 'train on'}.",
            "Ask for another share, or another seed.",
        )
