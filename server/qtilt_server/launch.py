"""Starts ``vllm serve`` with guidance: its environment, its arguments, and what it can't be combined with.

The ``vllm`` command can't be used for that: with the CPU wheel it fails on looking up its own version. Its serve
subcommand works, and brings every flag along.
"""

import argparse
import copy
from collections.abc import MutableMapping
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from qtilt.vllm_plugin.config import ADDITIONAL_CONFIG_KEY, PROCESSOR, WORKER_EXTENSION, PluginConfig
from qtilt.vllm_plugin.vllm_internals import SERVER, WORKER, MissingInternalsError, require_internals
from qtilt_server.errors import StartupError
from qtilt_server.flags import GuidanceFlags, add_guidance_arguments
from qtilt_server.remembered import check_unchanged, come_back

USAGE = "qtilt-server MODEL [--value-model NAME=DIR] [options of guidance and of vllm serve]"
HELP_HINT = "All flags: qtilt-server --help=all; those of one group or flag: qtilt-server --help=Guidance"
PLUGIN = "qtilt"
ENDPOINT_PLUGINS = "vllm.endpoint_plugins"
OTHER_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
COMPILED_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""How many matrix products compiled for CPUs oneDNN and torch keep: one per number of rows and shape of weights.

Their own 1024 each are some 750 MiB that no budget of memory counts (docs/performance.md).
"""
LAST_ANSWERS_S = 5
"""How long answers may still be sent after the engine has been stopped."""


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Before torch and vLLM are imported: have vLLM load our endpoints beside its other plugins, start its processes as
    its own command does, and bound caches.

    What the user has set stays.
    """
    if environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise StartupError("guidance needs vLLM's Python API server: unset VLLM_USE_RUST_FRONTEND")
    if environ.get("VLLM_SKIP_MODEL_NAME_VALIDATION", "0") not in ("", "0"):
        raise StartupError(
            "without a check of models' names other routes would answer for value models' names, and unguided: "
            "unset VLLM_SKIP_MODEL_NAME_VALIDATION"
        )
    if environ.get("PROMETHEUS_MULTIPROC_DIR"):
        raise StartupError("with files of several processes /metrics lacks guidance's: unset PROMETHEUS_MULTIPROC_DIR")
    environ["VLLM_PLUGINS"] = ",".join(_allowed_plugins(environ.get("VLLM_PLUGINS")))
    environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    for name, capacity in COMPILED_PRODUCTS.items():
        environ.setdefault(name, capacity)


def check_vllm() -> None:
    """Raise StartupError for a vLLM that lacks what guidance uses of it, before anything of it is imported."""
    try:
        require_internals([*WORKER, *SERVER])
    except MissingInternalsError as error:
        raise StartupError(str(error)) from error


