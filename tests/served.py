"""Small real servers: OpenAI's completions protocol over a tiny causal model, with faults.

`Served` tells log-probabilities of prompts. `ServedMarks` writes as well, and tells log-probabilities of what it writes.
"""

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


OPENAI = {"model", "prompt", "max_tokens", "temperature", "top_p", "logprobs", "seed", "echo"}


class ServedMarks(Served):
    """Writes greedily and tells log-probabilities of what it wrote.

    Attributes:
        can: `ids` (prompts as ids), `extended` (fields beyond OpenAI's, else refused), `marks` (`logprob_token_ids`, else
            left out silently), `told` (any log-probabilities at all), `named` (ids in the reply), `content` (llama.cpp's form).
        most: the largest `logprobs`. `never`: ids whose probability is 0.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "tiny"):
        super().__init__(model, tokenizer, name)
        self.can = {"ids", "extended", "marks", "told", "named"}
        self.most, self.never = 20, set[int]()

    def answer(self, request: dict[str, Any], key: str) -> tuple[int, dict[str, str], dict[str, Any]]:
        wrong = self._wrong(request) if not self.faults and key == f"Bearer {KEY}" else None
        return (400, {}, {"error": {"message": wrong}}) if wrong else super().answer(request, key)

    def _wrong(self, request: dict[str, Any]) -> str | None:
        if isinstance(request["prompt"], list) and "ids" not in self.can:
            return "prompt must be a string"
        if set(request) - OPENAI and "extended" not in self.can:
            return f"unrecognised fields {sorted(set(request) - OPENAI)}"
        return f"logprobs is at most {self.most}" if (request.get("logprobs") or 0) > self.most else None

    def choice(self, request: dict[str, Any]) -> dict[str, Any]:
        if {"prompt_logprobs", "echo"} & set(request):
            return super().choice(request)
        prompt = request["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        rows = self.written(list(ids), request)
        ended = rows[-1][0] in self.ends(request)
        told = {"index": 0, "text": "", "finish_reason": "stop" if ended else "length", "logprobs": None}
        if "told" not in self.can:
            return told
        if "content" in self.can:
            return {**told, "logprobs": {"content": [self.content(*row) for row in rows]}}
        spelt = "named" not in self.can or not request.get("return_tokens_as_token_ids")
        call = self.piece if spelt else "token_id:{}".format
        told["logprobs"] = {
            "tokens": [call(token) for token, _, _ in rows], "token_logprobs": [self.number(own) for _, own, _ in rows],
            "top_logprobs": [{call(token): self.number(value) for token, value in tops.items()} for _, _, tops in rows],
            "text_offset": None,
        }  # fmt: skip
        return told | ({"token_ids": [token for token, _, _ in rows]} if request.get("return_token_ids") and not spelt else {})

    def written(self, ids: list[int], request: dict[str, Any]) -> list[tuple[int, float, dict[int, float]]]:
        rows = []
        for _ in range(request["max_tokens"]):
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            logits[list(self.never)] = -torch.inf
            logprobs = logits.log_softmax(-1)
            token = int(logprobs.argmax())
            listed = request.get("logprob_token_ids") if "marks" in self.can else None
            tops = listed or logprobs.topk(request["logprobs"]).indices.tolist()
            rows.append((token, float(logprobs[token]), {one: float(logprobs[one]) for one in [token, *tops]}))
            ids = [*ids, token]
            if token in self.ends(request):
                break
        return rows

    def ends(self, request: dict[str, Any]) -> set[int]:
        return {self.model.config.eos_token_id, *(request.get("stop_token_ids") or ())}

    def content(self, token: int, own: float, tops: dict[int, float]) -> dict[str, Any]:
        every = [{"id": one, "token": self.piece(one), "logprob": self.number(value)} for one, value in tops.items()]
        return {"id": token, "token": self.piece(token), "logprob": self.number(own), "top_logprobs": every}

    def piece(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens((token + self.shift) % len(self.tokenizer))).replace("▁", " ")

    @staticmethod
    def number(value: float) -> float:
        return max(value, -9999.0)


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
