"""Answers star-graph prompts from the request's seed alone: the same request gets the same tokens at any time."""

import json
import random
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedTokenizerFast

from star_graph import StarGraph
from tiny_reference import build_tokenizer

MODEL = "stand-in"
CONTEXT = 64


class StandInServer:
    """Runs in a thread of the test. `before(path, body)` is called before a request is answered.

    It may return a (status, JSON) pair to be answered instead, or None. `choice(body, choice)` may change a choice
    before its tokens count as guided.
    """

    def __init__(self, value_model_root: Path | None = None) -> None:
        self.value_model_root = value_model_root
        self.before: Callable[[str, Any], tuple[int, Any] | None] = lambda path, body: None
        self.choice: Callable[[Any, dict[str, Any]], object] = lambda body, choice: None
        self.mass: Callable[[int], float] = lambda guided: 0.75
        self.tail: Callable[[Any], str] = lambda body: "floor"
        """The default, of a request."""
        self.requests: list[tuple[str, Any]] = []
        self.versions: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.tokenizer = make_tokenizer()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def bodies(self, path: str) -> list[Any]:
        with self.lock:
            return [body for asked, body in self.requests if asked == path]

    def restart(self) -> None:
        """Forgets all versions, as a restarted server does."""
        self.versions.clear()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.requests.append((path, body))
        replaced = self.before(path, body)
        if replaced is not None:
            return replaced
        return 200, {
            "/v1/models": self._models,
            "/v1/guidance": self._status,
            "/v1/guidance/value_models": self._publish,
            "/v1/completions": self._complete,
            "/tokenize": self._tokenize,
            "/health": lambda body: {},
        }[path](body)

    def _models(self, body: Any) -> Any:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "test", "max_model_len": CONTEXT}
        return {"object": "list", "data": [model]}

    def _tokenize(self, body: Any) -> Any:
        return {"count": len(self.tokenizer(body["prompt"])["input_ids"]), "max_model_len": CONTEXT}

    def _status(self, body: Any) -> Any:
        newest = self.versions[-1]["version"] if self.versions else 0
        models = [{"name": "value", "active": newest, "versions": self.versions}]
        root = None if self.value_model_root is None else str(self.value_model_root)
        return {"value_models": models if self.versions else [], "value_model_root": root}

    def _publish(self, body: Any) -> Any:
        with self.lock:
            version = {"version": len(self.versions) + 1, "path": body["path"]}
            self.versions.append(version)
        return {"name": body["name"], **version}

    def _complete(self, body: Any) -> Any:
        prompt_token_ids = self.tokenizer(body["prompt"])["input_ids"]
        choices = [self._choice(body, index, prompt_token_ids) for index in range(body.get("n") or 1)]
        answer = {"id": "x", "object": "text_completion", "created": 0, "model": MODEL, "choices": choices}
        if body.get("guidance") is not None:
            answer["guidance"] = {key: body["guidance"][key] for key in ("value_model", "eta", "top_k", "method")}
            answer["guidance"]["tail"] = body["guidance"].get("tail", self.tail(body))
        return answer

    def _choice(self, body: Any, index: int, prompt_token_ids: list[int]) -> Any:
        rng = random.Random(f"{body['prompt']}/{body['seed'] + index}")
        text = walk(body["prompt"], right=rng.random() < 0.5)
        token_ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        choice = {
            "index": index,
            "text": text,
            "finish_reason": "stop",
            "logprobs": None,
            "stop_reason": None,
            "token_ids": token_ids,
            "prompt_token_ids": prompt_token_ids,
        }
        self.choice(body, choice)
        if body.get("guidance") is not None:
            g = body["guidance"]["guided_tokens"]
            guided = len(token_ids) if g is None else min(g, len(token_ids))
            choice["guidance"] = {
                "guided_tokens": guided,
                "kl": 0.25 * guided,
                "kl_candidates": 0.125 * guided,
                "mass": self.mass(guided) if guided else None,
            }
        return choice


def make_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(StarGraph().alphabet)


def walk(prompt: str, right: bool) -> str:
    """The path the prompt asks for, or the one along another arm."""
    edges, ends = prompt.rstrip(">").split("/")
    following = {second: first for first, second in edges.split("|")}
    leaves = [second for second in following if second not in following.values()]
    goal = ends[1] if right else next(leaf for leaf in leaves if leaf != ends[1])
    path = [goal]
    while path[-1] in following:
        path.append(following[path[-1]])
    return "".join(reversed(path))


def _handler(server: StandInServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            data = self.rfile.read(length := int(self.headers["Content-Length"]))
            if len(data) == length:  # Less when the client was killed while it wrote.
                self._answer(json.loads(data))

        def _answer(self, body: Any) -> None:
            status, value = server.answer(self.path, body)
            data = json.dumps(value).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except ConnectionError:
                self.close_connection = True  # The client was killed.

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
