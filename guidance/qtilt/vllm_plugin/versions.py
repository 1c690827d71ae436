"""The value-model versions a worker holds, and the two-phase way a new one comes in.

prepare (reading, checking, allocating: a background thread, steps go on) → ready → commit (a dictionary entry).
Until the commit nothing that runs can see the new version; a failed preparation changes nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from weakref import WeakValueDictionary

import torch

from qtilt.engine.cache import KVCache
from qtilt.engine.engine import ValueEngine
from qtilt.forwards.choice import choose_tilt
from qtilt.forwards.fused import Kernels
from qtilt.forwards.memory import CacheGeometry
from qtilt.method.distributions import ReturnDistribution
from qtilt.method.tilt import OFFSETS, TAILS, TiltFunctions, lowest_offset
from qtilt.model.checkpoint import Manifest, load_value_model, read_manifest
from qtilt.model.low_rank import BaseModels
from qtilt.vllm_plugin.compatibility import Reference, check_fits_reference, scorable_tokens
from qtilt.vllm_plugin.measures import StepCounts
from qtilt.vllm_plugin.reserve import Reserve

if TYPE_CHECKING:
    from qtilt.vllm_plugin.captured import CapturedStep, StepKind

VersionKey = tuple[str, int]


@dataclass(frozen=True)
class EngineSettings:
    """slots: most requests in one batch. max_length: longest sequence, in tokens. dtype: of weights and caches.

    kv_fraction: memory of a cache, as a fraction of what ``slots`` sequences of ``max_length`` need. kernels: for
    backbones that can be fused. served: where the reference model is, the usual base of low-rank value models.
    max_new_tokens: of one forward of a value model.
    """

    slots: int
    max_length: int
    dtype: torch.dtype
    device: torch.device
    kv_fraction: float = 1.0
    kernels: Kernels | None = None
    served: Sequence[str] = ()
    max_new_tokens: int = 8192


@dataclass(eq=False)
class ResidentVersion:
    """One loaded version of one value model. rows: the rows of the running batch that use it. captured: by kind, its
    steps that can be replayed (captured.py); None where that failed.
    """

    name: str
    version: int
    path: Path
    manifest: Manifest
    engine: ValueEngine
    scorable: int
    warnings: list[str]
    tilt: TiltFunctions
    rows: int = field(default=0)
    captured: "dict[StepKind, CapturedStep | None]" = field(default_factory=dict)
    counts: StepCounts = field(default_factory=StepCounts)

    @property
    def label(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def distribution(self) -> ReturnDistribution:
        return self.manifest.distribution

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "version": self.version,
            "path": str(self.path),
            "type": self.manifest.type,
            "distribution": self.manifest.distribution.to_config(),
            "provenance": self.manifest.provenance,
            "scorable_tokens": self.scorable,
            "forward": self.engine.forward.name,
            "captured_steps": sum(step is not None and step.agrees for step in self.captured.values()),
            "warnings": self.warnings,
            "rows": self.rows,
            "free_slots": self.engine.cache.free_slots,
            "held_pages": self.engine.cache.held_pages,
            "cache_gib": self.engine.cache.gib,
            "dropped": self.engine.cache.dropped,
        }


class PreparationStatus(TypedDict):
    """state: loading, ready or failed. error: why it failed, else None."""

    state: str
    error: str | None


class Residents:
    """Versions that requests may name, and versions in preparation."""

    def __init__(self, reference: Reference, settings: EngineSettings) -> None:
        self._reference = reference
        self._settings = settings
        self._resident: dict[VersionKey, ResidentVersion] = {}
        self._preparing: dict[VersionKey, Future[ResidentVersion]] = {}
        # A request holds one slot in all, so caches of `slots` slots can be shared by all versions of equal geometry.
        self._caches: WeakValueDictionary[CacheGeometry, KVCache] = WeakValueDictionary()
        self._held_caches: list[KVCache] = []
        self._bases = BaseModels(settings.served)
        self.reserve = Reserve(settings.device, 0, 0, 0)
        """What is held for versions to come."""
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qtilt-prepare")

    def __iter__(self) -> Iterator[ResidentVersion]:
        return iter(self._resident.values())

    @property
    def caches(self) -> list[KVCache]:
        """Of all versions, and those that are held for versions to come."""
        found = [reference() for reference in self._caches.valuerefs()]  # a loading thread may be adding one
        return [cache for cache in found if cache is not None]

    def get(self, name: str, version: int) -> ResidentVersion:
        """Raises ValueError for a version that isn't resident."""
        try:
            return self._resident[name, version]
        except KeyError:
            resident = ", ".join(f"{known}@{number}" for known, number in self._resident) or "none"
            raise ValueError(f"value model {name}@{version} isn't resident; resident: {resident}") from None

    def load_at_start(self, name: str, path: str, version: int = 1) -> ResidentVersion:
        """Load the first version of a name, in the calling thread. Raises ValueError when it can't be used."""
        self._resident[name, version] = self._load(name, version, Path(path))
        return self._resident[name, version]

    def hold_caches(self, geometries: Iterable[CacheGeometry]) -> None:
        """Allocate, for value models to come, the caches that they will need. Raises ValueError without the memory."""
        settings = self._settings
        for geometry in geometries:
            cache = KVCache(geometry, settings.slots, settings.max_length, settings.kv_fraction)
            self._held_caches.append(cache)
            self._caches[geometry] = cache

    def prepare(self, name: str, version: int, path: str) -> None:
        """Begin to load; ``status`` tells how it goes. Raises ValueError when that version is known already."""
        key = (name, version)
        if key in self._resident or key in self._preparing:
            raise ValueError(f"value model {name}@{version} is already resident or being prepared")
        self._preparing[key] = self._loader.submit(self._load, name, version, Path(path))

    def status(self, name: str, version: int) -> PreparationStatus:
        """Raises ValueError for a version that isn't being prepared."""
        future = self._prepared(name, version)
        if not future.done():
            return {"state": "loading", "error": None}
        error = future.exception()
        return {"state": "failed", "error": str(error)} if error else {"state": "ready", "error": None}

    def commit(self, name: str, version: int) -> None:
        """From now on requests may name this version. Raises ValueError unless its preparation is ready."""
        status = self.status(name, version)
        if status["state"] != "ready":
            raise ValueError(f"value model {name}@{version} is {status['state']}, only a ready one can be committed")
        self._resident[name, version] = self._preparing.pop((name, version)).result()

    def discard(self, name: str, version: int) -> None:
        """Drop a prepared or resident version. Raises ValueError while rows of the running batch use it.

        A preempted request isn't in the batch: who discards must know that none is waiting (the server's leases do).
        Waits for nothing.
        """
        if (name, version) in self._preparing:
            preparing = [self._preparing.pop((name, version))]
            if not preparing[0].cancel():
                self._loader.submit(self._hold_again_after, preparing)
            return
        resident = self.get(name, version)
        if resident.rows:
            raise ValueError(
                f"value model {name}@{version} guides {resident.rows} running request(s), it can't be discarded"
            )
        del self._resident[name, version]
        if self._settings.device.type == "cuda":
            steps = torch.cuda.Event(blocking=True)
            steps.record(torch.cuda.current_stream(self._settings.device))
            self._loader.submit(_keep_until_done, resident, steps)
            self._loader.submit(self.reserve.hold_again)

    def _hold_again_after(self, preparing: list[Future[ResidentVersion]]) -> None:
        """Drop what a preparation that nobody wants any more has loaded; one that failed has loaded nothing."""
        if preparing.pop().exception() is None:
            self.reserve.hold_again()

    def _prepared(self, name: str, version: int) -> Future[ResidentVersion]:
        try:
            return self._preparing[name, version]
        except KeyError:
            raise ValueError(f"value model {name}@{version} isn't being prepared") from None

    def _load(self, name: str, version: int, path: Path) -> ResidentVersion:
        manifest = read_manifest(path)
        warnings = check_fits_reference(manifest, path, self._reference)
        with self.reserve.room_for_a_version():
            model = load_value_model(path, self._settings.dtype, self._settings.device, self._bases)
            settings = self._settings
            engine = ValueEngine(
                model,
                settings.slots,
                settings.max_length,
                self._caches,
                max_new_tokens=settings.max_new_tokens,
                kv_fraction=settings.kv_fraction,
                kernels=settings.kernels,
            )
        engine.free_what_is_kept_twice()
        scorable, tilt = scorable_tokens(manifest, self._reference), choose_tilt(settings.device)
        _run_once(tilt, manifest.distribution, scorable, self._reference.vocab_size, settings.device)
        if self._settings.device.type == "cuda":
            # Steps run on another stream than this thread: for them too, all must be in place. This waits for the
            # thread's own work only, and no step waits for it.
            torch.cuda.current_stream(self._settings.device).synchronize()
        return ResidentVersion(name, version, path, manifest, engine, scorable, warnings, tilt)


