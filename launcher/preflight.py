"""The program that looks at every node before a job: prints a table, a sentence for each problem, and says which nodes to leave out.

Owns the command line, the order of the checks, and the exit codes; what is looked at is train/node_facts.py's, what must hold
train/node_verdict.py's and train/node_network.py's. Started by a batch script with srun (one task per node), by mpirun, or by itself.
"""

import argparse
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.bandwidth import Rate
    from parallel.config import ProcessInfo
    from train.config import Config
    from train.node_facts import NodeFacts
    from train.node_meeting import Meeting
    from train.node_verdict import Problem, Verdict

ROOT = Path(__file__).resolve().parents[1]
MPI = ("openmpi", "mpich")

DESCRIPTION = "Checks every node before a job, and says which ones to leave out."
EPILOG = """\
start it (on each node of a job, the same by MPI, this machine alone):
  srun --ntasks-per-node=1 python launcher/preflight.py --config configs/switchall_1b.yaml
  mpirun -n 2 python launcher/preflight.py --config configs/switchall_1b.yaml
  python launcher/preflight.py --config configs/switchall_1b.yaml

Exit code: 0 all nodes are good; 1 some are bad: the last line is `bad nodes: n2,n5`; 2 the command, the config or the environment must
be changed; 3 what is wrong is wrong everywhere, so that leaving out nodes would not help. docs/preflight.md lists what must hold.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: see EPILOG. Every node ends with the same one; a node that is told no verdict in time ends with 1."""
    _put_this_clone_first()
    rank = 0
    try:
        # Not at the top: they are found only after the line above, and --help must not wait for them.
        args = _parse(argv)
        from launcher.environment import read_environment
        from launcher.imports import check_imports
        from launcher.main import is_sentence, report

        try:
            check_imports(ROOT)
            info = read_environment(os.environ)
            rank = info.rank
            _check_start(info)
            from train.config import load_config

            config = load_config(args.config, args.set)
        except ValueError as error:
            if not is_sentence(error):
                traceback.print_exception(error)
            report(str(error), rank)
            # What only another node cannot read is that node's fault, and the first one names it. srun ends with the highest code.
            return 1 if rank else 2
        try:
            return _preflight(config, info, args)
        except (ValueError, RuntimeError, OSError) as error:
            if not is_sentence(error):
                traceback.print_exception(error)
            report(f"{info.node}: {error}", rank)
            return 1
    except ModuleNotFoundError as error:
        traceback.print_exception(error)
        print(f"error: {error}: start with .venv/bin/python, which make sets up", file=sys.stderr, flush=True)
        return 1


def _put_this_clone_first() -> None:
    """`python launcher/preflight.py` puts launcher/ first on sys.path; the packages lie one folder up."""
    if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == ROOT / "launcher":
        del sys.path[0]
    if str(ROOT) not in sys.path[:1]:
        sys.path.insert(0, str(ROOT))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launcher/preflight.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for launcher/main.py")
    parser.add_argument("--gpus", type=_count, metavar="N", help="GPUs of each node; default: what SLURM promised")
    for flag, default, help_text in (
        ("--min-gpu-gb", None, "GB that must be free on each GPU; default: 90 %% of its memory"),
        ("--min-host-gb", 1.0, "GB of host memory that must be free; default: 1"),
        ("--min-network-gb", None, "GB/s to a neighbour that must be reached; default: half of what is usual here"),
        (
            "--bandwidth-mb",
            64.0,
            "MB that two neighbours send each other, several times; 0 measures nothing; default: 64",
        ),
        ("--patience-s", 120.0, "seconds to wait for a node, a check or a pair of nodes; default: 120"),
    ):
        parser.add_argument(flag, type=_size, default=default, metavar="X", help=help_text)
    parser.add_argument(
        "--bad-nodes-file", type=Path, metavar="FILE", help="gets the bad nodes, as n2,n5; empty if there are none"
    )
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, but it is {text}")
    return int(text)


