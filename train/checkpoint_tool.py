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

from train.checkpoint_folder import LOOKS, PARTIAL, discard, latest_problem, say_taken_away
from train.export import ExportConfig, write_export
from train.inventory import Found, checkpoints_of, damages, inventory, prunable
from train.run_lock import hold
from train.source import CheckpointSource, Source, read_from

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
    except OSError as error:
        print(f"error: {error.filename} cannot be read ({error.strerror}): let this user read it", file=sys.stderr)
        return 1


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
    folder = checkpoints_of(args.dir)
    if args.verify:
        found, damaged = _read_all(folder, console)
    else:
        found = inventory(folder)
        damaged = {one.path: [one.problem] if one.problem else [] for one in found}
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
    problem = latest_problem(folder) if found else None
    for sentence in [*(sentence for one in found for sentence in damaged[one.path]), *([problem] if problem else [])]:
        print(f"damaged: {sentence}")
    for leftover in sorted(folder.glob(f"step_*{PARTIAL}")):
        print(f"{leftover.name} is being written, or a killed save left it: the next save removes it")
    if not args.verify:
        print("manifests and lengths were checked: --verify compares every byte")
        return 0
    return 1 if problem or any(damaged.values()) else 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    folder = checkpoints_of(args.dir)
    chosen, damaged = _read_all(folder, console, step=args.step)
    if not chosen:
        print(f"{folder} holds no checkpoint yet")
        return 0
    for one in chosen:
        for sentence in damaged[one.path]:
            print(f"damaged: {sentence}")
        if not damaged[one.path]:
            print(f"whole: {one.path}, {one.num_files} files, {one.size:,} bytes")
    problem = latest_problem(folder)
    if problem:
        print(f"damaged: {problem}")
    print(_what_a_resume_uses(inventory(folder), damaged))
    return 1 if problem or any(damaged.values()) else 0


def _what_a_resume_uses(every: list[Found], damaged: dict[Path, list[str]]) -> str:
    in_order = [one for one in every if one.meant] + [one for one in reversed(every) if not one.meant]
    for one in in_order:
        if (damaged[one.path] if one.path in damaged else damages(one.path)) == []:
            return f"a resume would use {one.path}"
    return "a resume would find no whole checkpoint, and refuse to begin anew over these"


def _prune(args: argparse.Namespace, console: Console) -> int:
    folder = checkpoints_of(args.dir)
    if args.dry_run:
        _say_what_goes(prunable(inventory(folder), keep=args.keep, every=args.every), "would go")
        return 0
    # a run holds this lock from before it reads its checkpoints to its end: nothing is written or read here meanwhile
    with hold(folder, leave_file=False):
        goes = prunable(inventory(folder), keep=args.keep, every=args.every)
        gone = [
            one for one in goes if discard(one.path)
        ]  # its name first: a kill leaves a .partial, which no reader looks at
        stays = [one.path for one in goes if one.path.exists()]
        stays += [leftover for leftover in folder.glob(f"step_*{PARTIAL}") if not discard(leftover)]
    _say_what_goes(gone, "removed")
    if stays:
        raise RuntimeError(
            f"{len(stays)} of {folder} must be removed, but could not be, the first of them {stays[0].name} (the reason is "
            "above): give this user the right to write there, then prune again"
        )
    return 0


def _say_what_goes(goes: list[Found], verb: str) -> None:
    for one in goes:
        print(f"{verb}: {one.path}, {one.size:,} bytes")
    print(f"{verb}: {len(goes)} checkpoints, {sum(one.size for one in goes):,} bytes")


def _export(args: argparse.Namespace, console: Console) -> int:
    folder = args.dir
    if args.step is not None:
        checkpoints = checkpoints_of(args.dir)
        folder = _of_step(inventory(checkpoints), args.step, checkpoints).path

    def write(source: Source) -> tuple[CheckpointSource, ExportConfig]:
        if not isinstance(source, CheckpointSource):
            raise ValueError(f"DIR must be a run folder, but {args.dir} is an export already: copy it")
        return source, write_export(args.out, source, dtype=args.dtype)

    source, config = read_from(folder, write, setting="DIR")
    size = sum(entry.bytes for entry in config.files.values())
    print(
        f"{args.out}: step {source.step} of {source.path}, {len(source.shapes)} tensors, {size:,} bytes, {args.dtype}"
    )
    return 0


def _read_all(folder: Path, console: Console, *, step: int | None = None) -> tuple[list[Found], dict[Path, list[str]]]:
    """Every checkpoint, or that of `step`, and by its path a sentence for each damaged file.

    Beside a run that goes on: those that are there at the end. What was taken away while it was read is looked for again.

    Raises:
        RuntimeError: the run is faster at each look.
    """
    damaged: dict[Path, list[str]] = {}
    for _ in range(LOOKS):
        every = inventory(folder)
        chosen = every if step is None else [_of_step(every, step, folder)]
        found = _damages([one for one in chosen if one.path not in damaged], console)
        damaged |= {path: sentences for path, sentences in found.items() if sentences is not None}
        if None not in found.values():
            return chosen, damaged
    raise RuntimeError(say_taken_away(folder))


def _of_step(found: list[Found], step: int, folder: Path) -> Found:
    for one in found:
        if one.step == step:
            return one
    steps = ", ".join(str(one.step) for one in found)
    raise ValueError(
        f"--step must be the step of a checkpoint, but it is {step} and {folder} has {steps}: choose one of them"
    )


def _damages(chosen: list[Found], console: Console) -> dict[Path, list[str] | None]:
    """By checkpoint a sentence for each damaged file; None if it was taken away. A terminal sees how far the reading is."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(one.size for one in chosen))
        found = {}
        for one in chosen:
            progress.update(task, description=one.path.name)
            found[one.path] = damages(one.path, tell=lambda size: progress.advance(task, size))
    return found
