"""Shared by the tests of networks, which import the modules that lie beside them."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def results(request):
    """Figures by family; where ORWCFM_RECORD is set they replace those in the module's RESULTS, others stay."""
    found = {}
    yield found
    if os.environ.get("ORWCFM_RECORD"):
        path = request.module.RESULTS
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | found, indent=1) + "\n")
