"""The example that trains a teacher, the loss it reports, and the teacher that is committed."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from examples.score_mlm import as_table, read_documents, score_folder, score_language

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "models/pocket-teacher"
LANGUAGES = ["ar", "en", "sw"]
FIFTEEN = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()
SEQ_LEN, HELDOUT = 64, 4


def train(text: Path, output_dir: Path, *, max_steps: int) -> None:
    shape = "--vocab_size 400 --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 4"
    schedule = f"--seq_len {SEQ_LEN} --batch_size 16 --learning_rate 3e-3 --max_steps {max_steps}"
    data = f"--input {text}/*.jsonl* --heldout_documents {HELDOUT} --output_dir {output_dir}"
    command = f"{data} --intermediate_size 64 {shape} {schedule}".split()
    subprocess.run(
        [sys.executable, "examples/train_teacher.py", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for language in LANGUAGES:
        shutil.copy(ROOT / f"recipes/demo_text/{language}.jsonl", folder)
    packed = (folder / "sw.jsonl").read_bytes()
    (folder / "sw.jsonl.gz").write_bytes(gzip.compress(packed))
    (folder / "sw.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def teacher(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train(text, folder, max_steps=300)
    return folder


@pytest.fixture
def train_teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; like any script it finds its neighbour in its own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module("train_teacher")
    for name in ("train_teacher", "score_mlm"):
        sys.modules.pop(name, None)


def test_folder_loads_with_plain_auto_classes_in_xlmr_layout(teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model, loading = AutoModelForMaskedLM.from_pretrained(teacher, output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    assert model.config.model_type == "xlm-roberta"
    assert model.dtype == torch.bfloat16
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.convert_ids_to_tokens(range(4)) == first
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    assert model.config.vocab_size == len(tokenizer) == 400
    config = model.config
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
    ids = tokenizer("bread", "milk")["input_ids"]
    assert [ids[0], ids[-1], ids.count(2)] == [0, 2, 3]


def test_tokenizer_keeps_text_and_normalizer(teacher: Path, text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    for language, texts in read_documents(f"{text}/*").items():
        kept = tokenizer.backend_tokenizer.normalizer.normalize_str(" ".join(texts[0].split()))
        ids = tokenizer(kept)["input_ids"]
        assert tokenizer.unk_token_id not in ids, language
        assert tokenizer.decode(ids, skip_special_tokens=True) == kept
    assert tokenizer("ﬁne  ｂｒｅａｄ").input_ids == tokenizer("fine bread").input_ids  # NFKC


def test_training_lowers_heldout_loss_in_each_language(teacher: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    config = AutoConfig.from_pretrained(teacher, dtype=torch.float32)
    untrained = AutoModelForMaskedLM.from_config(config).eval()
    heldout = read_documents(str(teacher / "heldout.jsonl"))
    assert {name: len(texts) for name, texts in heldout.items()} == dict.fromkeys(
        LANGUAGES, HELDOUT
    )
    trained = score_folder(teacher, heldout, seq_len=SEQ_LEN)
    for language, texts in heldout.items():
        before = score_language(untrained, tokenizer, texts, seq_len=SEQ_LEN)
        assert before.masked_tokens == trained[language].masked_tokens > 40
        assert trained[language].loss < before.loss - 0.5, (language, before, trained[language])


def test_card_names_each_language_and_its_loss_again(teacher: Path) -> None:
    card = ModelCard.load(teacher / "README.md")
    assert card.data.language == LANGUAGES
    heldout = read_documents(str(teacher / "heldout.jsonl"))
    assert as_table(score_folder(teacher, heldout, seq_len=SEQ_LEN)) in card.text
    assert str(teacher.parent) not in card.content


def test_same_folder_goes_on_from_its_checkpoint(teacher: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    train(text, folder, max_steps=320)
    state = json.loads((folder / "checkpoints/checkpoint-320/trainer_state.json").read_text())
    first_run = (teacher / "checkpoints/checkpoint-300/trainer_state.json").read_text()
    logged = json.loads(first_run)["log_history"]
    assert len(logged) > 1
    assert state["log_history"][: len(logged)] == logged
    assert (folder / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


def test_heldout_documents_are_apart(train_teacher: ModuleType, tmp_path: Path) -> None:
    settings = train_teacher.Settings(input="", output_dir=tmp_path, heldout_documents=3)
    texts = [f"document {number}" for number in range(10)]
    kept, heldout = train_teacher.split_heldout({"en": texts + texts}, settings)
    assert sorted(kept["en"] + heldout["en"]) == texts
    assert len(heldout["en"]) == 3
    with pytest.raises(ValueError, match=r"heldout_documents=3, but 'sw' has 3 .* use 2 or fewer"):
        train_teacher.split_heldout({"sw": [*texts[:3], texts[0]]}, settings)


def test_rows_are_full_and_hold_the_text_in_order(train_teacher: ModuleType, teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = ["The bakery opens.", "Bread cannot be hurried, she says."] * 4
    rows = train_teacher.pack(tokenizer, texts, seq_len=16)
    assert rows.shape[1] == 16
    assert set(rows[:, 0].tolist()) == {0}
    assert set(rows[:, -1].tolist()) == {2}
    stream = [i for t in texts for i in [*tokenizer(t, add_special_tokens=False).input_ids, 2]]
    body = rows[:, 1:-1].flatten().tolist()
    assert body == stream[: len(body)]
    assert len(stream) - len(body) < 14


def test_local_start_lets_four_heads_see_their_neighbours(
    train_teacher: ModuleType, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    settings = train_teacher.Settings(input="", output_dir=tmp_path, num_hidden_layers=1)
    model = train_teacher.build_model(1000, settings).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 999, (8, settings.seq_len))
    looked_at = model(ids, output_attentions=True).attentions[0].argmax(-1)  # [8, heads, places]
    inner = torch.arange(settings.seq_len)[2:-2]
    for head, offset in enumerate((-1, 1, -2, 2)):
        share = (looked_at[:, head, 2:-2] == inner + offset).float().mean()
        assert share > 0.7, (head, offset, share)


def test_score_equals_one_position_at_a_time() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    model = AutoModelForMaskedLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    sentence = "Children on their way to school stop to buy a roll, and eat it on the bus home."
    ids = tokenizer(sentence)["input_ids"]
    draws = torch.rand(len(ids), generator=torch.Generator().manual_seed(7)).tolist()
    places = [i for i in range(1, len(ids) - 1) if draws[i] < 0.15]
    masked = [tokenizer.mask_token_id if i in places else token for i, token in enumerate(ids)]
    with torch.no_grad():
        probabilities = model(torch.tensor([masked])).logits[0].softmax(-1)
    losses = [-float(probabilities[i, ids[i]].log()) for i in places]
    hits = [int(probabilities[i].argmax()) == ids[i] for i in places]

    score = score_language(model, tokenizer, [sentence], seed=7)

    assert len(places) > 1
    assert score[:2] == (1, len(places))
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert score.top1 == sum(hits) / len(hits)


def test_batch_size_and_other_languages_move_no_mask() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    model = AutoModelForMaskedLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    documents = read_documents(str(ROOT / "recipes/demo_text/e[ln].jsonl"))
    texts = documents["en"][:6]
    alone = score_language(model, tokenizer, texts, batch_size=1)
    together = score_language(model, tokenizer, texts, batch_size=4)
    beside_greek = score_folder(POCKET, {name: t[:6] for name, t in documents.items()})["en"]
    for other in (together, beside_greek):
        assert other.masked_tokens == alone.masked_tokens
        assert other.loss == pytest.approx(alone.loss, rel=1e-4)


def test_unusable_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl.* matches no file"):
        read_documents(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "one", "lang": "en"}\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 lacks 'text' or 'lang'"):
        read_documents(str(tmp_path / "*.jsonl"))


def test_pocket_teacher_predicts_better_than_word_frequencies() -> None:
    """5.8 nats is where its training stood before it saw word order."""
    english = read_documents(str(ROOT / "recipes/demo_text/en.jsonl"))
    assert score_folder(POCKET, english)["en"].loss < 5.0


def test_pocket_teachers_card_covers_its_languages() -> None:
    card = ModelCard.load(POCKET / "README.md")
    assert card.data.language == FIFTEEN
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "fill-mask")
    rows = re.findall(r"^\| (\w\w) \| 300 \| \d+ \| (\d\.\d\d) \| [\d.]+% \|$", card.text, re.M)
    assert [language for language, _ in rows] == FIFTEEN
    attribution = (POCKET / "ATTRIBUTION.md").read_text(encoding="utf-8")
    credited = re.findall(r"\| ([a-z]{2}(?: [a-z]{2})*) \|$", attribution, re.M)
    assert set(" ".join(credited).split()) == set(FIFTEEN)
