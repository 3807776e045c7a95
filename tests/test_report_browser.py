"""The report in a browser: nothing fails in it, nothing leaves it, and it shows the numbers by mouse, keys and files.

Needs playwright and a Chromium: the machine's, or the one that `playwright install chromium` fetches.
"""

import csv
import io
import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import recorded

from mtl.report import figures, page, record

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as started:
        found = next((path for name in NAMES if (path := shutil.which(name))), None)
        found = found or started.chromium.executable_path
        if not Path(found).is_file():
            pytest.skip(f"no Chromium: none of {', '.join(NAMES)}, and no {found}")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = started.chromium.launch(executable_path=found, args=sandbox)
        yield made
        made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder) -> Path:
    return page.write([recorded.write(folder / "one")])


@pytest.fixture(scope="module")
def several(folder) -> Path:
    many = [
        recorded.write(folder / f"{balancer}-{seed}", balancer=balancer, seed=seed)
        for balancer in ("CoBa", "Equal")
        for seed in (0, 1)
    ]
    many.append(recorded.write(folder / "other", tasks=("code", "law")))
    return page.write(many, folder / "several.html")


@pytest.fixture
def opened(browser):
    """Opens a file; at the end nothing may have failed, and nothing but the file been asked for."""
    asked, failed, contexts = [], [], []

    def open_(path: Path, **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
        contexts.append(context)
        shown = context.new_page()
        shown.on("request", lambda request: asked.append(request.url))
        shown.on("pageerror", lambda error: failed.append(str(error)))
        shown.on("console", lambda said: said.type == "error" and failed.append(said.text))
        shown.goto(path.as_uri())
        return shown

    yield open_
    for context in contexts:
        context.close()
    assert failed == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) >= 1


def legend(shown, id: str) -> dict[str, str]:
    """What a chart's legend says."""
    rows = shown.locator(f"figure[id='{id}'] .u-legend .u-series:not(.edge)").all()
    return {
        row.locator(".u-label").inner_text(): row.locator(".u-value").inner_text() for row in rows
    }


@pytest.mark.parametrize(
    "theme, paper", [("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 24, 29)")]
)
def test_it_opens_by_itself_in_the_readers_theme(opened, one, several, theme, paper):
    color = "getComputedStyle(document.body).backgroundColor"
    for path in (one, several):
        shown = opened(path, color_scheme=theme)
        assert shown.evaluate(color) == paper
        for each in shown.locator("summary").all():
            each.click()
        count = shown.evaluate("figures.length")
        assert shown.locator("canvas").count() == count > 5, "every figure is drawn"
        shown.get_by_role("button", name="Light / dark").click()
        assert shown.evaluate(color) != paper


def test_the_charts_hold_the_runs_numbers(opened, one):
    shown = opened(one)
    for figure in figures.of_run(record.read(one.parent)):
        x, *rows = shown.evaluate(f"charts.get('{figure.id}').plot.data")
        assert x == figure.x
        below = [0.0] * len(x)
        for row, series in zip(rows, figure.series, strict=True):
            if figure.kind == "area":
                below = [a + b for a, b in zip(below, series.y, strict=True)]
            assert row == pytest.approx(below if figure.kind == "area" else series.y)
    spans = shown.evaluate(
        "[...charts.values()].map(c => [c.plot.scales.x.min, c.plot.scales.x.max])"
    )
    assert {tuple(span) for span in spans} == {(0, 60)}, "one axis of steps for all"


def painted(shown, id: str) -> int:
    """How many colors a chart's canvas has within its axes."""
    return shown.evaluate(f"""(() => {{
        const {{ctx, bbox}} = charts.get('{id}').plot;
        const {{data}} = ctx.getImageData(bbox.left, bbox.top, bbox.width, bbox.height), seen = new Set();
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) seen.add(data.slice(i, i + 3).join());
        return [...seen].filter(c => ['0,114,178', '213,94,0'].includes(c)).length;
    }})()""")


