"""The digest of a value model's directory."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from guided_vllm.tiny_models import make_value_model
from qtilt.distributions import Bernoulli
from qtilt.model.digest import content_digest


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_value_model(tmp_path / "value", "v", Bernoulli(), "llama", seed=1)


def test_it_is_of_what_is_in_the_directory_and_not_of_where_it_lies(directory: Path, tmp_path: Path) -> None:
    digest = content_digest(directory)
    assert digest.startswith("sha256:")
    assert len(digest) == 71
    copy = shutil.copytree(directory, tmp_path / "elsewhere" / "copy")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "etag").write_text("x")
    (copy / ".gitattributes").touch()
    assert content_digest(copy) == digest


def _flip_a_bit(directory: Path) -> None:
    head = directory / "head.safetensors"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        _flip_a_bit,
        lambda directory: (directory / "more").touch(),
        lambda directory: (directory / "value_model.json").rename(directory / "value-model.json"),
        lambda directory: (directory / "backbone" / "config.json").rename(directory / "config.json"),
    ],
    ids=["a bit of the head", "a file more", "another name", "another folder"],
)
def test_another_content_has_another(directory: Path, change: Callable[[Path], object]) -> None:
    digest = content_digest(directory)
    change(directory)
    assert content_digest(directory) != digest
