"""Compiles llama_forward.cpp with this machine's compiler, once, and loads it into torch."""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("llama_forward.cpp")
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
"""What the compiler may use, by what torch says of the CPU. Others have no compiled forward."""
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1"]


_loaded: list[Path] = []


def load_library() -> None:
    """Have torch know it, from here on. Compiling takes some ten seconds, and is kept in the user's cache folder.

    Raises RuntimeError that says why it can't be.
    """
    if _loaded:
        return
    from torch.utils.cpp_extension import get_cxx_compiler  # half a second

    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INSTRUCTIONS:
        raise RuntimeError(f"the compiled forward needs a CPU with {' or '.join(INSTRUCTIONS)}, this one: {capability}")
    flags = [*FLAGS, *INSTRUCTIONS[capability], f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    key = [SOURCE.read_text(), torch.__version__, get_cxx_compiler(), *flags]
    library = cache_folder() / f"llama_forward-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        _compile(get_cxx_compiler(), flags, library)
    torch.ops.load_library(library)
    _loaded.append(library)


def top_finite(rows_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers of each row, falling, and where they are; what isn't finite counts as −inf."""
    if _takes(rows_BV):
        values_BK, places_BK = torch.ops.qtilt.top_k(rows_BV, k)
        return values_BK, places_BK
    return rows_BV.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).topk(k, dim=-1)


def log_sum_exp(rows_BV: Tensor, scale_B: Tensor) -> Tensor:
    """ln Σ e^(x/scale) of each row, float64 ``[B]`` as ``scale_B``; what isn't finite counts as −inf."""
    if _takes(rows_BV):
        sums_B: Tensor = torch.ops.qtilt.log_sum_exp(rows_BV, scale_B)
        return sums_B
    scaled_BV = rows_BV / scale_B.to(rows_BV.dtype).unsqueeze(-1)
    return scaled_BV.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).logsumexp(-1).double()


def _takes(rows_BV: Tensor) -> bool:
    on_cpu = rows_BV.device.type == "cpu" and rows_BV.dtype == torch.float32
    return bool(_loaded) and on_cpu and rows_BV.stride(-1) == 1


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtilt"


def _compile(compiler: str, flags: list[str], library: Path) -> None:
    """Several processes may do so at once: each puts a whole file in place."""
    from torch.utils.cpp_extension import include_paths, library_paths

    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            compiled, linked = Path(folder, "compiled.o"), Path(folder, "linked.so")
            includes = [argument for path in include_paths() for argument in ("-isystem", path)]
            _run([compiler, *flags, *includes, "-c", str(SOURCE), "-o", str(compiled)])
            # Without -fopenmp: the threads are to be those of the OpenMP that torch has brought along.
            paths = [f"-L{path}" for path in library_paths()]
            _run([compiler, "-shared", str(compiled), *paths, "-lc10", "-ltorch_cpu", "-o", str(linked)])
            linked.replace(library)
    except OSError as error:
        raise RuntimeError(f"the forward can't be compiled: {error}") from error


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the forward can't be compiled, {command[0]} says: {done.stderr.strip()[-2000:]}")
