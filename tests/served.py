"""A small real server: OpenAI's completions protocol over a tiny causal model, with prompt log-probabilities and faults."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

KEY = "sk-tiny-secret"


class Served:
    """What the server does next: `ways` it has (`prompt_logprobs`, `echo`), and `faults` (status, headers) it begins with."""

    def __init__(self, model: Any, tokenizer: Any, name: str = "tiny"):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.ways = {"prompt_logprobs", "echo"}
        self.faults: list[tuple[int, dict[str, str]]] = []
        self.shift = 0  # a server with another tokenizer calls its tokens otherwise
        self.asked: list[dict[str, Any]] = []
        self.refused = 0
        self.lock = threading.Lock()

    def answer(self, request: dict[str, Any], key: str) -> tuple[int, dict[str, str], dict[str, Any]]:
        if self.faults:
            self.refused += 1
            status, headers = self.faults.pop(0)
            return status, headers, {"error": {"message": "not now", "type": "x", "code": None, "param": None}}
        if key != f"Bearer {KEY}":
            return 401, {}, {"error": {"message": f"Incorrect API key provided: {key[7:]}", "code": "invalid_api_key"}}
        if request["model"] != self.name:
            return 404, {}, {"error": {"message": f"The model {request['model']} does not exist."}}
        self.asked.append(request)
        return (
            200,
            {},
            {"id": "1", "object": "text_completion", "created": 1, "model": self.name, "choices": [self.choice(request)]},
        )

    def choice(self, request: dict[str, Any]) -> dict[str, Any]:
        ids = request["prompt"]
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0].float()
        logprobs = logits.log_softmax(-1)
        written = int(logits[-1].argmax())
        told: dict[str, Any] = {"index": 0, "text": self.piece(written), "finish_reason": "length", "logprobs": None}
        values = [None, *(float(logprobs[t - 1, token]) for t, token in enumerate(ids) if t)]
        if "prompt_logprobs" in request and "prompt_logprobs" in self.ways:
            told["prompt_logprobs"] = [
                None if value is None else self.position(logprobs[t - 1], ids[t]) for t, value in enumerate(values)
            ]
        if request.get("echo") and "echo" in self.ways:
            told["text"] = "".join(self.piece(token) for token in [*ids, written])
            told["logprobs"] = {
                "tokens": [self.piece(token) for token in [*ids, written]],
                "token_logprobs": [*values, float(logprobs[-1, written])], "top_logprobs": None, "text_offset": None,
            }  # fmt: skip
        return told

    def position(self, logprobs: torch.Tensor, token: int) -> dict[str, Any]:
        """The prompt's own token and the likeliest one, by id."""
        return {
            str(n): {
                "logprob": float(logprobs[n]),
                "rank": int((logprobs > logprobs[n]).sum()) + 1,
                "decoded_token": self.piece(n),
            }
            for n in {token, int(logprobs.argmax())}
        }

    def piece(self, token: int) -> str:
        return str(self.tokenizer.decode([(token + self.shift) % len(self.tokenizer)]))


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """The address of a server that runs until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                status, headers, told = served.answer(request, self.headers.get("Authorization", ""))
            body = json.dumps(told).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
