from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, BertTokenizerFast

from data_prep import build_shards
from pipeline.config import Data, Objective, Recipe, Student, Teacher, Train, Watch
from pipeline.objectives import DistillationObjective, build_objective
from pipeline.topology import Topology

REPO = Path(__file__).parents[3]
FAMILIES = ("bert", "roberta", "camembert", "xlm-roberta")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PMI", "OMPI_", "MPI_")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and nothing is asked of a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def pocket_teacher() -> Path:
    return REPO / "models" / "pocket-teacher"


@pytest.fixture(scope="session")
def one_rank() -> Topology:
    return Topology(rank=0, world_size=1, local_rank=0, local_world_size=1)


@pytest.fixture(scope="session")
def make_recipe(pocket_teacher: Path) -> Callable[..., Recipe]:
    """A small recipe; a section's keyword arguments replace its values."""

    def make(
        *,
        teacher: dict[str, Any] | None = None,
        student: dict[str, Any] | None = None,
        objective: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        watch: dict[str, Any] | None = None,
        **top: Any,
    ) -> Recipe:
        shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
        return Recipe(
            **{"output_dir": "runs/test", **top},
            teacher=Teacher(
                **{"model": str(pocket_teacher), "dtype": "float32", **(teacher or {})}
            ),
            student=Student(**{**shape, "intermediate_size": 32, **(student or {})}),
            objective=Objective(**{"num_relation_heads": 4, **(objective or {})}),
            train=Train(
                **{"max_steps": 10, "batch_size": 8, "micro_batch_size": 2, **(train or {})}
            ),
            data=Data(**{"shards": "shards", **(data or {})}),
            watch=Watch(**(watch or {})),
        )

    return make


@pytest.fixture(scope="session")
def make_objective() -> Callable[..., DistillationObjective]:
    """A recipe's objective for a teacher of width 12 and a student of width 8."""

    def make(recipe: Recipe, teacher: int = 12, student: int = 8) -> DistillationObjective:
        shapes = [
            SimpleNamespace(
                hidden_size=width, num_attention_heads=4, num_hidden_layers=3, vocab_size=40
            )
            for width in (teacher, student)
        ]
        return build_objective(recipe, *shapes)

    return make


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved random model of each family; every parameter is random, biases and norms too."""
    return {name: _save_tiny_model(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def _save_tiny_model(model_type: str, folder: Path) -> Path:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=20,
        type_vocab_size=2,
        pad_token_id=0 if model_type == "bert" else 1,
        hidden_dropout_prob=0.5,  # whoever forgets eval mode is found out
        attention_probs_dropout_prob=0.5,
    )
    model = AutoModel.from_config(config)
    generator = torch.Generator().manual_seed(len(model_type))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """A saved BERT tokenizer, whose special ids are not those of XLM-R."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    tokenizer.train([str(repo / "recipes" / "demo_text" / "en.jsonl")], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("bert-tokenizer")
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepare(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Callable[[Path], Path]:
    """Prepares some of the demo text with a tokenizer; returns the folder of shards."""

    def run(tokenizer: Path) -> Path:
        folder = tmp_path_factory.mktemp("prepared") / "shards"
        arguments = [
            f"--prep.input=['{repo}/recipes/demo_text/[ds]*.jsonl']",
            f"--prep.output_dir={folder}",
            f"--prep.tokenizer={tokenizer}",
            "--prep.seq_len=64",
            "--prep.heldout_rows=3",
            "--prep.rows_per_block=7",
            "--prep.blocks_per_shard=3",
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAYON_NUM_THREADS", "1")
            for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
                patch.delenv(name)
            status = build_shards.main(arguments)
        assert status == 0
        return folder

    return run


@pytest.fixture(scope="session")
def shards(prepare: Callable[[Path], Path], pocket_teacher: Path) -> Path:
    """Prepared demo text; do not write into the folder."""
    return prepare(pocket_teacher)


@pytest.fixture(scope="session")
def bert_shards(prepare: Callable[[Path], Path], bert_tokenizer: Path) -> Path:
    return prepare(bert_tokenizer)
