"""Prometheus metrics of guidance; vLLM's own /metrics route exposes them."""

from prometheus_client import Counter, Gauge, Histogram

from qtilt_server.schema import ChoiceGuidance

KL_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class GuidanceMetrics:
    """Made once per server, when its state is initialised."""

    def __init__(self) -> None:
        self._requests = Counter(
            "qtilt_guided_requests", "Guided requests admitted.", ["value_model", "version", "method"]
        )
        self._tokens = Counter(
            "qtilt_guided_tokens", "Returned tokens drawn from a guided distribution.", ["value_model", "version"]
        )
        self._kl = Counter(
            "qtilt_guided_kl_nats", "Sum of KL(guided || reference) over returned tokens.", ["value_model", "version"]
        )
        self._kl_of_choices = Histogram(
            "qtilt_choice_kl_nats",
            "KL(guided || reference) of a choice, over its returned tokens.",
            ["value_model", "version"],
            buckets=KL_BUCKETS,
        )
        self._candidates = Counter(
            "qtilt_scored_candidates",
            "Tokens scored by the value model for returned tokens.",
            ["value_model", "version"],
        )
        self._failures = Counter(
            "qtilt_guidance_failures",
            "Guided requests answered with an error because value code raised an exception (kind exception) or gave "
            "values that are not finite numbers (kind nan).",
            ["value_model", "version", "kind"],
        )
        self._active = Gauge("qtilt_active_version", "The version that a value model's name means.", ["value_model"])
        self._swaps = Counter("qtilt_value_model_loads", "Value models published while serving.", ["outcome"])

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

    def active(self, value_model: str, version: int) -> None:
        self._active.labels(value_model).set(version)

    def gone(self, value_model: str) -> None:
        self._active.remove(value_model)

    def load(self, outcome: str) -> None:
        """outcome: ``loaded``, ``refused`` or ``timeout``."""
        self._swaps.labels(outcome).inc()
