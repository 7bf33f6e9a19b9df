from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from data_prep.command import ConfigError
from data_prep.shards import ShardReader
from pipeline import vocabulary
from pipeline.attention import PACKED
from pipeline.checkpoint import check_identity, identity
from pipeline.config import Recipe, check_recipe
from pipeline.models import CutEncoder, keep_tokens, num_parameters, trimmed_config
from pipeline.topology import Topology
from pipeline.trimmed_tokenizer import trimmed_tokenizer
from pipeline.vocabulary import (
    COUNTS,
    Vocabulary,
    check_languages,
    choose_vocabulary,
    count_tokens,
    in_words,
)

CPU = torch.device("cpu")


@pytest.fixture
def choose(
    make_recipe: Callable[..., Recipe], shards: Path, one_rank: Topology, tmp_path: Path
) -> Callable[..., Vocabulary | None]:
    """Chooses the tokens that keys of student ask for, from the prepared demo text."""

    def run(reader: Any = None, digest: str = "digest", **student: Any) -> Vocabulary | None:
        recipe = make_recipe(student=student, output_dir=str(tmp_path))
        check_recipe(recipe)
        return choose_vocabulary(recipe, reader or ShardReader(str(shards)), digest, one_rank, CPU)

    return run


def counted_by_hand(reader: ShardReader, languages: set[str]) -> collections.Counter[int]:
    """Segment by segment, without padding."""
    counts: collections.Counter[int] = collections.Counter()
    for index in range(len(reader.blocks())):
        input_ids, cu_seqlens, meta = reader.read_sample(index)
        flat, bounds = input_ids.reshape(-1).tolist(), cu_seqlens.tolist()
        for number, language in enumerate(meta["segment_languages"]):
            if language is not None and (not languages or language in languages):
                counts.update(flat[bounds[number] : bounds[number + 1]])
    return counts


@pytest.mark.parametrize("languages", [set(), {"de"}, {"sw", "de"}])
def test_tokens_are_counted_by_segment_and_any_split_over_ranks_adds_up(
    languages: set[str], shards: Path
) -> None:
    reader = ShardReader(str(shards))
    expected = counted_by_hand(reader, languages)
    known = reader.manifest.tokens
    assert expected.total() == sum(known[name] for name in languages or known)
    blocks = range(len(reader.blocks()))
    for num_ranks in (1, 3):
        parts = [torch.zeros(16000, dtype=torch.int64) for _ in range(num_ranks)]
        for rank, part in enumerate(parts):
            count_tokens(reader, blocks[rank::num_ranks], languages, part)
        total = torch.stack(parts).sum(0)
        assert {i: n for i, n in enumerate(total.tolist()) if n} == dict(expected)


@pytest.mark.parametrize("min_count", [1, 2, 5])
@pytest.mark.parametrize("languages", [[], ["de"]])
def test_what_occurs_often_enough_is_kept_and_coverage_is_its_share(
    min_count: int, languages: list[str], shards: Path, choose, pocket_teacher: Path
) -> None:
    chosen = choose(
        vocabulary="languages" if languages else "corpus",
        vocabulary_min_count=min_count,
        vocabulary_languages=languages,
    )
    counts = counted_by_hand(ShardReader(str(shards)), set(languages))
    kept = set(chosen.kept.tolist())
    assert {token for token, count in counts.items() if count >= min_count} <= kept
    tokenizer = AutoTokenizer.from_pretrained(pocket_teacher)
    spelling = [t for t in kept if counts[t] < min_count]
    names = tokenizer.convert_ids_to_tokens(spelling)
    others = [n for n in names if len(n) > 1 and n not in tokenizer.all_special_tokens]
    assert len(others) <= 1  # the one of the lowest score
    assert len(kept) < 16000
    covered = sum(count for token, count in counts.items() if token in kept)
    assert (chosen.num_covered, chosen.num_counted) == (covered, counts.total())
    assert (covered == counts.total()) == (min_count == 1)
    assert chosen.kept.tolist() == sorted(kept)
    assert (chosen.num_ids, chosen.unk_id) == (16000, 3)


def test_the_whole_vocabulary_needs_no_counting(choose) -> None:
    assert choose(reader=SimpleNamespace()) is None


