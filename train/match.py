"""`model.match` of a config file -> the same tree with the size solved, and no match.

Owns where the target and the vocabulary come from. Does not own the search (model/match.py, imported only where there is a match,
because it needs torch). Called by train/config.py while a config is loaded.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from data.config import DataConfig
from data.split import open_train
from model.config import MatchConfig
from train.config_file import Tree

if TYPE_CHECKING:
    from train.config import Config


class Solved(NamedTuple):
    """A tree without `model.match`, and a sentence about the size that was solved for; None where there was nothing to solve."""

    tree: Tree
    sentence: str | None


def solve_match(tree: Tree, *, load: "Callable[[str], Config] | None") -> Solved:
    """What is wrong with `model.match` or with the rest of the model is left to the check of the whole config, which has the words.

    load: reads the config file that `params_of` names; None where this is such a file itself.

    Raises:
        ValueError: there is no such size, or the vocabulary is not known.
    """
    model = tree.values.get("model")
    if not isinstance(model, dict) or model.get("match") is None:
        return Solved(tree, None)
    try:
        match = MatchConfig.model_validate_json(json.dumps(model["match"]), strict=True)
    except ValidationError:
        return Solved(tree, None)
    from model.match import find_key, size_of, solve, with_size

    key = find_key(model, by=match.by)
    vocab_size = _vocab_size(tree.values)
    parameters = _target(match, load=load, vocab_size=vocab_size)
    solution = solve(model, key=key, parameters=parameters, vocab_size=vocab_size)
    # a model that is refused at every size is refused at this one too, and then with its reason
    size = solution.size if solution else size_of(model, key) or 1024
    solved = replace(tree, values=tree.values | {"model": with_size(model, key, size)})
    return Solved(solved, solution.sentence if solution else None)


def _target(match: MatchConfig, *, load: "Callable[[str], Config] | None", vocab_size: int) -> int:
    """The number asked for: given, or of the other model, with its own vocabulary or, where that is the shards', with ours."""
    if match.params_of is None:
        return round(match.params or 0)
    if load is None:
        raise ValueError(
            "model.match.params_of must name a model with sizes of its own, but that one has a model.match.params_of too, "
            f"{match.params_of}: name the last of the chain"
        )
    from model.parameters import count_parameters
    from model.transformer import Transformer

    other = load(match.params_of).model
    return count_parameters(Transformer(other, vocab_size=other.vocab_size or vocab_size, backend="reference"))


def _vocab_size(values: dict[str, Any]) -> int:
    """The model's, or the shards' where it is null. A wrong one is refused by the check of the whole config, so any number will do."""
    given, data = values["model"].get("vocab_size"), values.get("data")
    if given is not None:
        return given if isinstance(given, int) and given > 0 else 1
    try:
        return open_train(DataConfig.model_validate_json(json.dumps(data), strict=True)).vocab_size
    except ValidationError:
        error = "the section data is not right either"
    except (ValueError, RuntimeError, OSError) as caught:
        error = str(caught)
    raise ValueError(
        f"model.match counts the embeddings too, but model.vocab_size is null and no shards say it ({error}): set "
        "model.vocab_size to the tokenizer's size, or prepare the shards first"
    )
