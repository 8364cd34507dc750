"""The far end of a `process` reward: run as a script by another Python, which may know nothing of this package.

    python worker.py FILE.py|package.module FUNCTION CONNECTION MEMORY      (two inherited file descriptors)

Answers {"ready": true} once the function is imported, then for each {"shape": […]}, float32 samples at the start
of the memory, {"scores": n} with n float64 values written there. "prompts" and "metadata" beside the shape go to a
function that has parameters of those names. Needs numpy or torch; Python 3.8 or later.
"""

import array
import importlib
import importlib.util
import inspect
import json
import mmap
import os
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


def samples_at(memory, shape):
    """A torch tensor where the user's file imports torch, else a numpy array; its own copy."""
    count = 1
    for side in shape:
        count *= side
    if "torch" not in sys.modules:
        try:
            import numpy
        except ImportError:
            pass
        else:
            return numpy.frombuffer(memory, "float32", count).reshape(shape).copy()
    import torch

    return torch.frombuffer(memory, dtype=torch.float32, count=count).reshape(shape).clone()


def score(function, memory, shape, told):
    """Call the function and leave its scores in the memory; the answer to send."""
    try:
        takes = [*inspect.signature(function).parameters]
    except (TypeError, ValueError):
        takes = []
    scores = function(samples_at(memory, shape), **{k: v for k, v in told.items() if k in takes})
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu()
    found = list(getattr(scores, "shape", None) or [len(scores)])
    if found != [shape[0]]:
        return {"wrong_shape": found}
    data = array.array("d", [float(value) for value in scores]).tobytes()
    memory[: len(data)] = data
    return {"scores": found[0]}


def main():
    where, name, connection, descriptor = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    line = Connection(connection)
    function = None
    try:
        function = load(where, name)
        answer: dict = {"ready": True}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    line.send_bytes(json.dumps(answer).encode())
    while function is not None:
        try:
            told = json.loads(line.recv_bytes())
        except EOFError:  # the run is over
            return
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        try:
            answer = score(function, memory, told.pop("shape"), told)
        except Exception as error:
            full = isinstance(error, MemoryError) or "out of memory" in str(error)
            answer = {"full" if full else "error": f"{type(error).__name__}: {error}"}
        line.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
