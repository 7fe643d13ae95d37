"""A run as it was saved last, for commands that read it: the model with the weights of the newest whole checkpoint, its config, its
tokenizer.

Changes nothing in the folder. Called by train/generate.py and train/evaluate.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from train import checkpoint
from train.build import load_model
from train.config import Config, read_saved
from train.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """step: updates done. path: of the checkpoint."""

    path: Path
    step: int
    config: Config
    tokenizer: Tokenizer
    model: Transformer


def load_run(folder: Path, *, device: torch.device) -> Trained:
    """The newest whole checkpoint of a run folder.

    Raises:
        ValueError: there is no checkpoint in the folder, or the tokenizer is not that of the run.
        RuntimeError: no checkpoint is whole.
    """
    run = RunFolder(folder)
    newest = checkpoint.latest(run.checkpoints)
    if newest is None:
        raise ValueError(
            f"--run must name the folder of a run that was saved, but {run.checkpoints} holds no checkpoint"
        )
    state = checkpoint.read_state(newest)
    config = read_saved(state.config)
    tokenizer = load_tokenizer(run.tokenizer)
    if tokenizer.tokenizer_id != state.extra["tokenizer_id"]:
        raise ValueError(
            f"{run.tokenizer} must be the tokenizer of the run, but it is {tokenizer.tokenizer_id} and {newest} was trained with "
            f"{state.extra['tokenizer_id']}: restore it from the run's shards"
        )
    model = load_model(newest, config, vocab_size=tokenizer.vocab_size, device=device)
    return Trained(newest, state.step, config, tokenizer, model)
