"""Solves one size of a model for a number of parameters: `model.match`.

Owns the search and its sentences. Does not own where the number comes from, nor the files (train/match.py, its caller). Parameters are
counted on the meta device, so whatever a layer declares is counted right; a size that the model refuses (experts that must be a square,
a width that heads must divide) is passed over.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from model.config import ModelConfig
from model.parameters import count_parameters
from model.section import LayerSection
from model.transformer import Transformer

LARGEST = 2**40  # of the sizes tried: the parameters do not grow with what has not reached any target there
ACCURATE = 1.0e-3  # relative error above which a finer size is named
SHORT = {"feedforward_dim": ("hidden_dim", "expert_dim"), "experts": ("num_experts",)}


class Sized(NamedTuple):
    """A size and the parameters of the model with it."""

    size: int
    parameters: int


@dataclass(frozen=True)
class Solution:
    """The solved size, and a sentence about how near the model is with it."""

    size: int
    sentence: str


def solve(values: dict[str, Any], *, key: str, parameters: int, vocab_size: int) -> Solution | None:
    """The size at the dotted `key` that brings the model section `values` nearest to `parameters` in all; the smaller of two.

    None: this model is refused at every size.

    Raises:
        ValueError: the smallest model is too large already, or no size makes it large enough.
    """

    def count(size: int) -> int | None:
        return _parameters(with_size(values, key, size), vocab_size=vocab_size)

    found = _nearest(count, parameters, key=key)
    if found is None:
        return None
    error = (found.parameters - parameters) / parameters
    near = f"{abs(error):.3%} {'above' if error > 0 else 'below'}" if error else "exactly"
    before = size_of(values, key)
    instead = "" if before in (None, found.size) else f" instead of {before}"
    sentence = f"model.{key} is {found.size}{instead}: {found.parameters:,} parameters, {near} the {parameters:,} that model.match asks for"
    if abs(error) > ACCURATE:
        sentence += _finer(with_size(values, key, found.size), key=key, found=found, vocab_size=vocab_size)
    return Solution(found.size, sentence)


def find_key(values: dict[str, Any], *, by: str) -> str:
    """The dotted key in the model section that `by` means: itself, or a short name's, looked for in the feed-forwards first.

    Raises:
        ValueError: no layer in use has such a size, or several have.
    """
    keys = list(_size_keys(values))
    if by in keys:
        return by
    for pattern in ("feedforwards", "mixers"):
        fields = [key.partition(".") for key in keys if key.partition(".")[0] in _used(values, pattern)]
        meant = ["".join(parts) for parts in fields if parts[2] in SHORT.get(by, (by,))]
        if len(meant) > 1:
            raise ValueError(
                f"model.match.by must name one size, but {by} may be {' or '.join(meant)}: write one of these"
            )
        if meant:
            return meant[0]
    short = [name for name, fields in SHORT.items() if any(key.rpartition(".")[2] in fields for key in keys)]
    raise ValueError(
        f"model.match.by must name a size of this model, but it is {by}: write one of {', '.join([*short, *keys])}"
    )


def _size_keys(values: dict[str, Any]) -> Iterator[str]:
    """Dotted keys of the model section, and of the sections of layers in use, that say how many or how wide."""
    yield "d_model"
    if not values.get("distinct_layers"):  # else the depth does not change the parameters
        yield "num_layers"
    for name in dict.fromkeys([*_used(values, "feedforwards"), *_used(values, "mixers")]):
        for section in get_args(ModelConfig.model_fields[name].annotation):
            for field in getattr(section, "model_fields", {}):
                if _is_whole(section.model_fields[field].annotation) and (
                    field.startswith("num_") or field.endswith("_dim")
                ):
                    yield f"{name}.{field}"


def _used(values: dict[str, Any], pattern: str) -> list[str]:
    """The kinds that a pattern names, as far as there are such kinds."""
    names = values.get(pattern)
    return [name for name in names if name in ModelConfig.kinds(LayerSection)] if isinstance(names, list) else []


def _is_whole(annotation: Any) -> bool:
    return annotation is int or any(_is_whole(part) for part in get_args(annotation))


def with_size(values: dict[str, Any], key: str, size: int) -> dict[str, Any]:
    """The model section with one size set, and without `match`."""
    section, _, field = key.rpartition(".")
    changed = {name: value for name, value in values.items() if name != "match"}
    return changed | ({section: _section(changed, section) | {field: size}} if section else {field: size})


def size_of(values: dict[str, Any], key: str) -> int | None:
    """What the model section says at a dotted key, if that is a whole number."""
    section, _, field = key.rpartition(".")
    size = (_section(values, section) if section else values).get(field)
    return size if isinstance(size, int) else None


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the model, empty where it is none."""
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _parameters(values: dict[str, Any], *, vocab_size: int) -> int | None:
    """Of the model that the section describes; None where it is refused."""
    try:
        config = ModelConfig.model_validate_json(json.dumps(values), strict=True)
        return count_parameters(Transformer(config, vocab_size=vocab_size, backend="reference"))
    except ValueError:  # pydantic's is one too
        return None


