"""Predicted step time and weak-scaling efficiency of the large SwitchAlls from 8 to 4,096 GPUs. Nothing here is measured.

Owns the topologies, the table and the picture. The bytes and seconds are those of `--dry-run` (train/dry_run.py, parallel/predict.py).
Called by anyone, from the root of the clone: `python -m benchmarks.scaling`; it needs no GPU and writes <date>_scaling.md and
.png into benchmarks/results. Weak scaling: every GPU keeps its rows, so the batch grows with the GPUs; efficiency is the step time on 8
GPUs over that on N.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

from parallel.config import ProcessInfo
from parallel.predict import Hardware, Seconds
from train.build import build_model
from train.config import Config, load_config
from train.dry_run import forecast

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("switchall_1b", "switchall_7b", "switchall_30b")
GPUS = tuple(8 * 2**n for n in range(10))
NODE_SIZE = 8
CONFIGURED_FOR = 16  # the number of GPUs whose share of the configured batch every GPU keeps
GPU_MEMORY, ROOM = 80e9, 10e9  # ROOM: the least that is left for activations


@dataclass(frozen=True)
class Point:
    """A model on so many GPUs. memory: bytes per GPU without activations; rows: per GPU and step."""

    gpus: int
    rows: int
    tokens: int
    micro_steps: int
    seconds: Seconds
    memory: float

    @property
    def fits(self) -> bool:
        return self.memory + ROOM < GPU_MEMORY


Models = dict[str, tuple[list[Point], list[Point]]]  # with the configured micro-steps, and with one


def points(
    config: Config, hardware: Hardware, *, gpus: Sequence[int] = GPUS, micro_steps: int | None = None
) -> list[Point]:
    """The prediction for each number of GPUs, in nodes of 8. micro_steps: of a step, each as the config has them; None: as many too."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    model = build_model(config, vocab_size=vocab_size)
    steps = micro_steps or config.optim.accumulation_steps
    rows = config.data.global_batch_size // CONFIGURED_FOR // config.optim.accumulation_steps * steps
    optim = config.optim.model_copy(update={"accumulation_steps": steps})
    found = []
    for size in gpus:
        data = config.data.model_copy(update={"global_batch_size": rows * size, "streams": rows * size})
        one = forecast(config.model_copy(update={"data": data, "optim": optim}), _world(size), model)
        tokens = one.work.tokens * one.work.accumulation_steps
        seconds, memory = one.prediction.seconds(hardware), one.prediction.memory.total
        found.append(Point(size, rows, tokens, one.work.accumulation_steps, seconds, memory))
    return found


def efficiency(found: Sequence[Point], *, overlap: bool) -> list[float]:
    """Step time of the first point over each one's."""
    times = [point.seconds.with_overlap if overlap else point.seconds.without_overlap for point in found]
    return [times[0] / seconds for seconds in times]


def table(name: str, found: Sequence[Point], single: Sequence[Point]) -> list[str]:
    """Markdown. single: the same with one micro-step to a step. A star where a point does not fit."""
    first = found[0]
    head = ("GPUs", "compute", "exchange", "gradients, ZeRO", "step, no overlap", "step, perfect overlap")
    head += ("efficiency, no overlap", "efficiency, perfect overlap")
    head += ("efficiency, 1 micro-step, no overlap", "GB per GPU")
    lines = [
        f"## {name}: {first.rows} rows ({first.tokens:,} tokens) per GPU and step, in {first.micro_steps} micro-steps",
        "",
    ]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    shares = (efficiency(found, overlap=False), efficiency(found, overlap=True), efficiency(single, overlap=False))
    for point, *of_point in zip(found, *shares, strict=True):
        seconds = point.seconds
        times = (seconds.compute or 0.0, seconds.exchange, seconds.reduction)
        times += (seconds.without_overlap, seconds.with_overlap)
        cells = [f"{point.gpus:,}", *(f"{value:.4f}" for value in times), *(f"{value:.3f}" for value in of_point)]
        lines.append("| " + " | ".join([*cells, f"{point.memory / 1e9:.1f}{'' if point.fits else ' *'}"]) + " |")
    return [*lines, ""]


