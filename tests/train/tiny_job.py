"""A whole run of one process that takes a tenth of a second: shards of random tokens, a SwitchAll of 4,000 weights.

Owns the shards and the config. Called by the tests of a run beside it, which hand them to train.run.run, as launcher/main.py does.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer, bytes_tokenizer
from data.writer import ShardSetWriter
from parallel.config import ProcessInfo
from train.config import Config

ALONE = ProcessInfo(
    rank=0,
    world_size=1,
    local_rank=0,
    local_world_size=1,
    master_addr="127.0.0.1",
    master_port=0,
    launcher="test",
)
SHARDS, DOCUMENTS, LENGTH = 8, 6, 20  # of each split; LENGTH tokens in a document


def write_shards(folder: Path, *, seed: int, tokenizer: Tokenizer | None = None, kinds: int | None = None) -> None:
    """Both splits, in place of what is there: `seed` draws the documents. Eight shards, so that their order tells seeds apart.

    kinds: different tokens in them; None: all.
    """
    tokenizer = tokenizer or bytes_tokenizer()
    generator = np.random.default_rng(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for split in ("train", "heldout"):
        writer = ShardSetWriter(folder / split, tokenizer=tokenizer, shard_tokens=DOCUMENTS * LENGTH)
        for _ in range(SHARDS * DOCUMENTS):
            tokens = generator.integers(1, tokenizer.vocab_size if kinds is None else kinds + 1, LENGTH - 1)
            writer.add(np.append(tokens, tokenizer.end_token).astype(tokenizer.dtype), num_bytes=LENGTH - 1)
        writer.close()


def another_tokenizer() -> Tokenizer:
    """As many tokens as the byte tokenizer has, two of them exchanged."""
    content = json.loads(bytes_tokenizer().to_bytes())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return Tokenizer(json.dumps(content))


def tiny_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """The config of a run in folder/run on the shards in folder/shards; `sections` changes fields of sections.

    Nothing is due in its three steps: what is written is written because the run ends.
    """
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "steps": 3, "seed": 5, "device": "cpu", "log_every_steps": 100},
        "data": {
            "shards": str(folder / "shards" / "train"),
            "heldout": str(folder / "shards" / "heldout"),
            "sequence_length": 8,
            "global_batch_size": 4,
            "streams": 4,
        },
        "model": {
            "d_model": 8,
            "num_layers": 1,
            "mixers": ["switchhead"],
            "feedforwards": ["sigma_moe"],
            "switchhead": {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 2},
            "sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2},
            "dropout": 0.3,
        },
        "parallel": {"zero_stage": 0},
        "optim": {"lr": 1.0e-2},
        "checkpoint": {"every_steps": 100},
        "eval": {"every_steps": 100, "max_tokens": 100},
        "watch": {},
    }
    return Config.model_validate({name: fields | sections.get(name, {}) for name, fields in values.items()})


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of the run in `folder`/run."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
