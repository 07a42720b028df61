"""The model to start from: its directory, fetched from the hub where it is not here, and its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

from slidetune.errors import SlidetuneError
from slidetune.models import catalog_row, in_catalog, load_model
from slidetune.runtime.data import Tokens, byte_tokens, tokens_of

# Weights are only ever read from safetensors files: others are pickled, and a pickle runs what it likes.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
# Other forms of the same weights.
_UNWANTED = ("*/*", "consolidated*")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_directory(ref: str, *, with_code: bool = False) -> Path:
    """The directory of a model: `ref` itself, or what the hub has by this id, or by that of this catalog name.

    `with_code`: fetch Python files too. Raises SlidetuneError for a model that is neither here nor to be had.
    """
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    if path.name == "config.json" and path.is_file():
        return path.parent
    known = in_catalog(ref)
    # Where the owner's folder is here, a path was meant.
    if not known and (path.parent.is_dir() or not _HUB_ID.fullmatch(ref)):
        raise SlidetuneError(
            f"{ref}: there is no such directory.",
            "Give the directory that holds the model's config.json and safetensors files, or a hub id as owner/name.",
        )
    hub_id = catalog_row(load_model(ref).name)["hub"] if known else ref
    from huggingface_hub import snapshot_download

    patterns = [*_WANTED, *(["*.py"] if with_code else [])]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=list(_UNWANTED)))
    # The hub's client has an exception for every way to fail, not all of them OSError.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SlidetuneError(
            f"{hub_id} could not be fetched from the hub ({reason}).",
            "Check the id and the connection; a gated model needs `hf auth login`. Or give a directory that holds the "
            "model.",
        ) from None


def tokens_for(folder: Path, vocab_size: int, *, trust_remote_code: bool = False) -> Tokens:
    """The tokens of the tokenizer in a model's directory; bytes where it has none.

    Raises SlidetuneError for one that can't be read, or that is code of its own and not trusted.
    """
    if not _has_tokenizer(folder):
        return byte_tokens(vocab_size)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Of a broken file each tokenizer raises something else, the fast ones a plain Exception.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise SlidetuneError(
                f"{folder}: its tokenizer is Python code that comes with the model, which is not run.",
                "Look at that code; trust_remote_code: true (--trust-remote-code) runs it.",
            ) from None
        raise SlidetuneError(
            f"{folder}: its tokenizer can't be read ({reason}).",
            "Copy its tokenizer files there anew, or give rows of input_ids and remove them.",
        ) from None
    return tokens_of(tokenizer, vocab_size)


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
