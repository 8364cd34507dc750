"""The far end of a `process` reward: run as a script by another Python, which may know nothing of this package.

    python worker.py FILE.py|package.module FUNCTION CONNECTION      (an inherited file descriptor)

Answers {"ready": true} once the function is imported. Then each request is JSON, {"shape": […], "seed": n} with
"prompts" and "metadata" for a function that has parameters of those names; the answer {"room": true} asks for the
float32 samples in parts, and {"scores": n} is followed by n float64 values. Needs numpy or torch; Python 3.8 or later.
"""

import array
import importlib
import importlib.util
import inspect
import json
import os
import random
import sys
from multiprocessing.connection import Connection


def load(where, name):
    """The user's function; its own folder, not this script's, comes first on the path."""
    sys.path[0] = os.path.dirname(os.path.abspath(where)) if where.endswith(".py") else os.getcwd()
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location("orwcfm_worker_reward", where)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    return getattr(module, name)


def receive(line, shape):
    """The samples: a torch tensor where the user's file imports torch, else a numpy array."""
    size = 4
    for side in shape:
        size *= side
    memory, filled = bytearray(size), 0
    line.send_bytes(json.dumps({"room": True}).encode())
    while filled < size:
        filled += line.recv_bytes_into(memory, filled)
    if "torch" not in sys.modules:
        try:
            import numpy
        except ImportError:
            pass
        else:
            return numpy.frombuffer(memory, "float32").reshape(shape)
    import torch

    return torch.frombuffer(memory, dtype=torch.float32).reshape(shape)


def seed_all(seed):
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed % 2**63)


def score(function, samples, count, arguments):
    """Call the function; its scores as bytes of float64, or the shape that is wrong."""
    try:
        takes = [*inspect.signature(function).parameters]
    except (TypeError, ValueError):
        takes = []
    scores = function(samples, **{k: v for k, v in arguments.items() if k in takes})
    if isinstance(scores, tuple) and len(scores) == 2 and isinstance(scores[1], (dict, type(None))):
        scores = scores[0]  # (scores, information)
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu()
    found = list(getattr(scores, "shape", None) or [len(scores)])
    if found != [count]:
        return {"wrong_shape": found}, b""
    return {"scores": count}, array.array("d", [float(value) for value in scores]).tobytes()


def main():
    where, name, line = sys.argv[1], sys.argv[2], Connection(int(sys.argv[3]))
    function = None
    try:
        function = load(where, name)
        answer: dict = {"ready": True}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    line.send_bytes(json.dumps(answer).encode())
    while function is not None:
        data = b""
        try:
            request = json.loads(line.recv_bytes())
        except EOFError:  # the run is over
            return
        try:
            shape = request.pop("shape")
            samples = receive(line, shape)
            seed_all(request.pop("seed"))
            answer, data = score(function, samples, shape[0], request)
        except (Exception, SystemExit) as error:
            full = isinstance(error, MemoryError) or "out of memory" in str(error)
            answer = {"full" if full else "error": f"{type(error).__name__}: {error}"}
        line.send_bytes(json.dumps(answer).encode())
        if data:
            line.send_bytes(data)


if __name__ == "__main__":
    main()
