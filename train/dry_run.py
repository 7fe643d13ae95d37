"""`--dry-run`: the resolved config, the table of the model, and what a step would send, keep and take at a topology.

Owns what of a config and a model the prediction needs, and its text. Does not own the formulas (parallel/predict.py, parallel/volume.py,
model/cost.py). Called by launcher/main.py; benchmarks/scaling.py takes `forecast`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from textwrap import indent

import torch

from model.attention_config import SwitchHeadConfig
from model.config import ModelConfig
from model.cost_table import model_table, table_text
from model.feedforward_config import SigmaMoEConfig
from model.parameters import ExpertBank, count_parameters, logical_parameters
from model.product_key_config import PEERConfig, PKMConfig
from model.selection import SINKHORN_ITERATIONS
from model.transformer import Transformer
from parallel.config import ProcessInfo
from parallel.predict import (
    EXCHANGE,
    FLOAT_BYTES,
    Hardware,
    Memory,
    Prediction,
    Reduction,
    State,
    Topology,
    Work,
    local_numel,
    predict,
)
from train.build import build_model, choose_exchanges, exchange_notes, open_data
from train.config import Config, Layout, check_world, to_yaml
from train.optimizer import parameter_groups

SHA256_GB = 1.0  # GB/s of one core, see docs/checkpoint_format.md


@dataclass(frozen=True)
class Plan:
    """What a dry run is asked for. nodes, gpus_per_node: None means those of this start. disk_gb: GB/s (10^9 bytes) of a process."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    hardware: Hardware = field(default_factory=Hardware)
    disk_gb: float = 1.0

    def processes(self, info: ProcessInfo) -> ProcessInfo:
        """`info` as it would be with these nodes; the rank stays that of this process."""
        per_node = self.gpus_per_node or info.local_world_size
        nodes = self.nodes or max(1, info.world_size // info.local_world_size)
        return info.model_copy(update={"world_size": nodes * per_node, "local_world_size": per_node})


@dataclass(frozen=True)
class Forecast:
    """A topology, what the ranks do there, and what follows from it."""

    topology: Topology
    work: Work
    state: State
    prediction: Prediction


def dry_run(config: Config, info: ProcessInfo, plan: Plan = Plan()) -> None:
    """Prints one YAML text, everything but the config in comments; starts nothing and writes nothing.

    Raises:
        ValueError: what `run` would refuse before its first step on the planned processes; model.vocab_size is null and there are no
            shards to ask.
    """
    planned = plan.processes(info)
    check_world(config, planned)
    vocab_size = config.model.vocab_size or open_data(config).train.vocab_size
    model = build_model(config, vocab_size=vocab_size)
    if info.rank == 0:
        print(to_yaml(config), end="")
        for note in config.model.notes():
            print(f"# {note}")
        print(f"# vocabulary: {vocab_size:,} tokens\n# parameters: {count_parameters(model):,}")
        length = config.data.sequence_length
        print(indent(table_text(model_table(model, length=length), length=length), "# "))
        print(indent("\n".join(forecast_lines(config, forecast(config, planned, model), plan)), "# "))


def forecast(config: Config, info: ProcessInfo, model: Transformer) -> Forecast:
    """`model` is on the meta device and whole; `info` tells the number of processes. ValueError as `check_world`."""
    layout = check_world(config, info)
    topology = Topology(info.world_size, layout.ep_size, layout.node_size)
    length, steps = config.data.sequence_length, config.optim.accumulation_steps
    costs = [line.cost for line in model_table(model, length=length)]
    known = [cost.work.macs for cost in costs if cost is not None]
    work = Work(
        tokens=config.data.global_batch_size // steps // info.world_size * length,
        accumulation_steps=steps,
        wire_bytes=getattr(torch, config.run.dtype).itemsize,
        chunks=config.parallel.chunks,
        recompute=config.model.recompute,
        macs_per_token=sum(known) / length if len(known) == len(costs) else None,
        banks=config.model.banks(),
        exchanges=choose_exchanges(config, layout, processes=info.world_size),
        reductions=tuple(_reductions(config.model)),
        average_keys=frozenset({"mlp"} if _averages_keys(config.model) else ()),
        ends_block=_ends_of_blocks(config.model),
    )
    state = _state(config, model, topology, work)
    return Forecast(topology, work, state, predict(topology, work, state))


def _state(config: Config, model: Transformer, topology: Topology, work: Work) -> State:
    """The optimizer's groups as ZeRO sees them: dense weights and, where banks are split, this rank's experts, each by decay."""
    paths = {id(module): path for path, module in model.named_modules()}
    banks = {bank.path: bank for bank in work.banks}
    groups = parameter_groups(model, weight_decay=config.optim.weight_decay)
    group_of = {id(tensor): number for number, group in enumerate(groups) for tensor in group["params"]}
    dense, experts = [0] * len(groups), [0] * len(groups)
    for parameter in logical_parameters(model):
        number, numel = group_of[id(parameter.tensor)], parameter.tensor.numel()
        if topology.ep_size > 1 and isinstance(parameter.module, ExpertBank):
            bank = banks[paths[id(parameter.module)]]
            local = local_numel(bank, ep_size=topology.ep_size, columns=work.exchanges[bank.path].columns)
            experts[number] += numel * local // (bank.shape.num_groups * bank.shape.group_numel)
        else:
            dense[number] += numel
    moments = 2 if config.optim.optimizer == "adamw" else 0
    return State(dense, experts, zero_stage=config.parallel.zero_stage, moments=moments)


def _reductions(model: ModelConfig) -> Iterator[Reduction]:
    """The all-reduces of statistics of a micro-step; a mean is one of its numbers and the count of the rows."""
    distinct = model.distinct_layers or model.num_layers
    uses = model.num_layers // distinct
    for mixer, feedforward in zip(
        model.mixer_sections()[:distinct], model.feedforward_sections()[:distinct], strict=True
    ):
        if isinstance(mixer, SwitchHeadConfig) and mixer.entropy_weight > 0:
            # over sequences: one number for all repeats of a layer, made where the loss is, outside the layer
            yield Reduction(2, len(set(mixer.router_of().values())), backward=True, in_layer=False)
        if isinstance(feedforward, SigmaMoEConfig):
            weights, experts = feedforward.loss_weights(), feedforward.num_experts
            if weights.entropy > 0 and feedforward.entropy_over == "sequence":
                yield Reduction(2, 1, backward=True, in_layer=False)
            elif weights.entropy > 0:
                yield Reduction(experts + 1, uses, backward=True, in_layer=True)
            if weights.load > 0:
                yield Reduction(2 * experts + 1, uses, backward=True, in_layer=True)
            if feedforward.router == "sinkhorn":
                yield Reduction(experts + 1, SINKHORN_ITERATIONS * uses, backward=False, in_layer=True)
        if isinstance(feedforward, PEERConfig | PKMConfig) and feedforward.query_norm == "batch":
            width = model.d_model if feedforward.key_dim is None else feedforward.num_heads * feedforward.key_dim
            yield Reduction(width + 1, 2 * uses, backward=True, in_layer=True)  # means, then variances


def _averages_keys(model: ModelConfig) -> bool:
    return model.sigma_moe is not None and model.sigma_moe.router == "average_keys"


def _ends_of_blocks(model: ModelConfig) -> frozenset[str]:
    """Labels of banks after whose `combine` a block has nothing to keep for its backward pass: recompute then stops before it."""
    if model.dropout > 0:
        return frozenset()
    gated = model.pkm is not None and model.pkm.gated
    return frozenset({"mlp", "peer"} if gated else {"mlp", "peer", "pkm"})


def forecast_lines(config: Config, found: Forecast, plan: Plan) -> list[str]:
    """The prediction as text, without comment signs."""
    hardware = plan.hardware
    topology, work = found.topology, found.work
    nodes = topology.processes / topology.node_size
    rows = work.tokens // config.data.sequence_length
    return [
        f"topology: {topology.processes} processes, {nodes:g} node(s) of {topology.node_size}; ep_size {topology.ep_size}, "
        f"{topology.num_hops} hop(s); expert-data size {topology.data_size}; zero_stage {found.state.zero_stage}",
        f"per rank and micro-step: {rows:,} rows, {work.tokens:,} tokens; {work.accumulation_steps} micro-step(s); what travels has "
        f"{work.wire_bytes} bytes an element",
        *exchange_notes(config, Layout(topology.ep_size, topology.node_size), processes=topology.processes),
        *_sent_lines(found, hardware),
        *_step_lines(found, hardware),
        *_memory_lines(found.prediction.memory),
        *_save_lines(config, found, plan.disk_gb),
        *_placement_lines(config.parallel.placement_every_steps, found),
    ]


def _sent_lines(found: Forecast, hardware: Hardware) -> list[str]:
    prediction = found.prediction
    seconds = prediction.seconds(hardware)
    lines = [
        "bytes that a rank sends in a step (mean over ranks, uniform routing), to its own node and to others, and seconds at "
        f"{hardware.nvlink_gb:g} and {hardware.network_gb:g} GB/s:"
    ]
    rows = [
        (verb, f"{sent.near:,.0f}", f"{sent.far:,.0f}", f"{seconds.by_verb[verb]:.6f}")
        for verb, sent in prediction.sent.items()
        if sent.total
    ]
    widths = [max(len(row[column]) for row in [("exchange", "near", "far", "seconds"), *rows]) for column in range(4)]
    for row in [("verb", "near", "far", "seconds"), *rows]:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells))
    return lines if rows else ["bytes that a rank sends in a step: none"]


