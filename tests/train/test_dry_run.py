"""What `--dry-run` predicts, against the ledger and the engine of real steps on four processes, and its text."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.parameters import logical_parameters
from model.transformer import Transformer
from parallel.config import ProcessInfo
from parallel.predict import DENSE_GRADIENTS, EXPERT_GRADIENTS, ZERO_GATHER, Hardware
from tests.parallel.two_steps import (
    LENGTH,
    STEP_ROWS,
    VOCABULARY,
    Case,
    _before_update,
    open_engine,
    optim_config,
    rows,
)
from train.build import build_memory
from train.config import Config, check_world, load_config
from train.dry_run import Forecast, Plan, dry_run, forecast, save_bytes
from train.engine import LocalMesh
from train.step import StepSettings, train_step

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny_cpu.yaml"
PROCESSES = 4
Sent = dict[str, tuple[float, float]]


def world(size: int, *, per_node: int) -> ProcessInfo:
    place = {"rank": 0, "local_rank": 0, "master_addr": "127.0.0.1", "master_port": 0, "launcher": "test"}
    return ProcessInfo.model_validate(place | {"world_size": size, "local_world_size": per_node})


@dataclass(frozen=True)
class Seen:
    """One rank's step: bytes near and far by verb, and bytes that it keeps."""

    sent: Sent
    weights: int
    gradients: int
    master: int
    moments: int
    bucket: int
    saved: int


def one_step(case: Case) -> Seen:
    with open_engine(case) as engine:
        batches = rows(case, rank=engine.mesh.rank, num_ranks=engine.mesh.world_size)
        settings = StepSettings(case.accumulation_steps, seed=3, mask_documents=True)
        gradients: list[int] = []
        with _before_update(engine, lambda: gradients.append(gradient_bytes(engine))):
            train_step(engine, batches, engine.mesh, settings, step=0, lr=0.1)
        (traffic,) = engine.mesh._steps
        sent: dict[str, list[float]] = defaultdict(lambda: [0, 0])
        for where, one in traffic.sent.items():
            if where.layer == "run" or where.verb == "norm":
                continue  # a few bytes, not predicted
            verb = where.verb
            if where.layer == "optimizer":
                verb = {"reduce": "gradients", "gather": ZERO_GATHER}[verb]
            sent[verb][0] += one.near
            sent[verb][1] += one.far
        zero = engine._deepspeed.optimizer
        parts = zero.single_partition_of_fp32_groups if case.stage else []
        kept = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
        return Seen(
            {verb: (near, far) for verb, (near, far) in sent.items() if near or far},
            weights=sum(4 * weight.numel() for weight in engine.model.parameters()),
            gradients=gradients[0],
            master=sum(4 * part.numel() for part in parts),
            moments=sum(4 * tensor.numel() for tensor in kept if torch.is_tensor(tensor) and tensor.dim()),
            bucket=4 * zero.reduce_bucket_size if case.stage else 0,
            saved=sum(4 * view.numel() for part in engine.owned_fragments() for view in part.tensors.values()),
        )


def gradient_bytes(engine: Any) -> int:
    """What is there before the update: whole tensors, or ZeRO's partitions."""
    if engine.stage == 0:
        return sum(4 * weight.grad.numel() for weight in engine.model.parameters())
    partitions = engine._deepspeed.optimizer.averaged_gradients.values()
    return sum(4 * gradient.numel() for partition in partitions for gradient in partition)


def config_of(case: Case) -> Config:
    sections: dict[str, Any] = {
        "run": {"dir": "nowhere", "steps": 10, "dtype": case.dtype},
        "data": {
            "shards": "none",
            "heldout": "none",
            "sequence_length": LENGTH,
            "global_batch_size": STEP_ROWS,
            "streams": STEP_ROWS,
        },
        "model": case.model.model_dump(),
        "parallel": {
            "ep_size": case.ep_size,
            "zero_stage": case.stage,
            "exchange": case.exchange,
            "chunks": case.chunks,
            "table_columns": case.table_columns,
        },
        "optim": optim_config(case).model_dump(exclude_unset=True) | {"accumulation_steps": case.accumulation_steps},
    }
    return Config.model_validate(sections)


def forecast_of(case: Case) -> Forecast:
    model = Transformer(case.model, vocab_size=VOCABULARY, backend="reference")
    info = world(PROCESSES, per_node=case.node_size or PROCESSES)
    return forecast(config_of(case), info, model)


def predicted(case: Case) -> tuple[Sent, Forecast]:
    found = forecast_of(case)
    sent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for verb, one in found.prediction.sent.items():
        of_verb = sent["gradients" if verb in (DENSE_GRADIENTS, EXPERT_GRADIENTS) else verb]
        of_verb[0], of_verb[1] = of_verb[0] + one.near, of_verb[1] + one.far
    return {verb: (near, far) for verb, (near, far) in sent.items() if near or far}, found


