"""The commands `python -m train.checkpoint list|verify|prune|export`: what a person does with the checkpoints of a run.

Owns the command line and what is printed. What is found is train/inventory.py's, an export's files train/export.py's. Called by
train/checkpoint.py. One process; only prune and export write.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from train.checkpoint_folder import PARTIAL, discard
from train.export import write_export
from train.inventory import Found, damages, inventory, places, prunable
from train.run_lock import hold
from train.source import CheckpointSource, open_source

WIDE = 200  # columns where there is no terminal: no line of a table is broken in a file or a pipe


def main(command_line: Sequence[str] | None = None) -> int:
    """0 when done; 1 where something is damaged or the world failed, 2 where the user must change something."""
    logging.basicConfig(format="%(message)s")
    args = _parse(command_line)
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    try:
        return args.run(args, console)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _parse(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.checkpoint", description="Look at, check, thin out or export the checkpoints of a run."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("dir", type=Path, metavar="DIR", help="a run folder, or its folder of checkpoints")
        added.set_defaults(run=run)
        return added

    listing = command("list", _list, "the checkpoints: step, size, who wrote them, what is wrong with them")
    listing.add_argument("--verify", action="store_true", help="read every byte, not only manifests and lengths")
    verify = command("verify", _verify, "compare every file with its checksum; exit code 1 if one is damaged")
    verify.add_argument("--step", type=int, metavar="N", help="only the checkpoint of this step")
    prune = command("prune", _prune, "remove old checkpoints; a run that is writing here keeps this command out")
    prune.add_argument("--keep", type=_positive, required=True, metavar="N", help="the newest N stay")
    prune.add_argument("--every", type=_positive, metavar="M", help="steps that are multiples of M stay too")
    prune.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    export = command("export", _export, "write the model in one folder: safetensors, config, tokenizer")
    export.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    export.add_argument("--step", type=int, metavar="N", help="that checkpoint (default: the newest whole one)")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="routers stay float32")
    return parser.parse_args(command_line)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but it is {text}")
    return int(text)


def _list(args: argparse.Namespace, console: Console) -> int:
    folder = places(args.dir).checkpoints
    found = inventory(folder)
    damaged = {one.path: [one.problem] if one.problem else [] for one in found}
    if args.verify:
        damaged = _damages(found, console)
    table = Table(box=None, pad_edge=False)
    for title in ("step", "position", "bytes", "files"):
        table.add_column(title, justify="right")
    for title in ("written by", "latest", "state"):
        table.add_column(title)
    for one in found:
        position = "?" if one.position is None else f"{one.position:,}"
        mark, state = "<-" if one.meant else "", "damaged" if damaged[one.path] else "whole"
        table.add_row(f"{one.step:,}", position, f"{one.size:,}", str(one.num_files), one.layout or "?", mark, state)
    console.print(table)
    for sentences in damaged.values():
        for sentence in sentences:
            print(f"damaged: {sentence}")
    for leftover in sorted(folder.glob(f"step_*{PARTIAL}")):
        print(f"{leftover.name} is being written, or a killed save left it: the next save removes it")
    if not args.verify:
        print("manifests and lengths were checked: --verify compares every byte")
    return 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    folder = places(args.dir).checkpoints
    every = inventory(folder)
    chosen = every if args.step is None else [_of_step(every, args.step, folder)]
    damaged = _damages(chosen, console)
    for one in chosen:
        for sentence in damaged[one.path]:
            print(f"damaged: {sentence}")
        if not damaged[one.path]:
            print(f"whole: {one.path}, {one.num_files} files, {one.size:,} bytes")
    print(_what_a_resume_uses(every, damaged))
    return 1 if any(damaged.values()) else 0


def _what_a_resume_uses(every: list[Found], damaged: dict[Path, list[str]]) -> str:
    in_order = [one for one in every if one.meant] + [one for one in reversed(every) if not one.meant]
    for one in in_order:
        if not (damaged[one.path] if one.path in damaged else damages(one.path)):
            return f"a resume would use {one.path}"
    return "a resume would find no whole checkpoint, and refuse to begin anew over these"


def _prune(args: argparse.Namespace, console: Console) -> int:
    where = places(args.dir)
    if args.dry_run:
        _say_what_goes(prunable(inventory(where.checkpoints), keep=args.keep, every=args.every), "would go")
        return 0
    # a run holds this lock from before it reads its checkpoints to its end: nothing is written or read here meanwhile
    with hold(where.run):
        goes = prunable(inventory(where.checkpoints), keep=args.keep, every=args.every)
        for one in goes:
            discard(one.path)  # its name goes first: a kill leaves a .partial, which no reader looks at
        for leftover in where.checkpoints.glob(f"step_*{PARTIAL}"):
            discard(leftover)
    _say_what_goes(goes, "removed")
    return 0


def _say_what_goes(goes: list[Found], verb: str) -> None:
    for one in goes:
        print(f"{verb}: {one.path}, {one.size:,} bytes")
    print(f"{verb}: {len(goes)} checkpoints, {sum(one.size for one in goes):,} bytes")


def _export(args: argparse.Namespace, console: Console) -> int:
    folder = args.dir
    if args.step is not None:
        checkpoints = places(args.dir).checkpoints
        folder = _of_step(inventory(checkpoints), args.step, checkpoints).path
    source = open_source(folder, setting="DIR")
    if not isinstance(source, CheckpointSource):
        raise ValueError(f"DIR must be a run folder, but {args.dir} is an export already: copy it")
    config = write_export(args.out, source, dtype=args.dtype)
    size = sum(entry.bytes for entry in config.files.values())
    print(
        f"{args.out}: step {source.step} of {source.path}, {len(source.shapes)} tensors, {size:,} bytes, {args.dtype}"
    )
    return 0


def _of_step(found: list[Found], step: int, folder: Path) -> Found:
    for one in found:
        if one.step == step:
            return one
    steps = ", ".join(str(one.step) for one in found)
    raise ValueError(
        f"--step must be the step of a checkpoint, but it is {step} and {folder} has {steps}: choose one of them"
    )


def _damages(chosen: list[Found], console: Console) -> dict[Path, list[str]]:
    """By checkpoint a sentence for each damaged file. A terminal sees how far the reading is."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(one.size for one in chosen))
        found = {}
        for one in chosen:
            progress.update(task, description=one.path.name)
            found[one.path] = damages(one.path, tell=lambda size: progress.advance(task, size))
    return found
