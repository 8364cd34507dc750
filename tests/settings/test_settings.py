"""Settings are declared once, need no torch, and come back from TOML as they were written."""

import subprocess
import sys
import tomllib

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orwcfm_fast import settings
from orwcfm_fast.errors import UserError
from orwcfm_fast.settings import PANELS, Finetune, build, read_toml, setting, to_toml

COMMANDS = [
    settings.Pretrain,
    settings.Finetune,
    settings.Sweep,
    settings.Sample,
    settings.Evaluation,
    settings.Predict,
]
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
values = st.dictionaries(
    st.sampled_from([*Finetune.model_fields]),
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | text
    | st.lists(text),
    max_size=8,
)


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@given(values)
def test_what_is_written_as_toml_reads_back_equal(written):
    assert tomllib.loads(to_toml(written)) == {k: v for k, v in written.items() if v is not None}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_settings_of_a_run_come_back_from_its_file(kind, tmp_path):
    before = kind(seed=-3, device='cuda:1 "x"\\')
    (tmp_path / "config.toml").write_text(to_toml(before.model_dump()), "utf-8")
    assert build(kind, read_toml(tmp_path / "config.toml")) == before


def test_a_file_may_write_a_name_with_hyphens(tmp_path):
    (tmp_path / "c.toml").write_text("steps-per-round = 3\n")
    assert build(Finetune, read_toml(tmp_path / "c.toml")).steps_per_round == 3


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_setting_has_a_section_and_a_sentence(kind):
    for name, field in kind.model_fields.items():
        assert field.json_schema_extra["panel"] in PANELS, name
        assert len(field.description or "") > 5 and not field.description.endswith("."), name


def test_a_section_that_help_does_not_know_is_refused():
    with pytest.raises(AssertionError):
        setting(1, panel="Miscellaneous", help="a number")


def test_a_wrong_value_names_the_setting_the_value_and_what_it_is_for():
    with pytest.raises(UserError, match=r"^alpha = -1.0: input should be .* \(weight α of the W2 penalty"):
        build(Finetune, {"alpha": -1.0})


def test_settings_import_no_torch():
    code = "import sys, orwcfm_fast.settings; print({'torch', 'numpy', 'typer'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
