from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data_prep.command import ConfigError
from pipeline.report import INFERENCE, main, read_run, write_report

TRAINING = [
    {"step": 1, "loss": 3.25, "tokens": 1000, "tokens_per_second": 900.0, "grad_norm": 1.0},
    {"step": 2, "loss": 1.75, "tokens": 2000, "tokens_per_second": 1234.5, "grad_norm": None},
]
HELDOUT = [
    {"step": 1, "heldout_loss": 3.5, "heldout_loss_de": 3.0, "heldout_loss_sw": 4.0},
    {"step": 2, "heldout_loss": 1.5, "heldout_loss_de": 1.125, "heldout_loss_sw": 1.875},
]
VOID = {"meta", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """Text and elements of a page; fails where elements do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.words: list[str] = []
        self.sources: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.sources += [str(v) for k, v in attrs if k in ("src", "href") and v and v[0] != "#"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(
        name: str = "run", lines: list[dict[str, Any]] = TRAINING + HELDOUT, **files: str
    ) -> Path:
        run = tmp_path / name
        run.mkdir()
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for stem, content in files.items():
            (run / {"config": "config.yaml"}.get(stem, f"{stem}.json")).write_text(content)
        return run

    return make


def report(*runs: Path) -> Page:
    path = write_report(runs)
    assert path == runs[0] / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_figures_of_a_run_are_on_its_page(make_run: Callable[..., Path]) -> None:
    run = make_run(config="seed: 12345", provenance='{"packages": {"torch": "9.8.7"}}')
    page = report(run)
    row = f"{run} 2 2,000 3.2500 1.7500 3.5000 1.5000 1,234"
    assert row in page.text
    assert "de 3.0000 1.1250" in page.text
    assert "sw 4.0000 1.8750" in page.text
    assert "seed: 12345" in page.text
    assert "9.8.7" in page.text
    assert page.elements.count("svg") == 4


def test_the_page_needs_nothing_beside_it(make_run: Callable[..., Path]) -> None:
    page = report(make_run())
    assert page.sources == []
    assert "script" not in page.elements


def test_a_run_that_has_only_begun(make_run: Callable[..., Path]) -> None:
    page = report(make_run(lines=TRAINING[:1]))
    assert page.elements.count("svg") == 2  # no held-out losses yet
    assert "1 1,000 3.2500 3.2500" in page.text


def test_a_run_with_held_out_lines_alone(make_run: Callable[..., Path]) -> None:
    assert "de 3.0000 1.1250" in report(make_run(lines=HELDOUT)).text


def test_a_language_that_came_later(make_run: Callable[..., Path]) -> None:
    lines = [*TRAINING, HELDOUT[0], {**HELDOUT[1], "heldout_loss_th": 2.5}]
    text = report(make_run(lines=lines)).text
    assert "de 3.0000 1.1250" in text
    assert re.search(r"th \S* ?2\.5000", text)


def test_runs_are_compared_on_the_first_ones_page(make_run: Callable[..., Path]) -> None:
    first, second = make_run("first"), make_run("second", lines=TRAINING)
    page = report(first, second)
    assert str(first) in page.text
    assert f"{second} 2 2,000 3.2500 1.7500" in page.text
    assert not (second / "report.html").exists()


def test_many_runs_have_a_colour_each_or_share_one(make_run: Callable[..., Path]) -> None:
    runs = [make_run(f"run-{number}") for number in range(7)]
    page = report(*runs)
    assert all(f"{run} 2 2,000" in page.text for run in runs)


def test_text_of_a_run_is_text(make_run: Callable[..., Path]) -> None:
    evil = "<script>alert(1)</script>"
    run = make_run("a<b>&$x", config=f"teacher: {evil}", provenance=json.dumps({"gpu": evil}))
    page = report(run, make_run("_second_$"))
    assert "script" not in page.elements
    assert page.text.count(evil) == 2
    assert "a<b>&$x 2 2,000" in page.text


def test_inference_figures_are_shown_where_there_are_some(make_run: Callable[..., Path]) -> None:
    figures = {"parameters": 1_000_000, "embeddings": 5000, "milliseconds": 12.34}
    content = {
        "teacher": {**figures, "tokens_per_second": 100.0},
        "student": {**figures, "tokens_per_second": 456.0},
        "speedup": 4.56,
        "conditions": "one thread",
    }
    run = make_run(**{INFERENCE.removesuffix(".json"): json.dumps(content)})
    text = report(run).text
    assert "student 1,000,000 5,000 12.3 456" in text
    assert "4.56 times as fast as the teacher: one thread." in text
    assert "times as fast" not in report(make_run("without")).text


def test_the_same_run_gives_the_same_page(make_run: Callable[..., Path]) -> None:
    run = make_run()
    first = write_report([run]).read_text()
    assert without_ids(write_report([run]).read_text()) == without_ids(first)


def without_ids(html: str) -> str:
    """Matplotlib names clip paths at random."""
    return re.sub(r"\b[pm][0-9a-f]{10}\b", "ID", html)


def test_a_torn_last_line_is_left_out(make_run: Callable[..., Path]) -> None:
    run = make_run(lines=TRAINING)
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "lo')
    assert [line["step"] for line in read_run(run).training] == [1, 2]


def test_the_command_prints_where_the_page_is(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


@pytest.mark.parametrize("lines", [None, []])
def test_a_folder_without_a_run_is_refused_by_name(
    lines: list[Any] | None, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "none" if lines is None else make_run(lines=lines)
    with pytest.raises(ConfigError, match=rf"{run} has no lines in metrics\.jsonl"):
        main([str(make_run("other")), str(run)])
