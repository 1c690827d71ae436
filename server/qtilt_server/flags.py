"""The launcher's own flags; all others are vLLM's. Imports neither torch nor vLLM."""

import argparse
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, Self

from qtilt.params import DEFAULT_ETA, DEFAULT_TAIL, DEFAULT_TOP_K, MIN_ETA, TAILS
from qtilt.vllm_plugin.config import VALUE_DTYPES
from qtilt_server.errors import StartupError
from qtilt_server.schema import VALUE_MODEL_NAME

if TYPE_CHECKING:
    from qtilt_server.remembered import Restored

ADMIN_KEY_VARIABLE = "QTILT_ADMIN_KEY"
STDOUT = "-"
"""In place of a file's name."""


@dataclass(frozen=True, kw_only=True)
class GuidanceFlags:
    """Raises StartupError for a value out of its range or a directory that doesn't exist."""

    value_models: dict[str, Path] = field(default_factory=dict)
    """Name → directory, in the order given: the first is the default of requests."""
    eta: float = DEFAULT_ETA
    top_k: int = DEFAULT_TOP_K
    max_top_k: int = 64
    tail: Literal["floor", "mean"] = DEFAULT_TAIL
    value_model_root: Path | None = None
    """Where POST /v1/guidance/value_models may load from; without it nothing can be published."""
    swap_timeout: float = 60.0
    """Seconds that a load waits for the older version of its name to drain."""
    value_dtype: str = "auto"
    kv_fraction: float | None = None
    kv_tokens: int | str | None = None
    """A number, or "auto"."""
    backbone: str | None = None
    backbone_layers: int | None = None
    plan: float | None = None
    """GiB of the device whose memory is planned, in place of serving."""
    registry: Path | None = None
    """Where it is remembered what was published: see remembered.py."""
    restored: "Mapping[str, Restored]" = field(default_factory=dict)
    """By name, of which version the directory is that it came back with; of others it is version 1."""
    admin_key: str | None = field(default=None, repr=False)
    """Who has it may publish; without one whoever is on this machine."""
    log: str | None = None
    """A file for a line of JSON a guided request, or ``-``."""

    def __post_init__(self) -> None:
        _require(MIN_ETA <= self.eta < math.inf, f"--guidance-eta must be finite and {MIN_ETA} or more, got {self.eta}")
        _require(self.max_top_k >= 1, f"--guidance-max-top-k must be at least 1, got {self.max_top_k}")
        _require(
            1 <= self.top_k <= self.max_top_k,
            f"--guidance-top-k must be 1 to {self.max_top_k} (--guidance-max-top-k), got {self.top_k}",
        )
        _require(0 <= self.swap_timeout < math.inf, f"--swap-timeout must be seconds, got {self.swap_timeout}")
        _require(
            self.kv_fraction is None or 0 < self.kv_fraction <= 1,
            f"--guidance-kv-fraction must be above 0 and at most 1, got {self.kv_fraction}",
        )
        _require(
            self.kv_fraction is None or self.kv_tokens is None,
            "--guidance-kv-fraction and --guidance-kv-tokens both say how large value caches are: give one of them",
        )
        _require(
            self.backbone is None or not self.value_models,
            "--guidance-backbone is for a start without --value-model, whose memory is known: give one of them",
        )
        _require(
            self.backbone_layers is None or self.backbone is not None,
            "--guidance-backbone-layers says how many layers of --guidance-backbone: give that too",
        )
        _require(
            self.backbone != "",
            "--guidance-backbone is empty, expected a directory or a hub id",
        )
        _require(
            self.backbone_layers is None or self.backbone_layers >= 1,
            f"--guidance-backbone-layers must be at least 1, got {self.backbone_layers}",
        )
        _require(
            self.plan is None or 0 < self.plan < math.inf,
            f"--guidance-plan must be a device's GiB, above 0, got {self.plan}",
        )
        _require(
            self.plan is None or bool(self.value_models) or self.backbone is not None,
            "--guidance-plan needs to know the value models: give --value-model or --guidance-backbone",
        )
        _require(
            self.log is None
            or self.log == STDOUT
            or (bool(self.log) and Path(self.log).parent.is_dir() and not Path(self.log).is_dir()),
            f"--guidance-log {self.log}: expected - or a file in a directory that exists",
        )
        for name, directory in self.value_models.items():
            _require(directory.is_dir(), f"--value-model {name}={directory}: no such directory")
        root = self.value_model_root
        _require(root is None or root.is_dir(), f"--value-model-root {root}: no such directory, create it first")

    @classmethod
    def from_namespace(cls, args: argparse.Namespace) -> Self:
        return cls(
            value_models=_parse_value_models(args.value_model),
            eta=args.guidance_eta,
            top_k=args.guidance_top_k,
            max_top_k=args.guidance_max_top_k,
            tail=args.guidance_tail,
            value_model_root=None if args.value_model_root is None else Path(args.value_model_root).resolve(),
            swap_timeout=args.swap_timeout,
            value_dtype=args.value_dtype,
            kv_fraction=args.guidance_kv_fraction,
            kv_tokens=args.guidance_kv_tokens,
            backbone=args.guidance_backbone,
            backbone_layers=args.guidance_backbone_layers,
            plan=args.guidance_plan,
            registry=None if args.value_model_registry is None else Path(args.value_model_registry).resolve(),
            admin_key=args.admin_key or os.environ.get(ADMIN_KEY_VARIABLE) or None,
            log=args.guidance_log,
        )


