"""Which device is chosen."""

import pytest
import torch

from launcher.environment import choose_device


@pytest.mark.parametrize(
    ("setting", "accelerator", "gpu", "device"),
    [
        ("auto", None, False, "cpu"),
        ("auto", None, True, "cuda"),
        ("auto", "cpu", True, "cpu"),  # `make train` on a GPU machine
        ("auto", "cuda", True, "cuda"),
        ("cpu", None, True, "cpu"),
        ("cuda", None, True, "cuda"),
    ],
)
def test_device_follows_setting_accelerator_and_machine(
    monkeypatch: pytest.MonkeyPatch, setting: str, accelerator: str | None, gpu: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    environ = {} if accelerator is None else {"DS_ACCELERATOR": accelerator}
    assert choose_device(setting, environ) == device  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("setting", "accelerator", "gpu", "parts"),
    [
        ("cuda", None, False, ["run.device is cuda", "no GPU", "auto or cpu"]),
        ("cuda", "cpu", True, ["run.device", "is cuda", "DS_ACCELERATOR is cpu"]),
        ("cpu", "cuda", True, ["is cpu", "DS_ACCELERATOR is cuda"]),
        ("auto", "xpu", False, ["is cpu", "DS_ACCELERATOR is xpu"]),
    ],
)
def test_a_device_that_cannot_be_had_is_an_error(
    monkeypatch: pytest.MonkeyPatch, setting: str, accelerator: str | None, gpu: bool, parts: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    environ = {} if accelerator is None else {"DS_ACCELERATOR": accelerator}
    with pytest.raises(ValueError) as caught:
        choose_device(setting, environ)  # pyright: ignore[reportArgumentType]
    assert all(part in str(caught.value) for part in parts), str(caught.value)
