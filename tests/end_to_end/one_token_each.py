"""Shards in which every token but the documents' ends is there once: what a run has read shows by itself whether all of it was.

Owns the shards and the judgement of a run's journal (faults.py). The judgement knows the documents and how many steps an epoch has; where
a row lies it does not know.
"""

import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from data.tokenizer import END_TOKEN, Tokenizer
from data.writer import ShardSetWriter

END = 0
LENGTH, STREAMS, ROWS = 8, 8, 8  # tokens in a row, streams, rows in a step
STEPS_PER_EPOCH = 13
NUM_TOKENS = ROWS * LENGTH * STEPS_PER_EPOCH + 1  # the last one is only a target
SHARDS = 6


def tokenizer() -> Tokenizer:
    """A word for each number, and, as a tokenizer must have them, one for each byte."""
    words = [f"{number:04d}" for number in range(1, NUM_TOKENS)]
    vocab = {END_TOKEN: END} | {text: id for id, text in enumerate([*words, *sorted(ByteLevel.alphabet())], start=1)}
    return Tokenizer(
        json.dumps(
            {
                "model": {"type": "BPE", "vocab": vocab, "merges": []},
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                "added_tokens": [{"id": END, "content": END_TOKEN, "special": True}],
                "decoder": {"type": "ByteLevel"},
            }
        )
    )


def documents(num_tokens: int, *, seed: int) -> list[list[int]]:
    """1, 2, 3 ... cut into documents of 1 to 40 tokens with their ends, `num_tokens` in all."""
    draw, found, left, number = random.Random(seed), [], num_tokens, 1
    while left:
        length = left if left < 42 else draw.randint(2, 41)
        found.append([*range(number, number + length - 1), END])
        left, number = left - length, number + length - 1
    return found


@dataclass(frozen=True)
class TokenShards:
    """folder: of both splits. documents: of the training split, in the order of its index."""

    folder: Path
    documents: list[list[int]]


def write_shards(folder: Path, *, seed: int) -> TokenShards:
    """Both splits below `folder`."""
    train = documents(NUM_TOKENS, seed=seed)
    for split, its, shards in (("train", train, SHARDS), ("heldout", documents(100, seed=seed + 1), 1)):
        folder.mkdir(exist_ok=True)
        writer = ShardSetWriter(folder / split, tokenizer=tokenizer(), shard_tokens=10**9)
        for part in np.array_split(np.arange(len(its)), shards):
            for number in part:
                writer.add(np.array(its[number], dtype=np.uint16), num_bytes=4 * (len(its[number]) - 1))
            writer.end_shard()
        writer.close()
    return TokenShards(folder, train)


def read_journals(folder: Path) -> dict[int, dict[int, list[dict[str, Any]]]]:
    """Step -> start of the run -> lines of all ranks. The files are called `<start>_<rank>`."""
    found: dict[int, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.iterdir()):
        for line in map(json.loads, path.read_text().splitlines()):
            found[line["step"]][int(path.name.split("_")[0])].append(line)
    return found


def assert_nothing_twice_or_left_out(folder: Path, shards: TokenShards, *, steps: int) -> int:
    """What the run has learned from is, in each epoch, every token of every document once. A step that was made again counts as it was
    made the last time: the run goes on from a checkpoint before it. And each time it had the same rows. Returns the number of steps
    that were made, or begun, more than once.
    """
    train = shards.documents
    numbers = {token: number for number, tokens in enumerate(train) for token in tokens[:-1]}
    journal, again = read_journals(folder), 0
    assert sorted(journal) == list(range(1, steps + 1))
    inputs: dict[int, Counter[int]] = defaultdict(Counter)
    for step, starts in sorted(journal.items()):
        again += len(starts) > 1
        rows = {start: Counter(row for line in lines for row in rows_of(line)) for start, lines in starts.items()}
        last = rows[max(rows)]
        assert last.total() == ROWS, f"step {step} had {last.total()} rows"
        for start, those in rows.items():
            assert those <= last, f"start {start} made step {step} of other rows than start {max(rows)}: {those - last}"
        for tokens, targets, ids in last:
            assert tokens[1:] == targets[:-1], (
                f"step {step}: a row has other targets than its next tokens: {tokens}, {targets}"
            )
            for token, document in zip(tokens, ids, strict=True):
                inputs[(step - 1) // STEPS_PER_EPOCH][token] += 1
                assert token == END or numbers[token] == document, (
                    f"token {token} belongs to {numbers[token]}, not {document}"
                )
    for epoch in range(steps // STEPS_PER_EPOCH):
        seen = Counter(numbers[token] for token in inputs[epoch].elements() if token != END)
        whole = Counter({number: len(tokens) - 1 for number, tokens in enumerate(train) if len(tokens) > 1})
        assert seen == whole, f"epoch {epoch}: documents seen too often {seen - whole}, too rarely {whole - seen}"
        assert set(inputs[epoch].values()) <= {1, inputs[epoch][END]}, f"epoch {epoch}: a token was seen twice"
        assert inputs[epoch][END] == len(train) - 1, "every end but the line's last, which is only a target"
    return again


def rows_of(line: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    return [
        (tuple(tokens), tuple(targets), tuple(ids))
        for tokens, targets, ids in zip(line["tokens"], line["targets"], line["documents"], strict=True)
    ]
