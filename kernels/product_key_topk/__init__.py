"""product_key_topk: the K best of J^2 values that two sets of J sub-keys score, without all sub-scores at once.

Owns: the public function, what it gives back, all checks, and the choice of a backend. Does not own: the query and its norm, gates and
what is looked up (model/product_keys.py, model/lookup.py).
Called by: model/product_keys.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.availability import check_backend, why_not_triton
from kernels.product_key_topk import cpu
from kernels.product_key_topk.reference import reference

BACKENDS = ("triton", "torch", "reference")
MAX_PICKS = 64  # of the kernel, which keeps so many for each token of a tile in registers
MAX_KEYS = 46340  # of the kernel: an id below 2**31


class PairChoice(NamedTuple):
    """The K best values of each (token, head), K descending by score: their scores, differentiable, and their sub-keys a and b (int64)."""

    scores_THK: Tensor
    first_THK: Tensor
    second_THK: Tensor


def product_key_topk(queries_TPZC: Tensor, keys_HZJC: Tensor, *, top_k: int, backend: str) -> PairChoice:
    """The K best pairs (a, b) by q_0 . key_0[a] + q_1 . key_1[b], of J^2 (arXiv 1907.05242, section 3.1; 2407.04153, section 2).

    Among equal scores the lowest id a J + b wins, in a half (then the lowest sub-key) as among the pairs. Only a tie that rounding makes
    (sums of unequal parts that come out equal) may be decided otherwise: a pair that is no candidate can be in it.

    Args:
        queries_TPZC: T tokens, a query of two halves of width C for each head, or one for all (size 1). Any floating-point type.
        keys_HZJC: J sub-keys of each half for each head, or for all (size 1). Dtype and device of the queries.
        top_k: K, from 1 to J^2; at most 64 for "triton", which also takes at most 46,340 sub-keys.
        backend: "triton"; "torch", by chunks of tokens; or "reference".

    Returns:
        Scores in float32 (float64 for float64) in every mode, autocast too; fp32 products round to TF32 only where
        torch.backends.cuda.matmul.allow_tf32 is set. The gradient of a score goes to the query and the two sub-keys of its pair; the
        choice is a constant. Saved for it: the inputs, and with "triton" and "torch" the ids alone. Deterministic, bit for bit; "torch" on
        a GPU, too. Sub-keys that nobody chose get exactly zero. With NaN among the scores only the ids' range is promised.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a top_k that cannot be; "triton" without a GPU or with float64.
    """
    _check(queries_TPZC, keys_HZJC, top_k=top_k)
    wide = torch.promote_types(queries_TPZC.dtype, torch.float32)
    _check_backend(backend, queries_TPZC, dtype=wide, num_keys=keys_HZJC.shape[2], top_k=top_k)
    with torch.autocast(queries_TPZC.device.type, enabled=False):
        queries_TPZC, keys_HZJC = queries_TPZC.to(wide).contiguous(), keys_HZJC.to(wide).contiguous()
        if backend == "reference":
            return PairChoice(*reference(queries_TPZC, keys_HZJC, top_k=top_k))
        if backend == "torch":
            return PairChoice(*cpu.choose(queries_TPZC, keys_HZJC, top_k=top_k))
        from kernels.product_key_topk.op import choose_op

        return PairChoice(*choose_op(queries_TPZC, keys_HZJC, top_k))


def candidates(device_type: str, *, num_keys: int, top_k: int) -> tuple[str, ...]:
    """The backends that can serve float32 on this device, the likely fastest first."""
    if why_not_triton(device_type) is None and not _too_many(num_keys, top_k):
        return ("triton", "torch")
    return ("torch",)


def _too_many(num_keys: int, top_k: int) -> bool:
    return top_k > MAX_PICKS or num_keys > MAX_KEYS


def _check(queries_TPZC: Tensor, keys_HZJC: Tensor, *, top_k: int) -> None:
    queries, keys = list(queries_TPZC.shape), list(keys_HZJC.shape)
    fits = len(queries) == len(keys) == 4 and queries[2] == keys[1] == 2 and queries[3] == keys[3]
    if not fits or 0 in (*queries[1:], *keys) or (queries[1] != keys[0] and 1 not in (queries[1], keys[0])):
        raise ValueError(
            f"queries [T, H or 1, 2, C] and keys [H or 1, 2, J, C] must agree, with no size 0 but T, got {queries} and {keys}: reshape one "
            "of them"
        )
    if queries_TPZC.dtype != keys_HZJC.dtype or not queries_TPZC.dtype.is_floating_point:
        raise ValueError(
            f"queries and keys must have one floating-point dtype, got {queries_TPZC.dtype} and {keys_HZJC.dtype}: cast one of them"
        )
    if queries_TPZC.device != keys_HZJC.device:
        raise ValueError(
            f"queries and keys must be on one device, got {queries_TPZC.device} and {keys_HZJC.device}: move one of them"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= keys[2] ** 2:
        raise ValueError(
            f"top_k must be a whole number from 1 to the number of pairs, got {top_k} and {keys[2]} sub-keys of a half: choose at most "
            f"{keys[2] ** 2}"
        )


def _check_backend(backend: str, queries_TPZC: Tensor, *, dtype: torch.dtype, num_keys: int, top_k: int) -> None:
    check_backend("product_key_topk", backend, BACKENDS, device_type=queries_TPZC.device.type)
    if backend != "triton":
        return
    if dtype != torch.float32:
        raise ValueError(
            f"the triton backend of product_key_topk computes in float32, got {queries_TPZC.dtype}: cast queries and keys, or choose "
            "another backend"
        )
    if _too_many(num_keys, top_k):
        raise ValueError(
            f"the triton backend of product_key_topk takes a top_k of at most {MAX_PICKS} and at most {MAX_KEYS:,} sub-keys, got top_k "
            f"{top_k} and {num_keys} sub-keys: choose the torch backend"
        )
