"""The lock between processes."""

import threading
import time
from pathlib import Path

import pytest

from data.files import exclusive


def test_one_at_a_time_holds_the_lock_and_the_file_is_gone_at_the_end(tmp_path: Path):
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            with exclusive(tmp_path / "lock"):
                inside.append(number)
                time.sleep(0.002)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80
    assert not list(tmp_path.iterdir())


def test_an_error_inside_lets_the_lock_go(tmp_path: Path):
    with pytest.raises(KeyError), exclusive(tmp_path / "lock"):
        raise KeyError
    with exclusive(tmp_path / "lock"):
        pass
