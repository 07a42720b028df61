"""Documents share sequences: all of each is there once, and a model sees each as if it were alone."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from slidetune.plans import Plan
from slidetune.runtime.adam import AdamW
from slidetune.runtime.binding import Parts
from slidetune.runtime.counted_spec import spec_of
from slidetune.runtime.data import Batches, why_not_packed
from slidetune.runtime.data.conventions import Document
from slidetune.runtime.data.documents import Documents, Piece, cut
from slidetune.runtime.data.packing import pack
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, PlainLoop, assert_same_losses, make_model

SEQ_LEN = 64
# Its forward doesn't tell its masks where documents begin.
MIXES = "gpt_oss"
FAMILIES = sorted({name.partition(",")[0] for name in SMALL_CONFIGS} - {MIXES})
NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)


@given(st.lists(st.integers(1, 30)), st.integers(30, 40), st.randoms())
def test_every_document_is_in_one_sequence(lengths, seq_len, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    for sequences in (pack(lengths, seq_len), pack(lengths, seq_len, order)):
        assert sorted(number for sequence in sequences for number in sequence) == list(range(len(lengths)))
        filled = [sum(lengths[number] for number in sequence) for sequence in sequences]
        assert all(0 < tokens <= seq_len for tokens in filled)
        # No two could be one.
        assert all(a + b > seq_len for a, b in zip(sorted(filled), sorted(filled)[1:], strict=False))


def test_the_best_fit_is_taken():
    assert pack([3, 5, 2, 4, 6], 8) == [[4, 2], [1, 0], [3]]


@pytest.mark.parametrize("length", [0, 9])
def test_a_document_that_fits_no_sequence(length):
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        pack([1, length], 8)


@given(st.integers(1, 100), st.integers(2, 20))
def test_text_is_cut_and_kept(count, seq_len):
    pieces = cut(Document(list(range(count)), None), seq_len)
    if count == 1:
        assert pieces == []
        return
    assert [token for piece in pieces for token in piece.ids] == list(range(count))
    assert all(len(piece.ids) <= seq_len for piece in pieces)
    assert all(piece.labels == [-100, *piece.ids[1:]] for piece in pieces)
    assert seq_len == 2 or all(len(piece.ids) > 1 for piece in pieces)


@pytest.mark.parametrize(
    ("labels", "pieces"),
    [
        ([-100, -100, 3, 4], [Piece([1, 2, 3], [-100, -100, 3])]),
        ([1, -100, -100, 4], []),
        ([-100, 2, -100, -100], [Piece([1, 2, 3], [-100, 2, -100])]),
    ],
)
def test_labels_of_its_own_are_cut_off(labels, pieces):
    assert cut(Document([1, 2, 3, 4], labels), 3) == pieces


def stored(documents):
    found = Documents()
    for ids in documents:
        found.add(Piece(ids, [-100, *ids[1:]]))
    return found


def packed_batch(documents):
    """One sequence of all documents (lists of ids)."""
    sequences = [list(range(len(documents)))]
    return next(Batches(stored(documents), sequences, batch=1, seq_len=SEQ_LEN, packed=True))


def padded_batch(documents):
    """A sequence of each document."""
    sequences = [[number] for number in range(len(documents))]
    return next(Batches(stored(documents), sequences, batch=len(documents), seq_len=SEQ_LEN, packed=False))


def test_a_packed_batch():
    batch = packed_batch([[5, 6, 7], [8], [9, 9]])
    assert {name: tensor.shape for name, tensor in batch.items()} == dict.fromkeys(batch, (1, SEQ_LEN))
    assert batch["input_ids"][0, :8].tolist() == [5, 6, 7, 8, 9, 9, 0, 0]
    assert batch["labels"][0, :8].tolist() == [-100, 6, 7, -100, -100, 9, -100, -100]
    assert batch["position_ids"][0, :9].tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2]
    assert "attention_mask" not in batch


@pytest.fixture
def measured():
    """(name, lengths) -> loss of a batch, mean loss of its documents one by one, and a trainer's `step`."""
    with contextlib.ExitStack() as stack:

        def measure(name, lengths, make_batch):
            config = SMALL_CONFIGS[name] | (NO_DROPOUT if name == "gpt2" else {})
            generator = torch.Generator().manual_seed(3)
            documents = [torch.randint(3, config["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
            batch = make_batch(documents)
            rows = batch["input_ids"].shape[0]
            plan = Plan(model=f"small {name}", seq_len=SEQ_LEN, micro_batch=rows, accumulation=1, adam_threads=1)
            trainer = stack.enter_context(
                SlidingTrainer(make_model(config), plan, optimizer=AdamW(lr=0.0), device=DEVICE)
            )
            alone = [
                (trainer.step({"input_ids": torch.tensor([ids] * rows)}), len(ids) - 1)
                for ids in documents
                if len(ids) > 1
            ]
            mean = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
            return trainer.step(batch), mean, trainer, batch

        yield measure


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_are_computed_as_if_alone(name, measured):
    # Longer than the windows, shorter than them, and one of a single token.
    together, alone, trainer, batch = measured(name, (26, 20, 1, 9), packed_batch)
    assert why_not_packed(trainer.parts, trainer.device) is None
    assert together == pytest.approx(alone, abs=2e-3)
    # The measure is fine enough to see documents that are not kept apart; on a GPU rounding may hide them.
    assert DEVICE != "cpu" or abs(trainer.step({name: batch[name] for name in ("input_ids", "labels")}) - alone) > 4e-3


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "gemma2", MIXES])
def test_padded_documents_are_computed_as_if_alone(name, measured):
    together, alone, *_ = measured(name, (26, 9, 40), padded_batch)
    assert together == pytest.approx(alone, abs=2e-3)


@pytest.mark.parametrize("packed", [True, False])
def test_a_filled_up_batch_trains_as_the_plain_loop(packed):
    """The last batch's second micro-batch has no label at all."""
    config = SMALL_CONFIGS["qwen3"]
    plan = Plan(model="small qwen3", seq_len=SEQ_LEN, micro_batch=1, accumulation=2, adam_threads=1)
    documents = stored([[7] * length for length in (60, 40, 20)])
    data = Batches(documents, [[0], [1], [2]], batch=2, seq_len=SEQ_LEN, packed=packed)
    found = [next(data) for _ in range(4)]
    optimizer = AdamW(lr=1e-3)
    loop = PlainLoop(make_model(config), optimizer=optimizer, accumulation=2)
    with SlidingTrainer(make_model(config), plan, optimizer=optimizer, device=DEVICE) as trainer:
        assert_same_losses([trainer.step(batch) for batch in found], [loop.step(batch) for batch in found])


def parts_of(name, change=lambda model: None):
    model = make_model(SMALL_CONFIGS[name])
    change(model)
    return Parts(model, spec_of(model, name))


@pytest.mark.parametrize("name", [name for name in SMALL_CONFIGS if not name.startswith(MIXES)])
def test_models_that_keep_documents_apart(name):
    assert why_not_packed(parts_of(name)) is None
    # Its masks are added to the scores, not truth values.
    assert why_not_packed(parts_of(name, lambda model: model.set_attn_implementation("eager"))) is None


def test_models_that_do_not():
    assert why_not_packed(parts_of(MIXES)) == "layer 0 is not told where a document begins"
    carrying = parts_of("llama")
    carrying.layers[1].mixing = torch.nn.Conv1d(1, 1, 1)
    assert "carry a state" in why_not_packed(carrying)


def test_learned_positions_that_go_on(monkeypatch):
    parts = parts_of("gpt2")
    record_calls = parts.record_calls

    def going_on(device, inputs):
        calls, (tokens, positions) = record_calls(device, inputs)
        return calls, [tokens, torch.arange(positions.shape[-1])[None]]

    monkeypatch.setattr(parts, "record_calls", going_on)
    assert "don't start again" in why_not_packed(parts)
