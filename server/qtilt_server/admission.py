"""From the guidance block of a request to resolved parameters with a lease."""

from dataclasses import dataclass
from typing import Literal

from qtilt.params import GuidanceParams
from qtilt_server.errors import GuidanceRequestError
from qtilt_server.flags import GuidanceFlags
from qtilt_server.registry import Lease, ValueModelRegistry
from qtilt_server.schema import GuidanceDefaults, GuidanceRequest, GuidanceStatus

DEFAULT_METHOD: Literal["qsharp"] = "qsharp"


@dataclass(frozen=True)
class Admission:
    """The server's defaults and limits, and the versions there are. speculates: whether vLLM drafts tokens."""

    flags: GuidanceFlags
    registry: ValueModelRegistry
    speculates: bool = False

    def admit(self, request: GuidanceRequest) -> tuple[GuidanceParams, Lease]:
        """Fill in the defaults and fix the version; the caller releases the lease.

        Raises GuidanceRequestError for a top_k above the server's limit, an unknown value model, or what isn't there
        while tokens are drafted.
        """
        top_k = self.flags.top_k if request.top_k is None else request.top_k
        if top_k > self.flags.max_top_k:
            raise GuidanceRequestError(
                f"guidance.top_k is {top_k}, allowed: 1 to {self.flags.max_top_k} (the server's --guidance-max-top-k)",
                "guidance.top_k",
            )
        self._refuse_with_drafts(request)
        lease = self.registry.lease(request.value_model)
        params = GuidanceParams(
            value_model=lease.version.name,
            version=lease.version.version,
            eta=self.flags.eta if request.eta is None else float(request.eta),
            top_k=min(top_k, lease.version.scorable_tokens),
            method=request.method or DEFAULT_METHOD,
            tail=request.tail or self.flags.tail,
            guided_tokens=request.guided_tokens,
            candidate_mass=1.0 if request.candidate_mass is None else float(request.candidate_mass),
            kl_budget=None if request.kl_budget is None else float(request.kl_budget),
            details=bool(request.details),
        )
        return params, lease

    def _refuse_with_drafts(self, request: GuidanceRequest) -> None:
        if not self.speculates:
            return
        for field, asked in (("details", request.details), ("kl_budget", request.kl_budget)):
            if asked:
                raise GuidanceRequestError(
                    f"guidance.{field} is {asked}, allowed: null, because this server drafts tokens "
                    "(--speculative-config)",
                    f"guidance.{field}",
                )

    def status(self) -> GuidanceStatus:
        """``GET /v1/guidance``."""
        root = self.flags.value_model_root
        return GuidanceStatus(
            value_models=self.registry.describe(),
            defaults=GuidanceDefaults(
                value_model=self.registry.default_name,
                eta=self.flags.eta,
                top_k=self.flags.top_k,
                method=DEFAULT_METHOD,
                tail=self.flags.tail,
            ),
            max_top_k=self.flags.max_top_k,
            value_model_root=None if root is None else str(root),
        )