def mean_over_ranks(seen: list[Seen]) -> Sent:
    verbs = dict.fromkeys(verb for one in seen for verb in one.sent)
    pairs = {verb: [one.sent.get(verb, (0.0, 0.0)) for one in seen] for verb in verbs}
    return {
        verb: (sum(near for near, _ in of) / len(seen), sum(far for _, far in of) / len(seen))
        for verb, of in pairs.items()
    }


EVERY = {"switchhead": {"top_k": 3}, "sigma_moe": {"top_k": 5}}  # of all experts: what is expected is what happens
PRODUCT_KEYS = {
    "peer": {"num_experts": 9, "num_heads": 2, "top_k": 9, "key_dim": 6},
    "pkm": {"num_keys": 3, "num_heads": 2, "top_k": 9, "key_dim": 4, "query_norm": "batch"},
}
EXACT = {
    "two hops, repeated layers, recompute": Case(
        ep_size=4, node_size=2, stage=2, accumulation_steps=2, optimizer="adamw"
    ).with_model(
        **EVERY | {"switchhead": {"top_k": 3, "entropy_weight": 1.0}},
        distinct_layers=1,
        recompute=True,
    ),
    "weights, Avg-K": Case(ep_size=4, node_size=2, stage=1, exchange="weights", dtype="bfloat16").with_model(
        **EVERY | {"sigma_moe": {"top_k": 5, "router": "average_keys", "load_weight": 1.0}}
    ),
    "parts, tables by columns, batch norms, Sinkhorn": Case(
        ep_size=2, node_size=4, table_columns=2, chunks=2
    ).with_model(
        **EVERY | {"sigma_moe": {"top_k": 5, "router": "sinkhorn"}} | PRODUCT_KEYS,
        feedforwards=("sigma_moe", "peer", "pkm"),
        num_layers=3,
        dropout=0.1,
        recompute=True,
    ),
    "recompute that stops before the last combine, but not before a gate": Case(
        ep_size=2, node_size=2, stage=1
    ).with_model(
        mixers=("attention",),
        switchhead=None,
        attention={"num_heads": 4, "head_dim": 8},
        sigma_moe=None,
        feedforwards=("peer", "pkm"),
        peer=PRODUCT_KEYS["peer"],
        pkm=PRODUCT_KEYS["pkm"] | {"gated": True},
        recompute=True,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_real_step_sends_and_keeps_what_was_predicted(pool, name: str):
    case = EXACT[name]
    seen = pool(PROCESSES).run(one_step, case)
    expected, found = predicted(case)
    measured = mean_over_ranks(seen)
    assert measured.keys() == expected.keys()
    # a ring's share of a message is rounded down to a byte
    assert {verb: both for verb, both in measured.items() if both != pytest.approx(expected[verb], rel=1e-4)} == {}
    memory = found.prediction.memory
    for one in seen:
        assert (one.weights, one.master, one.moments) == (memory.weights, memory.master, memory.moments)
        assert one.bucket == memory.bucket
        assert one.saved <= save_bytes(config_of(case), found)
        if case.stage != 1:  # there the whole gradients of all micro-steps have just been given up for partitions
            assert one.gradients == memory.gradients
    # DeepSpeed's padding and that of the experts are predicted but not written
    assert max(one.saved for one in seen) == pytest.approx(save_bytes(config_of(case), found), rel=0.02)


def test_free_routing_is_predicted_within_five_percent(pool):
    """Routers that have not learned, 48 tokens on a rank: they were off by 1.5 % at most."""
    case = Case(ep_size=4, node_size=2, stage=1)
    measured, (expected, _) = mean_over_ranks(pool(PROCESSES).run(one_step, case)), predicted(case)
    assert measured.keys() == expected.keys()
    for verb, both in measured.items():
        rel = 0.05 if verb in ("plan", "dispatch", "gates", "combine") else 1e-4
        assert both == pytest.approx(expected[verb], rel=rel), verb


def printed(capsys: pytest.CaptureFixture[str], config: Config, plan: Plan) -> list[str]:
    dry_run(config, world(1, per_node=1), plan)
    out = capsys.readouterr().out
    assert Config.model_validate(yaml.safe_load(out)) == config
    return [line.removeprefix("# ") for line in out.splitlines() if line.startswith("# ")]


VOCABULARY_OF_TINY = "model.vocab_size=256"


def test_the_text_names_the_topology_the_choices_the_bytes_the_seconds_and_the_memory(capsys):
    config = load_config(TINY, [VOCABULARY_OF_TINY, "parallel.ep_size=4", "parallel.zero_stage=2"])
    plan = Plan(nodes=4, gpus_per_node=2, hardware=Hardware(nvlink_gb=100.0, network_gb=10.0, tflops=1.0))
    lines = printed(capsys, config, plan)
    assert "topology: 8 processes, 4 node(s) of 2; ep_size 4, 2 hop(s); expert-data size 2; zero_stage 2" in lines
    assert "per rank and micro-step: 2 rows, 512 tokens; 1 micro-step(s); what travels has 4 bytes an element" in lines
    text = "\n".join(lines)
    assert all(f"{bank}: " in text for bank in ("mixer.value_experts", "mixer.output_experts", "feedforward.experts"))
    assert " at 100 and 10 GB/s:" in text
    assert "Activations are not predicted." in text
    verbs = {line.split("  ")[1]: line.split()[-3:] for line in lines if line.startswith("  ")}
    near, far, seconds = verbs["gradients (dense)"]
    both = [int(number.replace(",", "")) for number in (near, far)]
    assert both[0] == pytest.approx(both[1], abs=1)  # in nodes of two, every second rank's next one is on its node
    assert float(seconds) == pytest.approx(both[0] / 100e9 + both[1] / 10e9, abs=1e-6)


def test_one_process_sends_nothing(capsys):
    lines = printed(capsys, load_config(TINY, [VOCABULARY_OF_TINY]), Plan())
    assert "bytes that a rank sends in a step: none" in lines
    assert any(line.startswith("topology: 1 processes, 1 node(s) of 1; ep_size 1") for line in lines)


def test_a_checkpoint_is_predicted_with_its_seconds_and_the_memory_of_its_copy(capsys):
    """45.9 million weights with two moments, on 64 processes of which 8 hold each expert: 12 bytes for every weight over 64."""
    config = load_config(ROOT / "configs" / "switchall_47m.yaml", ["model.vocab_size=8000", "parallel.ep_size=8"])
    plan = Plan(nodes=8, gpus_per_node=8, disk_gb=0.001)
    (line,) = [line for line in printed(capsys, config, plan) if line.startswith("checkpoint: ")]
    gigabytes = float(line.split()[1])
    assert gigabytes == pytest.approx(
        12 * 45.9e6 / 64 / 1e9, rel=0.25
    )  # five experts of two heads do not divide by eight
    assert float(line.split("; ")[1].split()[0]) == pytest.approx(1000 * gigabytes, rel=0.05)
    assert "as much host memory for the copy" in line
    waits = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"asynchronous": False})})
    assert "no host memory for a copy" in "\n".join(printed(capsys, waits, plan))