class OneLineParser(argparse.ArgumentParser):
    """argparse prints the usage before an error; ours are one line."""

    def error(self, message: str) -> NoReturn:
        raise StartupError(message)


def parse_own_flags(argv: list[str]) -> GuidanceFlags:
    """Our flags out of a whole command line, before the seconds it takes to import vLLM's parser."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    add_guidance_arguments(parser)
    namespace, _ = parser.parse_known_args(argv)
    return GuidanceFlags.from_namespace(namespace)


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    """Define our flags, once for our own parser and once for vLLM's."""
    group = parser.add_argument_group("Guidance", "Steer the model with value models.")
    group.add_argument(
        "--value-model",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="A value-model directory and the name requests use; repeat for more. The first is the default. "
        "Without any, guided requests are refused until one is published.",
    )
    group.add_argument(
        "--guidance-eta", type=float, default=DEFAULT_ETA, help="Default KL weight η; a larger η is a weaker tilt."
    )
    group.add_argument(
        "--guidance-top-k", type=int, default=DEFAULT_TOP_K, help="Default number of scored tokens a step, at most."
    )
    group.add_argument("--guidance-max-top-k", type=int, default=64, help="Largest top_k a request may ask for.")
    group.add_argument(
        "--guidance-tail",
        choices=TAILS,
        default=DEFAULT_TAIL,
        help="Default tail, what tokens that aren't scored get. floor: the lowest possible return's offset. mean: the "
        "reference-weighted mean of those scored, so that they keep the reference's probability. Default: %(default)s.",
    )
    group.add_argument(
        "--value-model-root", metavar="DIR", help="POST /v1/guidance/value_models loads directories below DIR only."
    )
    group.add_argument(
        "--value-model-registry",
        metavar="FILE",
        help="Remember in FILE what is published: a server that starts again with it comes back with what was active.",
    )
    group.add_argument(
        "--swap-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="How long a load waits for the older of two resident versions to drain before it answers 409.",
    )
    group.add_argument(
        "--value-dtype", choices=VALUE_DTYPES, default="auto", help="dtype of the value models; auto: the reference's."
    )
    group.add_argument(
        "--guidance-kv-fraction",
        type=float,
        metavar="FRACTION",
        help="Memory of a value cache, as a fraction of what --max-num-seqs sequences of --max-model-len tokens need. "
        "With less than 1, what was used least recently is dropped where room is needed, and computed again. Default: "
        "1 on CPUs.",
    )
    group.add_argument(
        "--guidance-kv-tokens",
        type=_tokens,
        metavar="auto|N",
        help="How many tokens a value cache holds, in place of the fraction. auto, the default on GPUs: as many as "
        "vLLM's own key-value cache will hold.",
    )
    group.add_argument(
        "--guidance-backbone",
        metavar="DIR|HUB_ID",
        help="What value models will be made of that are yet to be published, or one of them: without --value-model, "
        "memory for three versions and their cache is held from the start.",
    )
    group.add_argument(
        "--guidance-backbone-layers",
        type=int,
        metavar="N",
        help="How many of its first layers they have (default: all).",
    )
    group.add_argument(
        "--admin-key",
        metavar="KEY",
        help="What the routes below /v1/guidance/value_models want as bearer token; the environment variable "
        f"{ADMIN_KEY_VARIABLE} keeps it out of the list of processes. Without it they answer to this machine "
        "only.",
    )
    group.add_argument(
        "--guidance-log",
        metavar="FILE",
        help="Append a line of JSON for each guided request when it has ended (- for stdout): ids, version, "
        "parameters, tokens, KL and what came of it; no prompts, no answers.",
    )
    group.add_argument(
        "--guidance-plan",
        type=float,
        metavar="GIB",
        help="Print how a GPU's memory of so many GiB would be shared out, and end. Needs no GPU and no weights.",
    )


def _parse_value_models(entries: list[str]) -> dict[str, Path]:
    value_models: dict[str, Path] = {}
    for entry in entries:
        name, equals, directory = entry.partition("=")
        _require(bool(equals and directory), f"--value-model {entry}: expected NAME=DIR")
        _require(
            re.match(VALUE_MODEL_NAME, name) is not None,
            f"--value-model {entry}: a name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit",
        )
        _require(name not in value_models, f"--value-model {entry}: the name {name} is given twice")
        value_models[name] = Path(directory).resolve()
    return value_models


def _tokens(text: str) -> int | str:
    """Of --guidance-kv-tokens."""
    if text == "auto":
        return text
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected auto or a number of at least 1, got {text!r}")
    return number


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise StartupError(message)