def _nearest(count: Callable[[int], int | None], target: int, *, key: str) -> Sized | None:
    """The size whose parameters are nearest to the target; the smaller of two that are as near. None: no size is allowed."""
    bracket = _bracket(count, target, key=key)
    if bracket is None:
        return None
    low, high = bracket
    end = high.size
    while end - low.size > 1:
        middle = (low.size + end) // 2
        found = _first_allowed(count, middle, end)
        if found is not None and found.parameters <= target:
            low = found
        else:  # no size from here to `end`, or to the one found, is allowed and small enough
            end, high = middle, found or high
    return min(low, high, key=lambda sized: abs(sized.parameters - target))


def _bracket(count: Callable[[int], int | None], target: int, *, key: str) -> tuple[Sized, Sized] | None:
    """Two allowed sizes, the first with at most `target` parameters, the second with more; None: no size is allowed."""
    low, start = None, 0
    while start <= (LARGEST if low else 2**20):
        found = _first_allowed(count, start, LARGEST)
        if found is None and low is not None:
            break
        if found is not None and found.parameters > target:
            if low is None:
                raise ValueError(
                    f"model.match must ask for no less than the smallest model, but {target:,} parameters are asked for and with "
                    f"model.{key} {found.size} there are {found.parameters:,} already: ask for more, or make the rest of the model smaller"
                )
            return low, found
        low, start = found or low, max(1, 2 * max(start, found.size if found else 0))
    if low is None:
        return None
    if low.parameters == target:
        return low, low
    raise ValueError(
        f"model.match.by must name a size with which the parameters can grow, but no model.{key} brings them to {target:,}, "
        f"with {low.size} there are {low.parameters:,}: name another size, or change what bounds this one"
    )


def _first_allowed(count: Callable[[int], int | None], first: int, end: int) -> Sized | None:
    """The smallest allowed size from `first` on, looked for as far as the next square, and at least the next multiple of 64."""
    for size in range(first, min(end, first + max(64, 2 * math.isqrt(first) + 2))):
        if (parameters := count(size)) is not None:
            return Sized(size, parameters)
    return None


def _finer(values: dict[str, Any], *, key: str, found: Sized, vocab_size: int) -> str:
    """Names the size whose next step changes the parameters least, where that is less than the matched one's step."""

    def step(other: str) -> float:
        if (size := size_of(values, other)) is None:
            return math.inf
        after = _first_allowed(
            lambda s: _parameters(with_size(values, other, s), vocab_size=vocab_size), size + 1, LARGEST
        )
        change = abs(after.parameters - found.parameters) if after else 0
        return change or math.inf

    steps = {other: step(other) for other in _size_keys(values)}
    finest = min(steps, key=lambda other: steps[other])
    if steps[finest] >= steps[key]:
        return "; no other size of this model is finer"
    return f"; model.{finest} is finer, in steps of {steps[finest] / found.parameters:.3%}"
