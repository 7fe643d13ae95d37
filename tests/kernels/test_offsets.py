"""The rule of 64-bit offsets, on kernels of a few lines in Triton's intermediate language; of all kernels: test_compiled.py."""

import pytest

from kernels.offsets import narrow_products

KERNEL = """module {{
  tt.func public @kernel(%x: !tt.ptr<f32> loc(#loc), %ids: !tt.ptr<i32> loc(#loc), %n: i32 loc(#loc)) {{
    %zero = arith.constant 0 : i32 loc(#loc)
    %one = arith.constant 1 : i32 loc(#loc)
    %nine = arith.constant 9 : i32 loc(#loc)
    %block = arith.constant 128 : i32 loc(#loc)
    %width = arith.constant 412 : i32 loc(#loc)
    %width_1 = arith.constant 412 : i64 loc(#loc)
    %row = tt.get_program_id x : i32 loc(#loc)
{lines}
    tt.return loc(#loc)
  }} loc(#loc)
}} loc(#loc)
#loc = loc("/elsewhere/kernels/op/kernel.py":1:0)
#loc1 = loc("/elsewhere/kernels/op/kernel.py":7:12)
#loc2 = loc("at"(#loc1))
#loc3 = loc(callsite(#loc2 at #loc))
"""
READ = "%place = tt.addptr %x, %at : !tt.ptr<f32>, i32"
WRONG = {
    "a program's row": ["%at = arith.muli %row, %width : i32 loc(#loc1)", READ],
    "an argument": ["%at = arith.muli %row, %n : i32 loc(#loc2)", READ],
    "made 64 bits wide afterwards": [
        "%product = arith.muli %row, %width : i32 loc(#loc3)",
        "%at = arith.extsi %product : i32 to i64",
        "%place = tt.addptr %x, %at : !tt.ptr<f32>, i64",
    ],
    "the place in a block times a width": [
        "%start = arith.muli %row, %block : i32 loc(#loc)",
        "%at = arith.muli %start, %width : i32 loc(#loc1)",
        READ,
    ],
    "what was loaded": [
        "%of_id = tt.addptr %ids, %row : !tt.ptr<i32>, i32",
        "%id = tt.load %of_id : !tt.ptr<i32>",
        "%at = arith.muli %id, %width : i32 loc(#loc1)",
        READ,
    ],
    "by a shift": ["%at = arith.shli %row, %nine : i32 loc(#loc1)", READ],
    "a block's rows": [
        "%i = tt.make_range {end = 32 : i32, start = 0 : i32} : tensor<32xi32>",
        "%rows = tt.splat %row : i32 -> tensor<32xi32>",
        "%t = arith.addi %rows, %i : tensor<32xi32>",
        "%widths = arith.constant dense<412> : tensor<32xi32>",
        "%at = arith.muli %t, %widths : tensor<32xi32> loc(#loc1)",
        "%places = tt.splat %x : !tt.ptr<f32> -> tensor<32x!tt.ptr<f32>>",
        "%place = tt.addptr %places, %at : tensor<32x!tt.ptr<f32>>, tensor<32xi32>",
    ],
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
    "in 64 bits": [
        "%wide = arith.extsi %row : i32 to i64",
        "%at = arith.muli %wide, %width_1 : i64 loc(#loc1)",
        "%place = tt.addptr %x, %at : !tt.ptr<f32>, i64",
    ],
    "the place in a block": ["%at = arith.muli %row, %block : i32 loc(#loc1)", READ],
    "constants": ["%at = arith.muli %nine, %width : i32 loc(#loc1)", READ],
    "a counter with a constant end": [
        "scf.for %step = %zero to %nine step %one  : i32 {",
        "  %at = arith.muli %step, %width : i32 loc(#loc1)",
        f"  {READ}",
        "}",
    ],
    "of another value with that name, which a reduction combines": [
        '%sum = "tt.reduce"(%rows) <{axis = 0 : i32}> ({',
        "^bb0(%left: i32, %right: i32):",
        "  %small = arith.addi %left, %right : i32",
        "  tt.reduce.return %small : i32",
        "}) : (tensor<32xi32>) -> i32",
        "%small = arith.addi %one, %nine : i32",
        "%at = arith.muli %small, %width : i32 loc(#loc1)",
        READ,
    ],
    "a number and no address": ["%value = arith.muli %row, %width : i32 loc(#loc1)", "tt.store %x, %value : !tt.ptr<i32>"],
    "behind a comparison": [
        "%half = arith.cmpi slt, %row, %n : i32",
        "%product = arith.muli %row, %width : i32 loc(#loc1)",
        "%small = arith.cmpi slt, %product, %n : i32",
        "%at = arith.select %small, %one, %zero : i32",
        READ,
    ],
}  # fmt: skip


def found(lines: list[str]) -> tuple[str, ...]:
    return narrow_products(KERNEL.format(lines="\n".join(f"    {line}" for line in lines)))


@pytest.mark.parametrize("name", WRONG)
def test_a_product_that_counts_elements_in_32_bits_is_found_at_its_line(name: str) -> None:
    assert found(WRONG[name]) == ("kernels/op/kernel.py:7",)


@pytest.mark.parametrize("name", RIGHT)
def test_other_products_are_left_alone(name: str) -> None:
    assert found(RIGHT[name]) == ()
