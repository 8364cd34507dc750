"""A reward function as a server: `orwcfm rewards serve FILE.py:FUNCTION`, an ASGI application of Starlette's."""

import asyncio
import hmac
import ipaddress
import os
import socket
from typing import Any

import torch

from orwcfm_fast.device import out_of_memory
from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.rewards import wire
from orwcfm_fast.rewards.combine import make_reward
from orwcfm_fast.rewards.library import library
from orwcfm_fast.rewards.registry import Reward
from orwcfm_fast.rewards.remote import TOKEN
from orwcfm_fast.rewards.scoring import score
from orwcfm_fast.settings import Serve


class Refused(Exception):
    """A request that is not answered with scores.

    Args:
        status: of HTTP.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def make_app(function: Reward, name: str, token: str = "", max_bytes: int = 64 << 20) -> Any:
    """The ASGI application: GET / names the reward, POST / answers samples with their scores, one call at a time.

    Args:
        function: the reward.
        name: of it, in errors.
        token: what a request must carry as `Authorization: Bearer`; "" for none.
        max_bytes: of a request's body.
    """
    library("starlette", "serve")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    turn = asyncio.Lock()  # a reward's function need not bear two threads

    def check_token(request: Any) -> None:
        given = request.headers.get("authorization", "").encode()
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refused(401, "wrong or missing token")

    async def body_of(request: Any) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != wire.TYPE:  # a web page cannot send this type to a server that does not allow it to
            raise Refused(415, f"Content-Type should be {wire.TYPE}")
        declared = request.headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > max_bytes:
            raise Refused(413, f"over {max_bytes} bytes")
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                raise Refused(413, f"over {max_bytes} bytes")
        return b"".join(parts)

    async def post(request: Any) -> bytes:
        check_token(request)
        body = await body_of(request)
        async with turn:
            return await run_in_threadpool(answer_to, body, function, name)

    async def endpoint(request: Any) -> Any:
        try:
            if request.method == "POST":
                return Response(await post(request), media_type=wire.TYPE)
            check_token(request)
            return PlainTextResponse(f"orwcfm reward {name}\n")
        except Refused as error:
            closing = {"Connection": "close"} if error.status in (401, 413, 415) else {}
            return PlainTextResponse(f"{error}\n", error.status, closing)

    return Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])


def answer_to(body: bytes, function: Reward, name: str) -> bytes:
    """The scores for a request's body, as a safetensors file.

    Raises:
        Refused: the body is none of the wire's; the reward raised or returned no scores; out of memory.
    """
    try:
        samples, notes = wire.unpack(body, "samples")
        n = len(samples)
        texts, metadata = wire.listed(notes, "prompts", str, n), wire.listed(notes, "metadata", dict, n)
    except (ValueError, RecursionError) as error:
        raise Refused(400, " ".join(str(error).split())) from None
    prompts = None
    if texts is not None or metadata is not None:
        pairs = zip(texts or [""] * n, metadata or [{}] * n, strict=True)
        prompts = [Prompt(text, metadata=values) for text, values in pairs]
    seed = notes.get("seed", 0)
    try:
        found = score(function, samples, name, seed=seed if isinstance(seed, int) else 0, prompts=prompts)
    except RewardError as error:
        raise Refused(422, " ".join(str(error).split())) from None
    except Exception as error:
        if out_of_memory(error):
            raise Refused(507, "out of memory") from None
        raise
    return wire.pack("scores", found.to(torch.float64), {})


def serve(spec: str, how: Serve) -> None:
    """Serve the reward that `spec` names until Ctrl-C.

    Raises:
        UserError: no such reward or port; an address beyond loopback without a token.
    """
    uvicorn = library("uvicorn", "serve")
    token = os.environ.get(TOKEN, "")
    if not token and not is_loopback(how.host):
        raise UserError(
            f"--host {how.host}: other machines can reach it; set {TOKEN} to a token that they must send"
        )
    reward = make_reward(spec)
    app = make_app(reward.terms[0][2], reward.name, token, how.max_mib << 20)
    try:
        family = socket.AF_INET6 if ":" in how.host else socket.AF_INET
        listening = socket.create_server((how.host, how.port), family=family)
    except OSError as error:
        raise UserError(f"--host {how.host} --port {how.port}: {error.strerror or error}") from None
    port = listening.getsockname()[1]
    host = f"[{how.host}]" if ":" in how.host else how.host
    print(f"reward {reward.name} at http://{host}:{port}" + (" (with a token)" if token else ""), flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, limit_concurrency=512, lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
