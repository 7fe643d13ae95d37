"""The pass over the copies of one row of a table after the other, in Triton: the gradient of a table, or at once a step of Adam.

Owns: the kernels and their launches. Does not own: the order of the copies (kernels/tables/routes.py), autograd and what is zero (op.py),
the equations of Adam (kernels/tables/adam.py). Called by: op.py beside it, and forms.py of the operations.

The copies are sorted by the entry (row of the table) that they read. A program owns PLACES sorted places, whatever their entries: one hot
expert may have all. It adds up each run of equal entries in registers. A run that lies within its places is finished by it; of a run
that begins in an earlier program or goes on in a later one it writes its part, and a second launch adds up the parts of each such run in
order, in the program where the run begins. Nothing is added atomically and nothing depends on timing; the grid follows from shapes.
Each touched row is stored once. PEER's two tables have a pass each: one pass for both would read 20 bytes of ids less, beside the 2 D of
a copy's row, and would hold the state of two tables in registers.

Letters: C copies, L entries, D columns; BLOCK_D columns of a program.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportGeneralTypeIssues=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tables.traffic import places_for

# Of a program, more where programs would be too many (traffic.py). The hottest of 1,024^2 experts has some 13,000 copies of 262,144
# tokens, their mean is 32.
PLACES = 128
MAX_COLUMNS = 1024  # of a program: 8 for each thread of 4 warps
PARTS, PART_COLUMNS = 16, 256  # of a step of add_parts_kernel
COUNTED = 1024  # places of a program of count_steps_kernel


@triton.jit
def _entry_at(place, order, entry, inside):
    """The copy at a sorted place, and its entry; -1 outside."""
    copy = tl.load(order + place, mask=inside, other=0).to(tl.int64)
    return copy, tl.load(entry + copy, mask=inside, other=-1).to(tl.int64)


@triton.jit
def _finish(
    total, found, d, D: tl.constexpr, out, exp_avg, exp_avg_sq, steps, lr, eps, decay, log_beta_1, rest_1, log_beta_2, rest_2
):  # fmt: skip
    """Stores the gradient `total` of entry `found`, or with exp_avg steps the entry by it: see RowAdam.step."""
    place = found * D + d
    inside = d < D
    if exp_avg is not None:
        count = tl.load(steps + found).to(tl.float64)
        step = lr / (1.0 - tl.exp2(count * log_beta_1)).to(tl.float32)
        scale = tl.sqrt((1.0 - tl.exp2(count * log_beta_2)).to(tl.float32))
        first = tl.load(exp_avg + place, mask=inside, other=0.0)
        first += rest_1 * (total - first)
        second = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
        second += rest_2 * (total * total - second)
        tl.store(exp_avg + place, first, mask=inside)
        tl.store(exp_avg_sq + place, second, mask=inside)
        value = tl.load(out + place, mask=inside, other=0.0)
        total = value - decay * value - step * first / (tl.sqrt(second) / scale + eps)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["C", "lr", "eps", "decay", "log_beta_1", "rest_1", "log_beta_2", "rest_2"])
def add_runs_kernel(
    source, index, weights, entry, order, parts, out, exp_avg, exp_avg_sq, steps, C, lr, eps, decay, log_beta_1, rest_1,
    log_beta_2, rest_2, D: tl.constexpr, PLACES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Finishes each run within PLACES sorted places: the sum over its copies of weight * source[index]. Writes the parts of others.

    parts (programs, 2, D): [s, 0] of the run that begins before program s, [s, 1] of the one that begins in it and goes on after it.
    """
    program = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = program * PLACES
    end = tl.minimum(start + PLACES, C)
    copy, this = _entry_at(start, order, entry, start < C)
    _, before = _entry_at(start - 1, order, entry, start > 0)
    begins_here = this != before
    total = tl.zeros([BLOCK_D], tl.float32)
    for place in range(start, end):
        next_copy, following = _entry_at(place + 1, order, entry, place + 1 < C)  # on its way while this row is
        row = tl.load(index + copy).to(tl.int64)
        x = tl.load(source + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.load(weights + copy) * x
        is_last = following != this
        if is_last & begins_here:
            _finish(
                total,
                this,
                d,
                D,
                out,
                exp_avg,
                exp_avg_sq,
                steps,
                lr,
                eps,
                decay,
                log_beta_1,
                rest_1,
                log_beta_2,
                rest_2,
            )
        elif is_last | (place + 1 == end):
            part = program * 2 + begins_here.to(tl.int64)
            tl.store(parts + part * D + d, total, mask=d < D)
        total = tl.where(is_last, 0.0, total)
        begins_here = begins_here | is_last
        copy, this = next_copy, following


@triton.jit(do_not_specialize=["C", "lr", "eps", "decay", "log_beta_1", "rest_1", "log_beta_2", "rest_2"])
def add_parts_kernel(
    entry, order, parts, out, exp_avg, exp_avg_sq, steps, C, lr, eps, decay, log_beta_1, rest_1, log_beta_2, rest_2,
    D: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Finishes the run that begins in this program's places of add_runs_kernel and goes on after them, if there is one."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    after = (program + 1) * PLACES
    _, before = _entry_at(program * PLACES - 1, order, entry, program > 0)
    _, this = _entry_at(after - 1, order, entry, after < C)
    _, following = _entry_at(after, order, entry, after < C)
    if (this != following) | (this == before) | (after >= C):
        return
    total = tl.load(parts + (program * 2 + 1) * D + d, mask=d < D, other=0.0)
    first = program + 1
    goes_on = True
    while goes_on:
        part = first + tl.arange(0, PARTS)
        _copies, found = _entry_at(part * PLACES, order, entry, part * PLACES < C)
        belongs = found == this
        inside = belongs[:, None] & (d < D)[None, :]
        total += tl.sum(tl.load(parts + part[:, None] * (2 * D) + d[None, :], mask=inside, other=0.0), 0)
        goes_on = tl.sum(belongs.to(tl.int32), 0) == PARTS
        first += PARTS
    _finish(total, this, d, D, out, exp_avg, exp_avg_sq, steps, lr, eps, decay, log_beta_1, rest_1, log_beta_2, rest_2)


@triton.jit(do_not_specialize=["C"])
def count_steps_kernel(entry, order, steps, C, BLOCK: tl.constexpr):
    """One step more for each entry that has a copy, by the place of its first one."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, this = _entry_at(place, order, entry, place < C)
    _, before = _entry_at(place - 1, order, entry, (place > 0) & (place < C))
    is_first = (place < C) & (this != before)
    tl.store(steps + this, tl.load(steps + this, mask=is_first, other=0) + 1, mask=is_first)


def add_runs(
    source_RD: Tensor, index_C: Tensor, weights_C: Tensor, entry_C: Tensor, order_C: Tensor, out_LD: Tensor, *,
    state: Sequence[Tensor] = (), settings: Sequence[float] = (),
) -> None:  # fmt: skip
    """out[e] = the sum over the copies of entry e of weight * source[index], float32, rounded once; other entries are left alone.

    With `state` and `settings` of a RowAdam the entries of the table `out` are stepped by that sum instead. All tensors contiguous.
    """
    num_copies, width = len(entry_C), source_RD.shape[1]
    if num_copies == 0:
        return
    exp_avg, exp_avg_sq, steps = state or (None, None, None)
    numbers = settings or [0.0] * 7
    if steps is not None:
        count_steps_kernel[(triton.cdiv(num_copies, COUNTED),)](entry_C, order_C, steps, num_copies, COUNTED)
    places = places_for(num_copies, least=PLACES)
    programs = triton.cdiv(num_copies, places)
    parts = source_RD.new_empty(programs, 2, width, dtype=torch.float32)
    columns = min(MAX_COLUMNS, max(32, triton.next_power_of_2(width)))
    rest = (out_LD, exp_avg, exp_avg_sq, steps, num_copies, *numbers, width, places)
    add_runs_kernel[programs, triton.cdiv(width, columns)](
        source_RD, index_C, weights_C, entry_C, order_C, parts, *rest, columns, num_warps=max(1, columns // 256)
    )
    if programs > 1:
        columns = min(PART_COLUMNS, columns)
        add_parts_kernel[programs - 1, triton.cdiv(width, columns)](entry_C, order_C, parts, *rest, PARTS, columns)
