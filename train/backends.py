"""Which backend computes each bank of experts, and each other part that has kernels: by its name in the config, or the fastest by a
measurement before the first step.

Owns: when it is measured, what is chosen, and what the log says. Does not own: the candidates and the work by which they are compared
(model/expert_choice.py, model/part_choice.py; of a run: works.py), what is kept of it (kernels_file.py), the tiles (kernels/tuning.py).
Called by train/run.py and train/build.py.

Every rank says which candidates it has; rank 0 measures those that all have, and tells the others. On a CPU all candidates give the same
bits. On a GPU they do not, so a run that is started again takes the fastest of which kernels.json in its folder has a time, and measures
only work of which no candidate has one: other sizes, another GPU, another torch or Triton. A time that was kept
stays, whatever a later start lacks.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from kernels import tuning
from kernels.availability import why_not_triton
from kernels.grouped_matmul import choose_backend, why_not_torch
from model.expert_choice import BankWork
from model.experts import DENSE
from model.part_choice import PartWork
from model.transformer import Transformer
from model.work import Work
from train.config import Config
from train.engine import World
from train.kernels_file import Kept, read
from train.run_folder import RunFolder
from train.together import on_every_rank, on_rank_zero

Works = Mapping[str, Work]  # by the path of a module


@dataclass(frozen=True)
class Backends:
    """of_module: by path. measured: by path, the work that was (`str` of a Work).

    seconds: of a forward and backward pass, by work and candidate; infinite where there is no time. tiles: kernels/tuning.py's. lacking:
    sentences, what some ranks do not have. kept: what kernels.json is to hold, on rank 0.
    """

    of_module: dict[str, str]
    measured: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    tiles: dict[str, int] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    kept: Kept | None = None

    def apply(self, model: Transformer) -> None:
        """Tells the modules of the model, narrowed or not, and the kernels."""
        for path, backend in self.of_module.items():
            module: Any = model.get_submodule(path)
            assert isinstance(module.backend, str)
            module.backend = backend
        if self.measured:
            tuning.decide(self.tiles)

    def notes(self) -> list[str]:
        """Sentences for the log, which rank 0 writes: what ranks lack, what was chosen and why; equal modules once."""
        found, anew = list(self.lacking), self.kept.anew if self.kept else []
        for work, path in by_layers(self.measured):
            seconds, no_time = self.seconds[work], "no room" if work in anew else "not kept"
            texts = {name: f"{1e3 * value:.2f}" if value < math.inf else no_time for name, value in seconds.items()}
            times = ", ".join(f"{name} {text}" for name, text in texts.items())
            why = f"ms forward and backward: {times}" if len(seconds) > 1 else "the only candidate"
            found.append(f"{path}: computed by {_fastest(seconds)}; {why}")
        if self.kept and self.kept.resumes:
            news = "measured anew; on a GPU last bits may differ from before"
            found += [f"kernels.json has no time for {work}: {news}" for work in anew]
        return found

    def write(self, folder: RunFolder) -> None:
        """kernels.json, where something was measured. Called by rank 0.

        Raises:
            RuntimeError: the folder cannot be written.
        """
        if self.kept is not None:
            self.kept.write(folder, tiles=self.tiles)


def named_backend(config: Config, path: str, work: Work, device: torch.device) -> str | None:
    """What the config names for this work, model.expert_backend for a bank, model.kernel_backend for the rest; None: to be measured.

    Raises:
        ValueError: the backend cannot serve this device, this dtype or these sizes.
    """
    if isinstance(work, BankWork):
        asked = config.model.expert_backend
        return None if asked == "auto" else _bank_backend(asked, work, device)
    asked = config.model.kernel_backend
    if asked == "auto":
        return None
    serving = work.candidates(device.type)
    if asked not in serving:
        raise ValueError(
            f"model.kernel_backend must be one that can serve {path} ({work}) on this device, {' or '.join(serving)}, but it is {asked}: "
            "set it to auto"
        )
    return asked


def unmeasured_backend(config: Config, path: str, work: Work, device: torch.device) -> str:
    """What a process that only reads a model takes, which may lack the GPU of the run: what is named if it can serve here, else torch,
    or the loop for a bank of widths that torch refuses.
    """
    try:
        named = named_backend(config, path, work, device)
    except ValueError:
        named = None
    return named or (_bank_backend("auto", work, device) if isinstance(work, BankWork) else "torch")


def _bank_backend(asked: str, work: BankWork, device: torch.device) -> str:
    name = choose_backend("triton" if asked == DENSE else asked, device=device, dtype=work.dtype, widths=work.widths)
    return DENSE if asked == DENSE and DENSE in work.candidates(device.type) else name


def choose_backends(config: Config, works: Works, world: World) -> Backends:
    """What every rank computes each module with. The works are the same on every rank.

    Raises:
        ValueError: the config names a backend that cannot serve the device of a rank, this dtype or these sizes.
        RuntimeError: kernels.json cannot be read, or a work has no room in the device's memory.
    """
    device = world.device
    asked = on_every_rank(
        world, lambda: {path: named_backend(config, path, work, device) for path, work in works.items()}
    )
    named = {path: backend for path, backend in asked.items() if backend is not None}
    works = {path: work for path, work in works.items() if path not in named}
    serving, lacking = _serving_all(works, world)
    alone = {
        path: serving[str(work)][0]
        for path, work in works.items()
        if isinstance(work, PartWork) and device.type == "cpu" and len(serving[str(work)]) == 1
    }
    named, works = named | alone, {path: work for path, work in works.items() if path not in alone}
    if not works:
        return Backends(named, lacking=lacking)
    kept = on_rank_zero(world, lambda: read(RunFolder(Path(config.run.dir))))
    seconds: dict[str, dict[str, float]] = {}
    # One after the other, so that the ranks that wait do not wait for all of them at once.
    for name, work in {str(work): work for work in works.values()}.items():
        found = on_rank_zero(world, lambda name=name, work=work: _measure(work, serving[name], device, kept))
        if found is not None:
            seconds[name] = found
    seconds, tiles = world.all_gather_object([seconds, tuning.decisions()])[0]
    measured = {path: str(work) for path, work in works.items()}
    of_module = named | {path: _fastest(seconds[name]) for path, name in measured.items()}
    return Backends(of_module, measured, seconds, tiles, lacking, kept)


def _serving_all(works: Works, world: World) -> tuple[dict[str, list[str]], list[str]]:
    """By the name of a work the candidates that every rank has, in rank 0's order, and sentences on the ranks without Triton.

    One all-gather of some names a work, where there is a work.
    """
    if not works:
        return {}, []
    kind = world.device.type
    mine = on_every_rank(world, lambda: {str(work): list(work.candidates(kind)) for work in works.values()})
    told = world.all_gather_object([mine, why_not_triton(kind)])
    common = {
        name: [backend for backend in backends if all(backend in theirs[name] for theirs, _ in told)]
        for name, backends in told[0][0].items()
    }
    # of a bank with and without Triton there may be none; the loop serves wherever torch runs
    looped = [path for _, path in by_layers({path: 0 for path, work in works.items() if not common[str(work)]})]
    serving = {name: backends or ["loop"] for name, backends in common.items()}
    return serving, _lacking(told, looped)


def _lacking(told: Sequence[Any], looped: Sequence[str]) -> list[str]:
    """told: of each rank its candidates by work, and why it has no Triton. looped: paths of the banks with nothing in common."""
    by_triton = {name for mine, _ in told for name, backends in mine.items() if "triton" in backends}
    ranks: dict[str, list[int]] = {}
    for rank, (mine, reason) in enumerate(told):
        if any("triton" not in mine[name] for name in by_triton):
            ranks.setdefault(str(reason), []).append(rank)
    loop = f"; so only the loop is left for {', '.join(looped)}: install triton there, or name model.expert_backend"
    found = []
    for reason, those in ranks.items():
        who, has = ("ranks", "have") if len(those) > 1 else ("rank", "has")
        found.append(
            f"{who} {_ranges(those)} of {len(told)} {has} no triton backend: {reason}" + (loop if looped else "")
        )
    return found


def excluded(config: Config, works: Works, device: torch.device) -> list[str]:
    """Sentences for the log: what auto could not choose, and why."""
    if config.model.expert_backend != "auto":
        return []
    banks = [work for work in works.values() if isinstance(work, BankWork)]
    reasons = (why_not_torch(work.dtype, device_type=device.type, widths=work.widths) for work in banks)
    return [f"model.expert_backend auto: {reason}" for reason in dict.fromkeys(reasons) if reason]


Value = TypeVar("Value")


def by_layers(found: Mapping[str, Value]) -> list[tuple[Value, str]]:
    """Values by the path of a bank, equal ones of several layers once, with a path such as layers.0-3,7.mixer.value_experts."""
    depths: dict[tuple[str, Value], list[int]] = {}
    for path, value in found.items():
        _, depth, name = path.split(".", 2)
        depths.setdefault((name, value), []).append(int(depth))
    return [(value, f"layers.{_ranges(layers)}.{name}") for (name, value), layers in depths.items()]


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as "0-3,7"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ",".join(f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def _fastest(seconds: Mapping[str, float]) -> str:
    return min(seconds, key=seconds.__getitem__)


def _measure(work: Work, candidates: Sequence[str], device: torch.device, kept: Kept | None) -> dict[str, float]:
    """On rank 0: the times that were kept; where no candidate has one all are measured, and what had room is kept.

    Where one has, no other is measured: it might be faster, and the run would go on with other last bits.
    """
    assert kept is not None
    times = kept.seconds.get(_described(work, device), {})
    if not any(backend in times for backend in candidates):
        if device.type == "cpu" and len(candidates) == 1:
            return {candidates[0]: 0.0}  # nothing to choose, no tiles either
        found = {backend: _seconds(work, backend, device) for backend in candidates}
        had_room = {backend: value for backend, value in found.items() if value < math.inf}
        if not had_room:
            raise RuntimeError(
                f"a forward and backward pass of {work} must fit into the memory of {_where(device)}, but {' and '.join(candidates)} found "
                "no room: make the micro-step smaller (raise optim.accumulation_steps)"
            )
        times = kept.seconds[_described(work, device)] = times | had_room
        kept.anew.append(str(work))
    return {backend: times.get(backend, math.inf) for backend in candidates}


def _seconds(work: Work, backend: str, device: torch.device) -> float:
    """Infinite where the work does not fit into the memory of the device. What it took is given back: the run's own tensors come."""
    try:
        return work.seconds(backend, device=device)
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _described(work: Work, device: torch.device) -> str:
    """Everything that a measurement depends on, as text. On a GPU with all that a tile's name has, but the list of tiles: where kept times
    held with another Triton, its tiles would never be measured.
    """
    compilers = tuning.compilers() if device.type == "cuda" else f"torch {torch.__version__}"
    return f"{_where(device)}, {compilers}: {work}"


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
