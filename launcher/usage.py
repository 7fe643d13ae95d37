"""The text of `python launcher/main.py --help`: what the program does, how it is started, and every key of the config.

The keys come from the pydantic classes, so the help cannot fall behind them. Called by launcher/main.py.
"""

import json
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from train.config import Config
from train.config_errors import fields, sections

DESCRIPTION = "Trains a fully mixture-of-experts transformer from a YAML config; the same command again resumes it."

MAX_WIDTH = 36  # of a column of the table of keys

EXAMPLES = """\
start it (two expert-parallel processes, the same with torchrun, one process):
  deepspeed --num_accelerators 2 launcher/main.py --config configs/tiny_cpu.yaml
  torchrun --nproc-per-node 2 launcher/main.py --config configs/tiny_cpu.yaml
  python launcher/main.py --config configs/tiny_cpu.yaml

change the config (a dotted key and a YAML value; the last of a key wins):
  --set optim.lr=5.0e-4 --set run.dir=runs/faster     numbers with an exponent need a point and a sign: 5.0e-4, 4.7e+7
  --set optim.betas='[0.9, 0.999]'                     a list is set whole
  --set model.sigma_moe=null                           removes an optional section; its keys are set one by one

The path of the config and the paths in it (run.dir, data.shards) are relative to the folder the command is typed in.
SIGTERM or SIGUSR1 ends it after the present step with a checkpoint.
Exit code: 0 done, 1 the run failed, 2 something in the command, the config or the environment must be changed, 85 ended early by a
signal: the same command goes on.
"""


def key_table() -> str:
    """One line for each key: name, default or `required`, type, description; keys of optional sections say so."""
    optional = {name for name in sections(Config) if name.count(".") == 1}
    rows = []
    for key, field in fields(Config):
        default = "required" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
        if field.is_required() and key.rpartition(".")[0] in optional:
            default = "required*"
        rows.append((key, default, _kind(field.annotation), field.description or ""))
    # a cell that is longer than all but a few pushes its own line alone to the right
    widths = [min(MAX_WIDTH, max(len(row[column]) for row in rows)) for column in range(3)]
    lines = [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    return (
        "keys of the config (key, default, type):\n"
        + "\n".join(lines)
        + "\n  * where a pattern of model names that section\n"
    )


def _kind(annotation: Any) -> str:
    """A field's type in the words of YAML."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(_yaml(value) for value in args)
    if origin in (Union, UnionType):
        return "|".join(_kind(arg) for arg in args)
    if origin is tuple:
        return f"[{', '.join('...' if arg is Ellipsis else _kind(arg) for arg in args)}]"
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _kind(args[0])
    names = {int: "int", float: "number", str: "text", bool: "true|false", NoneType: "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
