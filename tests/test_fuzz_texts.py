"""Text files as Windows, macOS, editors and exporters write them: the right lines or one line that refuses them."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.prompts import read_prompts
from orwcfm_fast.settings import read_toml

BOM = b"\xef\xbb\xbf"
NO_LINE_ENDS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
"""Where str.splitlines ends a line and no editor does."""


def plain(texts: list[str]) -> bytes:
    return "\n".join(texts).encode()


def records(texts: list[str], ascii: bool = False) -> bytes:
    return "\n".join(json.dumps({"prompt": t}, ensure_ascii=ascii) for t in texts).encode()


# how the prompts are written, and whether they are read (else refused in one line)
KINDS = {
    "lines": (plain, True),
    "no last line end": (lambda t: plain(t), True),
    "a last line end": (lambda t: plain(t) + b"\n", True),
    "Windows line ends": (lambda t: plain(t).replace(b"\n", b"\r\n"), True),
    "blank lines": (lambda t: b"\n \n" + plain(t).replace(b"\n", b"\n\n\t\n"), True),
    "byte-order mark": (lambda t: BOM + plain(t), True),
    "byte-order mark, Windows": (lambda t: BOM + plain(t).replace(b"\n", b"\r\n"), True),
    **{f"U+{ord(c):04X}": (lambda t, c=c: plain([f"a{c}b" + x for x in t]), True) for c in NO_LINE_ENDS},
    "JSON lines": (records, True),
    "JSON lines in ASCII": (lambda t: records(t, True), True),
    "JSON lines, byte-order mark": (lambda t: BOM + records(t), True),
    "JSON lines, Windows": (lambda t: records(t).replace(b"\n", b"\r\n"), True),
    "JSON lines with U+2028": (lambda t: records([f"a\u2028\x85{x}" for x in t]), True),
    "JSON array": (lambda t: json.dumps([{"prompt": x} for x in t], indent=1).encode(), False),
    "array of texts": (lambda t: json.dumps(t).encode(), False),
    "UTF-16 of Windows": (lambda t: "\n".join(t).encode("utf-16"), False),
    "UTF-16 without mark": (lambda t: ("x\n" + "\n".join(t)).encode("utf-16-le"), False),
    "half a surrogate pair": (lambda t: b'{"prompt": "\\ud83d"}', False),
    "Latin-1": (lambda t: "caf\xe9".encode("latin-1"), False),
    "nothing": (lambda t: BOM + b"\r\n\n", False),
}
AROUND = {"JSON lines with U+2028": "a\u2028\x85", **{f"U+{ord(c):04X}": f"a{c}b" for c in NO_LINE_ENDS}}
texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20)
    .map(str.strip)
    .filter(lambda t: t and t[0] not in "{[\ufeff"),
    min_size=1,
    max_size=5,
)


def check(name: str, wanted: list[str]) -> None:
    write, good = KINDS[name]
    with TemporaryDirectory() as folder:
        path = Path(folder, "p.txt")
        path.write_bytes(write(wanted))
        if good:
            assert [p.text for p in read_prompts(path)] == [AROUND.get(name, "") + t for t in wanted]
            return
        with pytest.raises(UserError, match="--prompts") as error:
            read_prompts(path)
        assert "\n" not in str(error.value)


def fuzz(name: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 1000,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(texts)
    def one(wanted: list[str]) -> None:
        check(name, wanted)

    one()


@pytest.mark.parametrize("name", KINDS)
def test_prompts_are_the_lines_that_an_editor_shows(name):
    fuzz(name, 30)


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_three_thousand_of_each_kind(name):
    fuzz(name, 3000)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_config_with_a_byte_order_mark_is_read(end, tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(BOM + b"alpha = 0.5" + end + b'reward = ["brightness"]' + end)
    assert read_toml(path) == {"alpha": 0.5, "reward": ["brightness"]}
    path.write_bytes("alpha = 0.5\n".encode("utf-16"))
    with pytest.raises(UserError, match="not a TOML file"):
        read_toml(path)
