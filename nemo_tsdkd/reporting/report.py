"""report.html: the charts, samples and configuration of one run or several, in one file that opens without a network.

No torch on import: the command answers at once, also on a machine without a GPU.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from nemo_tsdkd.checkpoints.atomic import write_atomically
from nemo_tsdkd.reporting.accuracy import ACCURACY
from nemo_tsdkd.reporting.charts import COLOURS, figures, series
from nemo_tsdkd.reporting.provenance import flat_settings
from nemo_tsdkd.reporting.run_files import REPORT, RunFiles, only_warned, read_runs
from nemo_tsdkd.reporting.sample_page import shown_samples

LARGEST = 7_500_000  # bytes of the file, as many samples left out as it takes


def build_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write the report of the runs in `folders`, atomically, and return its path.

    Raises:
        UserError: a folder that holds no run.
    """
    runs = read_runs(folders)
    templates = Environment(
        loader=PackageLoader("nemo_tsdkd.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    charts = [
        {"name": name, "title": title, "figure": json.loads(figure.to_json())} for name, title, figure in figures(runs)
    ]
    scripts = [get_plotlyjs().replace("\r\n", "\n"), templates.get_template("report.js").render()]
    values: dict[str, Any] = {
        "runs": [_summary(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)],
        "charts": charts,
        "chart_data": _embedded(charts),
        "differing": _differing(runs),
        # Only these two scripts run, whatever else a run's files might bring into the page; nothing is loaded.
        "script_digests": " ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        "scripts": [Markup(script) for script in scripts],
    }
    size = sum(map(len, scripts)) + len(values["chart_data"]) + sum(len(run.config) for run in runs)
    samples = shown_samples(runs, LARGEST - size)
    values |= {"sample_data": _embedded(samples), "samples": samples}
    page = templates.get_template("report.html").render(values)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def refresh_report(run_dir: Path) -> None:
    """Rebuild the report of a run that trains; a failure is a warning."""
    with only_warned(REPORT):
        build_report([run_dir], run_dir / REPORT)


def _summary(run: RunFiles, colour: str) -> dict[str, Any]:
    """What the page's head and the sections on configuration say of a run."""
    steps, accuracies = series(run, ACCURACY)
    last = run.rows[-1] if run.rows else {}
    return {
        "name": run.name,
        "colour": colour,
        "step": last.get("step", 0),
        "finished": bool(run.summary.get("finished")),
        "restarts": run.restarts,
        "accuracies": list(zip(steps, accuracies, strict=True)),
        "loss": last.get("loss"),
        "config": run.config,
        "versions": run.versions,
    }


def _differing(runs: Sequence[RunFiles]) -> list[tuple[str, list[Any]]]:
    """(setting, its value in each run) of the settings that are not alike in all runs."""
    settings: list[dict[str, Any]] = []
    for run in runs:
        try:
            settings.append(flat_settings(yaml.safe_load(run.config)))
        except (ValueError, yaml.YAMLError, RecursionError):  # absent or damaged
            settings.append({})
    names = dict.fromkeys(name for flat in settings for name in flat)
    rows = [(name, [flat.get(name, "not there") for flat in settings]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _embedded(value: Any) -> Markup:
    """JSON inside of a <script> element: no `<` can end the element, as no HTML is left in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
