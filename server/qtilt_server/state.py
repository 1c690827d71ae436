"""What the routes share; made once when the server starts, kept as ``app.state.guidance``."""

from dataclasses import dataclass

from qtilt_server.admin import AdminAccess
from qtilt_server.admission import Admission
from qtilt_server.details import TokenTexts
from qtilt_server.failures import FailureWatch
from qtilt_server.metrics import GuidanceMetrics
from qtilt_server.publication import Publisher
from qtilt_server.request_log import RequestLog
from qtilt_server.sampling_check import RolloutSamplingCheck
from qtilt_server.scoring import Scorer
from qtilt_server.worker import GuidanceWorker
from qtilt_server.worker_figures import WorkerFigures


@dataclass(frozen=True)
class GuidanceState:
    """Everything about guidance that outlives a request."""

    admin: AdminAccess
    admission: Admission
    publisher: Publisher
    worker: GuidanceWorker
    watch: FailureWatch
    sampling_check: RolloutSamplingCheck
    metrics: GuidanceMetrics
    texts: TokenTexts
    scorer: Scorer
    figures: WorkerFigures
    log: RequestLog | None
