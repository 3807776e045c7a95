"""The report: one HTML file with everything in it, which asks nothing of any network.

Tables and text are HTML, and so are there without a script. The charts are drawn from the figures'
values by `assets/report.js` with uPlot, which are both in the file.
"""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mtl.config.document import dump
from mtl.output import report as history
from mtl.output.files import write_text
from mtl.report import compare, figures, replay
from mtl.report.figures import Figure
from mtl.report.record import Record

NAME = "report.html"
# Nothing may be fetched; style and script stand in the file itself.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
)


def write(folders: Sequence[Path], path: Path | None = None) -> Path:
    """Write the report of one run into its folder, or of several into `path`.

    Args:
        path: None: `report.html` in the (first) run's folder.

    Raises:
        ValueError: a folder that is no run, or is given twice.
    """
    path = path or Path(folders[0]) / NAME
    write_text(path, page(compare.sides(folders)))
    return path


def attempt(folder: Path) -> str | None:
    """`write` of a run's report, on which nothing depends: what went wrong, or None."""
    try:
        write([folder])
    # A report that cannot be written must not end the run that it is about.
    except Exception as error:
        return f"{folder / NAME} could not be written: {type(error).__name__}: {error}"
    return None


def page(sides: Sequence[compare.Side]) -> str:
    """The whole file. Runs of the same tasks stand side by side, others in sections of their
    own.
    """
    drawn: list[Figure] = []
    parts = []
    count = sum(len(side.runs) for side in sides)
    for number, side in enumerate(sides):
        if len(sides) > 1:
            parts.append(f"<h2>Tasks {_text(', '.join(side.tasks))}</h2>")
        if len(side.runs) > 1:
            parts.append(_comparison(side, drawn, f"side{number}-"))
        for place, (name, record) in enumerate(side.runs.items()):
            body = _run(record, drawn, f"run{number}.{place}-" if count > 1 else "")
            if count > 1:
                title = f"<summary><h2>{_text(name)}</h2></summary>"
                body = f'<details class="run">{title}{body}</details>'
            parts.append(body)
    names = [name for side in sides for name in side.runs]
    title = names[0] if count == 1 else f"{count} runs"
    # JSON has no NaN, and a browser's parser refuses it.
    data = json.dumps([one.plain() for one in drawn], separators=(",", ":"), allow_nan=False)
    return _whole(title, "".join(parts), data)


def _whole(title: str, body: str, data: str) -> str:
    files = resources.files("mtl.report") / "assets"
    asset = {one: (files / one).read_text(encoding="utf-8") for one in ASSETS}
    # u003c below: a task may be named </script>, which would end the element.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(title)}: coba-mtl report</title>
