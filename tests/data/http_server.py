"""A server for the tests of remote shards that fails as it is told, and rows that are read through it.

Owns the answers; the fixture `server` of conftest.py starts it. Called by tests/data/test_remote.py and test_remote_faults.py.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import torch

from data.config import DataConfig
from data.loader import train_batches
from data.split import open_train

SEED = 3


@dataclass
class Server:
    """What a test tells the server to do, and what it was asked for."""

    url: str = ""
    faults: list[Callable[[SimpleHTTPRequestHandler, str], bool]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    queries: set[str] = field(default_factory=set)


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, server_state: Server, **options: object) -> None:
        self.state = server_state
        super().__init__(*arguments, **options)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2].partition("?")[0]
        self.state.asked[name] += 1
        self.state.queries.add(self.path.partition("?")[2])
        if not any(fault(self, name) for fault in self.state.faults):
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[Server]:
    """Serves the files under `root`; the address is that of root/train."""
    state = Server()
    handler = partial(Handler, server_state=state, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/train"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def fails_times(name: str, times: int, answer: Callable[[SimpleHTTPRequestHandler], None]):
    """A fault: the first requests for `name` get `answer`."""
    left = [times]

    def fault(handler: SimpleHTTPRequestHandler, asked: str) -> bool:
        if asked != name or not left[0]:
            return False
        left[0] -= 1
        answer(handler)
        return True

    return fault


def cut(content: bytes) -> Callable[[SimpleHTTPRequestHandler], None]:
    """Half of a file under the length of the whole: a connection that broke."""

    def answer(handler: SimpleHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        handler.close_connection = True

    return answer


def whole(content: bytes) -> Callable[[SimpleHTTPRequestHandler], None]:
    def answer(handler: SimpleHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def room_for(shards: float, tmp_path: Path) -> float:
    """data.cache_gb for so many shards of the largest size in tmp_path/train; if there is none, the default."""
    sizes = [path.stat().st_size for path in (tmp_path / "train").glob("*.tar")]
    return shards * max(sizes) / 1e9 if sizes else 100.0


def config_of(place: object, tmp_path: Path, **changes: object) -> DataConfig:
    values = {"sequence_length": 7, "global_batch_size": 8, "streams": 4, "heldout": "heldout"}
    values |= {"shards": place, "cache": str(tmp_path / "cache"), "allow_pipe": True}
    values["cache_gb"] = room_for(7, tmp_path)  # all of them, and too little for anything to be fetched ahead
    return DataConfig.model_validate(values | changes)


def rows(config: DataConfig, num: int = 20) -> list[list]:
    batches = train_batches(
        config, open_train(config), seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0
    )
    taken = islice(batches, num)
    return [[v.tolist() if isinstance(v, torch.Tensor) else v for v in astuple(batch)[:6]] for batch in taken]


def local_rows(folder: Path, tmp_path: Path) -> list[list]:
    return rows(config_of(str(folder), tmp_path, cache=None))
