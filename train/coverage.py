"""Who holds what: the ranges of all ranks, checked against each other and against a checkpoint before any byte moves.

Owns the turning of fragments and named tensors into parts, what the ranks tell each other of them, and the rule that nothing is
written twice, left out or put into another shape. Does not own the exchange itself nor files. Called by train/checkpoint.py.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.fragments import Fragment
from train.boxes import Span, box_of, check_cover
from train.manifest import MANIFEST, STATE, TENSOR_NAME, Count, DType, Manifest, Record, Sides, TensorName
from train.storage import DTYPE_NAMES, DTYPES, Part


class Held(Record):
    """A range [start, end) of one logical tensor's flat box (None: the whole) that a process writes or fills."""

    name: TensorName
    shape: list[Count]
    dtype: DType
    start: Count
    end: Count
    box: Sides | None = None

    @property
    def span(self) -> Span:
        return Span(box_of(self.box, self.shape), self.start, self.end)


class Report(Record):
    """What one rank tells the others before a save or a load: where in the run it is, and its ranges."""

    step: Count
    position: Count
    held: list[Held]

    @classmethod
    def of(cls, parts: Sequence[Part], *, step: int, position: int) -> "Report":
        held = [
            Held(
                name=part.name,
                shape=list(part.shape),
                dtype=DTYPE_NAMES[part.values.dtype],
                start=part.start,
                end=part.end,
                **({} if part.box is None else {"box": [list(side) for side in part.box]}),
            )
            for part in parts
        ]
        return cls(step=step, position=position, held=held)


def parts_of(fragments: Sequence[Fragment], tensors: Mapping[str, Tensor]) -> list[Part]:
    """One part per fragment and kind, "master/embedding.weight", and one per whole named tensor, "state/router_bias".

    Raises:
        ValueError: a fragment's tensors are not float32, 1-D and equally long; a dtype or name that the format does not have.
    """
    parts = []
    for fragment in fragments:
        views = list(fragment.tensors.values())
        if not views or any(v.shape != views[0].shape or v.ndim != 1 or v.dtype != torch.float32 for v in views):
            found = {kind: f"{view.dtype} {list(view.shape)}" for kind, view in fragment.tensors.items()}
            raise ValueError(
                f"the tensors of a fragment must be float32, 1-D and equally long, but {fragment.name} has {found}"
            )
        for kind, view in fragment.tensors.items():
            parts.append(Part(f"{kind}/{fragment.name}", tuple(fragment.shape), fragment.start, view, fragment.box))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"tensor {name} must have a dtype of {', '.join(DTYPES)}, but has {tensor.dtype}: convert it"
            )
        parts.append(Part(f"{STATE}/{name}", tuple(tensor.shape), 0, tensor.detach().reshape(-1)))
    for part in parts:
        if not re.fullmatch(TENSOR_NAME, part.name) or part.start < 0:
            raise ValueError(
                f"a tensor must have a name like {TENSOR_NAME} and a start of at least 0, but has {part.name!r} and {part.start}"
            )
    return parts


def union(reports: Sequence[Report]) -> dict[str, list[Held]]:
    """What all ranks hold, by tensor name.

    Raises:
        RuntimeError: two ranks are at different places of the run, or give one tensor different shapes or dtypes.
    """
    merged: dict[str, list[Held]] = defaultdict(list)
    for rank, report in enumerate(reports):
        if (report.step, report.position) != (reports[0].step, reports[0].position):
            raise RuntimeError(
                f"all ranks must be at one step and position, but rank 0 is at {reports[0].step} and {reports[0].position}, "
                f"rank {rank} at {report.step} and {report.position}: save and load at one place of the training loop"
            )
        for held in report.held:
            merged[held.name].append(held)
            first = merged[held.name][0]
            if (held.shape, held.dtype) != (first.shape, first.dtype):
                raise RuntimeError(
                    f"{held.name} must be one tensor on all ranks, but is {first.dtype} {first.shape} on an earlier rank and "
                    f"{held.dtype} {held.shape} on rank {rank}: give the logical shape, with all experts and no padding"
                )
    return merged


def check_save(reports: Sequence[Report]) -> None:
    """All ranks together hold every element of every tensor exactly once.

    Raises:
        RuntimeError: see `union`; a gap, an overlap, a range beyond the end: names the tensor and the elements.
    """
    remedy = "the ranks must bring each element once, replicas and named tensors from one rank only"
    for name, ranges in union(reports).items():
        check_cover(name, ranges[0].shape, [held.span for held in ranges], remedy=remedy)


def check_load(path: Path, manifest: Manifest, reports: Sequence[Report]) -> None:
    """The ranks ask for the tensors of the checkpoint, in its shapes, and together (replicas allowed) for each element.

    Raises:
        RuntimeError: see `union`; a name that one side lacks, another shape or dtype (both are said), elements that no rank takes.
    """
    asked = union(reports)
    stored = {name: entry for name, entry in manifest.tensors.items() if not name.startswith(f"{STATE}/")}
    remedy = f"start with the config that is written in {path / MANIFEST}"
    for names, where in ((asked.keys() - stored.keys(), "checkpoint"), (stored.keys() - asked.keys(), "model")):
        if names:
            raise RuntimeError(
                f"the model and the checkpoint {path} must have the same tensors, but {len(names)} are missing in the {where}, "
                f"the first {min(names)}: {remedy}"
            )
    for name, ranges in asked.items():
        entry, shape, dtype = stored[name], ranges[0].shape, ranges[0].dtype
        if (shape, dtype) != (entry.shape, entry.dtype):
            raise RuntimeError(
                f"{name} is {entry.dtype} {entry.shape} in the checkpoint {path} and {dtype} {shape} in the model: {remedy}"
            )
        spans = [held.span for held in ranges]
        check_cover(
            f"{name} in the model", entry.shape, spans, replicas=True, remedy="some rank must take each element"
        )
