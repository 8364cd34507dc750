"""Rewards over HTTP: a real server of `orwcfm rewards serve`'s application, its client, and what strangers send."""

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import urllib3

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.rewards import make_reward, remote, wire
from orwcfm_fast.rewards.server import is_loopback, make_app
from orwcfm_fast.settings import RewardOptions

TOKEN = "a token"
HEADERS = {"Content-Type": wire.TYPE, "Authorization": f"Bearer {TOKEN}"}


def by_prompt(samples, prompts=None, metadata=None):
    """The sum, and what came along: 100 for a letter of the prompt, 1000 for metadata's "k"."""
    total = samples.flatten(1).sum(1)
    if prompts:
        total = total + 100 * torch.tensor([len(text) for text in prompts])
    if metadata:
        total = total + 1000 * torch.tensor([values.get("k", 0) for values in metadata])
    return total


@pytest.fixture
def serving(monkeypatch):
    """serving(function, **of make_app) → the URL of a real server, with a token."""
    import uvicorn

    monkeypatch.setenv(remote.TOKEN, TOKEN)
    servers = []

    def start(function, **how):
        app = make_app(function, "mine", TOKEN, **how)
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def test_scores_are_those_of_the_function_in_parts_at_once_and_in_order(serving, monkeypatch):
    reward = make_reward(serving(by_prompt))
    x = torch.randn(41, 3, 4, 5)
    prompts = [Prompt("x" * (k % 7), metadata={"k": k}) for k in range(41)]
    expected = by_prompt(x, [p.text for p in prompts], [p.metadata for p in prompts])
    assert torch.allclose(reward.scores(x, prompts=prompts).total, expected, atol=1e-3)
    monkeypatch.setattr(remote, "PART", 3 * 4 * 60)  # three samples a request
    assert torch.allclose(reward.scores(x, prompts=prompts).total, expected, atol=1e-3)
    assert torch.allclose(reward(x), x.flatten(1).sum(1), atol=1e-4)
    reward.close()


def test_random_numbers_of_a_served_function_are_the_same_again(serving):
    reward = make_reward(serving(lambda samples: torch.rand(len(samples))))
    x = torch.zeros(5, 2)
    first, again, other = (reward.scores(x, seed=s).total for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def raises(samples):
    raise KeyError("weights")


def nan(samples):
    return samples.flatten(1).sum(1) * torch.nan


def too_few(samples):
    return samples.flatten(1).sum(1)[1:]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"HTTP 422 \(reward mine: KeyError: 'weights'"),
        (nan, r"HTTP 422 \(reward mine: 4 of 4 values are NaN\)"),
        (too_few, r"HTTP 422 \(reward mine: returned shape \(3,\), should be \(4,\)"),
    ],
)
def test_a_function_that_fails_is_one_line_with_its_reason(serving, function, message):
    reward = make_reward(serving(function))
    with pytest.raises(RewardError, match=message) as error:
        reward.scores(torch.ones(4, 2), "round 2")
    assert "\n" not in str(error.value) and "round 2" in str(error.value)


def test_a_server_that_runs_out_of_memory_is_asked_for_less(serving):
    def narrow(samples):
        if len(samples) > 10:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return samples.flatten(1).sum(1)

    reward = make_reward(serving(narrow))
    x = torch.randn(32, 2)
    assert torch.allclose(reward(x), x.sum(1), atol=1e-5) and reward.sizes.reward_batch == 8


