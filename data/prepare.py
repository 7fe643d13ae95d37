"""Text to shards: `python -m data.prepare --source PATH... --out DIR --tokenizer bytes|bpe --vocab-size N`.

Writes DIR/train and DIR/heldout, each with webdataset tars of tokenised documents, sidecars, index.json and
tokenizer.json. A document is held out by the hash of its text, so equal texts never lie on both sides. The same sources
and arguments give the same bytes, whatever the number of processes: documents are read and written in one order by this
process, and only tokenised by others. Written to DIR.partial and renamed when whole. Owns the order of the work;
data/sources.py finds the text, data/record.py knows
whether it was done already, data/tokenizer.py encodes, data/shards.py and data/index.py know the files.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from rich.console import Console

from data.encode import encode_documents, is_heldout
from data.files import exclusive, write_whole
from data.progress import progress_bar
from data.record import RECORD_FILE, Arguments, check_same_files, is_finished, record_of
from data.sources import (
    STDLIB,
    Document,
    SourceFile,
    check_has_text,
    find_sources,
    read_documents,
)
from data.tokenizer import MIN_VOCAB_SIZE, TOKENIZER_FILE, Tokenizer, bytes_tokenizer, load_tokenizer, train_bpe

BPE_SAMPLE_BYTES = 64 << 20  # of training text: seconds of training, and more text hardly changes the merges


def prepare(arguments: Arguments, *, workers: int, console: Console) -> None:
    """Writes the shards, unless they are there already.

    Raises ValueError for arguments or sources that cannot be, RuntimeError for damaged files.
    """
    started = time.perf_counter()
    _check_arguments(arguments)
    out = Path(arguments.out)
    partial = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out.with_name(f"{out.name}.lock")):
        finished = is_finished(out, arguments)
        if finished and not all(source == STDLIB or Path(source).exists() for source in arguments.sources):
            console.print(
                f"{out} holds these shards already (made with the same arguments from a source that is gone): nothing to do"
            )
            return
        files = find_sources(arguments.sources, seed=arguments.seed, excluded=[out, partial])
        if finished:
            check_same_files(out, files)
            console.print(f"{out} holds these shards already (made with the same arguments): nothing to do")
            return
        check_has_text(files, sources=arguments.sources, text_field=arguments.text_field)
        record = record_of(arguments, files)  # now: what is changed while it is read is noticed the next time
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        try:
            tokenizer = make_tokenizer(arguments, files, console=console)
            write_splits(partial, arguments, files, tokenizer=tokenizer, workers=workers, console=console)
            write_whole(partial / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    console.print(f"done in {time.perf_counter() - started:.1f} s: {out}")


def make_tokenizer(arguments: Arguments, files: Sequence[SourceFile], *, console: Console) -> Tokenizer:
    """The tokenizer that is asked for. BPE is trained on training documents alone, on their first 64 MiB at most."""
    if arguments.tokenizer == "bytes":
        return bytes_tokenizer()
    if arguments.tokenizer != "bpe":
        return load_tokenizer(Path(arguments.tokenizer))
    assert arguments.vocab_size is not None
    sample, sample_bytes = [], 0
    for document in _documents(arguments, files, skipped=Counter()):
        if sample_bytes >= BPE_SAMPLE_BYTES:
            break
        if not is_heldout(document.text):
            sample.append(document.text)
            sample_bytes += len(document.text.encode())
    else:
        _check_split(train=len(sample), heldout=1)
    started = time.perf_counter()
    tokenizer = train_bpe(sample, vocab_size=arguments.vocab_size)
    extent = "the first" if sample_bytes >= BPE_SAMPLE_BYTES else "all"
    console.print(
        f"BPE of {tokenizer.vocab_size:,} ids trained on {extent} {sample_bytes / 1e6:.1f} MB of the training text in "
        f"{time.perf_counter() - started:.1f} s"
    )
    return tokenizer


def write_splits(
    folder: Path,
    arguments: Arguments,
    files: Sequence[SourceFile],
    *,
    tokenizer: Tokenizer,
    workers: int,
    console: Console,
) -> None:
    """Writes folder/train and folder/heldout. Raises ValueError if one of them would be empty."""
    num_bytes = sum(file.bytes for file in files)
    from data.writer import ShardSetWriter  # imports torch, which the tokenising processes import this file without

    shard_tokens = arguments.shard_tokens or default_shard_tokens(num_bytes)
    train = ShardSetWriter(folder / "train", tokenizer=tokenizer, shard_tokens=shard_tokens)
    heldout = ShardSetWriter(folder / "heldout", tokenizer=tokenizer, shard_tokens=shard_tokens)
    bytes_up_to = dict(zip((file.name for file in files), accumulate(file.bytes for file in files), strict=True))
    skipped: Counter[str] = Counter()
    documents = _documents(arguments, files, skipped=skipped)
    with progress_bar("tokenising", total=num_bytes, console=console) as update:
        for encoded in encode_documents(documents, tokenizer_path=folder / "train" / TOKENIZER_FILE, workers=workers):
            (heldout if encoded.heldout else train).add(encoded.tokens, num_bytes=encoded.num_bytes)
            update(bytes_up_to[encoded.file_name])
    _check_split(train=train.num_documents, heldout=heldout.num_documents)
    for split in (train, heldout):
        split.close()
        console.print(split.summary())
    if skipped:
        console.print("skipped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())))


def default_shard_tokens(num_bytes: int) -> int:
    """About 64 shards, so that epochs differ in their order, of 0.5 MB to 128 MB (as uint16 ids)."""
    return max(1 << 18, min(1 << 26, num_bytes // 256))


def _documents(arguments: Arguments, files: Sequence[SourceFile], *, skipped: Counter[str]) -> Iterator[Document]:
    return read_documents(
        files, text_field=arguments.text_field, document_bytes=arguments.document_bytes, skipped=skipped
    )


def _check_arguments(arguments: Arguments) -> None:
    if Path(arguments.out).name in ("", ".."):
        raise ValueError(
            f"--out must name a new folder, but it is {arguments.out}: add a name, as in {arguments.out}/shards"
        )
    size = arguments.vocab_size
    if arguments.tokenizer == "bpe" and (size is None or size < MIN_VOCAB_SIZE):
        raise ValueError(
            f"--tokenizer bpe needs a --vocab-size of at least {MIN_VOCAB_SIZE} (256 bytes and the end token), but it "
            f"is {size}: raise it"
        )
    if arguments.tokenizer == "bytes" and size not in (None, MIN_VOCAB_SIZE):
        raise ValueError(
            f"--vocab-size must be {MIN_VOCAB_SIZE} (256 bytes and the end token) with --tokenizer bytes, but it is "
            f"{size}: leave it out"
        )
    if arguments.tokenizer not in ("bytes", "bpe") and size is not None:
        raise ValueError(
            f"--vocab-size is that of --tokenizer {arguments.tokenizer}, but it is given as {size}: leave it out"
        )
    for option, value, least in (
        ("--shard-tokens", arguments.shard_tokens, 1),
        ("--document-bytes", arguments.document_bytes, 4),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, but it is {value}: raise it")


def _check_split(*, train: int, heldout: int) -> None:
    if not train or not heldout:
        raise ValueError(
            f"both sets need documents, but there are {train} for training and {heldout} held out (5 % by hash of "
            "their text): add text, or cut it into smaller documents with --document-bytes"
        )


def parse_arguments(command_line: Sequence[str] | None) -> tuple[Arguments, int]:
    """The arguments, and the number of processes."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Write text as shards for training and evaluation (5 %, by hash of the document).",
    )
    add = parser.add_argument
    add(
        "--source",
        nargs="+",
        default=[STDLIB],
        metavar="PATH",
        help=f"files or folders of text, .jsonl, .gz or .zst of these; {STDLIB} (default): the source of this Python",
    )
    add("--out", required=True, metavar="DIR", help="gets DIR/train and DIR/heldout")
    add("--tokenizer", default="bpe", metavar="bytes|bpe|PATH", help="PATH: a byte-level tokenizer.json (default: bpe)")
    add("--vocab-size", type=int, metavar="N", help="ids of --tokenizer bpe, the end token among them")
    add("--workers", type=int, default=min(32, len(os.sched_getaffinity(0))), metavar="N", help="tokenising processes")
    add("--shard-tokens", type=int, metavar="N", help="tokens per shard (default: about 64 shards)")
    add("--seed", type=int, default=0, help="of the order of the files (default: 0)")
    add("--text-field", default="text", metavar="NAME", help="the field of .jsonl lines (default: text)")
    add("--document-bytes", type=int, default=1 << 20, metavar="N", help="longer documents are cut (default: 1048576)")
    options = vars(parser.parse_args(command_line))
    workers = max(1, options.pop("workers"))
    return Arguments(sources=tuple(options.pop("source")), **options), workers


def main(command_line: Sequence[str] | None = None) -> int:
    """The command: 0 when the shards are there, 1 with one sentence when they cannot be."""
    arguments, workers = parse_arguments(command_line)
    try:
        prepare(arguments, workers=workers, console=Console(highlight=False, soft_wrap=True))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        remedy = "make room or correct the permissions, then run the command again"
        print(f"error: {arguments.out} cannot be prepared ({error}): {remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
