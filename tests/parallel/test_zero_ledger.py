"""The ledger's count of DeepSpeed's own collectives: equal to what torch is really asked for, and to a formula from the weights."""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from model.parameters import ExpertBank
from parallel.ledger import Sent, Where
from tests.parallel.two_steps import DENSE, Case, open_engine, rows
from train.step import StepSettings, train_step

KINDS = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "barrier")
OTHERS = ("reduce_scatter", "reduce_scatter_tensor", "all_to_all", "gather", "scatter", "all_reduce_coalesced")


@dataclass(frozen=True)
class Call:
    """A collective that torch.distributed was asked for: bytes that this rank hands in, ranks that take part."""

    kind: str
    num_bytes: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What one rank saw in a step. weights: bytes of its dense weights and its experts; partitions: (bytes, ranks) of ZeRO's."""

    calls: list[Call]
    sent: dict[Where, Sent]
    dense: int
    experts: int
    partitions: list[tuple[int, int]]


def one_step(case: Case) -> Step:
    calls: list[Call] = []

    def spied(kind: str) -> Any:
        real = getattr(dist, kind)

        def spy(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs.get("input_tensor", kwargs.get("tensor", args[0] if args else None))
            group = kwargs.get("group") or dist.group.WORLD
            size = 0 if tensor is None else tensor.numel() * tensor.element_size()
            calls.append(Call(kind, size, tuple(dist.get_process_group_ranks(group))))
            return real(*args, **kwargs)

        return spy

    with open_engine(case) as engine:
        backend = sys.modules["deepspeed.comm.comm"].cdb
        spies = {kind: spied(kind) for kind in (*KINDS, *OTHERS)}
        gather = mock.patch.object(backend, "all_gather_function", spies["all_gather_into_tensor"])
        with mock.patch.multiple(dist, **spies), gather:
            batches = rows(case, rank=engine.mesh.rank, num_ranks=engine.mesh.world_size)
            settings = StepSettings(case.accumulation_steps, seed=3, mask_documents=True)
            train_step(engine, batches, engine.mesh, settings, step=0, lr=0.1)
        (traffic,) = engine.mesh._steps
        banks = [module for module in engine.model.modules() if isinstance(module, ExpertBank)]
        held = sum(weight.numel() for bank in banks for weight in bank.parameters(recurse=False)) * 4
        experts = held if case.ep_size > 1 else 0
        weights = sum(weight.numel() for weight in engine.model.parameters()) * 4
        return Step(calls, traffic.sent, weights - experts, experts, partitions_of(engine, case))


def partitions_of(engine: Any, case: Case) -> list[tuple[int, int]]:
    if case.stage == 0:
        return []
    zero = engine._deepspeed.optimizer
    groups = zip(zero.single_partition_of_fp32_groups, zero.real_dp_process_group, strict=True)
    return [(flat.numel() * 4, dist.get_world_size(group)) for flat, group in groups]


def by_calls(step: Step, *, rank: int, node_size: int) -> Counter[str]:
    """What the calls send around rings, near and far."""
    sent: Counter[str] = Counter()
    for call in step.calls:
        size = len(call.ranks)
        following = call.ranks[(call.ranks.index(rank) + 1) % size]
        link = "near" if following // node_size == rank // node_size else "far"
        if call.kind == "all_reduce":
            sent[link] += 2 * (size - 1) * call.num_bytes // size
        elif call.kind == "all_gather_into_tensor":
            sent[link] += (size - 1) * call.num_bytes
        else:
            raise AssertionError(f"the step made a {call.kind}")
    return sent


CASES = [(stage, ep_size, steps) for stage in (0, 1, 2) for ep_size in (1, 2, 4) for steps in (1, 2)]


@pytest.mark.parametrize(("stage", "ep_size", "steps"), CASES)
def test_the_count_is_what_torch_was_asked_for_and_what_the_formula_says(pool, stage, ep_size, steps):
    """At ep_size 1 a model without experts. Dispatch and combine, which go by all_to_all_single, are not in this count."""
    node_size = 4 if ep_size == 2 else 2
    model = DENSE if ep_size == 1 else Case().model
    case = Case(ep_size=ep_size, stage=stage, accumulation_steps=steps, node_size=node_size, model=model)
    data_size = 4 // ep_size
    for rank, step in enumerate(pool(4).run(one_step, case)):
        found: Counter[str] = Counter()
        for where, sent in step.sent.items():
            if where.layer in ("run", "optimizer") or where.verb == "statistics":
                found.update(near=sent.near, far=sent.far)
        assert +found == +by_calls(step, rank=rank, node_size=node_size)

        reduced = 2 * 3 * step.dense // 4 + 2 * (data_size - 1) * step.experts // data_size
        assert of_optimizer(step, "reduce") == (steps if stage == 2 else 1) * reduced
        assert of_optimizer(step, "gather") == sum((size - 1) * part for part, size in step.partitions)
        assert (stage == 0) == (of_optimizer(step, "gather") == 0)


def of_optimizer(step: Step, verb: str) -> int:
    places = [sent for where, sent in step.sent.items() if (where.layer, where.verb) == ("optimizer", verb)]
    return sum(sent.near + sent.far for sent in places)
