"""Tests here import `judge_server`, which lies beside them."""

import sys
import threading
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def judge_server(monkeypatch):
    """A running judge that says how bright a picture is."""
    from judge_server import Judge

    from orwcfm_fast.rewards import judge

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge._client.cache_clear()
    found = Judge()
    threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()