def test_counts_are_kept_for_a_resumed_run(choose, tmp_path: Path, monkeypatch) -> None:
    keys = {"vocabulary": "corpus", "vocabulary_min_count": 2}
    first = choose(**keys)
    calls = []

    def spy(*arguments: Any) -> None:
        calls.append(arguments)
        count_tokens(*arguments)

    monkeypatch.setattr(vocabulary, "count_tokens", spy)
    again = choose(**keys)
    assert not calls
    assert torch.equal(first.kept, again.kept)
    assert dataclasses.replace(first, kept=again.kept) == again
    choose(**{**keys, "vocabulary_min_count": 3})
    assert not calls  # the counts are the same
    choose(**{**keys, "vocabulary": "languages"}, vocabulary_languages=["de"])
    assert len(calls) == 1
    choose(**keys)
    assert len(calls) == 2
    choose(**keys, digest="of other shards")
    assert len(calls) == 3
    choose(**keys)
    (tmp_path / COUNTS).write_bytes((tmp_path / COUNTS).read_bytes()[:100])
    assert torch.equal(choose(**keys).kept, first.kept)
    assert len(calls) == 5


def test_another_choice_is_another_run(make_recipe: Callable[..., Recipe]) -> None:
    def named(**student: Any) -> dict[str, Any]:
        return identity(make_recipe(student=student), {}, "digest")

    run = named(vocabulary="corpus", vocabulary_min_count=2)
    check_identity(run, named(vocabulary="corpus", vocabulary_min_count=2), [])
    for other, key in (
        ({"vocabulary": "corpus", "vocabulary_min_count": 3}, "student.vocabulary_min_count"),
        ({}, "student.vocabulary "),
        ({"init": "svd", "vocabulary": "corpus", "vocabulary_min_count": 2}, "student.init "),
    ):
        with pytest.raises(ConfigError, match=key):
            check_identity(run, named(**other), [])


# The student


def save_model(folder: Path, model_type: str, num_ids: int) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=num_ids + 8,  # some models have rows that no token uses
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=140,
        pad_token_id=0 if model_type == "bert" else 1,
        bos_token_id=0,
        eos_token_id=num_ids - 1,  # to be seen with another number; nothing computes with it
    )
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "which"), [("xlm-roberta", "pocket_teacher"), ("bert", "bert_tokenizer")]
)
def test_a_trimmed_student_computes_what_the_whole_one_does(
    model_type: str, which: str, tmp_path: Path, repo: Path, request: pytest.FixtureRequest
) -> None:
    whole_tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(which))
    num_ids = len(whole_tokenizer)
    lines = (repo / "recipes" / "demo_text" / "de.jsonl").read_text().splitlines()
    words = [word for line in lines for word in json.loads(line)["text"].split()]
    texts = [" ".join(words[i : i + 20]) for i in range(0, 2000, 20)]
    used = {id_ for text in texts[:50] for id_ in whole_tokenizer(text)["input_ids"]}
    is_used = np.isin(np.arange(num_ids), list(used))
    kept = torch.from_numpy(vocabulary.kept_ids(whole_tokenizer, is_used))
    whole = AutoModel.from_pretrained(save_model(tmp_path / "whole", model_type, num_ids)).eval()

    model = AutoModel.from_pretrained(tmp_path / "whole")
    keep_tokens(model, kept)
    model.save_pretrained(tmp_path / "trimmed")
    trimmed_tokenizer(whole_tokenizer, kept.numpy()).save_pretrained(tmp_path / "trimmed")
    trimmed = AutoModel.from_pretrained(tmp_path / "trimmed").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    assert trimmed.config.vocab_size == len(tokenizer) == len(kept) < num_ids
    assert trimmed.config.pad_token_id == whole.config.pad_token_id == tokenizer.pad_token_id
    assert kept[trimmed.config.bos_token_id] == whole.config.bos_token_id
    num_equal = 0
    for text in texts:
        before = whole_tokenizer(text, return_tensors="pt")["input_ids"]
        after = tokenizer(text, return_tensors="pt")["input_ids"]
        if set(before[0].tolist()) <= set(kept.tolist()):
            assert torch.equal(kept[after], before)
            with torch.no_grad():
                assert torch.equal(
                    trimmed(after).last_hidden_state, whole(before).last_hidden_state
                )
            num_equal += 1
        else:
            with torch.no_grad():
                assert trimmed(after).last_hidden_state.isfinite().all()
    assert 50 <= num_equal < len(texts)


