"""Documents to token ids in several processes, in the order of the documents; and which documents are held out.

The processes are spawned and import nothing heavy. Used by data/prepare.py.
"""

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.sources import Document
from data.tokenizer import Tokenizer, load_tokenizer

HELDOUT_SHARE = 0.05
BATCH_CHARACTERS = 1 << 20  # of text that a process gets at once: 0.4 s of BPE, so that handing over costs nothing


@dataclass(frozen=True)
class EncodedDocument:
    """A document's ids, end token included."""

    tokens: np.ndarray
    num_bytes: int  # of its text
    heldout: bool
    file_name: str  # of the source file that it came from


def is_heldout(text: str) -> bool:
    """Whether a document belongs to the held-out 5 %: a function of its text alone, so equal texts stay together."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64


def encode_documents(documents: Iterable[Document], *, tokenizer_path: Path, workers: int) -> Iterator[EncodedDocument]:
    """Encodes with the tokenizer.json at `tokenizer_path`, in `workers` processes (1: in this one), in order."""
    batches = _batches(documents)
    if workers == 1:
        for batch in batches:
            yield from encode_batch(batch, tokenizer_path=tokenizer_path)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # the tokenizers library warns of forks, and threads may hang in them
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending: deque[Future[list[EncodedDocument]]] = deque()
        for batch in batches:
            pending.append(pool.submit(encode_batch, batch, tokenizer_path=tokenizer_path))
            if len(pending) > 2 * workers:  # bounds the memory, and keeps every process busy
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def encode_batch(batch: list[Document], *, tokenizer_path: Path) -> list[EncodedDocument]:
    """What one process does."""
    tokenizer = _tokenizer_at(tokenizer_path)
    return [
        EncodedDocument(
            tokens=tokenizer.encode_document(document.text),
            num_bytes=len(document.text.encode()),
            heldout=is_heldout(document.text),
            file_name=document.file.name,
        )
        for document in batch
    ]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _tokenizer_at(path: Path) -> Tokenizer:
    return load_tokenizer(path)
