"""Which nodes are bad, from what all of them tell: functions of facts alone, without a file, a clock or another process.

Owns what must hold, the sentences, and who is to blame where nodes differ: what most nodes have is right, and on a tie what the lowest
rank has. How the facts are found is train/node_facts.py's. Called by launcher/preflight.py on the node that decides.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from train.node_facts import NodeFacts

MAX_SKEW_S = 5.0
FREE_SHARE = 0.9  # of a GPU's memory, where no number is asked for: what the driver itself takes is below 2 %
# Of a node alone these are not the node's fault: another one would read the same files.
OF_THE_FILES = frozenset({"commit", "packages", "folder", "shards"})


@dataclass(frozen=True)
class Limits:
    """What is asked of each node. Memory in GB (1e9 bytes); None: see `judge`. gpus: None, what the starter promised."""

    gpus: int | None = None
    min_gpu_gb: float | None = None
    min_host_gb: float = 1.0
    patience_s: float = 120.0


@dataclass(frozen=True)
class Problem:
    """rank: the node's. everywhere: no choice of nodes would mend it."""

    rank: int
    check: str
    sentence: str
    everywhere: bool = False


@dataclass(frozen=True)
class Verdict:
    """exit_code: 0 all good, 1 the ranks in `bad` must be left out, 3 leaving out nodes would not help."""

    exit_code: int
    bad: tuple[int, ...]
    problems: tuple[Problem, ...]


def judge(
    facts: Mapping[int, NodeFacts],
    seen: Mapping[int, Sequence[int]],
    *,
    names: Sequence[str],
    limits: Limits,
    place: str,
    strangers: Sequence[int] = (),
) -> list[Problem]:
    """Everything but the network. names: of all nodes by rank, of which `facts` has those that told theirs.

    seen: the ranks whose files in the shared folder `place` a node sees. strangers: ranks that told what is no facts.
    """
    problems = [
        Problem(
            rank,
            "commit",
            f"it must be the same on all nodes, but {names[rank]} tells its facts as another version of this program does: check out the "
            "same commit, with the same changes, on all nodes",
        )
        for rank in strangers
    ]
    problems += _silent_ones(facts.keys() | set(strangers), names, place, limits.patience_s)
    for rank, node in facts.items():
        for check, sentence in node.problems.items():
            problems.append(Problem(rank, check, f"it must not fail, but on {names[rank]} {sentence}"))
    commits = {rank: node.commit for rank, node in facts.items() if "commit" not in node.problems}
    versions = {rank: node.versions for rank, node in facts.items() if "commit" not in node.problems}
    shards = {rank: node.shards for rank, node in facts.items() if "shards" not in node.problems}
    problems += _odd_ones("commit", commits, names, "check out the same commit, with the same changes, on all nodes")
    problems += _odd_ones("packages", versions, names, "install requirements.lock there")
    problems += _odd_ones("shards", shards, names, "give all nodes the same shards")
    problems += _gpu_problems(facts, names, limits)
    for rank, node in facts.items():
        if node.host_gb is not None and node.host_gb < limits.min_host_gb:
            problems.append(
                Problem(
                    rank,
                    "host memory",
                    f"--min-host-gb must be free, but {names[rank]} has {node.host_gb:g} GB and --min-host-gb is {limits.min_host_gb:g}: "
                    "end what else runs there",
                )
            )
    problems += _clock_problems(facts, names)
    problems += _folder_problems(facts, seen, names, place)
    return problems


def _silent_ones(told: Set[int], names: Sequence[str], place: str, patience_s: float) -> Iterator[Problem]:
    """The nodes that told nothing, if most did: of two halves that do not hear each other, nobody knows which has the right folder."""
    halves = 2 * len(told) <= len(names)
    who, remedy = "the others see", "leave it out, or mount the folder there"
    if halves:
        who, remedy = (
            f"{len(told)} of {len(names)} see",
            "mount the shared folder on all nodes: which half has another cannot be told",
        )
    for rank in range(len(names)):
        if rank not in told:
            yield Problem(
                rank,
                "folder",
                f"each node must tell its facts, but {names[rank]} has written nothing within {patience_s:g} s: it cannot see the folder "
                f"{place} that {who}, or starts no program; {remedy}",
                everywhere=halves,
            )


def conclude(problems: Sequence[Problem], *, size: int) -> Verdict:
    """What follows for a job of `size` nodes."""
    ranks: dict[str, set[int]] = {}
    for problem in problems:
        ranks.setdefault(problem.check, set()).add(problem.rank)
    hopeless = any(problem.everywhere for problem in problems) or any(
        len(found) == size and (size > 1 or check in OF_THE_FILES) for check, found in ranks.items()
    )
    bad = tuple(sorted({problem.rank for problem in problems}))
    return Verdict(3 if hopeless else 1 if bad else 0, () if hopeless else bad, tuple(problems))


def _odd_ones(check: str, values: Mapping[int, Any], names: Sequence[str], remedy: str) -> Iterator[Problem]:
    """The nodes that have not what most have. Where each of three or more has its own, nobody knows which is right."""
    if not values:
        return
    right = _commonest(values)
    count = sum(value == right for value in values.values())
    for rank, value in values.items():
        if value != right:
            mine, theirs = _difference(value, right)
            yield Problem(
                rank,
                check,
                f"it must be the same on all nodes, but {names[rank]} has {mine} and {count} of {len(values)} nodes have {theirs}: "
                f"{remedy}",
                everywhere=count == 1 and len(values) > 2,
            )


