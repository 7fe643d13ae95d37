"""What differs between two trees of plain values, key by key. Used by train/config.py for what a resumed run changes."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """One dotted key and its two values; None stands for an absent one."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old} and is {self.new}"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """Every value that differs between two trees of sections, in the order of `new`, then what only `old` has.

    The entries of a list of sections with names, as data.shards may be, are compared by name.
    """
    found = []
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = _by_name(old.get(name)), _by_name(new.get(name))
        if isinstance(before, dict) and isinstance(after, dict):
            inside = [Difference(f"{name}.{d.key}", d.old, d.new) for d in differences(before, after)]
            if not inside and isinstance(new[name], list) and list(before) != list(after):
                inside = [Difference(f"{name} (order)", list(before), list(after))]
            found += inside
        elif before != after:
            found.append(Difference(name, before, after))
    return found


def _by_name(value: Any) -> Any:
    """A list of sections with names as a tree of them; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: item for item in value}
    return value
