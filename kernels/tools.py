"""Compiles Triton kernels for GPUs that are not here, and measures what the compiler made of them.

Owns: compiling exactly what a launch would compile, and registers, spills and shared memory of the result. Does not own:
which launches are worth it (kernels/<op>/forms.py), the rule for addresses (kernels/offsets.py), the table
(benchmarks/kernels/compile_table.py).
Called by: benchmarks/kernels/compile_table.py and tests/kernels; never by the program.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.offsets import Products, products

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Form:
    """A call that launches kernels whose compiled code is watched.

    launch: called with `launches_compiled` around it, so on CPU tensors of realistic widths (their values and addresses
    decide what Triton specialises on). It may not read what a kernel wrote: nothing is written.
    can_spill: allowed for kernels of a backward pass only.
    """

    name: str
    launch: Callable[[], object]
    can_spill: bool = False


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel. registers: per thread. spilled: bytes per thread. shared: bytes per program.

    products: where it may count elements in 32 bits (kernels/offsets.py). loaded, stored: the most bytes that a thread reads from
    memory, or writes to it, by one instruction; 0 on AMD, where nobody looks.
    """

    kernel: str
    registers: int
    spilled: int
    shared: int
    products: Products = field(default_factory=Products)
    loaded: int = 0
    stored: int = 0


def compile_form(form: Form, *, target: str) -> list[Compiled]:
    """Every kernel that the form launches, compiled for a target of TARGETS, in the order of launching, each once."""
    with launches_compiled(TARGETS[target]) as kernels:
        form.launch()
    measure = measure_cubin if TARGETS[target].backend == "cuda" else measure_amdgcn
    return [
        replace(measure(kernel), products=products(kernel.asm["ttir"]))
        for kernel in {kernel.hash: kernel for kernel in kernels}.values()
    ]


@contextmanager
def launches_compiled(target: GPUTarget) -> Iterator[list[Any]]:
    """Inside, `kernel[grid](...)` compiles for the target, launches nothing, and adds the compiled kernel to the list."""
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1: unset it")
    kernels: list[Any] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel)
        return kernel

    JITFunction.run = compile_only  # the launch is the only place that knows all arguments
    driver.set_active(_AbsentDevice(target))  # type: ignore[arg-type]
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver._active = active


class _AbsentDevice:
    """As much of a Triton driver as compiling asks for. The device number keeps the targets' caches apart."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return -1 - [*TARGETS.values()].index(self._target)

    def get_current_stream(self, device: int) -> int:
        return 0


def measure_cubin(kernel: Any) -> Compiled:
    """Registers and stack of an NVIDIA kernel. Triton keeps nothing else on the stack, so it is what was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump must name REG and STACK of {kernel.name}, got: {text}")
    loaded, stored = widest(kernel.asm["ptx"])
    return Compiled(kernel.name, int(usage[1]), int(usage[2]), kernel.metadata.shared, loaded=loaded, stored=stored)


def widest(ptx: str) -> tuple[int, int]:
    """The most bytes of one load from global memory (asynchronous copies are loads), and of one store."""
    moved: dict[str, list[int]] = {"ld": [0], "st": [0]}
    for kind, count, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx):
        moved[kind].append(int(count or 1) * int(bits) // 8)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    return max([*moved["ld"], *(int(size, 0) for size in copies)]), max(moved["st"])


def measure_amdgcn(kernel: Any) -> Compiled:
    """Vector registers and spills of an AMD kernel, from the metadata in its assembly."""
    text = kernel.asm["amdgcn"]
    registers, spilled = (
        int(re.findall(rf"\.{name}:\s*(\d+)", text)[-1]) for name in ("vgpr_count", "vgpr_spill_count")
    )
    return Compiled(kernel.name, registers, 4 * spilled, kernel.metadata.shared)
