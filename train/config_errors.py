"""Plain values -> a checked config, or one sentence that says what to change.

pydantic reports every wrong value in its own words; here the most useful one becomes a sentence with the dotted key,
the value, what it must be and the nearest valid key, and the others are named after it. Called by train/config.py;
`fields` and `sections` also by launcher/main.py for its help.
"""

import json
from collections.abc import Iterator
from difflib import SequenceMatcher, get_close_matches
from math import isfinite
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from train.config_file import Tree

Model = TypeVar("Model", bound=BaseModel)

# pydantic's name of an error -> what the value must be (with pydantic's own numbers filled in).
_MUST_BE = {
    "int_type": "be a whole number",
    "int_from_float": "be a whole number",
    "float_type": "be a number",
    "string_type": "be text",
    "bool_type": "be true or false",
    "tuple_type": "be a list",
    "list_type": "be a list",
    "model_type": "be a section (lines of key: value)",
    "literal_error": "be {expected}",
    "greater_than": "be above {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be below {lt}",
    "less_than_equal": "be at most {le}",
    "string_too_short": "not be empty",
    "too_short": "have {min_length} or more entries",
    "too_long": "have {max_length} or fewer entries",
}


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every value of a config class, sections opened, in the order of the classes."""
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is None:
            yield prefix + name, field
        else:
            yield from fields(section, f"{prefix}{name}.")


def sections(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Dotted section -> its keys; the whole config is the section ''."""
    found = {prefix.rstrip("."): list(model.model_fields)}
    for name, field in model.model_fields.items():
        if (section := _section(field)) is not None:
            found |= sections(section, f"{prefix}{name}.")
    return found


def validate(model: type[Model], tree: Tree) -> Model:
    """The config of this class that the tree describes; types are strict, lists fill tuples. ValueError, one sentence."""
    try:
        # Through JSON, because that is pydantic's strict mode in which a list is a tuple and "3" is not 3.
        return model.model_validate_json(json.dumps(tree.values), strict=True)
    except ValidationError as error:
        raise ValueError(_sentence(model, tree, error.errors(include_url=False))) from None


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is a section, also one that may be null."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _sentence(model: type[BaseModel], tree: Tree, errors: list[ErrorDetails]) -> str:
    """The first error in the order of the file (missing keys last), then the names of the others."""
    grouped: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        grouped.setdefault(_dotted(tree.values, error), []).append(error)
    order = {key: place for place, (key, _) in enumerate(_items(tree.values))}
    # A list with a wrong entry is reported as a wrong list too: the entry says more.
    keys = [key for key in grouped if not any(other.startswith(f"{key}[") for other in grouped)]
    keys.sort(key=lambda key: (key not in order, order.get(key, 0)))
    text, suggested = _describe(model, tree, key=keys[0], errors=grouped[keys[0]])
    # A misspelt key is also a missing one: named once.
    others = [key for key in keys[1:] if key != suggested]
    rest = f" (and {len(others)} more to correct: {', '.join(others)})" if others else ""
    return f"{tree.origin(keys[0])}: {text}{rest}"


def _describe(model: type[BaseModel], tree: Tree, *, key: str, errors: list[ErrorDetails]) -> tuple[str, str | None]:
    """(what is wrong with this key and what to change, the valid key that is suggested if any)."""
    kind, value = errors[0]["type"], errors[0]["input"]
    if kind == "extra_forbidden":
        return _unknown(model, tree, key=key, value=value)
    if kind == "missing" and isinstance(errors[0]["loc"][-1], int):
        return f"{key} has too few entries, it is {_shown(value)}: add what is missing", None
    if kind == "missing":
        keys = sections(model).get(key)
        return (
            f"the key {key} is missing: add it"
            if keys is None
            else f"the section {key} is missing: add it with {', '.join(keys)}",
            None,
        )
    if kind == "value_error":
        said = str(errors[0].get("ctx", {}).get("error", errors[0]["msg"]))
        return (said if not key else f"{key} {said}" if said.startswith("must ") else f"{key}: {said}"), None
    musts = [_must(error) for error in errors]
    must = " or ".join(dict.fromkeys([musts[0], *(must.removeprefix("be ") for must in musts[1:])]))
    return (
        f"{key or 'it'} must {must}, but it is {_shown(value)}: {_remedy(tree, key=key, value=value, errors=errors)}",
        None,
    )


