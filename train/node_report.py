"""How the preflight's findings look: a row per node, a column per check, and a sentence per problem.

Owns the table and nothing else: every figure and sentence is handed in. Called by launcher/preflight.py on the node that decides.
"""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallel.bandwidth import Rate
from train.node_facts import NodeFacts
from train.node_network import CHECK as NETWORK
from train.node_network import VERBS, Pair
from train.node_verdict import Verdict, clock_skews

WIDTH = 160  # of a log file; a terminal has its own
NONE = "-"
COLUMNS = ("commit", "packages", "GPUs", "GPU memory", "ECC", "host memory", "folder", "shards", "clock")


def print_report(
    facts: Mapping[int, NodeFacts], rates: Mapping[Pair, Rate], verdict: Verdict, *, names: Sequence[str]
) -> None:
    """Prints the table and below it the sentences, to stdout. A cell with a problem is red and ends in an exclamation mark."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=WIDTH)
    table = Table(title=f"preflight of {len(names)} node{'s' if len(names) > 1 else ''}", title_justify="left")
    for heading in ("node", *COLUMNS, *(f"{label} GB/s" for label in VERBS.values())):
        table.add_column(heading)
    skews = clock_skews(facts)
    wrong = {(problem.rank, problem.check) for problem in verdict.problems}
    for rank, name in enumerate(names):
        cells = _cells(facts[rank], skews.get(rank)) if rank in facts else {}
        row = [_cell(cells.get(check, NONE), (rank, check) in wrong) for check in COLUMNS]
        row += [_cell(_rates(rank, rates, verb), (rank, NETWORK) in wrong) for verb in VERBS]
        table.add_row(_cell(name, any(bad == rank for bad, _ in wrong)), *row)
    console.print(table)
    for problem in verdict.problems:
        console.print(f"{names[problem.rank]}: {problem.check}: {problem.sentence}", markup=False)


def _cell(text: str, wrong: bool) -> Text:
    return Text(f"{text}!", style="bold red") if wrong else Text(text)


def _cells(node: NodeFacts, skew: float | None) -> dict[str, str]:
    commit, _, changes = (node.commit or NONE).partition("+")
    free = [gpu.free_gb for gpu in node.gpus if gpu.free_gb is not None]
    modes = {gpu.ecc for gpu in node.gpus if gpu.ecc is not None}
    errors = sum(gpu.uncorrected or 0 for gpu in node.gpus)
    return {
        "commit": commit[:8] + ("+" if changes else ""),
        "packages": f"torch {node.versions.get('torch')}" if node.versions else NONE,
        "GPUs": str(len(node.gpus)) if "GPUs" not in node.problems else NONE,
        "GPU memory": f"{min(free):.1f} GB" if free else NONE,
        "ECC": f"{'/'.join('on' if mode else 'off' for mode in sorted(modes))}, {errors}" if modes else NONE,
        "host memory": f"{node.host_gb:.1f} GB" if node.host_gb is not None else NONE,
        "folder": "ok" if "folder" not in node.problems else NONE,
        "shards": "ok" if "shards" not in node.problems else NONE,
        "clock": f"{skew:+.1f} s" if skew is not None else NONE,
    }


def _rates(rank: int, rates: Mapping[Pair, Rate], verb: str) -> str:
    """The figures with each neighbour, the lower rank's first."""
    figures = [getattr(rate, verb) for pair, rate in rates.items() if rank in pair]
    return ", ".join(NONE if gb is None else f"{gb:.3g}" for gb in figures) or NONE
