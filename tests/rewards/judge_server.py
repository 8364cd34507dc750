"""A local HTTP server with OpenAI's interface, which judges how bright a picture is."""

import base64
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def chat(text: str, top: dict[str, float] | None = None) -> dict:
    """A chat completion as vLLM answers it; `top`: probabilities of the first token."""
    choice: dict = {
        "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, "logprobs": None,
    }  # fmt: skip
    if top:
        tokens = [{"token": k, "logprob": math.log(p), "bytes": None} for k, p in top.items()]
        choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens}]}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "eye", "choices": [choice]}


def level(request: dict) -> float:
    """Mean of the picture that a request carries, in [0, 1]."""
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    png = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return float(np.asarray(Image.open(io.BytesIO(png))).mean() / 255)


class Judge(ThreadingHTTPServer):
    """`answer(request)` → a JSON value, or (status, bytes); `plan`: those of the coming requests, before it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.requests, self.busy, self.most = [], [], 0, 0
        self.models = {
            "object": "list",
            "data": [{"id": "eye", "object": "model", "created": 1, "owned_by": "t"}],
        }
        self.lock = threading.Lock()
        self.answer = lambda request: chat("Yes", {"Yes": level(request), " no": 1 - level(request)})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def reply(self, answer):
        status, body = answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode())
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "application/json")
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(self.server.models)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
            self.server.requests.append((time.monotonic(), request, self.headers["Authorization"]))
            planned = self.server.plan.pop(0) if self.server.plan else None
        time.sleep(0.01)
        answer = planned or self.server.answer(request)
        with self.server.lock:
            self.server.busy -= 1
        self.reply(answer)

    def log_message(self, *args):
        pass