def packed(header, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(dtype="F32", shape=(2, 1), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def noted(**notes) -> bytes:
    return packed({"__metadata__": notes, "samples": tensor()}, bytes(8))


GOOD = packed({"samples": tensor()}, bytes(8))
BODIES = {
    "empty": b"", "one byte": b"\0", "seven bytes": b"\x01" * 7, "zeros": bytes(64), "ones": b"\xff" * 64,
    "text": b"hello, world, this is no file", "html": b"<html>" + b"x" * 90, "json": b'{"samples": [[0.0], [1.0]]}',
    "pickle": pickle.dumps({"samples": [0.0] * 9}), "npy": b"\x93NUMPY\x01\x00" + bytes(90),
    "zip": b"PK\x03\x04" + bytes(90), "gzip": b"\x1f\x8b\x08" + bytes(90),
    "header of 2^63 bytes": packed({}, size=2**63), "of 2^64 - 1": packed({}, size=2**64 - 1),
    "longer than the body": packed({}, size=1000), "of no bytes": packed(b"", bytes(8)),
    "no JSON": packed(b"{samples", bytes(8)), "no UTF-8": packed(b"\xff\xfe\xfd{}", bytes(8)),
    "a list": packed([1, 2], bytes(8)), "a number": packed(12345678, bytes(8)), "null": packed(None, bytes(8)),
    "deep": packed(b"[" * 100_000, bytes(8)), "deep object": packed(b'{"a":' * 50_000, bytes(8)),
    "no tensor": packed({}), "another tensor": packed({"x": tensor()}, bytes(8)),
    "two tensors": packed({"samples": tensor(), "x": tensor(offsets=(8, 16))}, bytes(16)),
    "whole numbers": packed({"samples": tensor("I64", offsets=(0, 16))}, bytes(16)),
    "booleans": packed({"samples": tensor("BOOL", offsets=(0, 2))}, bytes(2)),
    "unknown type": packed({"samples": tensor("F7")}, bytes(8)),
    "scalar": packed({"samples": tensor(shape=(), offsets=(0, 4))}, bytes(4)),
    "no samples": packed({"samples": tensor(shape=(0, 3), offsets=(0, 0))}),
    "huge and empty": packed({"samples": tensor(shape=(2**40, 0), offsets=(0, 0))}),
    "overflowing shape": packed({"samples": tensor(shape=(2**40, 2**40))}, bytes(8)),
    "negative shape": packed({"samples": tensor(shape=(-2, -1))}, bytes(8)),
    "wrong size": packed({"samples": tensor(shape=(3, 1))}, bytes(8)),
    "past the end": packed({"samples": tensor(offsets=(0, 80))}, bytes(8)),
    "backwards": packed({"samples": tensor(offsets=(8, 0))}, bytes(8)),
    "negative offsets": packed({"samples": tensor(offsets=(-8, 0))}, bytes(8)),
    "cut off": GOOD[:-1], "with a tail": GOOD + b"tail",
    "prompts no JSON": noted(prompts="a cat"), "too few prompts": noted(prompts='["a"]'),
    "prompts of numbers": noted(prompts="[1, 2]"), "prompts as object": noted(prompts='{"a": 1}'),
    "metadata of texts": noted(metadata='["a", "b"]'), "metadata too many": noted(metadata="[{}, {}, {}]"),
    "deep metadata": noted(metadata="[" * 50_000), "notes no text": packed(
        {"__metadata__": {"prompts": 5}, "samples": tensor()}, bytes(8)),
}  # fmt: skip


def test_hostile_bodies_are_refused_in_one_line_and_the_server_goes_on(serving):
    url, calls = serving(lambda samples: torch.zeros(len(samples)), max_bytes=1 << 20), urllib3.PoolManager()
    assert len(BODIES) >= 40
    for name, body in BODIES.items():
        answer = calls.request("POST", url, body=body, headers=HEADERS, retries=False)
        assert answer.status == 400 and answer.data.count(b"\n") == 1, (name, answer.status, answer.data)
    assert calls.request("POST", url, body=GOOD, headers=HEADERS).status == 200


@pytest.mark.parametrize(
    ("change", "method", "body", "status"),
    [
        ({"Authorization": ""}, "POST", GOOD, 401),
        ({"Authorization": "Bearer another"}, "POST", GOOD, 401),
        ({"Authorization": "a token"}, "POST", GOOD, 401),
        ({"Authorization": ""}, "GET", None, 401),
        ({"Content-Type": "text/plain"}, "POST", GOOD, 415),
        ({}, "POST", bytes(3 << 20), 413),
        ({}, "POST", iter([bytes(1 << 19)] * 5), 413),  # in pieces, of no declared length
        ({}, "DELETE", None, 405),
    ],
)
def test_tokens_types_and_sizes_are_checked(serving, change, method, body, status):
    url = serving(lambda samples: torch.zeros(len(samples)), max_bytes=1 << 20)
    try:
        answer = urllib3.request(method, url, body=body, headers=HEADERS | change, retries=False)
    except urllib3.exceptions.ProtocolError:  # it hung up on the rest of the body
        assert status == 413
    else:
        assert answer.status == status, answer.data


@pytest.fixture
def other(monkeypatch):
    """A server that answers `plan`, then `answer`: (status, bytes) each."""
    monkeypatch.setattr(remote, "RETRIES", 3)

    class Handler(BaseHTTPRequestHandler):
        def reply(self, answer):
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        def do_GET(self):
            self.reply(server.greeting)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            server.calls += 1
            self.reply(server.plan.pop(0) if server.plan else server.answer)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.plan, server.calls, server.daemon_threads, server.greeting = [], 0, True, (405, b"")
    server.answer = (200, wire.pack("scores", torch.tensor([1.0, 2.0]), {}))
    server.url = f"http://127.0.0.1:{server.server_port}/score"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_failures_are_repeated(other):
    other.plan = [(503, b""), (500, b""), (429, b"")]
    assert make_reward(other.url)(torch.zeros(2, 1)).tolist() == [1.0, 2.0] and other.calls == 4


@pytest.mark.parametrize(
    ("answer", "message", "calls"),
    [
        ((500, b"CUDA error\ntrace"), r"HTTP 500 \(CUDA error\)", 4),
        ((429, b""), "HTTP 429", 4),
        ((502, b"<html>Bad Gateway</html>"), "HTTP 502$", 4),
        ((200, b"<html>welcome</html>"), "the answer is not a safetensors file", 1),
        ((200, b"[1.0, 2.0]"), "the answer is not a safetensors file", 1),
        ((302, b""), "HTTP 302", 1),
        ((200, wire.pack("scores", torch.ones(3), {})), r"returned shape \(3,\), should be \(2,\)", 1),
        ((200, wire.pack("scores", torch.tensor([1.0, torch.nan]), {})), "1 of 2 values are NaN", 1),
        ((200, wire.pack("rewards", torch.ones(2), {})), "should hold one tensor 'scores'", 1),
        ((200, bytes(2 << 20)), "the answer is over", 1),
    ],
)
def test_another_answer_is_one_line(other, answer, message, calls):
    other.answer = answer
    with pytest.raises(RewardError, match=message) as error:
        make_reward(other.url)(torch.zeros(2, 1))
    assert "\n" not in str(error.value) and other.calls == calls


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http", "write the server's URL, e.g. http://127.0.0.1:8400"),
        ("http:127.0.0.1:8400", "write the server's URL"),
        ("http://me:secret@host/", "write the server's URL"),
        ("http://127.0.0.1:9", "no answer in 1 attempts (Connection refused)"),
    ],
)
def test_what_http_cannot_use_is_one_line(monkeypatch, spec, message):
    monkeypatch.setattr(remote, "RETRIES", 0)
    with pytest.raises(UserError) as error:
        make_reward(spec)
    assert message in str(error.value).replace("[Errno 111] ", "") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "set ORWCFM_REWARD_TOKEN"), (404, "HTTP 404 (no such page)")]
)
def test_a_server_that_refuses_ends_the_command_before_it_begins(other, run_cli, tiny_run, status, message):
    other.greeting = (status, b"no such page\n")
    result = run_cli("finetune", "--checkpoint", "base", "--reward", other.url, "--out", "o")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert not os.path.exists("o")


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("far", False)],
)
def test_which_addresses_are_loopback(host, alone):
    assert is_loopback(host) is alone


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("far.py:f", "--host", "0.0.0.0"),
            "other machines can reach it; set ORWCFM_REWARD_TOKEN to a token",
        ),
        (("gone.py:f",), "no file gone.py"),
        (("far.py:g",), "has no function 'g' (has: f)"),
        (("brightnes",), "did you mean 'brightness'?"),
        (("far.py:f", "--port", 1 << 17), "port = 131072"),
    ],
)
def test_what_cannot_be_served_is_one_line(run_cli, monkeypatch, args, message):
    monkeypatch.delenv(remote.TOKEN, raising=False)
    Path("far.py").write_text("def f(x):\n    return x.flatten(1).sum(1)\n")
    result = run_cli("rewards", "serve", *args)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err