def _commonest(values: Mapping[int, Any]) -> Any:
    """What most ranks have; on a tie, what the lowest of their ranks has."""
    texts = {rank: json.dumps(value, sort_keys=True) for rank, value in sorted(values.items())}
    counts = Counter(texts.values())
    most = max(counts.values())
    return next(values[rank] for rank, text in texts.items() if counts[text] == most)


def _difference(value: Any, right: Any) -> tuple[str, str]:
    if not isinstance(value, dict):
        return str(value), str(right)
    keys = [key for key in value.keys() | right.keys() if value.get(key) != right.get(key)]
    told = [", ".join(f"{key} {str(side.get(key))[:20]}" for key in sorted(keys)) for side in (value, right)]
    return told[0], told[1]


def _gpu_problems(facts: Mapping[int, NodeFacts], names: Sequence[str], limits: Limits) -> Iterator[Problem]:
    readable = {rank: node for rank, node in facts.items() if "GPUs" not in node.problems}
    if limits.gpus == 0 or not readable:
        return
    usual = _commonest({rank: len(node.gpus) for rank, node in readable.items()})
    for rank, node in readable.items():
        asked, who = usual, "most nodes have"
        if limits.gpus is not None:
            asked, who = limits.gpus, "--gpus is"
        elif node.promised is not None:
            asked, who = node.promised, "SLURM promised"
        if len(node.gpus) < asked:
            yield Problem(
                rank,
                "GPUs",
                f"the GPUs that are asked for must be there, but {names[rank]} has {len(node.gpus)} and {who} {asked}: repair the node, or "
                "correct --gpus",
            )
        yield from _memory_problems(rank, node, names[rank], limits.min_gpu_gb)
        for gpu in node.gpus:
            if gpu.uncorrected:
                yield Problem(
                    rank,
                    "ECC",
                    f"a GPU must have 0 uncorrected memory errors since its driver was loaded, but GPU {gpu.index} of {names[rank]} has "
                    f"{gpu.uncorrected}: reset or replace it",
                )
    modes = {
        rank: sorted({gpu.ecc for gpu in node.gpus if gpu.ecc is not None})
        for rank, node in readable.items()
        if any(gpu.ecc is not None for gpu in node.gpus)
    }
    said = {rank: " and ".join("Enabled" if mode else "Disabled" for mode in found) for rank, found in modes.items()}
    yield from _odd_ones("ECC", said, names, "set the same mode on all GPUs (nvidia-smi --ecc-config)")


def _memory_problems(rank: int, node: NodeFacts, name: str, min_gpu_gb: float | None) -> Iterator[Problem]:
    for gpu in node.gpus:
        if gpu.free_gb is None or gpu.total_gb is None:
            continue
        least = FREE_SHARE * gpu.total_gb if min_gpu_gb is None else min_gpu_gb
        limit = f"{FREE_SHARE:.0%} of its {gpu.total_gb:.1f} GB" if min_gpu_gb is None else "--min-gpu-gb"
        if gpu.free_gb < least:
            users = f" ({'; '.join(gpu.processes)})" if gpu.processes else " (no process of it is seen from here)"
            yield Problem(
                rank,
                "GPU memory",
                f"{limit} must be free, but GPU {gpu.index} of {name} has {gpu.free_gb:.1f} GB and the limit is {least:.1f} GB{users}: end "
                "what else runs there",
            )


def clock_skews(facts: Mapping[int, NodeFacts]) -> dict[int, float]:
    """Seconds by which each node's clock is ahead of the one that most agree with: node 0's, if as many agree with it."""
    offsets = {rank: node.clock_s for rank, node in sorted(facts.items()) if node.clock_s is not None}
    if not offsets:
        return {}

    def agreeing(rank: int) -> int:
        return sum(abs(other - offsets[rank]) <= MAX_SKEW_S for other in offsets.values())

    right = max(offsets, key=agreeing)  # the first of equals
    return {rank: offsets[right] - offset for rank, offset in offsets.items()}


def _clock_problems(facts: Mapping[int, NodeFacts], names: Sequence[str]) -> Iterator[Problem]:
    skews = clock_skews(facts)
    slack = max((facts[rank].clock_error_s for rank, skew in skews.items() if skew == 0), default=0.0)
    for rank, skew in skews.items():
        if abs(skew) - slack - facts[rank].clock_error_s > MAX_SKEW_S:
            yield Problem(
                rank,
                "clock",
                f"clocks must agree within {MAX_SKEW_S:g} s, but that of {names[rank]} is {abs(skew):.1f} s "
                f"{'ahead of' if skew > 0 else 'behind'} the others': start its time service",
            )


def _folder_problems(
    facts: Mapping[int, NodeFacts], seen: Mapping[int, Sequence[int]], names: Sequence[str], place: str
) -> Iterator[Problem]:
    """Nodes that are not among those who see each other's files, the largest such set of any node's."""
    wrote = {rank for rank, node in facts.items() if "folder" not in node.problems}
    mutual = {
        rank: {other for other in wrote if other in seen.get(rank, ()) and rank in seen.get(other, ())} | {rank}
        for rank in sorted(wrote)
    }
    if not mutual:
        return
    together = max(mutual.values(), key=len)
    halves = 2 * len(together) <= len(wrote) and len(wrote) > 1  # nobody knows which has the right folder
    for rank in sorted(wrote - together):
        yield Problem(
            rank,
            "folder",
            f"{place} must be the same folder on all nodes, but {names[rank]} and the others see each other's files in "
            f"{len(mutual[rank]) - 1} of {len(wrote) - 1} cases: mount the shared folder there",
            everywhere=halves,
        )
