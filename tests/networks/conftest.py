"""Shared by the tests of networks, which import the modules that lie beside them."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def results(request):
    """Figures by family; written to the module's RESULTS where ORWCFM_RECORD is set."""
    found = {}
    yield found
    if os.environ.get("ORWCFM_RECORD"):
        request.module.RESULTS.write_text(json.dumps(found, indent=1) + "\n")
