"""`python -m pipeline.report RUN [RUN ...]`: one self-contained HTML page of one run or several."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from data_prep.command import EXIT_FINISHED, ConfigError, OptionParser, run_command
from pipeline.metrics import METRICS, read_lines

INFERENCE = "inference.json"
_HELDOUT = "heldout_loss_"
_COLOURS = ("#2a6f97", "#c8553d", "#588157", "#7b2d8b", "#bc8a00")


def main(argv: Sequence[str] | None = None) -> int:
    """Write RUN/report.html of the first run, comparing all that are named."""
    parser = OptionParser(prog="python -m pipeline.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run")
    runs: list[Path] = parser.parse_args(argv).runs
    for run in runs:
        if not read_lines(run / METRICS):
            raise ConfigError(f"{run} has no lines in {METRICS}, so there is nothing to report")
    print(write_report(runs))
    return EXIT_FINISHED


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What the page shows of one run."""

    name: str
    training: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    recipe: str
    provenance: dict[str, Any]
    inference: dict[str, Any] | None

    @property
    def by_language(self) -> dict[str, tuple[float | None, float]]:
        """First and last held-out loss of each language; no first one if it came later."""
        if not self.heldout:
            return {}
        first, last = self.heldout[0], self.heldout[-1]
        names = [key.removeprefix(_HELDOUT) for key in last if key.startswith(_HELDOUT)]
        return {name: (first.get(_HELDOUT + name), last[_HELDOUT + name]) for name in sorted(names)}


def read_run(run: Path) -> RunFacts:
    """Everything that a run left for the page."""
    lines = read_lines(run / METRICS)
    inference = run / INFERENCE
    provenance = run / "provenance.json"
    config = run / "config.yaml"
    return RunFacts(
        name=str(run),
        training=[line for line in lines if "loss" in line],
        heldout=[line for line in lines if "heldout_loss" in line],
        recipe=config.read_text(encoding="utf-8") if config.exists() else "",
        provenance=json.loads(provenance.read_text()) if provenance.exists() else {},
        inference=json.loads(inference.read_text()) if inference.exists() else None,
    )


def write_report(runs: Sequence[Path]) -> Path:
    """Write runs[0]/report.html and return its path. Text from the runs is escaped."""
    facts = [read_run(run) for run in runs]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        runs=facts,
        plots=_plots(facts),
        provenance=[yaml.safe_dump(f.provenance, sort_keys=False) for f in facts],
    )
    path = runs[0] / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _plots(facts: Sequence[RunFacts]) -> list[tuple[str, Markup]]:
    plots = [
        ("Training loss", _plot(lambda axes: _curves(axes, facts, "training", "loss"))),
        (
            "Throughput (tokens/s)",
            _plot(lambda axes: _curves(axes, facts, "training", "tokens_per_second")),
        ),
    ]
    if any(f.heldout for f in facts):
        plots.append(
            (
                "Held-out loss, mean over languages",
                _plot(lambda axes: _curves(axes, facts, "heldout", "heldout_loss", marker="o")),
            )
        )
        plots.append(("Held-out loss by language", _plot(lambda axes: _bars(axes, facts))))
    return plots


def _plot(draw: Callable[[Any], None]) -> Markup:
    """One figure as inline SVG: sharp on a phone and in print, no file beside the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    draw(axes)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _curves(
    axes: Any, facts: Sequence[RunFacts], part: str, key: str, marker: str | None = None
) -> None:
    for run, colour in zip(facts, _COLOURS * len(facts), strict=False):
        lines = getattr(run, part)
        steps, values = [line["step"] for line in lines], [line[key] for line in lines]
        axes.plot(steps, values, color=colour, marker=marker, markersize=4, label=run.name)
    axes.set_xlabel("step")
    if len(facts) > 1:
        axes.legend(frameon=False)


def _bars(axes: Any, facts: Sequence[RunFacts]) -> None:
    languages = sorted({language for run in facts for language in run.by_language})
    width = 0.8 / len(facts)
    for number, (run, colour) in enumerate(zip(facts, _COLOURS * len(facts), strict=False)):
        places = [i + number * width for i, name in enumerate(languages) if name in run.by_language]
        last = [run.by_language[name][1] for name in languages if name in run.by_language]
        axes.bar(places, last, width=width, color=colour, label=run.name)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(languages))], languages)
    if len(facts) > 1:
        axes.legend(frameon=False)


if __name__ == "__main__":
    run_command(main)
