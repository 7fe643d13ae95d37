"""The forms in which the kernels of sort_routes are compiled for kernels/README.md. Called by: benchmarks/kernels/compile_table.py."""

import torch

from kernels.sort_routes.kernel import sort
from kernels.tools import Form


def _launch(num_groups: int) -> None:
    sort(torch.zeros(65536, dtype=torch.int64), num_groups)


FORMS = [Form(f"int64, {num_groups:,} groups", lambda groups=num_groups: _launch(groups)) for num_groups in (64, 2048)]
