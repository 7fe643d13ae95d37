"""Kernels of a few lines in Triton's intermediate language, and what kernels/offsets.py finds in them. Called by: the tests of it."""

from kernels.offsets import Products, products

KERNEL = """module {{
  tt.func public @kernel(%x: !tt.ptr<f32> loc(#loc), %ids: !tt.ptr<i32> loc(#loc), %n: i32 loc(#loc)) {{
    %zero = arith.constant 0 : i32 loc(#loc)
    %one = arith.constant 1 : i32 loc(#loc)
    %nine = arith.constant 9 : i32 loc(#loc)
    %block = arith.constant 128 : i32 loc(#loc)
    %width = arith.constant 412 : i32 loc(#loc)
    %width_1 = arith.constant 412 : i64 loc(#loc)
    %row = tt.get_program_id x : i32 loc(#loc)
    %wide = arith.extsi %row : i32 to i64 loc(#loc)
    %true = arith.cmpi slt, %row, %n : i32 loc(#loc)
{lines}
    tt.return loc(#loc)
  }} loc(#loc)
}} loc(#loc)
#loc = loc("/elsewhere/kernels/op/kernel.py":1:0)
#loc1 = loc("/elsewhere/kernels/op/kernel.py":7:12)
#loc2 = loc("at"(#loc1))
#loc3 = loc(callsite(#loc2 at #loc))
"""
LINE = {"kernels/op/kernel.py:7:12"}
READ = "%place = tt.addptr %x, %at : !tt.ptr<f32>, i32"


def all_found(lines: list[str]) -> Products:
    return products(KERNEL.format(lines="\n".join(f"    {line}" for line in lines)))


def found(lines: list[str]) -> set[str]:
    return set(all_found(lines).narrow)
