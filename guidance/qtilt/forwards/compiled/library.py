"""Compiles the sources beside this file with the machine's compiler, once, and loads the result into torch."""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
"""What the compiler may use, by what torch says of the CPU. Others have no compiled forward."""
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1"]

_loaded: list[Path] = []


def load() -> None:
    """Have value engines and the tilt run on it from here on. Compiling takes some ten seconds, and is kept.

    Raises RuntimeError that says why it can't be.
    """
    if not _loaded:
        try:
            _loaded.append(_load())
        except OSError as error:
            raise RuntimeError(f"the C++ parts can't be compiled or loaded: {error}") from error


def _load() -> Path:
    """The file that torch has loaded."""
    from torch.utils.cpp_extension import get_cxx_compiler  # half a second

    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INSTRUCTIONS:
        raise RuntimeError(f"the C++ parts need a CPU with {' or '.join(INSTRUCTIONS)}, this one: {capability}")
    flags = [*FLAGS, *INSTRUCTIONS[capability], f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    sources = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
    key = [*(path.read_text() for path in sources), torch.__version__, get_cxx_compiler(), *flags]
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    _refuse_what_others_can_write(folder)
    if library.exists():
        _refuse_what_others_can_write(library)
    else:
        _compile([get_cxx_compiler(), *flags], library)
    try:
        torch.ops.load_library(library)
    except OSError:
        # Perhaps the file is damaged: it isn't kept, and who starts again compiles again.
        library.unlink()
        raise
    return library


def is_loaded() -> bool:
    """Whether value engines that are made now, and the tilt, run on it."""
    return bool(_loaded)


def takes(rows: Tensor) -> bool:
    """Whether the library has been loaded and computes with such numbers; it knows no gradients."""
    is_plain = rows.dtype == torch.float32 and rows.stride(-1) == 1 and not rows.requires_grad
    return bool(_loaded) and rows.device.type == "cpu" and is_plain


def cache_folder() -> Path:
    """Where compiled libraries are kept: nobody else may write there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtilt" / "compiled"


def _compile(command: list[str], library: Path) -> None:
    """Several processes may do so at once: each puts a whole file in place."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [argument for path in include_paths() for argument in ("-isystem", path)]
    # Linked without -fopenmp: the threads are to be those of the OpenMP that torch has brought along.
    linking = ["-shared", *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder, "compiled.o"), Path(folder, "linked.so")
        _run([*command, *includes, "-c", str(FOLDER / "library.cpp"), "-o", str(compiled)])
        _run([command[0], str(compiled), *linking, "-o", str(linked)])
        linked.chmod(0o700)  # whatever the umask
        linked.replace(library)


def _refuse_what_others_can_write(path: Path) -> None:
    """Whoever can write there has this process run what they like."""
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise RuntimeError(
            f"the C++ parts can't be kept in {path}: others than this process's user can write it (chmod go-w, or set "
            "XDG_CACHE_HOME to another folder)"
        )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the C++ parts can't be compiled, {command[0]} says: {done.stderr.strip()[-2000:]}")
