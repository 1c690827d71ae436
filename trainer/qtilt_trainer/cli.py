"""The command `qtilt-trainer`. Parses everything first; torch, transformers and the rest are imported after that."""

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from qtilt_trainer.config import LoopConfig
    from qtilt_trainer.loop import Run

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
BAD_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
HELP_WIDTH = 100
"""Fixed, so that docs/trainer-cli.md doesn't depend on the terminal it was made in."""

DESCRIPTION = "Trains value models that guide a model served by qtilt-server. Talks to the server over HTTP only."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failure outside, 2 for bad input, 130 when interrupted."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("qtilt_trainer").setLevel(logging.INFO)
    from qtilt_trainer.server_errors import ServerError
    from qtilt_trainer.tasks.grading import GradingError

    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except (ValueError, OSError, ServerError, GradingError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"qtilt-trainer: {_one_line(error)}\n")
        return BAD_INPUT if isinstance(error, (ValueError, *BAD_PATH)) else FAILED
    except KeyboardInterrupt:
        sys.stderr.write("qtilt-trainer: interrupted; the same command goes on from here\n")
        return INTERRUPTED
    return 0


class OneLineParser(argparse.ArgumentParser):
    """argparse prints the usage before an error; ours are one line. Sub-commands take the class over."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    formatter = functools.partial(argparse.HelpFormatter, width=HELP_WIDTH, max_help_position=30)
    parser = OneLineParser("qtilt-trainer", description=DESCRIPTION, formatter_class=formatter)
    parser.add_argument(
        "--debug", action="store_true", help="show a traceback instead of one line when a command fails"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        command.set_defaults(command=function)
        return command

    _init_options(add("init", _init, "make a value model from a backbone"))
    for name, function, text in (
        ("collect", _collect, "collect the roll-outs of one iteration that are missing"),
        ("fit", _fit, "fit the value model of one iteration on all roll-outs up to it"),
        ("publish", _publish, "have the server load the value model of one iteration, unless it has it"),
        ("evaluate", _evaluate, "measure accuracy and KL over the grid of [evaluate]"),
    ):
        command = add(name, function, text)
        _config_options(command)
        command.add_argument(
            "--iteration", type=int, metavar="N", help="from 1; default: the last of the configuration"
        )
        if name == "collect":
            _retry_option(command)
    regrade = add("regrade", _regrade, "grade the stored completions anew, after a change of the data or the rewards")
    _config_options(regrade)
    regrade.add_argument("--iteration", type=int, metavar="N", help="from 1; default: all, and the evaluated reference")
    loop = add("loop", _loop, "collect, fit and publish for all iterations, then evaluate and report; resumes")
    _config_options(loop)
    _retry_option(loop)
    _report_options(add("report", _report, "write the HTML page and the plots of finished runs"))
    return parser


def _init_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", required=True, metavar="DIR|HUB_ID", help="pre-trained model to start from")
    parser.add_argument("--layers", type=int, metavar="N", help="take its first N decoder layers only (default: all)")
    parser.add_argument(
        "--low-rank",
        type=int,
        metavar="R",
        help="fit an update of rank R and keep the rest as it is (default: fit all)",
    )
    parser.add_argument("--adapter", metavar="NAME", help="LoRA adapter of the reference that is steered")
    parser.add_argument("--type", required=True, choices=("q", "v"), help="q: one output a token; v: value of a state")
    parser.add_argument("--distribution", required=True, choices=("bernoulli", "categorical"), help="of the return")
    parser.add_argument("--atoms", type=int, default=11, help="categorical: number of atoms (default: %(default)s)")
    parser.add_argument("--low", type=float, default=0.0, help="categorical: lowest return (default: %(default)s)")
    parser.add_argument("--high", type=float, default=1.0, help="categorical: highest return (default: %(default)s)")
    parser.add_argument(
        "--head-std",
        type=float,
        default=0.0,
        help="standard deviation of the new head's weights (default: %(default)s)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write; must not exist")


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="the run's configuration")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="in place of the configuration's run_dir")
    parser.add_argument("--server", metavar="URL", help="in place of the configuration's server.url")


def _retry_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--retry-refused", action="store_true", help="ask prompts again that the server has refused")


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="run directories of finished loops")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the first RUN_DIR)")


def _init(options: argparse.Namespace) -> None:
    from qtilt_trainer.config import ValueModelConfig, checked
    from qtilt_trainer.initialise import initialise_value_model
    from qtilt_trainer.loop import distribution_of

    names = ("backbone", "layers", "low_rank", "adapter", "type", "distribution", "atoms", "low", "high", "head_std")
    config = checked(ValueModelConfig, {name: getattr(options, name) for name in names}, "init")
    initialise_value_model(
        config.backbone,
        config.type,
        distribution_of(config),
        options.out,
        config.head_std,
        layers=config.layers,
        low_rank=config.low_rank,
        adapter=config.adapter,
    )


def _collect(options: argparse.Namespace) -> None:
    def collect(run: "Run") -> None:
        if options.retry_refused:
            run.retry_refused()
        run.collect(_iteration(options, run))

    _with_run(options, collect)


def _regrade(options: argparse.Namespace) -> None:
    def regrade(run: "Run") -> None:
        run.regrade(None if options.iteration is None else _iteration(options, run))

    _with_run(options, regrade)


def _fit(options: argparse.Namespace) -> None:
    _with_run(options, lambda run: run.fit(_iteration(options, run)))


def _publish(options: argparse.Namespace) -> None:
    _with_run(options, lambda run: _say(run.publish(_iteration(options, run))))


def _evaluate(options: argparse.Namespace) -> None:
    from qtilt_trainer.result_table import result_table

    _with_run(options, lambda run: _say(result_table(run.evaluate(_iteration(options, run)))))


def _loop(options: argparse.Namespace) -> None:
    from qtilt_trainer.result_table import result_table

    def run_all(run: "Run") -> None:
        if options.retry_refused:
            run.retry_refused()
        records = run.loop()
        if records:
            _say(result_table(records))

    _with_run(options, run_all)


def _report(options: argparse.Namespace) -> None:
    from qtilt_trainer.report import write_report

    _say(write_report(options.run_dirs, options.out or options.run_dirs[0]))


def _with_run(options: argparse.Namespace, action: "Callable[[Run], None]") -> None:
    from qtilt_trainer.config import read_config
    from qtilt_trainer.loop import Run
    from qtilt_trainer.run_lock import run_lock

    config: LoopConfig = read_config(options.config, {"run_dir": options.run_dir, "server.url": options.server})
    run = Run(config)
    with run_lock(config.run_dir):
        action(run)


def _iteration(options: argparse.Namespace, run: "Run") -> int:
    last = len(run.config.iterations)
    iteration: int = last if options.iteration is None else options.iteration
    if not 1 <= iteration <= last:
        raise ValueError(f"--iteration must be 1 to {last}, got {iteration}")
    return iteration


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")


def _one_line(error: BaseException) -> str:
    from qtilt_trainer.redaction import without_url_secrets

    return without_url_secrets(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
