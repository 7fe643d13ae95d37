"""How a run begins from another model's weights: `run.init_from`, and with `run.upcycle` from those of its dense twin.

Owns what must fit and the filling of every rank's ranges. The step, the data position and the optimizer's state stay those of a new
run. Does not own the arithmetic of upcycling (model/upcycle.py) nor the reading (train/source.py). Called by train/resume.py, and only
where the run folder holds no checkpoint: from then on a run's own checkpoints count, and the folder is not looked at.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from data.split import TrainSplit
from model.parameters import LogicalParameter, logical_parameters, states_of
from model.transformer import Transformer
from model.upcycle import ROUTER_STD, recipes, small_routers
from train.config import Config, differences
from train.engine import Engine, World
from train.export import is_router
from train.source import Source, fill_from, read_from
from train.storage import Part
from train.together import on_every_rank

SETTING = "run.init_from"


def begin_from(config: Config, engine: Engine, world: World, index: TrainSplit) -> list[str]:
    """Fills the engine's weights from `run.init_from`; every rank calls it. Gives sentences for the log; none if nothing is asked.

    Raises:
        ValueError: the folder holds no model, or names, shapes or the tokenizer do not fit: both values are said.
        RuntimeError: what it holds is damaged.
    """
    if config.run.init_from is None:
        return []
    folder = Path(config.run.init_from)
    return read_from(
        folder, lambda source: _begin_from(source, config, engine, world, index), setting=SETTING, mesh=world
    )


def _begin_from(source: Source, config: Config, engine: Engine, world: World, index: TrainSplit) -> list[str]:
    on_every_rank(world, lambda: _check_tokenizer(source, index))
    model = engine.model
    if config.run.upcycle:
        values = on_every_rank(world, lambda: _upcycled(source, config, model))
    else:
        on_every_rank(world, lambda: _check_fits(source, config, model))
        values = {}
    on_every_rank(world, lambda: _fill(engine, source, values))
    engine.restored(step=0)
    how = "upcycled from" if config.run.upcycle else "begins with the weights of"
    changes = differences(source.config.model.model_dump(mode="json"), config.model.model_dump(mode="json"))
    told = [] if config.run.upcycle else [f"changed against {source.path}: model.{change}" for change in changes]
    return [f"{how} {source.path} (its step {source.step}); step 0, data position 0", *told]


def _check_tokenizer(source: Source, index: TrainSplit) -> None:
    if source.tokenizer.tokenizer_id != index.tokenizer_id:
        raise ValueError(
            f"{SETTING} must be a model of the shards' tokenizer, but {source.path} was trained with {source.tokenizer.tokenizer_id} and "
            f"{index.folder} has {index.tokenizer_id}: prepare the shards with {source.path}'s tokenizer.json, or choose another model"
        )


def _check_fits(source: Source, config: Config, model: Transformer) -> None:
    """Names and shapes are equal. Where they are not, the settings that differ say why."""
    shapes = _shapes(model)
    for name in sorted(shapes.keys() | source.shapes.keys()):
        if shapes.get(name) != source.shapes.get(name):
            changes = differences(source.config.model.model_dump(mode="json"), config.model.model_dump(mode="json"))
            why = "; ".join(f"model.{change}" for change in changes)
            raise ValueError(
                f"{SETTING} must be a model of these sizes, but {name} has shape {_said(source.shapes.get(name))} in {source.path} and "
                f"{_said(shapes.get(name))} here ({why}): give the same sizes, or set run.upcycle to true where it is this one's dense twin"
            )


def _said(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    shapes = {parameter.name: parameter.spec.shape for parameter in logical_parameters(model)}
    return shapes | {name: tuple(state.shape) for name, state in states_of(model).items()}


def _upcycled(source: Source, config: Config, model: Transformer) -> dict[str, Callable[[], Tensor]]:
    """By name, how each tensor that is not simply the source's is made."""
    made = recipes(source.config.model, config.model)
    values: dict[str, Callable[[], Tensor]] = {
        name: lambda recipe=recipe: recipe(source.read) for name, recipe in made.items()
    }
    small, std = small_routers(config.model), config.run.upcycle_router_std
    std = ROUTER_STD if std is None else std
    for parameter in logical_parameters(model):
        name, shape = parameter.name, parameter.spec.shape
        if name in made or source.shapes.get(name) == shape:
            continue
        if not (is_router(name) or ".selection." in name):
            raise ValueError(
                f"to upcycle, what is no expert and no router must be the dense model's, but {name} has shape "
                f"{_said(source.shapes.get(name))} in {source.path} and {_said(shape)} here: give this model the dense one's settings"
            )
        shrink = is_router(name) and any(name.startswith(f"{path}.") for path in small)
        values[name] = _drawn(parameter, std if shrink else None)
    return values


def _drawn(parameter: LogicalParameter, std: float | None) -> Callable[[], Tensor]:
    """What this run's seed has drawn for a router, the rows scaled to a mean norm of `std`: the logits' standard deviation."""
    drawn = parameter.tensor.detach().clone()
    if std is None:
        return lambda: drawn
    return lambda: drawn * (std / drawn.norm(dim=-1).mean())


def _fill(engine: Engine, source: Source, values: Mapping[str, Callable[[], Tensor]]) -> None:
    parts = [Part(f.name, f.shape, f.start, f.tensors["master"], f.box) for f in engine.fragments()]
    source.fill([part for part in parts if part.name not in values])
    fill_from([part for part in parts if part.name in values], lambda name: values[name]())
    with torch.no_grad():
        for name, state in states_of(engine.model).items():
            # an upcycled model has states that its dense twin has not: those of its new routers, as a new run draws them
            if source.shapes.get(name) == tuple(state.shape):
                state.copy_(source.read(name))
