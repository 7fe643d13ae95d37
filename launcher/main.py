"""The program that deepspeed, torchrun and plain python start: reads argv, environment and config, and hands over to
train/run.py.

Owns the command line, the exit codes and how an error looks; trains nothing itself. Run from a clone, from any folder.
"""

import argparse
import math
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.dry_run import Plan

ROOT = Path(__file__).resolve().parents[1]

# The last column is text: the rates' defaults are those of parallel/predict.py and train/dry_run.py, which a run does not import.
PLAN_FLAGS = (
    ("--nodes", int, "N", "machines", "those of this start"),
    ("--gpus-per-node", int, "G", "processes on each", "those of this start"),
    ("--nvlink-gb", float, "GB", "GB/s that a process sends inside its node", "450"),
    ("--network-gb", float, "GB", "GB/s that a process sends to other nodes", "50"),
    ("--tflops", float, "T", "TFLOP/s that a process sustains", "300"),
    ("--disk-gb", float, "GB", "GB/s that a process writes of a checkpoint", "1"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 the world failed (RuntimeError, OSError), 2 the user must change something (ValueError), 85 ended early by a
    signal (train/preemption.py). Ctrl-C ends the process by that very signal.
    """
    _put_this_clone_first()
    rank = 0
    try:
        # Not at the top: these are found only after the line above, and a ModuleNotFoundError deserves a sentence too.
        from launcher.imports import check_imports

        check_imports(ROOT)
        from train.preemption import EXIT_CODE, Preemption

        preemption = Preemption()
        preemption.listen()  # before what takes seconds to import: a signal may come in them
        from launcher.parent import watch_launcher

        watch_launcher(os.environ, preemption.ask)
        from launcher.environment import choose_device, read_environment
        from train.config import load_config

        args = _parse(argv)
        _check_plan(args)
        info = read_environment(os.environ)
        rank = info.rank
        config = load_config(args.config, args.set, say=lambda sentence: _say(sentence, rank))
        device = choose_device(config.run.device, os.environ)
        # DeepSpeed looks for an accelerator when it is first imported; left alone it may pick another than the run's.
        os.environ["DS_ACCELERATOR"] = device
        config = config.model_copy(update={"run": config.run.model_copy(update={"device": device})})

        if args.dry_run:
            from train.dry_run import dry_run

            dry_run(config, info, _plan(args))
        else:
            from train import run

            if run.run(config, info, preemption) == "preempted":
                preemption.ignore()
                return EXIT_CODE
    except (ValueError, RuntimeError, OSError) as error:
        if not is_sentence(error):
            traceback.print_exception(error)
        report(str(error), rank)
        return 2 if isinstance(error, ValueError) else 1
    except ModuleNotFoundError as error:
        traceback.print_exception(error)
        report(f"{error}: start with .venv/bin/python, which make sets up, or install requirements.lock", rank)
        return 1
    except KeyboardInterrupt:
        report("interrupted: the same command goes on from the last whole checkpoint", rank)
        # As Python would, but at once: its own end waits for a thread that writes a checkpoint, or aborts with it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(128 + signal.SIGINT)  # process 1 of a container does not end by its own signals
    return 0


def _put_this_clone_first() -> None:
    """`python launcher/main.py` puts launcher/ first on sys.path; the packages lie one folder up."""
    if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == ROOT / "launcher":
        del sys.path[0]
    if str(ROOT) not in sys.path[:1]:
        sys.path.insert(0, str(ROOT))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from launcher.usage import DESCRIPTION, EXAMPLES, key_table

    parser = argparse.ArgumentParser(
        prog="launcher/main.py",
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}\n{key_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, for instance configs/tiny_cpu.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the config; repeatable"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, the model's size, and bytes, seconds and memory of a step; train nothing",
    )
    planning = parser.add_argument_group("with --dry-run, the processes and rates to predict for")
    for flag, kind, metavar, help_text, default in PLAN_FLAGS:
        planning.add_argument(flag, type=kind, metavar=metavar, help=f"{help_text}; default: {default}")
    # DeepSpeed's launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _check_plan(args: argparse.Namespace) -> None:
    """ValueError where a flag of the plan stands without --dry-run, or is not above 0."""
    for flag, *_ in PLAN_FLAGS:
        value = getattr(args, _name(flag))
        if value is None:
            continue
        if not args.dry_run:
            raise ValueError(
                f"{flag} belongs to --dry-run, but it is {value} and --dry-run is missing: add --dry-run or remove {flag}"
            )
        if not 0 < value < math.inf:
            raise ValueError(f"{flag} must be above 0 and finite, but it is {value}: write another number")


def _plan(args: argparse.Namespace) -> "Plan":
    from parallel.predict import Hardware
    from train.dry_run import Plan

    rates = {_name(flag): getattr(args, _name(flag)) for flag in ("--nvlink-gb", "--network-gb", "--tflops")}
    hardware = Hardware(**{name: value for name, value in rates.items() if value is not None})
    disk = {} if args.disk_gb is None else {"disk_gb": args.disk_gb}
    return Plan(args.nodes, args.gpus_per_node, hardware, **disk)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def is_sentence(error: Exception) -> bool:
    """True for an error that our own code raised: written for the user. Any other is a bug and shows where it was."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames[-1].name == "raise_together" and isinstance(error.__cause__, Exception):
        return is_sentence(error.__cause__)  # what failed on this rank and was told to all
    raised = Path(frames[-1].filename)
    return raised.is_relative_to(ROOT) and not raised.is_relative_to(ROOT / ".venv")


def _say(sentence: str, rank: int) -> None:
    """Once for all ranks, and so that the output of a dry run stays YAML."""
    if rank == 0:
        print(f"# {sentence}", flush=True)


def report(sentence: str, rank: int) -> None:
    """On every rank, because the launcher kills the others as soon as one has ended."""
    print(f"error{f' (rank {rank})' if rank else ''}: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
