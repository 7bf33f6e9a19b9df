from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

from tests.pipeline.launch import ROOT, environment, fork, run

POCKET = ROOT / "models" / "pocket-teacher"
TEXT = ROOT / "recipes" / "demo_text"
SEQ_LEN = 64


def prepare(tokenizer: Path, output_dir: Path, *, heldout_rows: int = 0) -> Path:
    """Shards of a part of the embedded text."""
    texts = [str(TEXT / f"{language}.jsonl") for language in ("en", "th")]
    command = [sys.executable, "-m", "data_prep.build_shards"]
    arguments = [
        f"--prep.input={texts}",
        f"--prep.output_dir={output_dir}",
        f"--prep.tokenizer={tokenizer}",
        f"--prep.seq_len={SEQ_LEN}",
        f"--prep.heldout_rows={heldout_rows}",
        "--prep.rows_per_block=8",
    ]
    subprocess.run([*command, *arguments], cwd=ROOT, env=environment(), check=True)
    return output_dir


def save_model(folder: Path, model: torch.nn.Module, tokenizer: object) -> Path:
    """A model folder, as `save_pretrained` leaves it; weights large enough to tell heads apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "padding" not in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="session")
def xlmr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a random XLM-R teacher and student."""
    root = tmp_path_factory.mktemp("xlmr")
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    torch.manual_seed(0)
    folders = []
    for name, hidden, layers, heads in (("teacher", 48, 4, 4), ("student", 24, 3, 6)):
        config = XLMRobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=2 * hidden,
            max_position_embeddings=SEQ_LEN + 2,
            type_vocab_size=1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        folders.append(save_model(root / name, XLMRobertaModel(config), tokenizer))
    return folders[0], folders[1]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a random BERT teacher and student, with a WordPiece tokenizer of their own."""
    root = tmp_path_factory.mktemp("bert")
    wordpiece = BertWordPieceTokenizer(lowercase=True)
    wordpiece.train([str(TEXT / "en.jsonl"), str(TEXT / "th.jsonl")], vocab_size=600)
    wordpiece.save_model(str(root))
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = AutoTokenizer.from_pretrained(root)
    torch.manual_seed(0)
    folders = []
    for name, hidden, layers, heads in (("teacher", 48, 4, 4), ("student", 24, 3, 6)):
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=2 * hidden,
            max_position_embeddings=SEQ_LEN,
        )
        folders.append(save_model(root / name, BertModel(config), tokenizer))
    return folders[0], folders[1]


@pytest.fixture(scope="session")
def xlmr_shards(xlmr: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards without held-out rows for the random XLM-R."""
    return prepare(xlmr[0], tmp_path_factory.mktemp("shards") / "xlmr")


@pytest.fixture(scope="session")
def heldout_shards(xlmr: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with held-out rows for the random XLM-R."""
    return prepare(xlmr[0], tmp_path_factory.mktemp("shards") / "heldout", heldout_rows=3)


@pytest.fixture(scope="session")
def bert_shards(bert: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards without held-out rows for the random BERT."""
    return prepare(bert[0], tmp_path_factory.mktemp("shards") / "bert")


def write_tiny(folder: Path, teacher: Path, shards: Path) -> list[str]:
    """Arguments for a recipe of twelve quick steps that runs in folder/run."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"""
output_dir: {folder / "run"}
teacher: {{model: {teacher}}}
student: {{num_hidden_layers: 2, hidden_size: 24, num_attention_heads: 3, intermediate_size: 48}}
objective: {{num_relation_heads: 12}}
data: {{shards: {shards}, row_log: true}}
train: {{max_steps: 12, batch_size: 8, micro_batch_size: 2, learning_rate: 1e-2, warmup_steps: 3,
         save_every: 4, eval_every: 3, log_every: 1, keep_checkpoints: 2}}
"""
    )
    return ["--config", str(recipe)]


@pytest.fixture
def tiny(xlmr: tuple[Path, Path], heldout_shards: Path, tmp_path: Path) -> list[str]:
    """Twelve quick steps with dropout, held-out losses and several checkpoints, in tmp_path/run."""
    return write_tiny(tmp_path, xlmr[0], heldout_shards)


@pytest.fixture(scope="session")
def straight(
    xlmr: tuple[Path, Path], heldout_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """The folder of an undisturbed run of `tiny`, by ZeRO stage and ranks; only to be read."""

    @functools.cache
    def of(stage: str, ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{stage}-{ranks}")
        arguments = write_tiny(folder, xlmr[0], heldout_shards)
        outcome = run(arguments, ranks=ranks, stage=stage, begin=fork)
        assert outcome.status == 0, outcome.output
        return folder / "run"

    return of
