"""kernels.json of a run: the times by which its backends were chosen, and the tiles of their kernels.

Owns: what is kept there, how it is checked and written. Does not own: what is measured and chosen (backends.py), the tiles
(kernels/tuning.py). Called by train/backends.py, on rank 0.
"""

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from kernels import tuning
from train.checkpoint_folder import candidates
from train.run_folder import RunFolder, replace_file

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Kept:
    """Of every start of the run, on whatever machine. seconds: by a text for the work and the machine, then by backend, all finite.

    resumes: this start goes on from a checkpoint. anew: `str` of the works that it measured.
    """

    seconds: dict[str, dict[str, float]]
    tiles: dict[str, int]
    resumes: bool = False
    anew: list[str] = field(default_factory=list)

    def write(self, folder: RunFolder, *, tiles: Mapping[str, int]) -> None:
        """RuntimeError: the folder cannot be written."""
        replace_file(folder.kernels, json.dumps({"seconds": self.seconds, "tiles": tiles}, indent=2) + "\n")


def read(folder: RunFolder) -> Kept:
    """What earlier starts have kept; the kernels take the tiles. A time that is infinite (no room in memory) is left out.

    Raises:
        RuntimeError: the file cannot be read, or holds a time or a tile that cannot be one.
    """
    kept = Kept({}, {}, resumes=bool(candidates(folder.checkpoints)))
    if folder.kernels.exists():
        try:
            content = json.loads(folder.kernels.read_text(encoding="utf-8"))
            for work, times in content["seconds"].items():
                finite = {backend: float(value) for backend, value in times.items() if value != math.inf}
                kept.seconds[work] = {backend: _below(math.inf, value) for backend, value in finite.items()}
            for name, number in content["tiles"].items():
                kept.tiles[name] = _below(tuning.MAX_CONFIGS, operator.index(number))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RuntimeError(
                f"{folder.kernels} keeps which kernels this run computes with, but it cannot be read ({error!r}): restore it, or remove "
                "it to have them chosen again (on a GPU the losses may then differ in their last bits)"
            ) from error
    tuning.decide(kept.tiles)
    return kept


def _below(limit: float, number: Number) -> Number:
    if not 0 <= number < limit:
        raise ValueError(f"{number} must be from 0 to below {limit}")
    return number
