"""Whether the Triton kernels can run here, without importing triton.

Owns: the one sentence why they cannot, and the refusal of a backend that is unknown or cannot run. Does not own: which shapes and dtypes
a kernel takes (kernels/<op>/__init__.py).
Called by: the public function of every kernels/<op>/ before it imports its kernel.py.
"""

import importlib.util
import os

import torch


@torch.compiler.assume_constant_result  # a compiled model asks once, while it is compiled
def why_not_triton(device_type: str) -> str | None:
    """The reason why no Triton kernel can run on tensors of this device type, or None if one can.

    "cuda" is an NVIDIA or an AMD GPU. Tensors on a CPU run in Triton's interpreter, for tests: TRITON_INTERPRET=1 must
    be set before triton is first imported.
    """
    if importlib.util.find_spec("triton") is None:
        return (
            "the triton backend needs the package triton, which is not installed: install it, or choose another backend"
        )
    if device_type == "cuda" or interpreted():
        return None
    return (
        f"the triton backend computes on a GPU, got tensors on {device_type}: move them to a GPU, or choose another "
        "backend"
    )


def check_backend(op: str, backend: str, backends: tuple[str, ...], *, device_type: str) -> None:
    """ValueError unless the backend is one of the op's, and on tensors of this device type can run."""
    if backend not in backends:
        raise ValueError(f"the backend of {op} must be one of {', '.join(backends)}, got {backend!r}")
    if backend == "triton" and (reason := why_not_triton(device_type)):
        raise ValueError(f"{op}: {reason}")


def interpreted() -> bool:
    """Whether this process was started to run Triton kernels in the interpreter, as triton itself reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
