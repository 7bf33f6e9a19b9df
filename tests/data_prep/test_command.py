from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.command import (
    ConfigError,
    ElsewhereError,
    RunError,
    one_line,
    parse_recipe,
    run_command,
)
from data_prep.config import PrepRecipe


def parse(*arguments: str) -> PrepRecipe:
    recipe, _ = parse_recipe(PrepRecipe, arguments, prog="program", description="It works.")
    return recipe


def test_a_recipe_is_read_and_overridden_by_dotted_names(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3\nprep: {input: [a, b], seq_len: 128}\ntrain: {max_steps: 5}\n")
    recipe = parse("--config", str(path), "--prep.seq_len", "64", "--prep.smoothing=1")
    assert (recipe.seed, recipe.prep.input, recipe.prep.seq_len) == (3, ["a", "b"], 64)
    assert (recipe.prep.smoothing, recipe.prep.heldout_rows) == (1.0, 0)


def test_the_default_recipe_is_read_only_where_none_is_named(tmp_path: Path) -> None:
    for name, seed in (("a.yaml", 5), ("b.yaml", 6)):
        (tmp_path / name).write_text(f"seed: {seed}\n")

    def seed(*arguments: str) -> int:
        default = str(tmp_path / "a.yaml")
        recipe, _ = parse_recipe(
            PrepRecipe, arguments, prog="p", description="d", default_config=default
        )
        return recipe.seed

    assert seed() == 5
    assert seed(f"--config={tmp_path / 'b.yaml'}") == 6


def test_a_commands_own_options_are_no_recipe_keys() -> None:
    _, options = parse_recipe(
        PrepRecipe,
        ["--again", "--seed", "4"],
        prog="p",
        description="d",
        add_options=lambda parser: parser.add_argument("--again", action="store_true"),
    )
    assert options.again is True


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prep.seqlen", "3"], "unknown key 'prep.seqlen'.*did you mean 'prep.seq_len'"),
        (["--prep.seq_le", "3"], "unknown key 'prep.seq_le'"),  # no abbreviations
        (["--prep.seq_len", "abc"], "prep.seq_len: expected int. Got value: abc"),
        (["--prep.seq_len", "12.5"], "prep.seq_len: expected int. Got value: 12.5"),
        (["--prep.input", "text.jsonl"], "prep.input: expected list. Got value: text.jsonl"),
        (["--bogus", "3"], "unknown key 'bogus'.*known keys here:.*teacher"),
        (["positional"], "positional"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as refusal:
        parse(*arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prep: {seqlen: 3}", "unknown key 'prep.seqlen'.*did you mean 'prep.seq_len'"),
        ("perp: {seq_len: 3}", "unknown key 'perp"),
        ("prep: {heldout_rows: two}", "prep.heldout_rows: expected int. Got value: two"),
        ("prep: {input: [a", "parsing"),
        ("- 1", "holds no recipe but list"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(
    tmp_path: Path, text: str, named: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=named) as refusal:
        parse("--config", str(tmp_path / "recipe.yaml"))
    assert "\n" not in str(refusal.value)


def test_one_line_folds_lines() -> None:
    assert one_line(ValueError(" a\n   b \n\nc\n")) == "a b c"


def ends(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "rank", "status", "said"),
    [
        (lambda: 0, 0, 0, []),
        (lambda: 85, 0, 85, []),
        (ends(ConfigError("the\n reason")), 0, 2, ["error: the reason"]),
        (ends(ConfigError("the reason")), 1, 2, []),
        (ends(RunError("the\n reason")), 0, 1, ["error: the reason"]),
        (ends(RunError("the reason")), 1, 1, ["error: the reason"]),
        (ends(ElsewhereError(2)), 1, 2, []),
        (ends(ElsewhereError(1)), 1, 1, []),
        (ends(KeyboardInterrupt()), 0, 1, ["error: interrupted"]),
        (ends(KeyboardInterrupt()), 1, 1, []),
        (ends(SystemExit(0)), 0, 0, []),
        (ends(SystemExit("text")), 0, 1, []),
    ],
)
def test_exit_statuses(
    main: Callable[[], int],
    rank: int,
    status: int,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(main, rank=rank, leave=sys.exit)
    assert end.value.code == status
    assert capsys.readouterr().err.splitlines() == said


def test_only_a_bug_prints_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(ends(ZeroDivisionError("bug")), rank=1, leave=sys.exit)
    assert end.value.code == 1
    assert re.search(r"Traceback.*ZeroDivisionError: bug", capsys.readouterr().err, re.DOTALL)


def test_a_failed_process_waits_for_nothing(repo: Path) -> None:
    """A collective that other ranks still wait in is entered when an interpreter shuts down."""
    program = (
        "import atexit, time\n"
        "from data_prep.command import RunError, run_command\n"
        "atexit.register(time.sleep, 60)\n"
        "def main():\n"
        "    print('out')\n"
        "    raise RunError('the reason')\n"
        "run_command(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "error: the reason\n")