<!-- This file contains uPlot:
{asset["uPlot.LICENSE"]}-->
<style>
{asset["uPlot.min.css"]}
{asset["report.css"]}
</style>
</head>
<body>
<header><h1>{_text(title)}</h1><button id="theme" type="button">Light / dark</button></header>
<main>
<noscript><p class="warning">Charts need JavaScript. Tables and text do not.</p></noscript>
{body}
</main>
<div id="spoken" role="status" aria-live="polite"></div>
<script type="application/json" id="figures">{data.replace("<", chr(92) + "u003c")}</script>
<script>
{asset["uPlot.iife.min.js"]}
</script>
<script>
{asset["report.js"]}
</script>
</body>
</html>
"""


ASSETS = ("uPlot.LICENSE", "uPlot.min.css", "report.css", "uPlot.iife.min.js", "report.js")


def _run(record: Record, drawn: list[Figure], prefix: str) -> str:
    replayed = replay.read(record.folder)
    mine = figures.of_run(record, prefix, replayed)
    drawn += mine
    chosen = record.chosen
    state = "finished" if record.last >= record.length else "not over"
    facts = [("steps", f"{record.last} of {record.length}, {state}")]
    if chosen:
        of = " of the averaged weights" if chosen.weights == "average" else ""
        where = f"step {chosen.step}{of}, by {chosen.key}"
        if chosen.step == 0:
            where += ": no later pass was better, and the start has no checkpoint"
        facts.append(("chosen checkpoint", where))
        facts.append((chosen.key, f"{chosen.value:.4f}"))
    facts.append(("balancer", compare.show(record.config.get("balancer", "unknown"))))
    facts.append(("convergence spread", f"{compare.spread_of(record):.3f}"))
    parts = [_facts(facts), _warnings(record), _tasks(record)]
    parts += [_chart(one) for one in mine]
    if replayed:
        notes = " ".join([replayed["about"], *replayed["notes"]])
        parts.append(f"<p class=note>{_text(notes)}</p>")
    if record.choice:
        text = history.choice(record.choice)
        parts.append(f"<h3>What was chosen from at the end</h3><pre>{_text(text)}</pre>")
    return "".join([*parts, _provenance(record)])


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    items = (f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in facts)
    return f"<dl>{''.join(items)}</dl>"


def _warnings(record: Record) -> str:
    found = record.warnings()
    if not found:
        return ""
    items = "".join(f"<li>{_text(one)}</li>" for one in found)
    return f'<section class="warning"><h3>Warnings</h3><ul>{items}</ul></section>'


def _tasks(record: Record) -> str:
    """What each task did, in numbers."""
    header = ["task", "start", "at the chosen", "own best", "at step", "gap to own best", "last"]
    header += ["passes over its rows", "target tokens", "mean weight"]
    chosen = record.chosen_losses()
    epochs = record.column(record.steps, "draws", "epoch")
    tokens = np.nansum(record.column(record.steps, "train", "tokens"), 0)
    weights = record.column(record.steps, "train", "weight")
    rows = []
    for k, task in enumerate(record.tasks):
        own = record.losses[:, k]
        at = float("nan") if chosen is None else float(chosen[k])
        low = float(own.min())
        step = str(record.at[own.argmin()])
        row = [_four(own[0]), _four(at), _four(low), step, _percent(at / low - 1), _four(own[-1])]
        row.append(_number(epochs[-1, k] if len(epochs) else np.nan, ".2f"))
        row.append(f"{int(tokens[k]):,}")
        row.append(_number(weights[:, k].mean() if len(weights) else np.nan, ".3f"))
        rows.append([task, *row])
    macro = record.losses.mean(1)
    at = float("nan") if chosen is None else float(chosen.mean())
    best = int(macro.argmin())
    gap = _percent(at / float(macro.min()) - 1)
    low, step = _four(macro.min()), str(record.at[best])
    total = f"{int(tokens.sum()):,}"
    rows.append(["macro", _four(macro[0]), _four(at), low, step, gap, _four(macro[-1]), "", total])
    return "<h3>Tasks</h3>" + _table(header, [[*row, ""][: len(header)] for row in rows])


def _comparison(side: compare.Side, drawn: list[Figure], prefix: str) -> str:
    names = list(side.runs)
    parts = []
    if side.differences:
        rows = [[key, *map(compare.show, values)] for key, values in side.differences.items()]
        parts.append("<h3>What differs</h3>" + _table(["setting", *names], rows))
    else:
        parts.append("<p>The runs' configurations do not differ, but for where they lie.</p>")
    rows = [[row["name"], *(_cell(cell) for cell in row["cells"])] for row in compare.table(side)]
    about = (
        "Loss at the chosen checkpoint; in brackets the step of the task's own best, and how far "
        "the loss lies above it. * marks the lowest of a row. Convergence spread: the standard "
        "deviation of the tasks' own best steps, as a part of the run."
    )
    parts.append(f"<h3>Results</h3><p class=note>{about}</p>" + _table(["task", *names], rows))
    if seeds := compare.over_seeds(side):
        header = ["task"]
        header += [f"{name} (n = {len(each)})" for name, each in side.groups.items()]
        rows = [[row["name"], *(_mean(cell) for cell in row["cells"])] for row in seeds]
        about = "Loss at the chosen checkpoint: mean over seeds, and Student's 95 % interval of it."
        parts.append(f"<h3>Over seeds</h3><p class=note>{about}</p>" + _table(header, rows))
    groups = {name: [side.runs[one] for one in each] for name, each in side.groups.items()}
    mine = [figures.overlaid(groups, task, f"{prefix}task{n}") for n, task in enumerate(side.tasks)]
    drawn += mine
    parts.append("<h3>Each task in all runs</h3>")
    return "".join([*parts, *map(_chart, mine)])


def _cell(cell: Mapping[str, Any]) -> str:
    text = _four(cell["loss"]) + " *" * cell["best"]
    inner = [f"step {cell['step']}"] if cell.get("step") is not None else []
    inner += [_percent(cell["gap"])] if "gap" in cell else []
    return f"{text} ({', '.join(inner)})" if inner else text


def _mean(cell: Mapping[str, Any]) -> str:
    between = "" if cell["low"] is None else f" ({_four(cell['low'])} to {_four(cell['high'])})"
    return _four(cell["mean"]) + between


def _chart(one: Figure) -> str:
    """Where the script draws a figure."""
    return (
        f'<figure id="{_text(one.id)}"><figcaption><strong>{_text(one.title)}</strong> '
        f"{_text(one.about)}</figcaption></figure>"
    )


def _provenance(record: Record) -> str:
    about = record.about
    parts = []
    if about:
        versions = [[name, value] for name, value in about.get("versions", {}).items()]
        facts = [("command", " ".join(about.get("command", []))), ("processes", about.get("world"))]
        facts = [("git", about.get("git") or "unknown"), *facts]
        parts.append("<h3>What it was</h3>" + _facts((k, str(v)) for k, v in facts))
        parts.append(_folded("Versions", _table(["package", "version"], versions)))
        parts.append(_folded("Configuration", f"<pre>{_text(dump(record.config))}</pre>"))
    if record.log:
        text = "\n".join(record.log)
        parts.append(_folded("What the run told", f"<pre>{_text(text)}</pre>"))
    return "".join(parts)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{body}</details>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(one)}</th>' for one in header)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "-"


def _four(value: float) -> str:
    return _number(value, ".4f")


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %" if np.isfinite(value) else "-"
