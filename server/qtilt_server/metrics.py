"""Prometheus metrics of guidance that the server counts itself; vLLM's own /metrics route exposes them."""

from collections import deque

from prometheus_client import Counter, Gauge, Histogram

from qtilt.params import METHODS
from qtilt_server.schema import ChoiceGuidance

KL_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
OF_A_VERSION = ("value_model", "version")
KEPT_UNLOADED = 8
"""Versions whose counters stay after they were unloaded, the latest: until somebody has scraped the last increments."""


class GuidanceMetrics:
    """Made once per server, when its state is initialised.

    Labels are bounded: names and versions are those of what an admin has loaded, and of unloaded versions
    ``KEPT_UNLOADED`` have series.
    """

    def __init__(self) -> None:
        self._requests = Counter("qtilt_guided_requests", "Guided requests admitted.", [*OF_A_VERSION, "method"])
        self._tokens = Counter("qtilt_guided_tokens", "Returned tokens drawn from a guided distribution.", OF_A_VERSION)
        self._kl = Counter("qtilt_guided_kl_nats", "Sum of KL(guided || reference) over returned tokens.", OF_A_VERSION)
        self._kl_of_choices = Histogram(
            "qtilt_choice_kl_nats",
            "KL(guided || reference) of a choice, over its returned tokens.",
            OF_A_VERSION,
            buckets=KL_BUCKETS,
        )
        self._candidates = Counter(
            "qtilt_scored_candidates", "Tokens scored by the value model for returned tokens.", OF_A_VERSION
        )
        self._failures = Counter(
            "qtilt_guidance_failures",
            "Guided requests answered with an error because value code raised an exception (kind exception) or gave "
            "values that are not finite numbers (kind nan).",
            [*OF_A_VERSION, "kind"],
        )
        self._active = Gauge("qtilt_active_version", "The version that a value model's name means.", ["value_model"])
        self._activations = Counter(
            "qtilt_activations",
            "How often the name has come to mean another version: by a publication, or by an admin's roll-back.",
            ["value_model", "cause"],
        )
        self._loads = Counter(
            "qtilt_value_model_loads",
            "Publications while serving: loaded, refused (400), timeout (409: the older version didn't drain) or "
            "failed (500).",
            ["outcome"],
        )
        for outcome in ("loaded", "refused", "timeout", "failed"):
            self._loads.labels(outcome)  # 0, and not missing, before the first
        self._of_versions = (self._tokens, self._kl, self._kl_of_choices, self._candidates)
        self._unloaded: deque[tuple[str, int]] = deque()

    def request(self, value_model: str, version: int, method: str) -> None:
        self._requests.labels(value_model, version, method).inc()

    def choice(self, value_model: str, version: int, choice: ChoiceGuidance) -> None:
        self._tokens.labels(value_model, version).inc(choice.guided_tokens)
        self._kl.labels(value_model, version).inc(max(choice.kl, 0.0))
        self._kl_of_choices.labels(value_model, version).observe(choice.kl)
        self._candidates.labels(value_model, version).inc(round(choice.candidates * choice.guided_tokens))

    def failure(self, value_model: str, version: int, kind: str) -> None:
        """kind: ``exception`` or ``nan``."""
        self._failures.labels(value_model, version, kind).inc()

    def active(self, value_model: str, version: int, cause: str | None = None) -> None:
        """cause: ``publication`` or ``rollback``; None for what the server starts with."""
        self._active.labels(value_model).set(version)
        self._begin(value_model, version)
        if cause is not None:
            self._activations.labels(value_model, cause).inc()

    def load(self, outcome: str) -> None:
        """outcome: ``loaded``, ``refused``, ``timeout`` or ``failed``."""
        self._loads.labels(outcome).inc()

    def unloaded(self, value_model: str, version: int) -> None:
        """No request can use the version any more."""
        self._unloaded.append((value_model, version))
        while len(self._unloaded) > KEPT_UNLOADED:
            name, number = self._unloaded.popleft()
            labels = {"value_model": name, "version": str(number)}
            for of_versions in (*self._of_versions, self._requests, self._failures):
                of_versions.remove_by_labels(labels)

    def gone(self, value_model: str) -> None:
        """The name means no version any more."""
        self._active.remove(value_model)
        self._activations.remove_by_labels({"value_model": value_model})

    def _begin(self, value_model: str, version: int) -> None:
        """Have counters be 0, and not missing, before their first: who looks at rates would miss that."""
        for of_versions in self._of_versions:
            of_versions.labels(value_model, version)
        for method in METHODS:
            self._requests.labels(value_model, version, method)
        for kind in ("exception", "nan"):
            self._failures.labels(value_model, version, kind)
        for cause in ("publication", "rollback"):
            self._activations.labels(value_model, cause)
