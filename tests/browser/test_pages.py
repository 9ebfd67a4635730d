"""report.html in a real browser without a network: it draws what a run's files hold, and runs nothing of it."""

import json
import os
from pathlib import Path

import chromium
import pytest
from run_folder import HOSTILE, row, sample, validation, write_run

from nemo_tsdkd.reporting.report import build_report

CHARTS = "[...document.querySelectorAll('.chart')]"
CURVES = f"Object.fromEntries({CHARTS}.map(c => [c.id.slice(6), c.data.map(t => t.name)]))"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    why = chromium.unavailable()
    if why:
        assert "CI" not in os.environ, why
        pytest.skip(why)
    with chromium.chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of twenty steps with two restarts, whose texts attack the page, and a shorter one of another rate."""
    root = tmp_path_factory.mktemp("runs")
    rows = [{"step": 0, **validation(0.25)}, *map(row, range(1, 21))]
    rows[10] |= validation(0.5)
    rows[20] |= validation(0.5)
    samples = [
        sample(step, index, [" first", "\nline", HOSTILE, ""], prompt=f"{HOSTILE} {index}", correct=index == 1)
        for step in (0, 10, 20)
        for index in range(3)
    ]
    samples[-1]["tokens"]["divergence"][1] = None
    long = write_run(root / f"long {HOSTILE.replace('/', '')[:60]}", rows, samples, restarts=(8, 16))
    return long, write_run(root / "short", rows[:11], samples[:3], lr=3e-5)


def opened(page, folders, tmp_path) -> Path:
    path = build_report(folders, tmp_path / "report.html")
    page.said.clear(), page.requests.clear()
    page.open(path)
    return path


def near(expected):
    """To a pixel or so."""
    return [[pytest.approx(x, abs=0.1), pytest.approx(y, abs=0.03)] for x, y in expected]


def points(page, chart, curve):
    """The marks of a curve where the browser drew them, in the units of the axes."""
    return page.value(f"""(() => {{
        const chart = document.getElementById("chart-{chart}");
        const number = chart.data.findIndex(t => t.name === {json.dumps(curve)});
        const {{xaxis, yaxis}} = chart._fullLayout;
        const marks = chart.querySelectorAll(".scatterlayer .trace")[number].querySelectorAll("path.point");
        const places = [...marks].map(mark => mark.getAttribute("transform").match(/-?[0-9.]+/g).map(Number));
        return places.map(([x, y]) => [xaxis.p2c(x), yaxis.p2c(y)]);
    }})()""")


def test_one_run(page, runs, tmp_path):
    path = opened(page, runs[:1], tmp_path)
    curves = page.value(CURVES)
    assert curves["loss"] == ["loss", "direct_weighted", "indirect_weighted", "entropy_weighted"]
    assert curves["time_0"] == ["rollout_s", "teacher_s", "student_s", "save_s", "validation_s"]
    others = "accuracy entropy selection rank_agreement length speed lr grad_norm memory"
    assert set(others.split()) < set(curves)
    # The file has the points, and the browser drew them where they belong.
    assert points(page, "accuracy", "validation_accuracy") == near([(0, 0.25), (10, 0.5), (20, 0.5)])
    weighted = [(step, row(step)["indirect_weighted"]) for step in range(1, 21)]
    assert points(page, "loss", "indirect_weighted") == near(weighted)
    assert page.value("document.querySelectorAll('#chart-loss .shapelayer path').length") == 2
    assert page.value("document.querySelectorAll('#chart-time_0 .barlayer .point').length") == 5 * 21
    # A sample opens, its tokens are coloured, and its text is text.
    assert page.value("document.querySelectorAll('#list button').length") == 3
    page.click("#list li:nth-child(3) button")
    assert page.value("document.querySelector('#sample .text').textContent") == f"{HOSTILE} 2"
    tokens = "[...document.querySelectorAll('#sample .response .token')]"
    assert page.value(f"{tokens}.map(t => t.textContent)") == [" first", "\u21b5\nline", HOSTILE, "\u25af"]
    assert page.value(f"{tokens}.map(t => t.className)") == ["token opener", "token opener uncertain", "token", "token"]
    shades = page.value(f"{tokens}.map(t => t.style.backgroundColor)")
    assert len(set(shades)) >= 3
    page.value("const pick = document.getElementById('pick-column'); pick.value = 'divergence'; pick.onchange()")
    assert page.value(f"{tokens}.map(t => t.classList.contains('infinite'))") == [False, True, False, False]
    assert page.value(f"{tokens}.map(t => t.style.backgroundColor)") != shades
    page.click("#sample button")  # the same prompt at step 0
    assert page.value("document.getElementById('pick-step').value") == "0"
    assert page.value("document.querySelector('#sample p').textContent").startswith("Step 0, validation 2, wrong")
    # Nothing was loaded, nothing failed, and nothing of the run's text ran.
    assert page.requests == [path.as_uri()]
    assert page.value("[window.injected, document.querySelectorAll('img, b').length]") == [None, 0]
    assert page.said == []


def test_runs_side_by_side(page, runs, tmp_path):
    opened(page, runs, tmp_path)
    curves = page.value(CURVES)
    assert len(curves["loss"]) == 8 and "short: direct_weighted" in curves["loss"]
    assert len(points(page, "lr", "short")) == 10
    assert {"time_0", "time_1"} < set(curves)
    page.value("const pick = document.getElementById('pick-run'); pick.value = 1; pick.onchange()")
    assert page.value("document.getElementById('pick-run').selectedOptions[0].text") == "short"
    assert page.value("document.querySelector('#sample p').textContent").startswith("Step 0, validation 0, wrong")
    differ = "[...document.querySelectorAll('#configuration > table tr')].slice(1)"
    assert page.value(f"{differ}.map(row => [...row.cells].map(cell => cell.textContent))") == [
        ["optim.lr", "1e-05", "3e-05"]
    ]
    assert page.value("window.injected") is None and page.said == []


def test_the_page_runs_nothing_even_where_text_becomes_html(page, runs, tmp_path):
    """The page's own rule, beside the escaping: its policy lets no other script run."""
    opened(page, runs[:1], tmp_path)
    page.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.injected = 1\">')")
    script = "Object.assign(document.createElement('script'), {textContent: 'window.injected = 2'})"
    page.value(f"document.body.append({script})")
    page.value("new Promise(done => setTimeout(done, 100))")
    assert page.value("window.injected") is None
    assert any("Content Security Policy" in text for text in page.said)
