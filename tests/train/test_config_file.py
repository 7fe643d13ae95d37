"""What YAML and the command line can get wrong before any value is looked at."""

from pathlib import Path

import pytest

from train.config import load_config

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny_cpu.yaml"


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def error_of_text(folder: Path, text: str) -> str:
    path = folder / "wrong.yaml"
    path.write_text(text)
    message = error_of(path)
    assert str(path) in message
    return message


def test_a_missing_file_names_the_configs_there_are(tmp_path: Path) -> None:
    message = error_of(tmp_path / "none.yaml")
    assert "no config file" in message
    assert all(
        name in message for name in ("configs/tiny_cpu.yaml", "configs/paper/switchhead_rope_45m.yaml", str(ROOT))
    )


def test_a_folder_is_not_a_config(tmp_path: Path) -> None:
    assert "cannot be read: Is a directory" in error_of(tmp_path)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, text: str) -> None:
    message = error_of_text(tmp_path, text)
    assert "has no keys" in message
    assert "configs/tiny_cpu.yaml" in message


@pytest.mark.parametrize(("text", "kind"), [("- run\n", "list"), ("just text\n", "str"), ("3\n", "int")])
def test_a_file_without_sections_is_an_error(tmp_path: Path, text: str, kind: str) -> None:
    assert f"but it holds the {kind}" in error_of_text(tmp_path, text)


def test_a_key_given_twice_is_an_error_with_both_values(tmp_path: Path) -> None:
    text = TINY.read_text().replace("  seed: 1\n", "  seed: 1\n  steps: 500\n")
    line = text.splitlines().index("  steps: 500") + 1
    message = error_of_text(tmp_path, text)
    assert f"run.steps is given twice, as 400 on line {line - 2} and as 500 on line {line}" in message
    assert "remove one" in message


def test_a_section_given_twice_is_an_error(tmp_path: Path) -> None:
    assert "optim is given twice" in error_of_text(tmp_path, TINY.read_text() + "optim: {lr: 1.0}\n")


def test_a_key_given_twice_inside_braces_is_an_error(tmp_path: Path) -> None:
    text = TINY.read_text().replace("{num_heads: 2,", "{num_heads: 2, num_heads: 3,")
    assert "model.switchhead.num_heads is given twice" in error_of_text(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("run: {dir: a\ndata: 3\n", "line 2"),
        ("run:\n\tdir: a\n", "line 2, column 1"),
        ("run: !!python/object:os.system {}\n", "line 1"),
        ("run: &a {dir: x}\n---\nrun: 3\n", "line 2"),
        ("? [a, b]\n: 3\n", "line 1"),
    ],
)
def test_bad_yaml_names_the_line(tmp_path: Path, text: str, part: str) -> None:
    message = error_of_text(tmp_path, text)
    assert "is not valid YAML" in message
    assert part in message


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(b"run: \xff\xfe")
    assert "must be UTF-8 text, but byte 5 is not" in error_of(path)


def test_a_date_is_text_only_in_quotes() -> None:
    message = error_of(TINY, "run.dir=2024-01-01")
    assert "run.dir is read by YAML as a date (2024-01-01)" in message
    assert "quotes" in message
    assert load_config(TINY, ['run.dir="2024-01-01"']).run.dir == "2024-01-01"


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim.=3", ".lr=3", "", "optim..lr=3"])
def test_set_without_key_and_value_is_an_error(text: str) -> None:
    message = error_of(TINY, text)
    assert "--set must be KEY=VALUE" in message
    assert repr(text) in message
    assert "--set optim.lr=5.0e-4" in message


@pytest.mark.parametrize("text", ["parallel={ep_size: 2}", "parallel=2", "model.switchhead={}"])
def test_set_of_a_section_says_to_set_its_keys(text: str) -> None:
    key, _, value = text.partition("=")
    message = error_of(TINY, text)
    assert f"{key} is a section and the value is {value}" in message
    assert f"--set {key}." in message


def test_set_below_a_value_names_the_value() -> None:
    assert "optim.betas is the value [0.9, 0.95] and has no keys" in error_of(TINY, "optim.betas.0=0.5")


def test_set_of_bad_yaml_names_the_override() -> None:
    assert error_of(TINY, "optim.betas=[0.9").startswith("--set optim.betas=[0.9 is not valid YAML")


def test_set_keeps_equals_signs_in_the_value() -> None:
    assert load_config(TINY, ["run.dir=runs/lr=3"]).run.dir == "runs/lr=3"