def _must(error: ErrorDetails) -> str:
    """What follows "must" for one of pydantic's errors, in YAML's spelling."""
    context = {name: _yaml(value) for name, value in error.get("ctx", {}).items()}
    return _MUST_BE[error["type"]].format(**context) if error["type"] in _MUST_BE else f"be right: {error['msg']}"


def _yaml(expected: Any) -> str:
    return str(expected).replace("'", "").replace("True", "true").replace("False", "false").replace("None", "null")


def _unknown(model: type[BaseModel], tree: Tree, *, key: str, value: Any) -> tuple[str, str | None]:
    parent = key.rpartition(".")[0]
    nearest = _nearest(key, [*(name for name in sections(model) if name), *(name for name, _ in fields(model))])
    said = f"{key} ({_shown(value)}) is not a key of the config"
    if nearest is None:
        keys = sections(model).get(parent)  # none for an entry of a list
        takes = f"; {parent or 'the config'} takes {', '.join(keys)}" if keys else ""
        return f"{said}: remove it{takes}", None
    given = dict(_items(tree.values))
    change = (
        f"remove one of the two, {nearest} is given as {_shown(given[nearest])}"
        if nearest in given
        else f"write {nearest}"
    )
    return f"{said}, the nearest valid key is {nearest}: {change}", nearest


def _nearest(key: str, valid: list[str]) -> str | None:
    """The valid key whose last name is most like this one's, keys of other sections counting a little less; None if
    far.
    """
    parent, _, last = key.rpartition(".")

    def likeness(candidate: str) -> float:
        section, _, name = candidate.rpartition(".")
        return (1.0 if section == parent else 0.9) * SequenceMatcher(None, last, name).ratio()

    best = max(valid, key=likeness)
    return best if likeness(best) >= 0.6 else None


def _remedy(tree: Tree, *, key: str, value: Any, errors: list[ErrorDetails]) -> str:
    kinds = {error["type"] for error in errors}
    whole = "int_type" in kinds
    if isinstance(value, str) and (whole or "float_type" in kinds) and (number := _as_number(value, whole=whole)):
        why = " without quotes" if number == value else "" if whole else " (YAML needs the point and the sign)"
        return f"write {number}{why}"
    choices = [choice for error in errors for choice in str(error.get("ctx", {}).get("expected", "")).split("'")[1::2]]
    if isinstance(value, str) and (close := get_close_matches(value, choices, n=1)):
        return f"write {close[0]}"
    if "string_type" in kinds and isinstance(value, int | float):
        quoted = f"--set '{key}=\"{value}\"'" if key in tree.overrides else f'{key.rpartition(".")[2]}: "{value}"'
        return f"put it in quotes, {quoted}"
    if kinds & {"greater_than", "greater_than_equal"}:
        return "raise it"
    if kinds & {"less_than", "less_than_equal"}:
        return "lower it"
    if "tuple_type" in kinds and not isinstance(value, dict):
        return f"put it in brackets, [{value}]"
    return "correct it" if value is not None else "give one"


def _as_number(text: str, *, whole: bool) -> str | None:
    """How YAML wants the number that this text spells: 1e-3 -> 1.0e-3, 47.0e6 -> 47.0e+6; None if it spells none."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not isfinite(number):
        return None
    if whole:
        return str(int(number)) if number.is_integer() else None
    mantissa, e, exponent = text.lower().partition("e")
    if not e:
        return text
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"


def _dotted(values: Any, error: ErrorDetails) -> str:
    """The key an error is about, as the file spells it: model.mixers[0]. pydantic's names of union branches fall out."""
    key, place = "", values
    for part in error["loc"]:
        if isinstance(part, int):
            if not isinstance(place, list) or part >= len(place):
                break
            key, place = f"{key}[{part}]", place[part]
        elif isinstance(place, dict) and (part in place or error["type"] == "missing"):
            key, place = f"{key}.{part}" if key else part, place.get(part)
    return key


def _items(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key and list entry of the tree with its value, in the order of the file, keys as `_dotted` spells them."""
    pairs: list[tuple[str, Any]] = []
    if isinstance(values, list):
        pairs = [(f"{prefix}[{index}]", item) for index, item in enumerate(values)]
    elif isinstance(values, dict):
        pairs = [(f"{prefix}.{name}" if prefix else name, item) for name, item in values.items()]
    for key, item in pairs:
        yield key, item
        yield from _items(item, key)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    return f"the text '{value}'" if isinstance(value, str) else json.dumps(value)