def assumptions(hardware: Hardware) -> list[str]:
    return [
        "Predictions, not measurements: no line of this was run on a GPU. Assumed:",
        "",
        f"- {NODE_SIZE} GPUs a node; each sends {hardware.nvlink_gb:g} GB/s to its own node and {hardware.network_gb:g} GB/s to others, "
        "reached by messages of every size; no latency, no congestion, no stragglers",
        f"- {hardware.tflops:g} TFLOP/s sustained per GPU for all arithmetic. An H100's peak is 989, but a matmul of experts of width "
        "128 is bound by memory at 381: narrow experts will be slower than this",
        "- the optimizer's update and the loading of data take no time; routing is uniform, so every GPU has its share of tokens",
        f"- ep_size auto is {NODE_SIZE}: the exchange stays in a node; gradients and ZeRO's gather go round rings, after the last "
        "backward pass",
        "- no overlap: compute, exchange and gradients one after the other. Perfect overlap: compute and exchange take as long as the "
        "longer of the two; gradients and ZeRO's gather are overlapped in neither, as in parallel/zero.py",
        f"- weak scaling: a GPU keeps the rows it has at {CONFIGURED_FOR} GPUs; efficiency is the step time on {GPUS[0]} GPUs over that on "
        f"N. At {GPUS[-1]:,} GPUs that is a batch of 134 million tokens or more, beyond what anybody trains with: with one micro-step to a "
        "step it is 34 million or more, and the gradients weigh more",
        f"- memory without activations; * leaves less than {ROOM / 1e9:g} of {GPU_MEMORY / 1e9:g} GB for them",
        "",
    ]


def picture(found: Models, hardware: Hardware, path: Path) -> None:
    """Step time and efficiency over the number of GPUs; points that do not fit are left open."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.2), dpi=120)
    for colour, (name, (of_model, single)) in zip(("tab:blue", "tab:orange", "tab:green"), found.items(), strict=True):
        gpus = [point.gpus for point in of_model]
        faces = [colour if point.fits else "white" for point in of_model]
        for overlap, style in ((False, "-"), (True, "--")):
            label = f"{name}, {'perfect' if overlap else 'no'} overlap"
            times = [p.seconds.with_overlap if overlap else p.seconds.without_overlap for p in of_model]
            for axes, values in ((left, times), (right, efficiency(of_model, overlap=overlap))):
                axes.plot(gpus, values, style, color=colour, label=label, zorder=2)
                axes.scatter(gpus, values, s=22, edgecolors=colour, facecolors=faces, zorder=3)
        label = f"{name}, no overlap, 1 micro-step"
        right.plot(gpus, efficiency(single, overlap=False), ":", color=colour, label=label, zorder=2)
    for axes, title in ((left, "step time, seconds"), (right, "weak-scaling efficiency against 8 GPUs")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(GPUS, [f"{size:,}" for size in GPUS])
        axes.minorticks_off()
        axes.set_xlabel("GPUs, 8 a node")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.set_yticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5, 10], [f"{tick:g}" for tick in ticks])
    right.set_ylim(0.0, 1.02)
    right.legend(fontsize=8, loc="lower left")
    figure.suptitle(
        f"Predicted, not measured: {hardware.tflops:g} TFLOP/s per GPU, {hardware.nvlink_gb:g} GB/s in a node, "
        f"{hardware.network_gb:g} GB/s between nodes; open circles: no room for activations",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predicted weak scaling of the large SwitchAlls; nothing is measured.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the table and the picture"
    )
    for field in fields(Hardware):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=field.default, help=f"default: {field.default:g}")
    args = parser.parse_args(argv)
    hardware = Hardware(args.nvlink_gb, args.network_gb, args.tflops)
    began = time.perf_counter()
    configs = {name: load_config(ROOT / "configs" / f"{name}.yaml") for name in CONFIGS}
    found = {
        name: (points(config, hardware), points(config, hardware, micro_steps=1)) for name, config in configs.items()
    }
    name = f"{datetime.now():%Y-%m-%d}_scaling"
    picture(found, hardware, args.out / f"{name}.png")
    lines = ["# Predicted weak scaling of configs/switchall_1b, 7b and 30b", "", *assumptions(hardware)]
    lines += [line for model, both in found.items() for line in table(model, *both)]
    lines += ["Times are seconds.", "", f"![step time and efficiency, predicted]({name}.png)", ""]
    lines += [f"Command: `python -m benchmarks.scaling` ({time.perf_counter() - began:.0f} s on a CPU)."]
    text = "\n".join(lines)
    (args.out / f"{name}.md").write_text(text + "\n")
    print(text)
    return 0


def _world(size: int) -> ProcessInfo:
    return ProcessInfo(
        rank=0,
        world_size=size,
        local_rank=0,
        local_world_size=NODE_SIZE,
        master_addr="",
        master_port=0,
        launcher="benchmark",
    )


if __name__ == "__main__":
    sys.exit(main())
