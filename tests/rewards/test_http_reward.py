"""The documented HTTP reward against a real server: retries, timeouts, and what the user sees."""

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from orwcfm_fast.errors import RewardError
from orwcfm_fast.rewards import make_reward

FILE = Path(__file__).parents[2] / "docs" / "http_reward.py"


@pytest.fixture
def server(monkeypatch):
    """A server that scores by the sum; `server.plan` holds the status of each coming answer (0: no answer)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            samples = np.load(io.BytesIO(self.rfile.read(int(self.headers["Content-Length"]))))
            status = server.plan.pop(0) if server.plan else 200
            server.calls += 1
            if status == 0:
                server.over.wait(60)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(samples.reshape(len(samples), -1).sum(1).tolist()).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.plan, server.calls, server.daemon_threads = [], 0, True
    server.over = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{server.server_port}/score")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def test_scores_come_over_http_after_failures_and_a_silent_answer(server):
    x = torch.randn(6, 3, 4, 4)
    reward = make_reward(f"{FILE}:score")
    server.plan = [503, 500]
    assert torch.allclose(reward(x), x.flatten(1).sum(1), atol=1e-4) and server.calls == 3
    server.plan = [0]
    short = make_reward(lambda x: reward.terms[0][2](x, timeout=4))
    assert torch.allclose(short(x), x.flatten(1).sum(1), atol=1e-4) and server.calls == 5


def test_a_server_that_stays_broken_or_refuses_is_one_line(server):
    reward = make_reward(f"{FILE}:score")
    server.plan = [404]
    with pytest.raises(RewardError, match=r"http_reward.py:score, round 2: HTTPError: HTTP Error 404"):
        reward.scores(torch.zeros(2, 1), "round 2")
    assert server.calls == 1, "what the server refuses is not asked again"


def test_no_server_at_all_is_one_line(monkeypatch):
    monkeypatch.setenv("REWARD_URL", "http://127.0.0.1:9/score")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    reward = make_reward(f"{FILE}:score")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(RewardError, match="Connection refused") as error:
        reward.scores(torch.zeros(2, 1), "round 1")
    assert "\n" not in str(error.value)