def test_curves_are_painted_in_their_colors(opened, one):
    shown = opened(one)
    assert painted(shown, "loss") == 2
    shown.locator("#loss .u-series th").nth(1).click()  # hide the first
    shown.wait_for_timeout(100)
    assert painted(shown, "loss") == 1


def test_the_mouse_shows_values_in_every_chart(opened, one):
    shown = opened(one)
    over = shown.locator("#loss .u-over").bounding_box()
    shown.mouse.move(over["x"] + over["width"] * 20 / 60, over["y"] + over["height"] / 2)
    shown.wait_for_timeout(100)
    expected = {
        t: recorded.losses(k, 20) / recorded.losses(k, 0) for k, t in enumerate(recorded.TASKS)
    }
    found = legend(shown, "loss")
    assert found.pop("step") == "20"
    assert {task: float(value) for task, value in found.items()} == pytest.approx(
        expected, rel=1e-3
    )
    weights = legend(shown, "weights")
    assert weights.pop("step") == "20", "the same step in the other charts"
    assert {t: float(v) for t, v in weights.items()} == pytest.approx(
        {"code": 1 / 3, "math": 2 / 3}, rel=1e-3
    ), "a task's own weight, not the sum that is drawn"


def test_keys_read_values_aloud(opened, one):
    shown = opened(one)
    shown.locator("#loss .chart").focus()
    shown.keyboard.press("Home")
    shown.keyboard.press("ArrowRight")
    shown.wait_for_timeout(100)
    ratios = [recorded.losses(k, 10) / recorded.losses(k, 0) for k in range(2)]
    said = shown.locator("#spoken")
    assert said.inner_text() == f"step 10: code {ratios[0]:.4g}, math {ratios[1]:.4g}"
    assert said.get_attribute("aria-live") == "polite"
    assert legend(shown, "loss")["step"] == legend(shown, "weights")["step"] == "10"
    shown.keyboard.press("End")
    assert said.inner_text().startswith("step 60: ")
    shown.keyboard.press("Escape")
    assert said.inner_text() == ""
    label = shown.locator("#loss .chart").get_attribute("aria-label")
    assert label.startswith("Loss ratio. Validation loss of every task")


def test_everything_is_reached_by_tab(opened, one):
    shown, seen = opened(one), []
    for _ in range(14):
        shown.keyboard.press("Tab")
        seen.append(
            shown.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent")
        )
    assert seen[0] == "Light / dark" and any(text.startswith("Loss ratio.") for text in seen)
    assert {f"Save Loss ratio as {kind}" for kind in ("PNG", "SVG", "CSV")} <= set(seen)
    shown.locator("#loss .u-series th").nth(1).focus()
    shown.keyboard.press("Enter")
    assert shown.evaluate("charts.get('loss').plot.series[1].show") is False


def saved(shown, id: str, kind: str) -> bytes:
    with shown.expect_download() as download:
        shown.locator(f"figure[id='{id}']").get_by_text(kind, exact=True).click()
    assert download.value.suggested_filename == f"{id}.{kind.lower()}"
    return Path(download.value.path()).read_bytes()


def test_each_figure_as_a_file(opened, one):
    shown = opened(one)
    header, *rows = csv.reader(io.StringIO(saved(shown, "loss", "CSV").decode()))
    assert header == ["step", "code", "math"]
    assert [[float(cell) for cell in row] for row in rows] == [
        [
            t,
            *(
                pytest.approx(recorded.losses(k, t) / recorded.losses(k, 0), rel=1e-5)
                for k in range(2)
            ),
        ]
        for t in range(0, 61, 10)
    ]
    image = saved(shown, "loss", "PNG")
    assert image.startswith(b"\x89PNG") and len(image) > 10_000
    drawing = ET.fromstring(saved(shown, "loss", "SVG"))
    space = {"s": "http://www.w3.org/2000/svg"}
    curves = drawing.findall(".//s:polyline", space)
    assert [curve.get("stroke") for curve in curves] == ["#0072b2", "#d55e00"]
    points = [tuple(map(float, p.split(","))) for p in curves[0].get("points").split()]
    assert len(points) == 7 and max(points, key=lambda p: p[1]) == points[2], "lowest at step 20"
    assert len(drawing.findall(".//s:circle", space)) == 2
    texts = {text.text for text in drawing.findall(".//s:text", space)}
    assert {"Loss ratio", "code", "math", "chosen: 30", "optimizer steps"} <= texts
    areas = ET.fromstring(saved(shown, "weights", "SVG")).findall(".//s:polygon", space)
    assert len(areas) == 2
    assert saved(shown, "weights", "CSV").decode().splitlines()[1].startswith("0,0.333333,0.666667")