def test_the_student_reads_the_teachers_ids(tmp_path: Path) -> None:
    """Kept ones as they are, dropped ones as unknown."""
    kept = torch.tensor([0, 1, 2, 3, 10, 20, 30])
    chosen = Vocabulary(kept=kept, num_ids=40, unk_id=3, num_counted=1, num_covered=1)
    folder = save_model(tmp_path, "xlm-roberta", 40)
    whole = CutEncoder(AutoModel.from_pretrained(folder, attn_implementation=PACKED)).eval()
    model = AutoModel.from_pretrained(folder, attn_implementation=PACKED)
    keep_tokens(model, kept)
    student = CutEncoder(model, new_ids=chosen.new_ids()).eval()
    assert student.word_embeddings.weight.shape == (7, 16)
    assert student.word_embeddings.padding_idx == whole.word_embeddings.padding_idx == 1
    assert "new_ids" not in student.state_dict()
    batch = (torch.arange(5)[None], torch.tensor([0, 2, 5], dtype=torch.int32), 3)
    with torch.no_grad():
        ours = student(torch.tensor([[0, 20, 11, 39, 2]]), *batch)
        theirs = whole(torch.tensor([[0, 20, 3, 3, 2]]), *batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_configuration_of_the_whole_student_is_left_alone(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(save_model(tmp_path, "xlm-roberta", 40))
    trimmed = trimmed_config(config, torch.tensor([0, 1, 2, 3, 10, 39]))
    assert (config.vocab_size, config.eos_token_id) == (48, 39)
    assert (trimmed.vocab_size, trimmed.eos_token_id) == (6, 5)


def test_the_report_counts_parameters_as_they_are(tmp_path: Path) -> None:
    kept = torch.tensor([0, 1, 2, 3, 10, 20, 30])
    chosen = Vocabulary(kept=kept, num_ids=40, unk_id=3, num_counted=400, num_covered=399)
    folder = save_model(tmp_path, "xlm-roberta", 40)
    model = AutoModel.from_pretrained(folder)
    before = sum(p.numel() for p in model.parameters())
    assert num_parameters(model.config) == before
    facts = chosen.facts(before, model.config.vocab_size, 16)
    keep_tokens(model, kept)
    after = sum(p.numel() for p in model.parameters())
    assert facts == {
        "tokens": 40,
        "tokens_kept": 7,
        "coverage_percent": 99.75,
        "parameters": after,
        "parameters_saved": before - after,
        "parameters_saved_percent": 100 * (before - after) / before,
    }
    words = in_words(facts)
    assert words.startswith("7 of 40 tokens kept, 99.750% of those in the text; ")
    assert f"{after:,} parameters, {before - after:,} (" in words


# What is refused


@pytest.mark.parametrize(
    ("student", "named"),
    [
        ({"vocabulary_min_count": 0, "vocabulary": "corpus"}, "vocabulary_min_count=0 is below 1"),
        ({"vocabulary_min_count": 2}, "vocabulary_min_count=2 is not used by"),
        ({"vocabulary_languages": ["de"]}, "does not fit student.vocabulary=full"),
        (
            {"vocabulary_languages": ["de"], "vocabulary": "corpus"},
            "does not fit student.vocabulary=corpus",
        ),
        ({"vocabulary": "languages"}, "does not fit student.vocabulary=languages"),
        ({"model": "folder", "init": "svd"}, "student.init=svd and student.model='folder'"),
        ({"init_layers": [1, 2]}, "is not used by student.init=random"),
        ({"init": "svd", "init_layers": [1]}, "names 1 teacher layers.*num_hidden_layers=2"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(
    student: dict[str, Any], named: str, make_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_recipe(make_recipe(student=student))


def test_languages_that_cannot_be_counted_are_refused(shards: Path) -> None:
    reader = ShardReader(str(shards))
    check_languages(reader, ["de", "sw"])
    with pytest.raises(ConfigError, match=r"has 'xx', of which.*use some of de, sw"):
        check_languages(reader, ["de", "xx"])
    older = SimpleNamespace(
        url="shards", manifest=reader.manifest, read_sample=lambda index: (None, None, {})
    )
    check_languages(older, [])
    with pytest.raises(ConfigError, match=r"shards do not say which language.*prepare them again"):
        check_languages(older, ["de"])
