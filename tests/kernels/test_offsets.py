"""The rule of 64-bit offsets, on kernels of a few lines in Triton's intermediate language; of all kernels: test_compiled.py."""

import pytest

from kernels.offsets import Products
from tests.kernels.ttir_lines import LINE, READ, all_found, found

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
    "cut to 32 bits": [
        "%product = arith.muli %wide, %width_1 : i64 loc(#loc1)",
        "%cut = arith.trunci %product : i64 to i32",
        "%at = arith.addi %cut, %one : i32",
        READ,
    ],
    "a quotient's own": [
        "%product = arith.muli %row, %width : i32 loc(#loc1)",
        "%at = arith.divsi %product, %n : i32",
        READ,
    ],
    "a block twice": [
        "%start = arith.muli %row, %block : i32 loc(#loc)",
        "%t = arith.addi %start, %nine : i32",
        "%at = arith.muli %t, %block : i32 loc(#loc1)",
        READ,
    ],
    "a block twice, once by a shift": [
        "%seven = arith.constant 7 : i32",
        "%start = arith.muli %row, %block : i32 loc(#loc)",
        "%at = arith.shli %start, %seven : i32 loc(#loc1)",
        READ,
    ],
    "by nothing and a row": [
        "%none = arith.muli %n, %zero : i32 loc(#loc)",
        "%t = arith.addi %none, %row : i32",
        "%at = arith.muli %t, %width : i32 loc(#loc1)",
        READ,
    ],
    "constants that are too large": [
        "%far = arith.constant -8388608 : i32",
        "%at = arith.muli %far, %width : i32 loc(#loc1)",
        READ,
    ],
    "a range that is too long": [
        "%i = tt.make_range {end = 8388608 : i32, start = 0 : i32} : tensor<8388608xi32>",
        "%widths = tt.splat %width : i32 -> tensor<8388608xi32>",
        "%at = arith.muli %i, %widths : tensor<8388608xi32> loc(#loc1)",
        READ,
    ],
    "a sum that is too large": [
        "%half = arith.constant 5000000 : i32",
        "%sum = arith.addi %half, %half : i32",
        "%at = arith.muli %sum, %width : i32 loc(#loc1)",
        READ,
    ],
    "numbers that are not read": [
        "%many = arith.constant dense<[5, 8388608]> : tensor<2xi32>",
        "%at = arith.muli %many, %width : tensor<2xi32> loc(#loc1)",
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
    "the place in a block by a shift": [
        "%seven = arith.constant 7 : i32",
        "%at = arith.shli %row, %seven : i32 loc(#loc1)",
        READ,
    ],
    "a block after a product of constants": [
        "%far = arith.muli %nine, %nine : i32",
        "%t = arith.addi %row, %far : i32",
        "%at = arith.muli %t, %block : i32 loc(#loc1)",
        READ,
    ],
    "a number of rows again, cut to 32 bits": [
        "%start = arith.muli %wide, %width_1 : i64 loc(#loc1)",
        "%rows = arith.divsi %start, %width_1 : i64",
        "%at = arith.trunci %rows : i64 to i32",
        READ,
    ],
    "a part of a constant": [
        "%part = arith.divsi %width, %row : i32",
        "%at = arith.muli %part, %width : i32 loc(#loc1)",
        READ,
    ],
    "one or nothing": [
        "%bit = arith.extui %true : i1 to i32",
        "%at = arith.muli %bit, %width : i32 loc(#loc1)",
        READ,
    ],
    "a number and no address": ["%value = arith.muli %row, %width : i32 loc(#loc1)", "tt.store %x, %value : !tt.ptr<i32>"],
    "behind a comparison": [
        "%half = arith.cmpi slt, %row, %n : i32",
        "%product = arith.muli %row, %width : i32 loc(#loc1)",
        "%small = arith.cmpi slt, %product, %n : i32",
        "%both = arith.andi %small, %half : i1",
        "%t = arith.select %both, %one, %nine : i32",
        "%at = arith.muli %t, %width : i32 loc(#loc1)",
        READ,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_product_that_counts_elements_in_32_bits_is_found_at_its_line(name: str) -> None:
    assert found(WRONG[name]) == LINE


@pytest.mark.parametrize("name", RIGHT)
def test_other_products_are_left_alone(name: str) -> None:
    assert found(RIGHT[name]) == set()


def test_a_product_in_64_bits_is_hidden_where_a_block_multiplies_and_seen_elsewhere() -> None:
    block = "%block_1 = arith.constant 128 : i64"
    at = "%at = arith.muli %wide, %{} : i64 loc(#loc1)"
    assert all_found([at.format("width_1"), READ]) == Products(seen=frozenset(LINE))
    assert all_found([block, at.format("block_1"), READ]) == Products(hidden=frozenset(LINE))
    assert all_found(["%at = arith.muli %row, %width : i32 loc(#loc1)", READ]) == Products(narrow=frozenset(LINE))


def test_a_sum_in_64_bits_that_a_loop_repeats_is_hidden_where_it_adds_a_block_and_seen_elsewhere() -> None:
    def loop(step: str) -> list[str]:
        return [
            "%block_1 = arith.constant 128 : i64",
            "%start = arith.constant 0 : i64",
            "%end = scf.for %i = %zero to %n step %one iter_args(%at = %start) -> (i64)  : i32 {",
            f"  {READ}",
            f"  %next = arith.addi %at, %{step} : i64 loc(#loc1)",
            "  scf.yield %next : i64",
            "}",
        ]

    assert all_found(loop("block_1")) == Products(hidden=frozenset(LINE))
    assert all_found(loop("width_1")) == Products(seen=frozenset(LINE))


def test_two_products_that_begin_in_one_column_are_two() -> None:
    """`row * width * n`, of which Triton says one place."""
    inner = "%inner = arith.muli %row, %width : i32 loc(#loc1)"
    both = [inner, "%at = arith.muli %inner, %n : i32 loc(#loc1)", READ]
    (place,) = LINE
    assert found(both) == {place, f"{place}#2"}
    in_64_bits = [
        "%inner = arith.muli %wide, %width_1 : i64 loc(#loc1)",
        "%at = arith.muli %inner, %wide : i64 loc(#loc1)",
    ]
    assert all_found([*in_64_bits, READ]) == Products(seen=frozenset({place, f"{place}#2"}))


def test_a_product_of_another_column_or_of_constants_gives_no_number() -> None:
    inner = "%inner = arith.muli %row, %width : i32 loc(#loc)"
    assert found([inner, "%at = arith.muli %inner, %n : i32 loc(#loc1)", READ]) == LINE | {"kernels/op/kernel.py:1:0"}
    constant = "%inner = arith.muli %nine, %nine : i32 loc(#loc1)"
    assert (
        found([constant, "%t = arith.addi %inner, %row : i32", "%at = arith.muli %t, %width : i32 loc(#loc1)", READ])
        == LINE
    )


KEEP = [
    "arith.extsi {}",
    "arith.extui {}",
    "arith.trunci {}",
    "tt.splat {}",
    "tt.broadcast {}",
    "tt.expand_dims {}",
]
KEEP += [
    "tt.gather {}[%zero]",
    "arith.select %true, %one, {}",
    "arith.maxsi %one, {}",
    "arith.minsi {}, %one",
    "arith.addi %one, {}",
]
ROWS = ["arith.divsi {}, %n", "arith.remsi {}, %n", "arith.shrsi {}, %n", "arith.andi {}, %n", "arith.ori {}, %n"]
ROWS += ['"tt.reduce"({})', '"tt.scan"({})', "tt.histogram {}"]


def times(operation: str, factor: str) -> list[str]:
    """Such an operation's result times a factor, as an offset."""
    return [f"%made = {operation} : i32", f"%at = arith.muli %made, %{factor} : i32 loc(#loc1)", READ]


@pytest.mark.parametrize("operation", KEEP)
def test_what_keeps_a_number_keeps_its_bound_and_that_it_was_multiplied(operation: str) -> None:
    assert found(times(operation.format("%nine"), "width")) == set()
    assert found(times(operation.format("%row"), "width")) == LINE
    assert found(times(operation.format("%row"), "block")) == set()
    assert (
        found(["%start = arith.muli %row, %block : i32 loc(#loc)", *times(operation.format("%start"), "block")]) == LINE
    )


@pytest.mark.parametrize("operation", ROWS)
def test_what_makes_a_number_of_rows_may_be_multiplied_by_a_block_again(operation: str) -> None:
    assert found(times(operation.format("%row"), "width")) == LINE
    assert (
        found(["%start = arith.muli %row, %block : i32 loc(#loc)", *times(operation.format("%start"), "block")])
        == set()
    )


UNKNOWN = {
    "arith.xori": ["%odd = arith.xori %row, %one : i32 loc(#loc1)", "%at = arith.addi %odd, %one : i32", READ],
    "tt.call": ["tt.call @helper(%row) : (i32) -> () loc(#loc1)"],
    "tt.make_tensor_ptr": ["%b = tt.make_tensor_ptr %x, [%wide], [%wide], [%row] : !tt.ptr<tensor<32xf32>> loc(#loc1)"],
    "tt.make_tensor_descriptor": ["%b = tt.make_tensor_descriptor %x, [%n], [%wide] : !tt.tensordesc<32xf32> loc(#loc1)"],
    "tt.int_to_ptr": ["%b = tt.int_to_ptr %wide : i64 -> !tt.ptr<f32> loc(#loc1)"],
}  # fmt: skip


@pytest.mark.parametrize("operation", UNKNOWN)
def test_an_operation_that_is_not_known_is_named_with_its_line(operation: str) -> None:
    with pytest.raises(RuntimeError, match=rf"got {operation} at kernels/op/kernel\.py:7:12: "):
        found(UNKNOWN[operation])


def test_a_value_that_nothing_makes_is_named() -> None:
    with pytest.raises(RuntimeError, match="%absent"):
        found(["%at = arith.addi %absent, %one : i32", READ])


def test_products_without_a_place_are_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_DISABLE_LINE_INFO"):
        found(["%at = arith.muli %row, %width : i32", READ])
