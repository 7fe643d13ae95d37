"""launcher/main.py with a disk that fails in one save of one rank: `slow_disk_main.py FAULT STEP RANK`, then main's own arguments.

Called by test_save_behind_steps.py. FAULT, when RANK writes its file of the checkpoint of STEP: `hang` does not return for two minutes,
`die` ends the process, `full` has no space left.
"""

import errno
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    fault, step, rank = sys.argv[1:4]
    sys.argv = [str(ROOT / "launcher" / "main.py"), *sys.argv[4:]]
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began the tests in the background
    if os.environ["RANK"] == rank:
        from train import storage

        def faulty(path: Path, mode: str) -> Any:
            if mode == "xb" and path.parent.name.startswith(f"step_{int(step):06d}") and path.suffix == ".safetensors":
                if fault == "die":
                    os._exit(9)
                if fault == "full":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                time.sleep(120)
            return open(path, mode)

        storage.open = faulty  # pyright: ignore[reportAttributeAccessIssue]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
