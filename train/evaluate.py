"""The held-out loss: every target scored once, in the same rows at any layout (data/loader.py cuts them).

Called by train/measure.py during a run; `python -m train.evaluate --run DIR` scores what a run has saved, on one process.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.config import is_remote
from data.index import check_tokenizer
from data.loader import Batch, heldout_batches
from data.split import open_heldout
from model.loss import IGNORED, cross_entropy_sum
from model.memory import StreamMemory
from train.build import build_memory
from train.config import read_saved
from train.engine import Engine, LocalMesh, PlainEngine, World
from train.step import StepSettings, forward
from train.trained import Trained, load_run


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats per target, and in bits per byte of text, over `num_targets` targets of `num_bytes` bytes."""

    loss: float
    bits_per_byte: float
    num_targets: int
    num_bytes: int


@torch.no_grad()
def evaluate(
    engine: Engine,
    batches: Iterable[Batch],
    world: World,
    settings: StepSettings,
    *,
    step: int,
    memory: StreamMemory | None = None,
) -> Evaluation:
    """Scores all batches; every rank must bring the same number of them. Leaves the model in training mode.

    memory: empty, of the evaluation's own streams, where a mixer has memory.
    """
    engine.model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        logits_BSV = forward(engine, batch, settings, step=step, device=world.device, memory=memory).logits_BSV
        sums[0] += cross_entropy_sum(logits_BSV, batch.targets_BS.to(world.device)).double().cpu()
        sums[1] += (batch.targets_BS != IGNORED).sum()
        sums[2] += batch.num_bytes
    engine.model.train()
    nats, num_targets, num_bytes = world.sum(sums).tolist()
    return Evaluation(
        loss=nats / max(1, num_targets),
        bits_per_byte=bits_per_byte(nats, num_bytes),
        num_targets=int(num_targets),
        num_bytes=int(num_bytes),
    )


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Cross-entropy in bits for each byte of text; end tokens count their nats but no bytes."""
    return nats / math.log(2) / max(1, num_bytes)


def score(
    trained: Trained, *, device: torch.device, heldout: str, max_tokens: int, memory_blocks: int | None
) -> Evaluation:
    """The held-out loss of a saved run on one process, in the rows of its own evaluations.

    heldout: folder of shards. memory_blocks: None for as many as in training.

    Raises:
        ValueError: the shards have another tokenizer, or memory is asked of a model without memory.
    """
    values = trained.config.model_dump(mode="json")
    values["eval"] |= {"max_tokens": max_tokens, "memory_blocks": memory_blocks}
    values["data"]["heldout"] = heldout
    if not any(is_remote(place) for place in (heldout, *(source.shards for source in trained.config.data.sources))):
        values["data"]["cache"] = None  # it was for the held-out shards of the run
    config = read_saved(values)
    index, world = open_heldout(config.data), LocalMesh(device)
    check_tokenizer(index, trained.tokenizer.tokenizer_id)
    accumulation_steps = config.optim.accumulation_steps
    batches = heldout_batches(
        config.data, index, max_tokens=max_tokens, accumulation_steps=accumulation_steps, rank=0, num_ranks=1
    )
    engine = PlainEngine(
        trained.model,
        torch.optim.SGD(trained.model.parameters(), lr=0.0),
        clip_grad_norm=0.0,
        accumulation_steps=accumulation_steps,
        dtype=getattr(torch, config.run.dtype),
    )
    settings = StepSettings(accumulation_steps, config.run.seed, config.mask_documents)
    memory = build_memory(config, world, evaluation=True)
    return evaluate(engine, batches, world, settings, step=trained.step, memory=memory)


def main(command_line: Sequence[str] | None = None) -> int:
    """The command: prints the loss; 0 when done, 1 or 2 with one sentence when it cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="The held-out loss of the newest checkpoint of a run."
    )
    add = parser.add_argument
    add("--run", required=True, type=Path, metavar="DIR", help="the run's folder (run.dir), or an export")
    add("--heldout", metavar="DIR", help="shards to score (default: data.heldout of the run)")
    add("--max-tokens", type=int, metavar="N", help="targets to score at most (default: eval.max_tokens of the run)")
    add(
        "--memory-blocks",
        type=int,
        metavar="C",
        help="rows of memory, for mixers with memory (default: as in training)",
    )
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(command_line)
    try:
        device = torch.device(args.device)
        trained = load_run(args.run, device=device)
        found = score(
            trained,
            device=device,
            heldout=args.heldout or trained.config.data.heldout,
            max_tokens=args.max_tokens or trained.config.eval.max_tokens,
            memory_blocks=args.memory_blocks,
        )
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(
        f"{trained.path}: loss {found.loss:.4f} nats per token, {found.bits_per_byte:.4f} bits per byte, "
        f"{found.num_targets:,} tokens, memory_blocks {'as in training' if args.memory_blocks is None else args.memory_blocks}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