def _size(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number from 0 on, but it is {text}")
    return number


def _check_start(info: "ProcessInfo") -> None:
    if info.world_size > 1 and info.launcher not in ("srun", *MPI):
        raise ValueError(
            f"the nodes must be started with srun or mpirun, but {info.launcher} has started {info.world_size} processes: use srun "
            "--ntasks-per-node=1"
        )
    if info.launcher == "srun" and info.local_world_size > 1:
        raise ValueError(
            f"srun must start one task on each node, but there are {info.local_world_size} on {info.node}: add --ntasks-per-node=1"
        )


def _preflight(config: "Config", info: "ProcessInfo", args: argparse.Namespace) -> int:
    """One node's part: tell the facts, hear those of the others, measure if all are good so far, and end as was decided."""
    from launcher.environment import visible_gpus
    from train.node_facts import find_facts, from_json
    from train.node_meeting import seen_marks
    from train.node_verdict import Limits, conclude, judge

    patience_s = args.patience_s
    # GPUs of a run that uses none are nobody's concern.
    gpus = 0 if args.gpus is None and "cpu" in (config.run.device, os.environ.get("DS_ACCELERATOR")) else args.gpus
    meeting, folder = _meet(Path(config.run.dir).parent, info, patience_s)
    try:
        mark = folder / f"mark-{info.rank}"
        visible = () if gpus == 0 else visible_gpus(os.environ)
        mine = find_facts(config, info, mark=mark, visible=visible, limit_s=patience_s / 2)
        told = meeting.gather("facts", mine.to_json(), patience_s=patience_s)
        facts, strangers = from_json(told)
        seen = meeting.gather(
            "seen", seen_marks(folder, facts, patience_s=patience_s / 2), ranks=facts, patience_s=patience_s
        )
        names = _names(facts, info)
        plan, store, problems = None, None, []
        if meeting.leads(facts):
            _remove_earlier(folder, info)
            limits = Limits(gpus, args.min_gpu_gb, args.min_host_gb, patience_s)
            place = str(folder.parent.resolve())
            problems = judge(facts, seen, names=names, limits=limits, place=place, strangers=strangers)
            backend = "nccl" if gpus != 0 and all(node.gpus for node in facts.values()) else "gloo"
            if not problems and info.world_size > 1 and args.bandwidth_mb > 0:
                store, problems = _open_store(info, patience_s)
            plan = {"by": info.rank, "backend": backend if store is not None else None}
        plan = meeting.settle("plan", plan, patience_s=2 * patience_s)
        leads, rates = plan["by"] == info.rank, {}
        if plan["backend"] is not None:
            rates = _measure(meeting, info, args, plan["backend"])
        verdict = None
        if leads:
            problems += _judge_network(rates, names, args)
            concluded = conclude(problems, size=info.world_size)
            # Before the others hear of it and end: srun may kill what is left of a step once a task ends badly.
            _print(facts, rates, concluded, names, args.bad_nodes_file)
            verdict = {"exit_code": concluded.exit_code}
        return meeting.settle("verdict", verdict, patience_s=2 * patience_s)["exit_code"]
    finally:
        meeting.leave()


def _meet(shared: Path, info: "ProcessInfo", patience_s: float) -> tuple["Meeting", Path]:
    """The meeting, and the folder in the shared folder that is this start's alone."""
    if info.launcher in MPI:
        from parallel.mpi import MpiMeeting

        meeting = MpiMeeting(rank=info.rank, size=info.world_size)
        name = meeting.settle("name", f"{socket.gethostname()}-{os.getpid()}", patience_s=patience_s)
        folder = shared / f".preflight-{name}"
        return meeting.using(folder), folder
    from train.node_meeting import FolderMeeting

    name = f"{info.job}.{info.step}-{info.restarts}" if info.launcher == "srun" else f"{info.node}-{os.getpid()}"
    folder = shared / f".preflight-{name}"
    return FolderMeeting(folder, rank=info.rank, size=info.world_size), folder


def _remove_earlier(folder: Path, info: "ProcessInfo") -> None:
    """What starts of this job before the present one have left: they were killed while they met."""
    for left in folder.parent.glob(f".preflight-{info.job}.*-*"):
        if int(left.name.rpartition("-")[2]) < info.restarts:
            shutil.rmtree(left, ignore_errors=True)


def _names(facts: "Mapping[int, NodeFacts]", info: "ProcessInfo") -> list[str]:
    """A name for each rank, of its own where mpirun has started several on one machine."""
    listed = info.nodes if len(info.nodes) == info.world_size else [f"rank {rank}" for rank in range(info.world_size)]
    names = [facts[rank].node if rank in facts else listed[rank] for rank in range(info.world_size)]
    return [f"{name}:{rank}" if names.count(name) > 1 else name for rank, name in enumerate(names)]


def _open_store(info: "ProcessInfo", patience_s: float) -> "tuple[Any, list[Problem]]":
    """Where the pairs meet: at the address and port that the run itself will use."""
    from parallel.bandwidth import open_store
    from train.node_network import CHECK
    from train.node_verdict import Problem

    try:
        return open_store(info.master_addr, info.master_port, seconds=patience_s), []
    except RuntimeError as error:
        return None, [Problem(info.rank, CHECK, f"it must not fail, but on {info.node} {error}")]


def _measure(
    meeting: "Meeting", info: "ProcessInfo", args: argparse.Namespace, backend: str
) -> "dict[tuple[int, int], Rate]":
    """The figures of all pairs. A round has `--patience-s` seconds, counted from the first: one that hangs delays no later one."""
    from parallel.bandwidth import Link, Rate, measure, ring_rounds
    from train.node_network import join_rates

    rounds = ring_rounds(info.world_size)
    began = time.monotonic()
    mine: list[dict[str, Any]] = []
    for number, pairs in enumerate(rounds, start=1):
        for pair in pairs:
            if info.rank in pair:
                link = Link(
                    ranks=pair,
                    rank=info.rank,
                    backend=backend,  # pyright: ignore[reportArgumentType]
                    local_rank=info.local_rank,
                    megabytes=args.bandwidth_mb,
                    address=info.master_addr,
                    port=info.master_port,
                    seconds=began + number * args.patience_s - time.monotonic(),
                )
                mine.append({"pair": pair, "rate": asdict(measure(link))})
    told = meeting.gather("rates", mine, patience_s=(len(rounds) + 1) * args.patience_s)
    by_rank = {rank: {tuple(one["pair"]): Rate(**one["rate"]) for one in ones} for rank, ones in told.items()}
    return join_rates(by_rank, [pair for pairs in rounds for pair in pairs])


def _judge_network(
    rates: "dict[tuple[int, int], Rate]", names: Sequence[str], args: argparse.Namespace
) -> "list[Problem]":
    from train.node_network import judge_network

    return judge_network(rates, names=names, min_network_gb=args.min_network_gb) if rates else []


def _print(
    facts: "Mapping[int, NodeFacts]",
    rates: "Mapping[tuple[int, int], Rate]",
    verdict: "Verdict",
    names: Sequence[str],
    bad_nodes_file: Path | None,
) -> None:
    from train.node_report import print_report
    from train.run_folder import replace_file

    bad = ",".join(names[rank] for rank in verdict.bad)
    if bad_nodes_file is not None:
        replace_file(bad_nodes_file, f"{bad}\n" if bad else "")
    print_report(facts, rates, verdict, names=names)
    last = {0: "all nodes are good", 1: f"bad nodes: {bad}", 3: "leaving out nodes would not help: see above"}
    print(last[verdict.exit_code], flush=True)


if __name__ == "__main__":
    sys.exit(main())