def launch(argv: list[str]) -> None:
    """Parse the whole command line, refuse what can't work, and serve until interrupted, or print the plan."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    from qtilt_server.admin import hide_admin_key

    command = ServeSubcommand()
    args = _parse(command, argv)
    configure_logging_from_args(args)
    flags = come_back(GuidanceFlags.from_namespace(args))
    refuse_unsupported(args)
    try:
        command.validate(args)
    except (TypeError, ValueError) as error:
        raise StartupError(str(error)) from error
    if flags.plan is not None:
        from qtilt_server.plan import print_plan

        print_plan(args, plugin_config(flags), flags.plan)
        return
    check_unchanged(flags)
    hide_admin_key(args, flags.admin_key)
    add_guidance(args, flags)
    _check_against_model(args, flags)
    _refuse_speculation_on_v1(args)
    _bound_shutdown()
    command.cmd(args)


def refuse_unsupported(args: argparse.Namespace) -> None:
    """Raise StartupError for flags of vLLM that guidance can't work with."""
    reasons = {
        "guidance keeps its state in one API process: remove --api-server-count": (args.api_server_count or 1) != 1,
        "guidance is not available with data parallelism: run several servers behind a router, and remove the "
        "--data-parallel-* flags": args.data_parallel_size != 1 or args.data_parallel_rank is not None,
        "guidance is not available with pipeline parallelism: remove --pipeline-parallel-size": (
            args.pipeline_parallel_size != 1
        ),
        "guidance is served over HTTP: remove --headless": args.headless,
        "guidance is served over HTTP, not gRPC: remove --grpc": args.grpc,
        "guidance compares tokenizers and needs one: remove --skip-tokenizer-init": args.skip_tokenizer_init,
        "value models don't survive vLLM's sleep mode: remove --enable-sleep-mode": args.enable_sleep_mode,
        "vLLM takes one worker extension and guidance is it: remove --worker-extension-cls": bool(
            args.worker_extension_cls
        ),
        f"the key {ADDITIONAL_CONFIG_KEY!r} of --additional-config is guidance's own: remove it": (
            ADDITIONAL_CONFIG_KEY in (args.additional_config or {})
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise StartupError(reason)


def add_guidance(args: argparse.Namespace, flags: GuidanceFlags) -> None:
    """Tell vLLM about the processor, the worker extension and their settings, beside what the user told it."""
    config = plugin_config(flags)
    args.logits_processors = [*(args.logits_processors or []), PROCESSOR]
    args.worker_extension_cls = WORKER_EXTENSION
    args.additional_config = {**(args.additional_config or {}), ADDITIONAL_CONFIG_KEY: config.to_dict()}


def plugin_config(flags: GuidanceFlags) -> PluginConfig:
    """What the worker is told."""
    return PluginConfig(
        value_models={name: str(directory) for name, directory in flags.value_models.items()},
        versions={name: restored.version for name, restored in flags.restored.items()},
        max_top_k=flags.max_top_k,
        value_dtype=flags.value_dtype,
        kv_fraction=flags.kv_fraction,
        kv_tokens=flags.kv_tokens,
        backbone=flags.backbone,
        backbone_layers=flags.backbone_layers,
        behind_server=True,
    )


def _parse(command: Any, argv: list[str]) -> argparse.Namespace:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="qtilt-server", usage=USAGE)  # type: ignore[no-untyped-call]
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve.prog, serve.usage = parser.prog, USAGE
    serve.description, serve.epilog = "vLLM's OpenAI-compatible server, with guided completions.", HELP_HINT
    add_guidance_arguments(serve)
    args: argparse.Namespace = parser.parse_args([command.name, *argv])
    if args.model_tag is None:  # vLLM's parser turns --model and a model in --config into this one
        raise StartupError("name the model to serve: qtilt-server MODEL …")
    args.model = args.model_tag
    return args


def _allowed_plugins(current: str | None) -> list[str]:
    """vLLM loads endpoint plugins only if VLLM_PLUGINS names them, and then no other plugin that isn't named either.

    So what it would load without the variable must be named along with ours.
    """
    if current is not None:
        names = current.split(",")
    else:
        names = [entry.name for group in OTHER_PLUGIN_GROUPS for entry in entry_points(group=group)]
    return [*dict.fromkeys([*names, PLUGIN])]


def _check_against_model(args: argparse.Namespace, flags: GuidanceFlags) -> None:
    """Do the value models fit the reference? Asked here, before the engine starts, for the answer to be one line.

    The endpoint plugin asks again when the engine has settled on its maximum length.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    from qtilt_server.plan import check_plan
    from qtilt_server.reference import check_value_models, reference_of, try_value_models

    if not entry_points(group=ENDPOINT_PLUGINS, name=PLUGIN):
        raise StartupError("the entry point of qtilt is missing: install the package with pip")
    try:
        model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
        reference = reference_of(model_config)
    except (OSError, ValueError) as error:
        raise StartupError(f"{args.model}: {error}") from error
    if model_config.runner_type != "generate":
        raise StartupError(f"{args.model}: guidance steers generation and this is a {model_config.runner_type} model")
    check_value_models(flags.value_models, reference)
    check_plan(args, plugin_config(flags))
    try_value_models(flags.value_models, reference.max_model_len, model_config.model)


def _bound_shutdown() -> None:
    """Have a server that is told to stop end, and its clients know, while requests are under way.

    vLLM 0.32 stops the engine and then waits for all answers, for ever for those that the engine still owed
    (vllm-project/vllm#36964 is about it). What --shutdown-timeout lets finish has finished before that.
    """
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.launchers.launcher import serve_http

    entry.serve_http = partial(serve_http, timeout_graceful_shutdown=LAST_ANSWERS_S)  # type: ignore[attr-defined]


def _refuse_speculation_on_v1(args: argparse.Namespace) -> None:
    """Only Model Runner V2 tells a processor of drafts; which runner vLLM takes depends on all of its settings."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    if all(given is None for given in (args.speculative_config, args.spec_method, args.spec_model, args.spec_tokens)):
        return
    try:
        # A copy: vLLM completes the speculative configuration in place.
        config = AsyncEngineArgs.from_cli_args(copy.deepcopy(args)).create_engine_config()
    except (OSError, ValueError) as error:
        raise StartupError(str(error)) from error
    if not config.use_v2_model_runner:
        raise StartupError(
            "guidance needs vLLM's Model Runner V2 for speculative decoding, and vLLM takes V1 on this machine or with "
            "these settings: remove --speculative-config and --spec-*"
        )