@torch.inference_mode()
def _run_once(
    tilt: TiltFunctions, distribution: ReturnDistribution, scorable: int, vocabulary: int, device: torch.device
) -> None:
    """What is compiled, or brought to the device, when it is first used is there before a step."""
    logits_1V, one_1 = torch.zeros(1, vocabulary, device=device), torch.ones(1, dtype=torch.float64, device=device)
    for top_k_1 in (None, one_1.long()):
        candidates = tilt.top_candidates(logits_1V, 2, scorable, top_k_1)
    mass = tilt.reference_mass(logits_1V, candidates, one_1)
    values_1KA = torch.zeros(*candidates.valid_BK.shape, distribution.num_logits, device=device)
    for method in OFFSETS:
        offsets_1K = tilt.offsets(distribution, values_1KA, one_1, method)
    for tail in TAILS:
        dropped = tilt.drops(mass, candidates.valid_BK, offsets_1K, lowest_offset(distribution, one_1), tail)
    tilt.divergence(mass, dropped)
    tilt.tilt_(logits_1V, candidates, dropped, one_1)


def _keep_until_done(version: ResidentVersion, steps: torch.cuda.Event) -> None:
    """Hold a version until steps queued on the device are done with it.

    Its memory is that of the loading thread's stream: when it is free, the next load writes into it without waiting for
    the steps' stream. So it is freed in that thread, after them.
    """
    steps.synchronize()
    del version
