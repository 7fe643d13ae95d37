"""The table of a model: its layers by kind, with parameters from the built model and costs by formula, and its text.

Does not own the formulas (model/cost.py says where they lie). Called by train/dry_run.py.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.cost import Cost, Work
from model.parameters import logical_parameters
from model.transformer import Transformer

HEADERS = ("layers", "kind", "parameters", "active", "MACs", "papers'", "floats", "papers'", "decode state")


@dataclass(frozen=True)
class Line:
    """All layers of a kind: their depths ("0-15"), their weights together, and the cost of each; None: not worked out."""

    layers: str
    kind: str
    parameters: int
    costs: tuple[Cost | None, ...]

    @property
    def cost(self) -> Cost | None:
        """Of all its layers together; None where one is not known."""
        known = [cost for cost in self.costs if cost is not None]
        return _sum(known) if len(known) == len(self.costs) else None


def model_table(model: Transformer, *, length: int) -> list[Line]:
    """Lines for the embedding, each kind of mixer and of feed-forward, the norms and the output, for rows of `length` tokens.

    Weights that are used at several depths count once among the parameters, once per use among the active ones and in the work.
    """
    config, sizes = model.config, _parameters_by_part(model)
    vocab_size, d_model = model.embedding.weight.shape
    places, repeats = config.places(backend=model.backend), config.num_layers // len(model.layers)
    lines = [Line("", "embedding", sizes["embedding"], (Cost(d_model, Work(0, 0)),))]
    for part, pattern in (("mixer", config.mixers), ("feedforward", config.feedforwards)):
        for kind in dict.fromkeys(pattern):
            depths = [depth for depth in range(config.num_layers) if pattern[depth % len(pattern)] == kind]
            here = [replace(places[depth % len(places)], depth=depth) for depth in depths]
            costs = tuple(getattr(config, kind).cost(place, length=length) for place in here)
            parameters = sum(sizes[f"layers.{depth}.{part}"] for depth in depths)
            lines.append(Line(_ranges(depths), kind, parameters, costs))
    norms = sizes["norms"] + repeats * sizes["layers.norms"]
    lines.append(Line("", "norms", sizes["norms"] + sizes["layers.norms"], (Cost(norms, Work(0, 0)),)))
    work = Work(vocab_size * d_model * length, vocab_size * length)
    lines.append(Line("", "output", sizes["output"], (Cost(sizes["output"], work),)))
    return lines


def table_text(lines: Sequence[Line], *, length: int) -> str:
    """The table with its totals and what the columns mean; "-" where a kind does not tell its cost. No line ends in a space."""
    known = [cost for line in lines if (cost := line.cost) is not None]
    total = _sum(known) if len(known) == len(lines) else None
    rows = [HEADERS]
    rows += [_row(line.layers, line.kind, line.parameters, line.cost, length=length) for line in lines]
    rows.append(_row("", "all", sum(line.parameters for line in lines), total, length=length))
    differs = any(cost.papers_work != cost.work for cost in known)
    columns = [column for column, name in enumerate(HEADERS) if differs or name != "papers'"]
    widths = [max(len(row[column]) for row in rows) for column in columns]
    text = [
        "  ".join(
            row[column].ljust(width) if column < 2 else row[column].rjust(width)
            for column, width in zip(columns, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    text += [
        "active: weights that work on one token, once for each use of a layer; all layers of a line together, as in every column.",
        f"MACs (multiply-accumulates) and floats: forward, per token of a row of {length:,}, no causal halving;",
        "floats: results of products and softmax, but of what only our kernels compute what is kept for the backward pass;",
        "decode state: floats per sequence after such a row and its memory. What is counted: model/cost.py.",
    ]
    return "\n".join(text + _layer_sentences(lines))


def _layer_sentences(lines: Sequence[Line]) -> list[str]:
    """Both countings of one layer on a whole row, as the papers print it, of each kind for which they differ."""
    return [
        f"one layer of {line.kind} on a row: {_short(cost.work.macs)} MACs and {_short(cost.work.floats)} floats; by the papers' "
        f"formulas {_short(cost.papers_work.macs)} and {_short(cost.papers_work.floats)}"
        for line in lines
        if (cost := line.costs[0]) is not None and cost.papers_work != cost.work
    ]


def _row(layers: str, kind: str, parameters: int, cost: Cost | None, *, length: int) -> tuple[str, ...]:
    if cost is None:
        return (layers, kind, f"{parameters:,}", *["-"] * 6)
    papers = cost.papers_work
    numbers = (cost.work.macs, papers.macs, cost.work.floats, papers.floats)
    per_token = [f"{number / length:,.0f}" for number in numbers]
    return (layers, kind, f"{parameters:,}", f"{cost.active_parameters:,}", *per_token, f"{cost.decode_floats:,}")


def _sum(costs: Sequence[Cost]) -> Cost:
    """One cost for all; its papers' counting is None where none of them has one."""
    papers = [cost.papers_work for cost in costs] if any(cost.papers for cost in costs) else []
    return Cost(
        sum(cost.active_parameters for cost in costs),
        Work(sum(cost.work.macs for cost in costs), sum(cost.work.floats for cost in costs)),
        decode_floats=sum(cost.decode_floats for cost in costs),
        papers=Work(sum(work.macs for work in papers), sum(work.floats for work in papers)) if papers else None,
    )


def _parameters_by_part(model: Transformer) -> Counter[str]:
    """Weights under embedding, output, layers.<i>.mixer, layers.<i>.feedforward, layers.norms (in layers) and norms (the rest)."""
    sizes: Counter[str] = Counter()
    for parameter in logical_parameters(model):
        first, *rest = parameter.name.split(".")
        if first == "layers":
            part = f"layers.{rest[0]}.{rest[1]}" if rest[1] in ("mixer", "feedforward") else "layers.norms"
        else:
            part = first if first in ("embedding", "output") else "norms"
        sizes[part] += math.prod(parameter.spec.shape)
    return sizes


def _ranges(depths: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2,5"."""
    runs: list[list[int]] = []
    for depth in depths:
        if runs and depth == runs[-1][-1] + 1:
            runs[-1].append(depth)
        else:
            runs.append([depth])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _short(number: int) -> str:
    """453427200 -> 453.4M, 762880 -> 0.76M, as the papers write it."""
    if number >= 1e9:
        return f"{number / 1e9:,.2f}G"
    return f"{number / 1e6:,.{1 if number >= 1e8 else 2}f}M"
