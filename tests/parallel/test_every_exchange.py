"""Promise 1 for every way in which experts and tokens can meet: what travels, in how many parts and hops, how a table is split."""

from dataclasses import replace
from functools import cache

import pytest

from tests.parallel.test_same_as_one_process import assert_same
from tests.parallel.two_steps import Case, exchanges_of, many_processes, one_process

PKM = {"num_keys": 3, "num_heads": 2, "top_k": 4}  # 9 values: padding on 2 and on 4 ranks
PEER = {"num_experts": 9, "num_heads": 2, "top_k": 3, "key_dim": 6}
EVERYTHING = {"experts": ("q", "k", "v", "o"), "routers": "separate"}

plain = Case(ep_size=4)
pkm = plain.with_model(feedforwards=("pkm",), sigma_moe=None, pkm=PKM)
peer = plain.with_model(feedforwards=("peer",), sigma_moe=None, peer=PEER)
recomputed = replace(plain, accumulation_steps=2).with_model(recompute=True, dropout=0.2)
drops = plain.with_model(sigma_moe={"router": "softmax_after", "num_shared_experts": 2, "hidden_dropout": 0.3})
remembers = replace(plain, accumulation_steps=2).with_model(switchhead={"positions": "xl", "memory_blocks": 1})

CASES = {
    "weights": replace(plain, exchange="weights"),
    "weights, recompute": replace(recomputed, exchange="weights", stage=2),
    "weights, two groups": replace(plain, exchange="weights", ep_size=2, stage=1),
    "weights, hidden dropout": replace(drops, exchange="weights"),
    "weights, average keys": replace(plain, exchange="weights").with_model(sigma_moe={"router": "average_keys"}),
    "auto": replace(plain, exchange="auto"),
    "parts": replace(plain, chunks=4, stage=1),
    "parts, recompute": replace(recomputed, chunks=3, stage=2),
    "parts, every projection": replace(plain, chunks=2).with_model(switchhead=EVERYTHING),
    "parts, memory": replace(remembers, chunks=4),
    "two nodes": replace(plain, node_size=2, stage=1),
    "two nodes, parts, recompute": replace(recomputed, node_size=2, chunks=2),
    "two nodes, every projection": replace(plain, node_size=2).with_model(switchhead=EVERYTHING),
    "two nodes, parts, hidden dropout": replace(drops, node_size=2, chunks=2),
    "nodes of one": replace(plain, ep_size=2, node_size=1, stage=2),
    "PKM by columns": replace(pkm, table_columns=4, stage=2),
    "PKM by rows and columns": replace(pkm, table_columns=2, chunks=2),
    "PKM as weights": replace(pkm, exchange="weights"),
    "PEER by columns": replace(peer, table_columns=4, stage=1),
    "PEER by rows and columns": replace(peer, table_columns=2),
    "PEER by rows and columns, two nodes": replace(peer, table_columns=2, node_size=2, stage=2),
    "PEER by columns, parts, recompute": replace(
        peer, table_columns=2, ep_size=2, chunks=3, accumulation_steps=2
    ).with_model(recompute=True, peer={"shared_experts": True}),
    "PEER as weights": replace(peer, exchange="weights"),
}

reference = cache(one_process)


@pytest.mark.parametrize("name", CASES)
def test_every_exchange_equals_one_process(pool, name):
    case = CASES[name]
    chosen = exchanges_of(case, 4)
    if case.exchange != "auto":
        assert {choice.mode for choice in chosen.values()} == {case.exchange}
    assert any(choice.columns > 1 for choice in chosen.values()) == (case.table_columns != 1)
    seen = pool(4).run(many_processes, case)
    alone = replace(case, ep_size=1, stage=0, exchange="tokens", chunks=1, node_size=None, table_columns=1)
    assert_same(seen, reference(alone), rtol=1e-4, atol=1e-5)
