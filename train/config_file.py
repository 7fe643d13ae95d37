"""A config file on disk and `--set` on the command line -> one tree of plain values, and back to YAML text.

Owns what YAML itself can get wrong (syntax, a key given twice, dates, an empty file) and where a value came from.
Knows the names of the fields only to tell a section from a value; whether the values fit is train/config_errors.py's.
Called by train/config.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Tree:
    """Values as the user wrote them: nested dicts of JSON types, `file` for messages, `overrides` dotted key ->
    `--set` text.
    """

    values: dict[str, Any]
    file: str
    overrides: dict[str, str]

    def origin(self, key: str) -> str:
        """Where this dotted key was written: its `--set`, or the file and the `--set`s inside the section; '' is the
        whole config.
        """
        for name, text in self.overrides.items():
            if key == name or key.startswith((f"{name}.", f"{name}[")):
                return f"--set {text}"
        inside = [f"--set {text}" for name, text in self.overrides.items() if not key or name.startswith(f"{key}.")]
        return " ".join([self.file, *(["with"] if inside else []), *inside])


def read_tree(path: str | os.PathLike[str], *, overrides: Sequence[str], sections: dict[str, list[str]]) -> Tree:
    """The file's values with the overrides (`a.b=c`, c in YAML, the last of a key wins) laid over them.

    `sections` is every dotted section and its keys. ValueError, one sentence, for anything that is not plain YAML.
    """
    file = os.fspath(path)
    values = _parse(_read_text(file), origin=file)
    if values is None:
        raise ValueError(
            f"{file} has no keys, but a config needs the sections {_listed(sections[''])}: "
            f"start from {CONFIGS / 'tiny_cpu.yaml'}"
        )
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} must hold sections (run:, data:, ...), but it holds the {type(values).__name__} {values!r}: "
            f"start from {CONFIGS / 'tiny_cpu.yaml'}"
        )
    texts: dict[str, str] = {}
    for text in overrides:
        texts[_apply(values, text, sections=sections)] = text
    return Tree(values=values, file=file, overrides=texts)


def yaml_text(values: dict[str, Any]) -> str:
    """YAML of a tree of JSON types: a section per block, lists on one line; reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that keeps a list on its line, as people write them: betas: [0.9, 0.95]."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(str(found.relative_to(CONFIGS.parent)) for found in CONFIGS.rglob("*.yaml"))
        raise ValueError(
            f"there is no config file {file} (looked in {os.getcwd()}): give the path of one, for instance of those in "
            f"{CONFIGS.parent}: {_listed(known)}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text, but byte {error.start} is not: is it a config file?") from None
    except OSError as error:
        raise ValueError(f"the config file {file} cannot be read: {error.strerror}") from None


def _parse(text: str, *, origin: str, key: str = "") -> Any:
    """Values of one YAML document, for this dotted key. ValueError for bad syntax, a key given twice, or no JSON type."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_duplicates(node, key=key, origin=origin)
        return _plain(loader.construct_document(node), key=key, origin=origin)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{origin} is not valid YAML{place}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _refuse_duplicates(node: yaml.Node, *, key: str, origin: str) -> None:
    """PyYAML keeps the last of two equal keys and says nothing; here it is an error."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, key=key, origin=origin)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, yaml.Node] = {}
    for name, value in node.value:
        dotted = f"{key}.{name.value}" if key else str(name.value)
        if dotted in first:
            raise ValueError(
                f"{origin}: {dotted} is given twice, {_shown(first[dotted])} and {_shown(value)}: remove one of them"
            )
        first[dotted] = value
        _refuse_duplicates(value, key=dotted, origin=origin)


def _shown(node: yaml.Node) -> str:
    line = f"on line {node.start_mark.line + 1}"
    return f"as {node.value} {line}" if isinstance(node, yaml.ScalarNode) else line


def _plain(value: Any, *, key: str, origin: str) -> Any:
    """The same value, checked to be made of what JSON has too: YAML also makes dates, sets, bytes and infinities."""
    if isinstance(value, dict):
        return {
            str(name): _plain(item, key=f"{key}.{name}" if key else str(name), origin=origin)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_plain(item, key=key, origin=origin) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        raise ValueError(f"{origin}: {key} must be a finite number, but it is {value}: give a number")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"{origin}: {key} is read by YAML as a {type(value).__name__} ({value}): put it in quotes if it is meant as text"
    )


def _apply(values: dict[str, Any], text: str, *, sections: dict[str, list[str]]) -> str:
    """Sets one `a.b=c` in `values`, in place; returns the dotted key."""
    key, equals, written = text.partition("=")
    key = key.strip()
    names = key.split(".")
    if not equals or not all(names):
        raise ValueError(
            f"--set must be KEY=VALUE with a dotted key, but it is {text!r}: write for instance --set optim.lr=5.0e-4"
        )
    value = _parse(written, origin=f"--set {text}", key=key)
    if key in sections and value is not None:
        example = f"{key}.{sections[key][0]}"
        raise ValueError(
            f"--set sets one value, but {key} is a section and the value is {written.strip()}: set its keys one by one, "
            f"as --set {example}=..."
        )
    place: Any = values
    for depth, name in enumerate(names[:-1]):
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            whole = ".".join(names[: depth + 1])
            raise ValueError(f"--set {text}: {whole} is the value {place!r} and has no keys: set {whole} itself")
    place[names[-1]] = value
    return key


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
