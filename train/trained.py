"""A trained model for commands that read it: with the weights of a run's newest whole checkpoint or of an export, config, tokenizer.

Changes nothing in the folder. Called by train/generate.py and train/evaluate.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from model.transformer import Transformer
from train.build import load_model
from train.config import Config
from train.source import read_all, read_from


@dataclass(frozen=True)
class Trained:
    """step: updates done. path: of the checkpoint or export."""

    path: Path
    step: int
    config: Config
    tokenizer: Tokenizer
    model: Transformer


def load_run(folder: Path, *, device: torch.device) -> Trained:
    """The newest whole checkpoint of a run folder, or an export.

    Raises:
        ValueError: there is no checkpoint in the folder, or the tokenizer is not that of the run.
        RuntimeError: no checkpoint is whole, or the export is damaged.
    """
    source, weights = read_from(folder, lambda source: (source, read_all(source)), setting="--run")
    model = load_model(weights, source.config, vocab_size=source.tokenizer.vocab_size, device=device)
    return Trained(source.path, source.step, source.config, source.tokenizer, model)
