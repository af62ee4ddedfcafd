"""The page of a comparison: complete, self-contained, and drawn by a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.report.charts import Mark, scatter_chart
from secateur.report.comparison import page, writer

COSTS = {"weights": 4e5, "file": 1.7e6, "energy": 2e-5, "time on edge-cpu": 4e-4}


def statistic(mean: float, deviation: float) -> dict[str, Any]:
    return {"mean": mean, "deviation": deviation, "values": [mean - deviation, mean + deviation]}


def entry(name: str, accuracy: float, factor: float) -> dict[str, Any]:
    return {
        "name": name,
        "form": "non-structured",
        "seeds": [0, 1],
        "epochs": 30,
        "accuracy": statistic(accuracy, 0.004),
        "loss": statistic(0.91 - accuracy, 0.002),
        "costs": {cost: statistic(factor * most, 0.1 * most) for cost, most in COSTS.items()},
        "recipe": {"name": name, "stages": [{"method": "admm"}]},
    }


@pytest.fixture
def report() -> dict[str, Any]:
    recipes = [entry("gmp", 0.88, 0.3), entry("<admm>", 0.9, 0.2), entry("binary", 0.7, 0.11)]
    return {
        "secateur": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "seeds": [0, 1],
        "margin": 0.005,
        "equal_epochs": True,
        "environment": {"cpu": "AVX2", "threads": 1},
        "dense": entry("dense", 0.91, 1.0),
        "recipes": recipes,
        "fronts": {cost: ["binary", "<admm>", "dense"] for cost in COSTS},
        "verdicts": [{"platform": "here", "about": "Measured.", "text": "It pays 1.30x & more."}],
        "failed": {"late-seed1": "train.lr: the loss became nan"},
        "notes": ["nothing was <timed>"],
    }


def charts(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_page_is_complete_escaped_and_needs_no_network(report: dict[str, Any]) -> None:
    html = page(report)
    assert len(charts(html)) == len(COSTS)
    assert all(len(chart.findall(".//circle")) == 4 for chart in charts(html))
    for text in ("It pays 1.30x &amp; more.", "late-seed1 failed: train.lr", "&lt;timed&gt;"):
        assert text in html
    assert "<admm>" not in html
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script""", html)
    assert "Pareto front: binary, &lt;admm&gt;, dense." in html
    assert "0.5 points of mean validation accuracy" in html
    report["equal_epochs"] = False
    report["recipes"][0]["epochs"] = 20
    assert "not trained equally long: 20 to 30 epochs" in page(report)


costs = st.floats(1e-9, 1e12)


@given(st.lists(st.tuples(costs, st.floats(0, 1), st.floats(0, 3)), min_size=1, max_size=6))
def test_marks_are_where_their_numbers_say(points: list[tuple[float, float, float]]) -> None:
    marks = [
        Mark(str(at), f"n{at}", x, y, (x * dx, 0.1), 1) for at, (x, y, dx) in enumerate(points)
    ]
    front = [min(range(len(points)), key=lambda at: points[at][0])]
    chart = ElementTree.fromstring(scatter_chart("cost", marks, front, str, str))
    _, _, width, height = map(float, chart.attrib["viewBox"].split())
    places = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in chart.findall(".//circle")]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    for one, a in zip(points, places, strict=True):
        for other, b in zip(points, places, strict=True):
            assert a[0] <= b[0] + 0.1 or one[0] >= other[0]
            assert a[1] >= b[1] - 0.1 or one[1] >= other[1]
    for bars in (path.attrib["d"] for path in chart.findall(".//path[@class='spread']")):
        numbers = [float(number) for number in re.findall(r"[-\d.]+", bars)]
        assert len(numbers) == 6
        assert all(-0.1 <= number <= width for number in numbers)


def test_costs_are_written_in_their_units() -> None:
    written = [writer(cost)(2.5e-5 if cost[0] in "et" else 2500) for cost in COSTS]
    assert written == ["2,500", "2.50 kB", "25.0 µJ", "25.0 µs"]


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium, the installed one if there is one; the reason is shown where there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="plots not looked at: no playwright")
    installed = shutil.which("chromium") or shutil.which("google-chrome")
    with sync.sync_playwright() as drivers:
        try:
            found = drivers.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"PLOTS NOT LOOKED AT: no Chromium here ({str(error).splitlines()[0]})")
        yield found
        found.close()


def test_chromium_draws_every_mark_and_asks_for_nothing(
    report: dict[str, Any], tmp_path: Path, browser: Any
) -> None:
    path = tmp_path / "compare.html"
    path.write_text(page(report), encoding="utf-8")
    shown, asked = browser.new_page(viewport={"width": 1200, "height": 900}), []
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(path.as_uri())
    assert asked == [path.as_uri()]
    boxes = shown.eval_on_selector_all(
        "svg",
        """charts => charts.map(chart => {
            const box = element => element.getBoundingClientRect().toJSON();
            const paint = element => getComputedStyle(element);
            return {
                chart: box(chart),
                marks: [...chart.querySelectorAll('circle')].map(box),
                fills: [...chart.querySelectorAll('circle')].map(e => paint(e).fill),
                spreads: [...chart.querySelectorAll('.spread')].map(e => paint(e).stroke),
                front: chart.querySelector('.front').getTotalLength(),
            };
        })""",
    )
    assert len(boxes) == len(COSTS)
    for found in boxes:
        assert found["chart"]["width"] > 300
        assert len({(mark["x"], mark["y"]) for mark in found["marks"]}) == 4
        for mark in found["marks"]:
            assert mark["width"] > 4
            assert found["chart"]["left"] < mark["left"] < mark["right"] < found["chart"]["right"]
            assert found["chart"]["top"] < mark["top"] < mark["bottom"] < found["chart"]["bottom"]
        assert len(set(found["fills"])) == 4  # a colour each, none of them nothing
        assert found["fills"] == found["spreads"]
        assert found["front"] > 100
