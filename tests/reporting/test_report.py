"""The report is one page that opens anywhere, says what the run's files say, and trusts no text."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from orwcfm_fast.evaluation.evaluate import Measures
from orwcfm_fast.evaluation.intervals import Interval
from orwcfm_fast.reporting.charts import Series, chart, ticks
from orwcfm_fast.reporting.pictures import save_pairs
from orwcfm_fast.reporting.report import run_report
from orwcfm_fast.runs.result import Result
from orwcfm_fast.runs.run import Run
from orwcfm_fast.settings import Finetune
from orwcfm_fast.theory.limit import POINTS

SMALL = ("--rounds", "2", "--rollout", "64", "--batch", "32", "--steps-per-round", "3", "--eval-n", "64",
         "--probe", "16", "--quiet")  # fmt: skip
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two rounds on two Gaussians, finished; its base lies beside it."""
    from typer.testing import CliRunner

    from orwcfm_fast.cli import load_app

    folder = tmp_path_factory.mktemp("report")
    base, out = str(folder / "base"), str(folder / "run")
    for arguments in (
        ("pretrain", "--data", "two-gaussians", "--steps", "30", "--batch", "64", "--out", base, "--quiet"),
        ("finetune", "--checkpoint", base, "--out", out, *SMALL),
    ):
        made = CliRunner().invoke(load_app(), arguments)
        assert made.exit_code == 0, made.stderr
    return folder / "run"


def starts(browser: str) -> bool:
    return subprocess.run([browser, "--version"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        there = [path for name in BROWSERS if (path := shutil.which(name))]
        there += filter(os.path.exists, [playwright.chromium.executable_path])
        found = next((path for path in there if starts(path)), None)
        if found is None:  # Ubuntu's chromium-browser may be a stub
            pytest.skip("no Chromium here")
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser):
    """path, light or dark → the page, and everything it complained about or fetched."""

    def open_page(path: Path, scheme: str):
        page, complaints, fetched = browser.new_page(color_scheme=scheme), [], []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(path.absolute().as_uri())
        return page, complaints, fetched

    return open_page


def test_report_opens_in_a_browser_with_no_error_and_no_network_light_and_dark(run, opened):
    paper = {}
    for scheme in ("light", "dark"):
        page, complaints, fetched = opened(run / "report.html", scheme)
        assert complaints == []
        assert [url for url in fetched if not url.startswith("data:")] == [
            (run / "report.html").absolute().as_uri()
        ]
        paper[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("[...document.images].every(i => i.hidden || i.naturalWidth > 0)")
        assert page.locator("figure.chart svg").count() == 8
        assert page.locator("g.forecast circle").count() == 9 + POINTS  # the last: the limit line's
    assert paper["light"] != paper["dark"]


def test_slider_turns_through_the_rounds_beside_the_start(run, opened):
    page, complaints, _ = opened(run / "report.html", "light")
    visible = page.locator("#after img:visible")
    sources = []
    for number in ("0", "1", "2"):
        page.locator("#at").fill(number)
        assert visible.count() == 1 and page.locator("#shown").inner_text() == f"round {number} of 2"
        sources.append(visible.get_attribute("src"))
    assert len(set(sources)) == 3 and sources[0] == page.locator("#before").get_attribute("src")
    page.locator("#at").press("ArrowLeft")
    extremes = page.locator("#extremes img:visible")
    assert extremes.count() == 1 and "round 1 of 2" in extremes.get_attribute("alt")
    assert visible.get_attribute("src") == sources[1] and complaints == []


def test_report_shows_the_figures_of_the_run(run):
    page = (run / "report.html").read_text("utf-8")
    summary = json.loads((run / "summary.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{summary['before']['reward']['mean']:.3f} → {summary['after']['reward']['mean']:.3f}" in page
    assert f"{last['loss_w2']:.4g}" in page and "<td>alpha</td>" in page
    assert set(re.findall(r'\ssrc="(.{5})', page)) == {"data:"} and "href=" not in page


def test_texts_of_users_and_guards_cannot_become_markup(run, run_cli):
    evil = Path("<img src onerror>&.py")
    evil.write_text("def score(x):\n    return x[:, 0]\n")
    reward = ("--reward", f"{evil}:score", "--out", "evil")
    made = run_cli("finetune", "--checkpoint", run.parent / "base", *reward, *SMALL, "--rounds", 1)
    assert made.code == 0, made.err
    record = json.loads(Path("evil/metrics.jsonl").read_text()) | {"guard": ["ESS <b>low</b>"]}
    Path("evil/metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert run_cli("finetune", "--resume", "evil", *reward[:2]).code == 0
    page = Path("evil/report.html").read_text("utf-8")
    assert "<img src onerror" not in page and "&lt;img src onerror&gt;&amp;.py:score" in page
    assert "round 1: ESS &lt;b&gt;low&lt;/b&gt;" in page


def test_ticks_are_round_numbers_within_the_range():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-0.013, 0.041) == pytest.approx([0, 0.02, 0.04])
    assert ticks(17, 2310) == [500, 1000, 1500, 2000]


def test_chart_leaves_out_what_is_not_finite_and_survives_one_point():
    svg = chart("a<b", [Series("s", [1, 2, 3], [1.0, float("nan"), 2.0])], "x")
    assert svg.count("<circle") == 2 and "nan" not in svg and "a&lt;b" in svg
    assert "nothing recorded" in chart("none", [Series("s", [], [])], "x")
    assert chart("one", [Series("s", [5], [0.0], y_low=[-1], y_high=[1])], "x").count("<circle") == 1


def measures_of_images(name: str, shares: dict[str, float]) -> Measures:
    exact = {k: Interval(v, v, v) for k, v in shares.items()}
    one = Interval(1.0, 1.0, 1.0)
    return Measures(name, 64, one, one, one, one, 1.0, 1.0, one, 1.0, 0.9, classes=exact, vendi=one)


def test_a_report_on_images_shows_pairs_alone_and_the_share_of_each_class(run, tmp_path):
    """Their pictures hold before and after already, so that none stands beside them."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "samples").mkdir()
    for n in range(3):
        images = torch.full((2, 1, 8, 8), n / 2)
        save_pairs(
            tmp_path / "samples" / f"round_{n:03d}.png", torch.zeros_like(images), images, f"{n} rounds"
        )
    before, after = (
        measures_of_images(n, {"0": x, "1": 1 - x}) for n, x in (("before", 0.5), ("after", 0.75))
    )
    settings = Finetune(rounds=2, reward=["even-digits"])
    page = run_report(
        Result(Run(tmp_path), settings, before, after, records, 1.0, None), ["about"]
    ).read_text("utf-8")
    assert 'id="before"' not in page and page.count("data:image/png") == 3
    assert "Share of each class in 64 held-out samples" in page and page.count("<rect") == 4
    assert "<title>after, 0: 75</title>" in page and "<title>before, 1: 50</title>" in page