def test_a_drag_zooms_all_charts_and_a_double_click_goes_back(opened, one):
    shown = opened(one)
    over = shown.locator("#loss .u-over").bounding_box()
    at = [over["x"] + over["width"] * part for part in (0.25, 0.75)]
    middle = over["y"] + over["height"] / 2
    shown.mouse.move(at[0], middle)
    shown.mouse.down()
    shown.mouse.move(at[1], middle, steps=5)
    shown.mouse.up()
    shown.wait_for_timeout(100)
    span = "(() => {const s = charts.get('ID').plot.scales.x; return [s.min, s.max]})()"
    for id in ("loss", "weights"):
        assert shown.evaluate(span.replace("ID", id)) == pytest.approx([15, 45], abs=1)
    shown.mouse.dblclick(at[0], middle)
    shown.wait_for_timeout(100)
    assert shown.evaluate(span.replace("ID", "loss")) == [0, 60]


def test_several_runs_are_laid_over_each_other(opened, several):
    shown = opened(several)
    assert shown.locator("h1").inner_text() == "5 runs"
    x, *rows = shown.evaluate("charts.get('side0-task0').plot.data")
    means = [
        sum(recorded.losses(0, t, s) / recorded.losses(0, 0, s) for s in (0, 1)) / 2 for t in x
    ]
    assert rows[0] == pytest.approx(means, rel=1e-4) and len(rows) == 6, "two means, two edges each"
    assert list(legend(shown, "side0-task0")) == ["step", "CoBa (2 seeds)", "Equal (2 seeds)"]
    assert shown.locator("canvas").count() == 2, "charts of a run are drawn when it is opened"
    shown.get_by_text("Equal, seed 1", exact=True).last.click()
    shown.wait_for_timeout(100)
    assert shown.locator("canvas").count() > 8
    assert [one.inner_text() for one in shown.locator("main > h2").all()] == [
        "Tasks code, math", "Tasks code, law",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [360, 600, 1600])
def test_no_width_overflows(opened, one, several, width):
    for path in (one, several):
        shown = opened(path, viewport={"width": width, "height": 800})
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        chart = shown.locator("figure .chart").first.bounding_box()
        assert 0.8 * min(width, 1080) - 20 < chart["width"] <= min(width, 1080)


def test_it_prints_in_light_within_the_page(opened, one):
    shown = opened(one, color_scheme="dark")
    shown.evaluate(
        "addEventListener('beforeprint', () => window.printed = [theme(), charts.get('loss').plot.width])"
    )
    pdf = shown.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and 2 <= pdf.count(b"/Type /Page\n") <= 8
    assert shown.evaluate("window.printed") == ["light", 680]
    assert shown.evaluate("theme()") == "dark"


def test_reloading_shows_how_far_a_run_is(opened, folder):
    run = recorded.write(folder / "going", until=25)
    shown = opened(page.write([run]))
    assert shown.evaluate("charts.get('loss').plot.data[0]") == [0, 10, 20]
    assert "Not over: step 25 of 60." in shown.locator(".warning").inner_text()
    later = recorded.write(folder / "later", until=45)
    (later / "metrics.jsonl").replace(run / "metrics.jsonl")
    page.write([run])
    shown.reload()
    assert shown.evaluate("charts.get('loss').plot.data[0]") == [0, 10, 20, 30, 40]
