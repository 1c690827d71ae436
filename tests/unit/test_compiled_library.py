"""Where the C++ parts can't be had, who starts them is told why in one error, and nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path

from qtilt.forwards.compiled import library

LOAD = "from qtilt.forwards.compiled import library; library.load()"


def load_elsewhere(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    return subprocess.run([sys.executable, "-c", LOAD], env=settings, capture_output=True, text=True, check=False)


def test_what_is_compiled_is_kept(compiled: Path) -> None:
    before = compiled.stat().st_mtime_ns
    done = load_elsewhere(library.cache_folder().parents[1])
    assert done.returncode == 0, done.stderr
    assert compiled.stat().st_mtime_ns == before


def test_without_a_compiler(tmp_path: Path) -> None:
    done = load_elsewhere(tmp_path, CXX="no-such-compiler")
    assert "RuntimeError: the C++ parts can't be compiled or loaded" in done.stderr
    assert "no-such-compiler" in done.stderr
    assert list((tmp_path / "qtilt" / "compiled").iterdir()) == []


def test_with_a_compiler_that_fails(tmp_path: Path) -> None:
    done = load_elsewhere(tmp_path, CXX="false")
    assert "RuntimeError: the C++ parts can't be compiled, false says" in done.stderr
    assert list((tmp_path / "qtilt" / "compiled").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "qtilt").write_text("a file, where a folder is wanted")
    assert "RuntimeError: the C++ parts can't be compiled or loaded" in load_elsewhere(tmp_path).stderr


def test_an_older_cpu(tmp_path: Path) -> None:
    done = load_elsewhere(tmp_path, ATEN_CPU_CAPABILITY="default")
    assert "RuntimeError: the C++ parts need a CPU with AVX512 or AVX2, this one: DEFAULT" in done.stderr
    assert not (tmp_path / "qtilt").exists()


def test_a_damaged_file_is_not_kept(compiled: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "qtilt" / "compiled" / compiled.name
    damaged.parent.mkdir(parents=True)
    damaged.write_text("not what was compiled")
    assert "RuntimeError: the C++ parts can't be compiled or loaded" in load_elsewhere(tmp_path).stderr
    assert not damaged.exists()


def test_what_others_can_write_is_not_loaded(tmp_path: Path) -> None:
    """Neither a library in such a folder nor such a library; whatever the user's umask is, ours is neither."""
    before = os.umask(0o002)
    try:
        done = load_elsewhere(tmp_path)
        assert done.returncode == 0, done.stderr
    finally:
        os.umask(before)
    folder = tmp_path / "qtilt" / "compiled"
    (compiled,) = folder.iterdir()
    for path in (folder, compiled):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        refused = load_elsewhere(tmp_path)
        assert f"can't be kept in {path}: others than this process's user can write it" in refused.stderr
        path.chmod(mode)
    assert load_elsewhere(tmp_path).returncode == 0
