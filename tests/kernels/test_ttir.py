"""What loops, branches and blocks carry in Triton's intermediate language, by the products that kernels/offsets.py finds there."""

import pytest

from tests.kernels.ttir_lines import LINE, READ, found

WRONG = {
    "a loop's counter": [
        "scf.for %step = %zero to %n step %one  : i32 {",
        "  %at = arith.muli %step, %width : i32 loc(#loc1)",
        f"  {READ}",
        "}",
    ],
    "carried by a loop": [
        "%at:2 = scf.for %step = %zero to %nine step %one iter_args(%a = %zero, %b = %zero) -> (i32, i32)  : i32 {",
        "  %next = arith.muli %row, %width : i32 loc(#loc1)",
        "  scf.yield %a, %next : i32, i32",
        "}",
        "%place = tt.addptr %x, %at#1 : !tt.ptr<f32>, i32",
    ],
    "carried by a loop without an end": [
        "%at = scf.while (%a = %zero) : (i32) -> i32 {",
        "  scf.condition(%true) %a : i32",
        "} do {",
        "^bb0(%a: i32):",
        "  %next = arith.muli %row, %width : i32 loc(#loc1)",
        "  scf.yield %next : i32",
        "}",
        READ,
    ],
    "by a loop's own counter": [
        "%end = scf.while (%i = %zero) : (i32) -> i32 {",
        "  scf.condition(%true) %i : i32",
        "} do {",
        "^bb0(%i_1: i32):",
        "  %next = arith.addi %i_1, %one : i32",
        "  scf.yield %next : i32",
        "}",
        "%at = arith.muli %end, %width : i32 loc(#loc1)",
        READ,
    ],
    "a width added again and again": [
        "%end = scf.for %step = %zero to %n step %one iter_args(%at = %zero) -> (i32)  : i32 {",
        f"  {READ}",
        "  %next = arith.addi %at, %width : i32 loc(#loc1)",
        "  scf.yield %next : i32",
        "}",
    ],
    "a number of rows taken away again and again": [
        "%at = scf.while (%a = %zero) : (i32) -> i32 {",
        "  scf.condition(%true) %a : i32",
        "} do {",
        "^bb0(%a_1: i32):",
        "  %next = arith.subi %a_1, %n : i32 loc(#loc1)",
        "  scf.yield %next : i32",
        "}",
        READ,
    ],
    "what a loop carries at first": [
        "%product = arith.muli %row, %width : i32 loc(#loc1)",
        "%end = scf.for %step = %zero to %n step %one iter_args(%at = %product) -> (i32)  : i32 {",
        f"  {READ}",
        "  scf.yield %zero : i32",
        "}",
    ],
    "what a loop without a turn carries": [
        "%product = arith.muli %row, %width : i32 loc(#loc1)",
        "%at = scf.for %step = %zero to %n step %one iter_args(%a = %product) -> (i32)  : i32 {",
        "  scf.yield %zero : i32",
        "}",
        READ,
    ],
    "what a loop without an end carries at first": [
        "%product = arith.muli %row, %width : i32 loc(#loc1)",
        "%end = scf.while (%at = %product) : (i32) -> i32 {",
        f"  {READ}",
        "  scf.condition(%true) %zero : i32",
        "} do {",
        "^bb0(%a: i32):",
        "  scf.yield %zero : i32",
        "}",
    ],
    "handed to a block": [
        "cf.cond_br %true, ^bb1(%row : i32), ^bb2",
        "^bb1(%t: i32):  // pred: ^bb0",
        "%product = arith.muli %t, %width : i32 loc(#loc1)",
        "cf.br ^bb3(%one, %product : i32, i32)",
        "^bb2:  // pred: ^bb0",
        "cf.br ^bb3(%one, %zero : i32, i32)",
        "^bb3(%unused: i32, %at: i32):  // 2 preds: ^bb1, ^bb2",
        READ,
    ],
    "of a branch": [
        "%at = scf.if %true -> (i32) {",
        "  %far = arith.muli %row, %width : i32 loc(#loc1)",
        "  scf.yield %far : i32",
        "} else {",
        "  scf.yield %zero : i32",
        "}",
        READ,
    ],
}  # fmt: skip
RIGHT = {
    "a block added again and again": [
        "%end = scf.for %step = %zero to %n step %one iter_args(%at = %zero) -> (i32)  : i32 {",
        f"  {READ}",
        "  %next = arith.addi %at, %block : i32",
        "  scf.yield %next : i32",
        "}",
    ],
    "carried by a loop beside a product": [
        "%at:2 = scf.while (%a = %zero, %b = %zero) : (i32, i32) -> (i32, i32) {",
        "  scf.condition(%true) %a, %b : i32, i32",
        "} do {",
        "^bb0(%a_1: i32, %b_1: i32):",
        "  %next = arith.muli %row, %width : i32 loc(#loc1)",
        "  scf.yield %a_1, %next : i32, i32",
        "}",
        "%place = tt.addptr %x, %at#0 : !tt.ptr<f32>, i32",
    ],
    "of what a loop without an end does not hand on": [
        "%at = scf.while (%a = %zero) : (i32) -> i32 {",
        "  scf.condition(%true) %nine : i32",
        "} do {",
        "^bb0(%a_1: i32):",
        "  %next = arith.muli %row, %width : i32 loc(#loc1)",
        "  scf.yield %next : i32",
        "}",
        READ,
    ],
    "under a name that another branch uses": [
        "scf.if %true {",
        "  %at = arith.muli %row, %width : i32 loc(#loc1)",
        "  tt.store %x, %at : !tt.ptr<i32>",
        "}",
        "scf.if %true {",
        "  %at = arith.addi %row, %one : i32",
        f"  {READ}",
        "}",
    ],
    "a counter with a constant end": [
        "scf.for %step = %zero to %nine step %one  : i32 {",
        "  %at = arith.muli %step, %width : i32 loc(#loc1)",
        f"  {READ}",
        "}",
    ],
    "of another value with that name, which a reduction combines": [
        "%end = scf.while (%a = %zero, %b = %n) : (i32, i32) -> i32 {",
        "  scf.condition(%true) %a : i32",
        "} do {",
        "^bb0(%a_1: i32):",
        "  scf.yield %a_1, %n : i32, i32",
        "}",
        '%sum = "tt.reduce"(%rows) <{axis = 0 : i32}> ({',
        "^bb0(%left: i32, %right: i32):",
        "  %small = arith.addi %left, %right : i32",
        "  tt.reduce.return %small : i32",
        "}) : (tensor<32xi32>) -> i32",
        "%small = arith.addi %one, %nine : i32",
        "%at = arith.muli %small, %width : i32 loc(#loc1)",
        READ,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_product_is_found_wherever_it_is_carried(name: str) -> None:
    assert found(WRONG[name]) == LINE


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_not_carried_to_an_address_is_left_alone(name: str) -> None:
    assert found(RIGHT[name]) == set()