def test_a_port_in_use_is_one_line(run_cli, other):
    Path("far.py").write_text("def f(x):\n    return x.flatten(1).sum(1)\n")
    result = run_cli("rewards", "serve", "far.py:f", "--port", other.server_port)
    assert result.code == 2 and "Address already in use" in result.err


def test_the_command_serves_a_file_until_it_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.delenv(remote.TOKEN, raising=False)
    (tmp_path / "far.py").write_text("def f(samples):\n    return samples.flatten(1).sum(1)\n")
    command = [sys.executable, "-m", "orwcfm_fast.cli", "rewards", "serve", "far.py:f", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("reward far.py:f at http://127.0.0.1:")
            x = torch.randn(6, 3)
            assert torch.allclose(make_reward(line.split()[-1])(x), x.sum(1), atol=1e-5)
        finally:
            server.terminate()
        assert server.wait(60) in (143, -15)


@pytest.mark.soak
def test_ten_thousand_requests_at_64_in_flight_lose_and_exchange_nothing(serving, monkeypatch):
    """Each request carries its own number; the answer must be of that one."""
    monkeypatch.setattr(remote, "PART", 1)
    url = serving(lambda samples: samples.flatten(1).double().sum(1))
    reward = make_reward(url, RewardOptions(reward_requests=64))
    x = torch.stack([torch.arange(10_000.0), torch.full((10_000,), 0.5)], 1)
    began = time.monotonic()
    found = reward(x)
    seconds = time.monotonic() - began
    print(f"10,000 requests in {seconds:.0f} s")
    assert torch.equal(found, x.sum(1))
    with ThreadPoolExecutor(4) as pool:  # and several clients at once
        parts = list(pool.map(make_reward(url).terms[0][2], x[:400].split(100)))
    assert torch.equal(torch.cat(parts).float(), x[:400].sum(1))