def _step_lines(found: Forecast, hardware: Hardware) -> list[str]:
    prediction, seconds = found.prediction, found.prediction.seconds(hardware)
    if prediction.flops is None:
        return ["seconds of a step: not predicted, a layer does not tell its cost (model/cost.py)"]
    tokens = found.work.tokens * found.work.accumulation_steps * found.topology.processes
    slow, fast = seconds.without_overlap, seconds.with_overlap
    return [
        f"compute: {prediction.flops / 1e12:,.3f} TFLOP per rank and step (model/cost.py, no causal halving), {seconds.compute:.6f} s at "
        f"a sustained {hardware.tflops:g} TFLOP/s, an assumption",
        f"step: {slow:.6f} s with no overlap, {fast:.6f} s if the exchange ({EXCHANGE[0]} to {EXCHANGE[-1]}) lies wholly under compute; "
        f"{tokens / slow:,.0f} to {tokens / fast:,.0f} tokens per second",
        "left out: the optimizer's arithmetic, data, latency, ranks with more than their share of the tokens",
    ]


def _memory_lines(memory: Memory) -> list[str]:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "master weights": memory.master,
        "moments": memory.moments,
        "DeepSpeed's bucket": memory.bucket,
        "gathered weights": memory.gathered,
    }
    listed = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in parts.items())
    return [f"memory per rank, GB: {listed}; in all {memory.total / 1e9:.3f}. Activations are not predicted."]


