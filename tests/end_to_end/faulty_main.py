"""launcher/main.py with a fault in rank 1 (or the rank in FAULTY_RANK): `faulty_main.py FAULT` and then main's own arguments.

Called by test_hang.py. A fault strikes in the feed-forward of the last of two layers, in its fifth forward pass: with two micro-steps
a step, in step 3. It sleeps, stops or raises before its first exchange, and dies when its output gets its gradient.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CALL = 5


def oversleep() -> None:
    time.sleep(120)


def die(gradient: Any) -> None:
    os._exit(9)


def strike(fault: str) -> None:
    if fault == "sleep":
        oversleep()
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "raise":
        raise MemoryError("the feed-forward wanted 80 GiB and there are 2")


def main() -> None:
    fault, sys.argv = sys.argv[1], [str(ROOT / "launcher" / "main.py"), *sys.argv[2:]]
    sys.path.insert(0, str(ROOT))
    if os.environ["RANK"] == os.environ.get("FAULTY_RANK", "1"):
        from model.sigma_moe import SigmaMoE

        forward, calls = SigmaMoE.forward, {}

        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[id(self)] = calls.get(id(self), 0) + 1
            if list(calls).index(id(self)) == 0:
                return forward(self, *args, **kwargs)
            if fault == "slow" and self.training:
                time.sleep(1.7)
            now = calls[id(self)] == CALL
            if now:
                strike(fault)
            output = forward(self, *args, **kwargs)
            if now and fault == "die":
                output.y_BSD.register_hook(die)
            return output

        SigmaMoE.forward = faulty  # pyright: ignore[reportAttributeAccessIssue]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
