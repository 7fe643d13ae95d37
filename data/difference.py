"""What a checkpoint keeps of the shards it was trained on, and the sentence that says what changed since.

Kept are, per source, totals and one short record per shard: name, 12 digits of its checksum, documents, tokens; about 60 bytes. Up to
MAX_LISTED shards of all sources together: 250 KB in a manifest that every rank reads. Of larger sets only the totals are kept: the
fingerprint still notices every change, and which shard it was is then told by the index that the set had. Groups of shards in place of
shards would not do: a shard that is added moves all groups behind it. Used by train/run.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data.index import ShardIndex
from data.split import Source, TrainSplit

MAX_LISTED = 4096
DIGITS = 12  # of a checksum: chance makes one of a million changes look like none only once in 10^8 times
NAMED = 3  # shards in a sentence, of each kind


def summarize(split: TrainSplit) -> list[dict[str, Any]]:
    """JSON for a checkpoint: name, documents, tokens and shards (null for a huge set) of each source."""
    listed = sum(len(source.index.shards) for source in split.sources) <= MAX_LISTED
    return [_summary(source, listed=listed) for source in split.sources]


def describe_changes(saved: Sequence[Mapping[str, Any]], split: TrainSplit) -> str:
    """What differs between the sources of a checkpoint, of the same names, and these; one clause for each that changed."""
    clauses = []
    for old, source in zip(saved, split.sources, strict=False):
        if clause := _changes(old, source.index):
            clauses.append(f"{f'source {source.name}: ' if source.name else ''}{clause}")
    return "; ".join(clauses) or "the kind of document or the order of the shards differs"


def _summary(source: Source, *, listed: bool) -> dict[str, Any]:
    index = source.index
    return {
        "name": source.name,
        "documents": index.num_documents,
        "tokens": index.num_tokens,
        "num_shards": len(index.shards),
        "shards": [[s.name, s.sha256[:DIGITS], s.documents, s.tokens] for s in index.shards] if listed else None,
    }


def _changes(old: Mapping[str, Any], index: ShardIndex) -> str:
    totals = (
        f"{old['num_shards']} shards with {old['documents']} documents and {old['tokens']} tokens became "
        f"{len(index.shards)} with {index.num_documents} and {index.num_tokens}"
    )
    if old["shards"] is None:
        same = (old["num_shards"], old["documents"], old["tokens"]) == (
            len(index.shards),
            index.num_documents,
            index.num_tokens,
        )
        return f"some of the {len(index.shards)} shards were altered, or their order was" if same else totals
    before = {name: (digits, documents, tokens) for name, digits, documents, tokens in old["shards"]}
    now = {shard.name: (shard.sha256[:DIGITS], shard.documents, shard.tokens) for shard in index.shards}
    parts = [
        _clause("new", {name: _size(*now[name][1:]) for name in now if name not in before}),
        _clause("gone", {name: _size(*before[name][1:]) for name in before if name not in now}),
        _clause(
            "altered",
            {
                name: f"{_size(*before[name][1:])} became {_size(*now[name][1:])}"
                for name in now
                if name in before and now[name] != before[name]
            },
        ),
    ]
    found = [part for part in parts if part]
    if not found:
        return "the same shards in another order" if list(before) != list(now) else ""
    return f"{', '.join(found)} ({totals})"


def _clause(kind: str, shards: Mapping[str, str]) -> str:
    """ "2 new: a.tar (3 documents, 40 tokens), ..."; empty if there is none."""
    if not shards:
        return ""
    named = ", ".join(f"{name} ({what})" for name, what in list(shards.items())[:NAMED])
    return f"{len(shards)} {kind}: {named}{', ...' if len(shards) > NAMED else ''}"


def _size(documents: int, tokens: int) -> str:
    return f"{documents} documents, {tokens} tokens"