def test_the_memory_of_streams_is_in_the_predicted_checkpoint():
    config = load_config(ROOT / "configs/paper/switchall_xl_47m_c4.yaml", ["model.vocab_size=8000"])
    model = Transformer(config.model, vocab_size=8000, backend="reference")
    found = forecast(config, world(1, per_node=1), model)
    memory = build_memory(config, LocalMesh(torch.device("cpu")))
    assert memory is not None
    states = [4 * tensor.numel() for name, tensor in memory.tensors().items() if name.endswith("states")]
    weights = sum(parameter.numel for parameter in logical_parameters(model))
    assert save_bytes(config, found) == pytest.approx(12 * weights + sum(states), rel=1e-4)


def test_the_plan_takes_what_it_does_not_say_from_the_start():
    start = world(4, per_node=2)
    for plan, size, per_node in ((Plan(), 4, 2), (Plan(nodes=3), 6, 2), (Plan(gpus_per_node=8), 16, 8)):
        planned = plan.processes(start)
        assert (planned.world_size, planned.local_world_size) == (size, per_node)


@pytest.mark.parametrize(
    ("overrides", "nodes", "parts"),
    [
        (["parallel.ep_size=3"], 1, ["ep_size must divide", "ep_size is 3 and there are 4"]),
        (["parallel.node_size=3"], 1, ["node_size must divide", "node_size is 3 and there are 4"]),
        (["parallel.ep_size=6"], 3, ["node_size must divide an ep_size", "node_size is 4 and ep_size is 6"]),
        (["data.streams=2", "parallel.ep_size=1"], 1, ["data.streams", "2", "4"]),
        (["optim.accumulation_steps=8"], 1, ["there are 4 processes", "16 / 8 = 2 rows"]),
        (["parallel.table_columns=2"], 1, ["table_columns is 2", "no layer with one"]),
    ],
)
def test_an_impossible_topology_is_refused_as_by_a_start(overrides: list[str], nodes: int, parts: list[str]):
    rows = 16 * nodes
    config = load_config(
        TINY, [VOCABULARY_OF_TINY, f"data.global_batch_size={rows}", f"data.streams={rows}", *overrides]
    )
    with pytest.raises(ValueError) as planned:
        dry_run(config, world(1, per_node=1), Plan(nodes=nodes, gpus_per_node=4))
    with pytest.raises(ValueError) as started:
        check_world(config, world(4 * nodes, per_node=4))
    assert str(planned.value) == str(started.value)
    for part in parts:
        assert part in str(planned.value)
