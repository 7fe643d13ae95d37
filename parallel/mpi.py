"""The meeting of the preflight's nodes under mpirun: everyone hears everyone through MPI. The only user of mpi4py.

Has the form of train/node_meeting.py's Meeting. mpirun starts all processes or none, so a gather is enough to hear of each node; its
requests do not block, because one may still hang later. Called by launcher/preflight.py. JSON travels: no pickle is decoded.
"""

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

POLL_S = 0.02


class MpiMeeting:
    """All processes of one mpirun. Rank 0 decides.

    Raises:
        RuntimeError: mpi4py is not installed, or MPI was started with other ranks than the environment says.
    """

    def __init__(self, *, rank: int, size: int) -> None:
        try:
            from mpi4py import MPI  # joins the other processes when it is imported
        except (ImportError, RuntimeError) as error:
            raise RuntimeError(
                f"mpirun needs mpi4py and an MPI library, but it is not to be had ({error}): pip install mpi4py mpich, or start with srun"
            ) from error
        self._world = MPI.COMM_WORLD
        self.rank, self.size = rank, size
        self._folder: Path | None = None
        if (self._world.rank, self._world.size) != (rank, size):
            raise RuntimeError(
                f"mpirun and mpi4py must be of one MPI, but mpirun says rank {rank} of {size} and {MPI.get_vendor()[0]} says rank "
                f"{self._world.rank} of {self._world.size}: use the mpirun of the MPI that mpi4py finds, or set MPI4PY_MPIABI"
            )

    def using(self, folder: Path) -> "MpiMeeting":
        """The same meeting, which removes its mark from `folder` when it is left."""
        self._folder = folder
        return self

    def gather(
        self, topic: str, value: Any, *, patience_s: float, ranks: Iterable[int] | None = None
    ) -> dict[int, Any]:
        """Two all-gathers over all ranks: 8 bytes, then the text of each. RuntimeError after `patience_s` seconds."""
        mine = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        lengths = np.zeros(self.size, dtype=np.int64)
        self._wait(self._world.Iallgather(np.array([mine.size], dtype=np.int64), lengths), topic, patience_s)
        texts = np.empty(int(lengths.sum()), dtype=np.uint8)
        self._wait(self._world.Iallgatherv(mine, [texts, lengths]), topic, patience_s)
        parts = np.split(texts, np.cumsum(lengths)[:-1])
        return {rank: json.loads(part.tobytes()) for rank, part in enumerate(parts)}

    def leads(self, arrived: Iterable[int]) -> bool:
        return self.rank == 0

    def settle(self, topic: str, value: Any, *, patience_s: float) -> Any:
        """Rank 0's value, through `gather`."""
        return self.gather(topic, value, patience_s=patience_s)[0]

    def leave(self) -> None:
        """Removes this process's mark. MPI itself is left when the process ends."""
        with contextlib.suppress(OSError):
            if self._folder is not None:
                (self._folder / f"mark-{self.rank}").unlink()
                self._folder.rmdir()  # the last one can

    def _wait(self, request: Any, topic: str, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while not request.Test():
            if time.monotonic() > deadline:
                # A process that ends by itself would wait in MPI_Finalize for the one that hangs.
                print(f"error: a process told nothing of its {topic} within {patience_s:g} s: look for it", flush=True)
                self._world.Abort(1)
            time.sleep(POLL_S)
