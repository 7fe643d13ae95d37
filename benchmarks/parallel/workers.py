"""What runs on every rank of a pool: a layer is checked against one process, then timed, its bytes counted, its choices noted.

Owns no shape (subjects.py) and no verdict (bench_exchange.py, the caller, which gets one result from each rank).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.parallel.checks import check_rows, check_step
from benchmarks.parallel.messages import Choices
from benchmarks.parallel.placing import Recorder, Way, alone, on_ranks, open_ranks, step_of
from benchmarks.parallel.rival import CountedAllToAll, as_a_loop, deepspeed_moe, forget_groups
from benchmarks.parallel.subjects import FeedForward, Heads, Subject
from benchmarks.parallel.timing import WARM_UP, Step, in_turn
from model.dispatch import Routing
from model.sigma_moe import SigmaMoE
from parallel.ledger import Traffic
from parallel.mesh import Mesh

OURS, DEEPSPEED, NO_EXCHANGE = "Switchyard", "DeepSpeed", "no exchange"
TRACED_STEPS = 3


@dataclass(frozen=True)
class Timed:
    """Of one rank, by the name of what was timed: seconds of each repetition; bytes sent in one; seconds held by the exchange in one."""

    seconds: dict[str, list[float]]
    sent: dict[str, int]
    held: dict[str, float]


def beside_deepspeed(subject: FeedForward, repetitions: int) -> Timed:
    """sigma-MoE and DeepSpeed's layer with the same rows, experts and choices. Raises RuntimeError if either is wrong.

    NO_EXCHANGE: a rank's share of the experts as a layer of its own, with as many copies to compute and none to send.
    """
    with open_ranks() as mesh:
        ours = step_of(on_ranks(subject, mesh, Way()), subject, rank=mesh.rank)
        assert isinstance(ours.layer, SigmaMoE)
        layer = deepspeed_moe(ours.layer, mesh)
        theirs = Step(layer, lambda x: layer(x)[0], ours.x, ours.cotangent)
        check_step(ours, subject, mesh, what=f"{subject.name} on ranks")
        check_rows(theirs, subject, mesh, expected=as_a_loop, what=f"DeepSpeed's layer for {subject.name}")

        share = replace(subject, num_experts=max(subject.top_k, subject.num_experts // mesh.ep_size))
        local = step_of(alone(share), share, rank=mesh.rank)
        steps, counted = {OURS: ours, DEEPSPEED: theirs, NO_EXCHANGE: local}, {}
        for name, step in steps.items():
            with CountedAllToAll() as counter:
                step()
            counted[name] = counter.bytes
        timed = _timed(steps, mesh, repetitions=repetitions)
        forget_groups()
    if timed.sent[OURS] != counted[OURS]:
        raise RuntimeError(
            f"the ledger must count what all_to_all_single sends, but it counts {timed.sent[OURS]} bytes of {subject.name} and "
            f"{counted[OURS]} were sent: run tests/parallel first"
        )
    return Timed(timed.seconds, counted, timed.held)


def in_all_ways(subject: Subject, ways: Sequence[Way], repetitions: int) -> Timed:
    """One layer for each way of meeting the experts, timed in turn, by `Way.name`. Raises RuntimeError if one is wrong."""
    with open_ranks() as mesh:
        steps = {way.name: step_of(on_ranks(subject, mesh, way), subject, rank=mesh.rank) for way in ways}
        for name, step in steps.items():
            check_step(step, subject, mesh, what=f"{subject.name}, {name}")
        return _timed(steps, mesh, repetitions=repetitions)


def traced(subject: Subject, way: Way, folder: str) -> Path:
    """Writes the chrome trace of TRACED_STEPS steps of this rank, and says where."""
    with open_ranks() as mesh:
        step = step_of(on_ranks(subject, mesh, way), subject, rank=mesh.rank)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(TRACED_STEPS):
                step()
        path = Path(folder) / f"{way.name}_rank{mesh.rank}.json"
        profile.export_chrome_trace(str(path))
    return path


@dataclass(frozen=True)
class Noted:
    """Of one rank: its choices by label, and the bytes that it sent by label, verb and whether they carry gradients."""

    choices: dict[str, Choices]
    sent: Counter[tuple[str, str, bool]]


def chosen_and_sent(subject: Heads) -> Noted:
    """One forward and backward pass of SwitchHead. Raises RuntimeError if it is wrong."""
    with open_ranks() as mesh:
        layer = on_ranks(subject, mesh, Way())
        step = step_of(layer, subject, rank=mesh.rank)
        check_step(step, subject, mesh, what=f"{subject.name} on ranks")
        layer.dispatcher = recorder = Recorder(layer.dispatcher)  # pyright: ignore[reportArgumentType]
        mesh.ledger.take()
        step()
        sent: Counter[tuple[str, str, bool]] = Counter()
        for where, part in mesh.ledger.take().sent.items():
            sent[where.label, where.verb, where.backward] += part.near + part.far
        banks = {id(layer.get_submodule(f"{label}_experts")): label for label in ("value", "output")}
        return Noted({banks[id(routing.bank)]: _plain(routing) for routing in recorder.routings}, sent)


def _plain(routing: Routing) -> Choices:
    parts = (routing.source_row_N, routing.output_row_N, routing.expert_ids_NK)
    return Choices(*(part.tolist() for part in parts))


def _timed(steps: dict[str, Step], mesh: Mesh, *, repetitions: int) -> Timed:
    noted: dict[str, list[Traffic]] = {name: [] for name in steps}

    def noting(name: str) -> Callable[[], float]:
        def step() -> float:
            mesh.ledger.take()
            seconds = steps[name]()
            noted[name].append(mesh.ledger.take())
            return seconds

        return step

    seconds = in_turn({name: noting(name) for name in steps}, repetitions=repetitions)
    # without the warm-up, whose waits for the other ranks are longer than a step
    traffic = {name: sum(of_steps[WARM_UP:], Traffic()) for name, of_steps in noted.items()}
    return Timed(
        seconds,
        {name: _bytes(traffic[name]) // repetitions for name in steps},
        {name: sum(traffic[name].seconds.values()) / repetitions for name in steps},
    )


def _bytes(traffic: Traffic) -> int:
    return sum(part.near + part.far for part in traffic.sent.values())