def save_bytes(config: Config, found: Forecast) -> int:
    """Of a checkpoint, by the rank that writes most: its part of the weights and moments, and the memory of its streams.

    Left out: the states of routers and norms, a few kilobytes of rank 0.
    """
    topology, state = found.topology, found.state
    numbers = sum(math.ceil(count / topology.processes) for count in state.dense)
    numbers += sum(math.ceil(count / topology.data_size) for count in state.experts)
    remembered = sum(config.model.memory_blocks().values()) * config.data.sequence_length * config.model.d_model
    return FLOAT_BYTES * (
        numbers * (1 + state.moments) + remembered * math.ceil(config.data.streams / topology.processes)
    )


def _save_lines(config: Config, found: Forecast, disk_gb: float) -> list[str]:
    gigabytes = save_bytes(config, found) / 1e9
    kept = "as much host memory for the copy that is written behind the steps, kept from save to save"
    if not config.checkpoint.asynchronous:
        kept = "no host memory for a copy, the steps wait (checkpoint.asynchronous is false)"
    return [
        f"checkpoint: {gigabytes:.3f} GB per rank at most; {gigabytes / disk_gb:.3f} s to write at {disk_gb:g} GB/s and as long to read "
        f"back where that is not from memory, {2 * gigabytes / SHA256_GB:.3f} s for SHA-256 of both; {kept}"
    ]


def _placement_lines(every: int | None, found: Forecast) -> list[str]:
    """Whose experts may move (parallel/placement.py), and what that sends if all do. What it brings is the routing's to say."""
    if every is None:
        return []
    topology, state, exchanges = found.topology, found.state, found.work.exchanges
    banks = [bank for bank in found.work.banks if topology.ep_size > 1 and not bank.shape.is_table]
    banks = [bank for bank in banks if exchanges[bank.path].mode == "tokens"]
    if not banks:
        return ["placement: no expert moves, because no bank's tokens travel to experts that could live elsewhere"]
    copies = topology.data_size if state.zero_stage == 0 else 1  # each expert group then sends all of it inside itself
    numel = sum(bank.shape.num_groups * bank.shape.group_numel for bank in banks)
    size = FLOAT_BYTES * (1 + state.moments) * numel * copies / topology.processes
    return [
        f"placement: every {every} steps the experts of {len(banks)} bank(s) may change places, at most {size:,.0f} bytes "
        "that a rank sends (mean over ranks), which no step counts; all above is for an even routing, which needs none"
    ]
