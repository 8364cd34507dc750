"""Our own parsers under any input: a value or the clean error; no crash, no hang, no memory beyond the input's own.

Sixty inputs to each here; `make soak` gives each 3,000, in all 21,000.
"""

import contextlib
import hashlib
import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orwcfm_fast.checkpoints import checkpoint, retention
from orwcfm_fast.checkpoints.torch_files import foreign_weights, read_pt
from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.runs.run import CONFIG, HEADER, Run, resumed_settings
from orwcfm_fast.settings import Finetune, to_toml

MOST_MEMORY = 32 << 20  # bytes; far below what a lie in a header asks for
SECONDS = 20  # an input; far above what any takes on a busy machine

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
sizes = st.integers(-(2**65), 2**65) | st.sampled_from([0, 1, 8, 16, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
keys = st.sampled_from(
    ["model", "data", "shape", "step", "round", "sha256", "settings", "versions", "x1_stride"]
)


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def put_signed(folder: Path, state: dict, tensors: bytes) -> None:
    """A checkpoint of any content, whose checksums are right."""
    put(folder, "model.safetensors", tensors)
    state = {**state, "sha256": {"model.safetensors": hashlib.sha256(tensors).hexdigest()}}
    with contextlib.suppress(ValueError, RecursionError):
        state = json.loads(json.dumps(state))
        state[checkpoint.OWN_DIGEST] = checkpoint._own_digest(state)
    put(folder, "state.json", json.dumps(state).encode())


def load(path: Path) -> None:
    Loader(torch.device("cpu"), "fp32").load(str(path))


# state.json as bytes, as JSON of any shape, as ours with a field changed
state_bytes = (
    st.binary(max_size=200)
    | anything.map(lambda v: json.dumps(v).encode())
    | st.tuples(keys, anything).map(lambda kv: json.dumps({"sha256": {}, kv[0]: kv[1]}).encode())
    | st.sampled_from(
        [b"[" * 200_000, b'{"sha256":' * 100_000, b"9" * 10_000, b'{"sha256": {"a": 1' + b"0" * 5000]
    )
)


def read_state(folder: Path, data: bytes) -> None:
    put(folder, "c/state.json", data)
    load(folder / "c")


def read_signed_state(folder: Path, state: dict) -> None:
    put_signed(folder / "c", state, b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    load(folder / "c")


signed_states = st.dictionaries(keys, anything, max_size=6) | st.fixed_dictionaries(
    {"model": st.sampled_from(["mlp", "unet-digits", "nothing", "", "../x"]), "data": st.text(max_size=8),
     "shape": st.lists(sizes | st.floats() | st.text(max_size=3), max_size=6) | anything}
)  # fmt: skip

tensor_headers = st.dictionaries(
    st.text(max_size=8),
    st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "F64", "I8", "BOOL", "X", ""]), "shape": st.lists(sizes, max_size=4),
         "data_offsets": st.lists(sizes, min_size=2, max_size=2) | anything}
    ) | anything, max_size=4,
).map(lambda v: json.dumps(v).encode())  # fmt: skip
safetensors_files = st.tuples(
    st.none() | st.integers(0, 2**64 - 1), tensor_headers | st.binary(max_size=80), st.binary(max_size=64)
).map(lambda v: struct.pack("<Q", len(v[1]) if v[0] is None else v[0]) + v[1] + v[2]) | st.binary(max_size=40)


def read_safetensors(folder: Path, data: bytes) -> None:
    put_signed(folder / "c", {"model": "mlp", "data": "moons", "shape": [2]}, data)
    load(folder / "c")


def archive(pickled: bytes, other: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, data in (("x/data.pkl", pickled), ("x/version", b"3\n"), ("x/data/0", other)):
            out.writestr(name, data)
    return buffer.getvalue()


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"net_model": {"a": torch.ones(3)}, "step": 3}, buffer)
    return buffer.getvalue()


def changed(data: bytes, places: list[tuple[int, int]], end: int) -> bytes:
    """Some bytes of a good file set otherwise, or its end cut off."""
    out = bytearray(data)
    for place, value in places:
        out[place % len(out)] = value
    return bytes(out[: end % (2 * len(out))])


pt_files = (
    st.binary(max_size=100)
    | st.tuples(st.binary(max_size=60), st.binary(max_size=60)).map(
        lambda v: archive(b"\x80\x02" + v[0], v[1])
    )
    | st.builds(
        changed,
        st.just(saved()),
        st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
        st.integers(1, 10**6),
    )
)


