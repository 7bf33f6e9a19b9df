"""Interrupted and undisturbed runs leave the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from data_prep.command import RunError
from data_prep.shards import ShardReader, generation, publish
from pipeline.checkpoint import _digest, _write, newest_state, read_marker
from pipeline.engine import convert_to_universal
from tests.pipeline.conftest import POCKET
from tests.pipeline.launch import (
    ROOT,
    fork,
    has_checkpoint,
    has_step,
    metrics,
    run,
    start,
    training,
    wait_for,
)


def rows_by_step(run_dir: Path) -> dict[int, list[int]]:
    """The rows that any rank trained on, of each step, from the ranks' own logs."""
    rows: dict[int, list[int]] = {}
    for path in sorted((run_dir / "rows").glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            rows.setdefault(entry["step"], []).extend(entry["rows"])
    return {step: sorted(ids) for step, ids in sorted(rows.items())}


def student_bytes(run_dir: Path) -> bytes:
    """The exported weights."""
    return (run_dir / "student" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_sigkill_changes_nothing(stage: str, ranks: int, tiny, straight, tmp_path: Path) -> None:
    whole, broken = straight(stage, ranks), tmp_path / "run"
    begin = start if (stage, ranks) == ("zero2", 2) else fork
    moments = random.Random(f"{stage}/{ranks}")
    for reached in (moments.randint(1, 5), moments.randint(6, 11)):
        with begin(tiny, ranks=ranks, stage=stage) as running:
            wait_for(has_step(broken, reached))
            time.sleep(moments.uniform(0, 0.3))  # anywhere in a step, a save or an evaluation
            running.kill_everything()
    outcome = run(tiny, ranks=ranks, stage=stage, begin=begin)
    assert outcome.status == 0, outcome.output
    assert student_bytes(broken) == student_bytes(whole)
    assert metrics(broken) == metrics(whole)
    assert rows_by_step(broken) == rows_by_step(whole)
    assert [line["step"] for line in training(broken)] == list(range(1, 13))


@pytest.mark.slow
def test_masked_text_is_masked_the_same_after_a_kill_and_on_other_ranks(
    tiny: list[str], tmp_path: Path
) -> None:
    predict = [
        *tiny,
        f"--teacher.model={POCKET}",  # which has a head
        *("--objective.name=distilbert", "--objective.losses.cos=0", "--train.max_steps=6"),
    ]
    runs = {name: tmp_path / name for name in ("whole", "run", "other ranks")}
    whole, broken, other = ([*predict, f"--output_dir={path}"] for path in runs.values())
    assert run(whole, stage="zero1", begin=fork).status == 0
    with fork(broken, stage="zero1") as running:
        wait_for(has_step(runs["run"], 4))
        running.kill_everything()
    assert run(broken, stage="zero1", begin=fork).status == 0
    assert student_bytes(runs["run"]) == student_bytes(runs["whole"])
    assert metrics(runs["run"]) == metrics(runs["whole"])
    assert run(other, ranks=2, stage="zero1", begin=fork).status == 0
    for ours, theirs in zip(metrics(runs["other ranks"]), metrics(runs["whole"]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    first, *_ = training(runs["whole"])
    assert {name for name in first if "loss" in name} == {"loss", "loss_ce", "loss_mlm"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_other_numbers_of_ranks_see_each_row_once(
    stage: str, tiny, straight, tmp_path: Path
) -> None:
    whole, elastic = straight(stage, 2), tmp_path / "run"
    begin = start if stage == "zero3" else fork
    for ranks, stop_after in ((2, 3), (1, 7), (2, None)):
        with begin(tiny, ranks=ranks, stage=stage) as running:
            if stop_after is not None:
                wait_for(has_step(elastic, stop_after))
                running.ranks()[0].send_signal(signal.SIGUSR1)
            outcome = running.wait()
        assert outcome.status == (0 if stop_after is None else 85), outcome.output
    assert rows_by_step(elastic) == rows_by_step(whole)
    seen = Counter(row for ids in rows_by_step(elastic).values() for row in ids)
    assert max(seen.values()) - min(seen.values()) <= 1  # epochs end within the run
    for ours, theirs in zip(training(elastic), training(whole), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["lr"] == theirs["lr"]
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.slow
def test_other_stages_on_other_numbers_of_ranks_go_on_as_if_undisturbed(
    tiny: list[str], tmp_path: Path
) -> None:
    """In fp32, where rounding hides nothing: a lost optimizer step would be seen."""
    policy = json.loads((ROOT / "ds_configs" / "zero2_fp32.json").read_text())
    configs = {}
    for stage in (1, 2, 3):
        zero = {**policy["zero_optimization"], "stage": stage, "overlap_comm": False}
        configs[stage] = tmp_path / f"zero{stage}.json"
        configs[stage].write_text(json.dumps({**policy, "zero_optimization": zero}))
    whole, elastic = tmp_path / "whole", tmp_path / "run"
    assert run([*tiny, f"--output_dir={whole}"], stage=str(configs[1]), begin=fork).status == 0
    allow = "--allow_change=deepspeed.zero_optimization.stage"
    legs = ((1, 1, 3, []), (2, 3, 6, [allow]), (4, 2, 9, [allow]), (1, 1, None, [allow]))
    for ranks, stage, stop_after, options in legs:
        with fork([*tiny, *options], ranks=ranks, stage=str(configs[stage])) as running:
            if stop_after is not None:
                wait_for(has_step(elastic, stop_after))
                running.ranks()[0].send_signal(signal.SIGUSR1)
            outcome = running.wait()
        assert outcome.status == (0 if stop_after is None else 85), outcome.output
    assert rows_by_step(elastic) == rows_by_step(whole)
    for ours, theirs in zip(metrics(elastic), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do(tiny, straight, tmp_path: Path) -> None:
    shutil.copytree(straight("zero2", 1), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.jsonl")}
    assert before
    outcome = run(tiny, ranks=2)
    assert outcome.status == 0
    assert "nothing left to do" in outcome.output
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.jsonl")}
    (tmp_path / "run" / "student" / "model.safetensors").unlink()  # killed before the export
    assert run(tiny, begin=fork).status == 0
    assert student_bytes(tmp_path / "run") == student_bytes(straight("zero2", 1))


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank", "runner", "group"])
def test_a_request_to_stop_saves_and_exits_85(who: str, tiny: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    slow = [*tiny, "--train.max_steps=4000", "--train.save_every=4000", "--train.eval_every=0"]
    with start(slow, ranks=2) as running:
        wait_for(has_step(run_dir, 3))
        ranks = running.ranks()
        assert len(ranks) == 2
        if who == "rank":
            ranks[1].send_signal(signal.SIGTERM)
        elif who == "runner":
            running.process.kill()
        else:
            for rank in ranks:
                rank.send_signal(signal.SIGUSR1)
        wait_for(lambda: not any(rank.is_running() for rank in ranks), timeout_s=30)
        outcome = running.wait()
    if who != "runner":
        assert outcome.status == 85, outcome.output
    latest = (run_dir / "checkpoints" / "latest").read_text()
    assert (run_dir / "checkpoints" / latest / "COMPLETE").exists()
    assert int(latest.removeprefix("step-")) == metrics(run_dir)[-1]["step"]


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_with_one_line(tiny: list[str], tmp_path: Path) -> None:
    with start([*tiny, "--train.max_steps=4000", "--train.eval_every=0"], ranks=2) as running:
        wait_for(has_step(tmp_path / "run", 3))
        running.ranks()[1].kill()
        outcome = running.wait(timeout_s=60)
    assert outcome.status not in (0, 85), outcome.output
    assert len(outcome.errors) == 1, outcome.output
    assert "rank 0 lost its connection" in outcome.errors[0]
    assert "Traceback" not in outcome.output


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(tiny, straight, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight("zero2", 1), run_dir)
    expected = student_bytes(run_dir)
    (shard,) = (run_dir / "checkpoints" / "step-00000012").glob("*optim_states.pt")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    outcome = run(tiny, begin=fork)
    assert outcome.status == 0, outcome.output
    assert "step-00000012 is damaged" in outcome.output
    assert "resuming from" in outcome.output
    assert "step-00000008" in outcome.output
    assert student_bytes(run_dir) == expected


class Payload:
    """A pickle of it makes whoever loads it create a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.slow
def test_a_checkpoint_that_would_run_code_is_refused(tiny, straight, tmp_path: Path) -> None:
    """Its checksums match: whoever can write there can make them."""
    run_dir, made = tmp_path / "run", tmp_path / "made"
    shutil.copytree(straight("zero2", 1), run_dir)
    folder = run_dir / "checkpoints" / "step-00000008"
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    shard = folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(shard, weights_only=False)
    torch.save({**content, "extra": Payload(made)}, shard)
    torch.load(shard, weights_only=False)
    assert made.exists()  # the payload works
    made.rmdir()
    marker = read_marker(folder)
    facts = _write(folder, {shard.name: memoryview(shard.read_bytes())}, 1)
    body = {"state": dataclasses.asdict(marker.state), "files": {**marker.files, **facts}}
    (folder / "COMPLETE").write_text(json.dumps({**body, "digest": _digest(body)}))
    outcome = run(tiny, begin=fork)
    assert outcome.status == 1, outcome.output
    (error,) = outcome.errors
    assert "step-00000008" in error
    assert "posix.mkdir" in error
    with pytest.raises(RunError, match=r"step-00000008.*posix.mkdir"):
        convert_to_universal(folder.parent, folder.name, tmp_path / "universal")
    assert not made.exists()


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_and_later_the_run(tiny, tmp_path: Path) -> None:
    """On one rank of two; its files may grow to less than a checkpoint has."""
    run_dir = tmp_path / "run"
    many = ["--train.max_steps=4000", "--train.eval_every=0", "--train.max_failed_saves=20"]

    def failures() -> list[int]:
        return [line["failed_saves"] for line in metrics(run_dir) if "failed_saves" in line]

    with fork([*tiny, *many], ranks=2) as running:
        wait_for(has_checkpoint(run_dir, 4))
        rank = running.ranks()[1]
        rank.rlimit(psutil.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        wait_for(lambda: bool(failures()))
        rank.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        failed_at = metrics(run_dir)[-1]["step"]
        latest = run_dir / "checkpoints" / "latest"
        wait_for(lambda: int(latest.read_text().removeprefix("step-")) > failed_at)
        num_before = len(failures())
        rank.rlimit(psutil.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        outcome = running.wait()
    assert outcome.status == 1, outcome.output
    (error,) = outcome.errors
    assert "rank 1: File too large" in error
    assert "in a row: 20" in error
    assert outcome.output.count("warning: checkpoint") == len(failures())
    assert failures()[num_before:] == list(range(1, 21))
    newest = newest_state(run_dir / "checkpoints")
    assert newest is not None
    assert newest.step > failed_at


@pytest.mark.slow
def test_a_changed_recipe_is_refused_by_name(tiny: list[str], tmp_path: Path) -> None:
    assert run([*tiny, "--train.max_steps=2"], begin=fork).status == 0
    changed = [*tiny, "--train.learning_rate=0.5", "--train.max_steps=2"]
    refused = run(changed, ranks=2, begin=fork)
    assert refused.status == 2
    assert len(refused.errors) == 1
    assert "train.learning_rate" in refused.errors[0]
    assert "--allow_change" in refused.errors[0]
    free = run([*tiny, "--train.max_steps=2", "--train.log_every=7"], begin=fork)
    assert free.status == 0, free.output
    longer = [*tiny, "--train.max_steps=3", "--allow_change=train.max_steps"]
    allowed = run(longer, begin=fork)
    assert allowed.status == 0, allowed.output
    assert [line["step"] for line in training(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_shards_that_it_began_with(
    tiny: list[str], straight, heldout_shards: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(heldout_shards, tmp_path / "shards"))
    arguments = [*tiny, f"--data.shards={shards}"]
    with fork(arguments, stage="zero1") as running:
        wait_for(has_checkpoint(tmp_path / "run", 4))
        running.kill_everything()
    began_with = ShardReader(str(shards))
    first, *others = began_with.manifest.shards
    assert first.language is None
    newer = {"shards": tuple(others), "rows": began_with.manifest.rows - first.rows}
    kept = shards / generation(began_with.digest)
    text = (shards / "manifest.json").read_bytes()
    publish(shards, dataclasses.replace(began_with.manifest, **newer))
    kept.unlink()  # as if somebody had copied the newer shards over the older ones
    refused = run(arguments, stage="zero1", begin=fork)
    assert refused.status == 2, refused.output
    assert "--allow_change 'data.shards (content)'" in refused.output
    kept.write_bytes(text)
    outcome = run(arguments, stage="zero1", begin=fork)
    assert outcome.status == 0, outcome.output
    assert student_bytes(tmp_path / "run") == student_bytes(straight("zero1", 1))
    assert metrics(tmp_path / "run") == metrics(straight("zero1", 1))
