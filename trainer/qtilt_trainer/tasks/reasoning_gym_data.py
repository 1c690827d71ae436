"""reasoning_gym's data sets as the task uses them: made, listed and scored. Imported only where the package is needed.

Also the worker that does it in a process that can be killed: `python -m qtilt_trainer.tasks.reasoning_gym_data`.

{"make": {dataset, parameters, seed, size, first, count}} -> [[question, gold or null, entry], ...]
{"score": {dataset, parameters, seed, size, entry, answer}} -> the score
Either may be answered by {"error": why}.
An entry is pickled, in base64: metadata can be any Python object. Only a worker ever unpickles it.
"""

import ast
import base64
import builtins
import functools
import inspect
import json
import pickle
import random
import re
from typing import Any

import sympy
from reasoning_gym.algorithmic import binary_matrix, spiral_matrix, string_insertion
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS, create_dataset
from reasoning_gym.games import countdown, n_queens, puzzle24

from qtilt_trainer.tasks.grading_worker import serve

READ_BY_EVAL = (binary_matrix, n_queens, spiral_matrix, string_insertion)
"""Where score_answer reads a list in the model's answer by eval()."""
READ_BY_SYMPY = (sympy, countdown, puzzle24)
"""Where score_answer finds the parse_expr that reads the model's answer; that is eval() inside."""
HARMLESS = {"abs", "max", "min", "pow", "round", "sum"}
OF_PYTHON = {name for name, value in vars(builtins).items() if inspect.isbuiltin(value)} - HARMLESS
CODE = re.compile(rf"""["'\\]|__|\.\s*[^\W\d]|\blambda\b|\b(?:{"|".join(sorted(OF_PYTHON))})\b""")
"""What an expression doesn't have and a program needs: strings, attributes, Python's own functions."""


def main() -> None:
    """The worker."""
    treat_answers_as_data()
    serve("reasoning_gym", _reply)


def create(dataset: str, parameters: dict[str, Any], seed: int, size: int) -> Any:
    """A data set object. Raises ValueError for an unknown name and for what its configuration refuses."""
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {sorted(DATASETS)}, got {dataset!r}")
    fields = dict(parameters)
    try:
        if dataset == "composite":
            fields["datasets"] = [DatasetSpec(**one) for one in fields.get("datasets", [])]
        return create_dataset(dataset, seed=seed, size=size, **fields)
    except Exception as error:  # Its checks are asserts, TypeErrors and ValueErrors of another package.
        raise ValueError(f"reasoning_gym's {dataset} refuses the parameters {parameters}: {error}") from error


def treat_answers_as_data() -> None:
    """Keeps a model's answer from being run as a program.

    reasoning_gym 0.1.25 gives answers to eval() and to SymPy's parse_expr, of which SymPy's documentation says that it
    "uses eval, and thus shouldn't be used on unsanitized input". Here lists are read as literals, and an answer that
    has what only programs need is no expression.
    """
    for module in READ_BY_EVAL:
        vars(module)["eval"] = ast.literal_eval
    parse_expr = sympy.parse_expr

    def parse(text: str, *arguments: Any, **options: Any) -> Any:
        if CODE.search(text):
            raise ValueError(f"no expression: {text[:200]!r}")
        return parse_expr(text, *arguments, **options)

    for module in READ_BY_SYMPY:
        vars(module)["parse_expr"] = parse


def _reply(question: dict[str, Any]) -> Any:
    ((name, fields),) = question.items()
    try:
        return _make(**fields) if name == "make" else _score(**fields)
    except Exception as error:  # noqa: BLE001  # Process edge: who asked decides what a failure means.
        return {"error": f"{type(error).__name__}: {error}"}


def _make(dataset: str, parameters: dict[str, Any], seed: int, size: int, first: int, count: int) -> list[Any]:
    source = _cached(dataset, json.dumps(parameters), seed, size)
    made = []
    for index in range(first, min(first + count, len(source))):
        random.seed(seed + index)  # list_functions draws from the module's own generator.
        entry = source[index]
        made.append([entry["question"], entry["answer"], base64.b64encode(pickle.dumps(entry)).decode()])
    return made


def _score(dataset: str, parameters: dict[str, Any], seed: int, size: int, entry: str, answer: str | None) -> float:
    source = _cached(dataset, json.dumps(parameters), seed, size)
    return float(source.score_answer(answer, pickle.loads(base64.b64decode(entry))))


@functools.lru_cache(maxsize=8)
def _cached(dataset: str, parameters: str, seed: int, size: int) -> Any:
    random.seed(seed)
    return create(dataset, json.loads(parameters), seed, size)


if __name__ == "__main__":
    main()