def read_foreign(folder: Path, data: bytes) -> None:
    put(folder, "f.pt", data)
    foreign_weights(read_pt(folder / "f.pt"), "f.pt")


# config.toml: any text, any value of any key, keys of ours with values of another kind
fields = st.sampled_from([*Finetune.model_fields, "alhpa", "reward ", ""])
toml_values = (
    st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.booleans()
    | st.lists(st.text(max_size=6), max_size=3)
)
tomls = (
    st.text(max_size=120).map(str.encode)
    | st.binary(max_size=120)
    | st.dictionaries(fields.filter(str.isidentifier), toml_values, max_size=5).map(
        lambda v: to_toml(v).encode()
    )
    | st.sampled_from(
        [b"a = " + b"[" * 20_000, b"a = " + b"9" * 10_000, b"a." * 20_000 + b"b = 1", b"\xff\xfe"]
    )
)


def read_config(folder: Path, data: bytes) -> None:
    put(folder, CONFIG, HEADER.encode() + b"finetune\n" + data)
    resumed_settings(Run(folder), Finetune, {}, ("rounds",))


lines = st.lists(
    st.binary(max_size=30)
    | anything.map(lambda v: json.dumps(v).encode())
    | st.fixed_dictionaries({"round": st.integers(-2, 6) | anything}).map(lambda v: json.dumps(v).encode()),
    max_size=8,
)


def read_metrics(folder: Path, data: list[bytes]) -> None:
    run = Run(folder)
    put(folder, "metrics.jsonl", b"\n".join(data))
    before = run.read_metrics()
    run.truncate_metrics(4)
    kept = [r["round"] for r in run.read_metrics()]
    assert kept == sorted(set(kept)) and set(kept) == {r["round"] for r in before if r["round"] <= 4}


names = st.sampled_from(["step_1", "step_2", "step_02", "step_10", "step_", "step_x", "step_-1", "step_²", "best",
                         "step_" + "9" * 100, ".step_1.part", ".step_2.old", ".best.part"])  # fmt: skip
trees = st.dictionaries(
    names, st.sampled_from(["whole", "empty", "file", "no state", "cut", "link"]), max_size=6
)


def read_folder(folder: Path, tree: dict[str, str]) -> None:
    for name, kind in tree.items():
        if kind == "file":
            put(folder, name, b"")
        elif kind == "link":
            (folder / name).symlink_to("/nowhere")
        elif kind == "empty":
            (folder / name).mkdir()
        else:
            checkpoint.save(
                folder / name, {"model": "mlp", "data": "moons", "shape": [2]}, a={"b": torch.ones(2)}
            )
            if kind == "no state":
                (folder / name / "state.json").unlink()
            elif kind == "cut":
                (folder / name / "a.safetensors").write_bytes(b"")
    with contextlib.suppress(UserError):
        retention.load_newest(folder)
    whole = {p.name for p in retention.steps(folder) if tree[p.name] == "whole"}
    found = None
    with contextlib.suppress(UserError, OSError):
        found = retention.load_newest(folder, set_aside=True)
    assert (found is None) == (not whole) and (not found or found.path.name in whole)
    retention.sweep(folder)
    with contextlib.suppress(OSError):  # `best` may be a folder of someone's: the run then ends in one line
        retention.prune(
            folder, 1, retention.best_step(folder, [{"round": 1, "ess": 1.0}], "ess", lambda n: n)
        )
    assert not found or checkpoint.load(found.path), "what was taken is never pruned"


PARSERS = {
    "state.json": (state_bytes, read_state),
    "state.json, signed": (signed_states, read_signed_state),
    "safetensors": (safetensors_files, read_safetensors),
    "pt": (pt_files, read_foreign),
    "config.toml": (tomls, read_config),
    "metrics.jsonl": (lines, read_metrics),
    "checkpoints/": (trees, read_folder),
}


def fuzz(name: str, examples: int) -> None:
    inputs, parse = PARSERS[name]

    @settings(
        max_examples=examples, deadline=SECONDS * 1000, database=None, derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(inputs)
    def one(value) -> None:
        with TemporaryDirectory() as folder:
            tracemalloc.start()
            try:
                parse(Path(folder), value)
            except (UserError, WorkError) as error:
                assert "\n" not in str(error) and len(str(error)) < 3000
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            assert peak < MOST_MEMORY

    one()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PARSERS)
def test_any_input_ends_in_a_value_or_the_clean_error(name):
    fuzz(name, 60)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PARSERS)
def test_21_000_inputs_end_so(name):
    fuzz(name, 3000)
