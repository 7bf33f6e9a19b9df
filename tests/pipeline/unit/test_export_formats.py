"""Every format, read by its own runtime, gives what the student in PyTorch gives."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from data_prep.command import ConfigError
from data_prep.shards import ShardReader
from pipeline.checkpoint import State
from pipeline.config import Recipe
from pipeline.export import export_model
from pipeline.export_formats.difference import Heldout, compare, demo_text
from pipeline.export_formats.onnx_files import open_onnx, quantise
from pipeline.export_formats.sentence_embedding import write_sentence_transformer
from pipeline.loader import Loader
from pipeline.models import (
    CutEncoder,
    LastLayer,
    Target,
    keep_tokens,
    load_teacher,
    load_tokenizer,
    pack_encoder,
    read_config,
)
from pipeline.objectives import build_objective
from pipeline.topology import Topology
from pipeline.trimmed_tokenizer import trimmed_tokenizer

TEXTS = ["Ein Satz.", "And a longer one, with a few more words.", "สวัสดี 你好", "x"]
ALL = ["hf", "onnx", "onnx-int8", "sentence-transformers"]
ARCHITECTURES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "modernbert": "ModernBertModel",
}


def save_random(model_type: str, tokenizer: Any, folder: Path, load: Any = AutoModel) -> Path:
    """A saved small model with weights so large that every part of it shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,  # of ModernBERT one global, two local
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        local_attention=8,
        num_labels=2 if load is AutoModelForQuestionAnswering else 3,
        **{f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "cls", "sep")},
    )
    model = load.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "norm" not in name.lower():
                weight.mul_(8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizers(pocket_teacher: Path, bert_tokenizer: Path) -> dict[str, Any]:
    found = {name: load_tokenizer(str(pocket_teacher)) for name in ARCHITECTURES}
    return {**found, "bert": load_tokenizer(str(bert_tokenizer))}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(
    request: pytest.FixtureRequest,
    tokenizers: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A random model's folder and its export in all formats; only to be read."""
    root = tmp_path_factory.mktemp(request.param)
    source = save_random(request.param, tokenizers[request.param], root / "source")
    return source, export_model(str(source), root / "exported", formats=ALL)


def test_transformers_and_servers_find_what_they_look_for(exported: tuple[Path, Path]) -> None:
    source, folder = exported
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    original = load_file(source / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == original.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], original[name]) for name in weights)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[config["model_type"]]]
    assert (folder / "tokenizer.json").is_file()
    # As text-embeddings-inference and vLLM read them.
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [name for name, value in pooling.items() if value is True] == [
        "pooling_mode_mean_tokens"
    ]
    assert pooling["pooling_mode_cls_token"] is False
    types = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    assert types[1] == "sentence_transformers.models.Pooling"


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[1:2]], ids=["padded", "one"])
def test_onnx_and_sentence_transformers_compute_what_pytorch_does(
    exported: tuple[Path, Path], texts: list[str]
) -> None:
    source, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = AutoModel.from_pretrained(source).eval()(**inputs).last_hidden_state
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    names = {name: tensor.numpy() for name, tensor in inputs.items()}
    assert {entry.name for entry in session.get_inputs()} == names.keys()
    (hidden,) = session.run(["last_hidden_state"], names)
    torch.testing.assert_close(torch.from_numpy(hidden)[mask], expected[mask], rtol=0, atol=2e-5)
    pooled = torch.stack(
        [row[is_text].mean(0) for row, is_text in zip(expected, mask, strict=True)]
    )
    embeddings = SentenceTransformer(str(folder), device="cpu").encode(texts)
    torch.testing.assert_close(torch.from_numpy(embeddings), pooled, rtol=0, atol=2e-5)
    (lower,) = onnxruntime.InferenceSession(folder / "onnx" / "model_int8.onnx").run(None, names)
    cosines = torch.cosine_similarity(torch.from_numpy(lower)[mask], expected[mask])
    assert 0.97 < cosines.min() < 1 - 1e-7  # close, and not the fp32 file under another name


def test_what_is_said_of_the_formats_is_so(exported: tuple[Path, Path]) -> None:
    _, folder = exported
    facts = json.loads((folder / "formats.json").read_text())
    assert facts["formats"].keys() == {"sentence-transformers", "onnx", "onnx-int8"}
    for entry in facts["formats"].values():
        assert entry["bytes"] == sum((folder / file).stat().st_size for file in entry["files"])
    fp32, int8 = (facts["formats"][name]["difference"] for name in ("onnx", "onnx-int8"))
    assert fp32["relative_error"] < 1e-5 < 1e-4 < int8["relative_error"] < 0.2
    assert facts["formats"]["onnx-int8"]["bytes"] < 0.5 * facts["formats"]["onnx"]["bytes"]
    card = (folder / "README.md").read_text()
    assert f"| {int8['cosine_mean']:.5f} | {int8['cosine_min']:.5f} |" in card
    assert b"site-packages" not in (folder / "onnx" / "model.onnx").read_bytes()


HEADS = {
    "label": (AutoModelForSequenceClassification, ["logits"]),
    "span": (AutoModelForQuestionAnswering, ["start_logits", "end_logits"]),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_fine_tuned_model_keeps_its_head(
    head: str, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    load, outputs = HEADS[head]
    source = save_random("xlm-roberta", tokenizers["xlm-roberta"], tmp_path / "source", load)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\n## Formats\nof before\n")
    folder = export_model(str(source), tmp_path / "out", formats=["onnx-int8", "onnx"])
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = load.from_pretrained(folder).eval()(**inputs)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    mask = inputs["attention_mask"].bool()
    arrays = session.run(outputs, {name: tensor.numpy() for name, tensor in inputs.items()})
    for name, array in zip(outputs, arrays, strict=True):
        ours, theirs = torch.from_numpy(array), expected[name]
        if head != "label":
            ours, theirs = ours[mask], theirs[mask]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    difference = json.loads((folder / "formats.json").read_text())["formats"]["onnx"]["difference"]
    assert difference["same_answer_percent"] == 100
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Mine\n")
    assert "of before" not in card
    with pytest.raises(ConfigError, match=r"gives .*logits; export the encoder"):
        export_model(str(source), tmp_path / "again", formats=["sentence-transformers"])
    assert not (tmp_path / "again").exists()


def test_bfloat16_is_rounded_once_and_measured(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    source = save_random("xlm-roberta", tokenizers["xlm-roberta"], tmp_path / "source")
    folder = export_model(str(source), tmp_path / "out", dtype="bfloat16")
    original, rounded = (load_file(f / "model.safetensors") for f in (source, folder))
    assert all(torch.equal(rounded[name], original[name].bfloat16()) for name in original)
    assert AutoModel.from_pretrained(folder).dtype == torch.bfloat16
    difference = json.loads((folder / "formats.json").read_text())["formats"]["hf"]["difference"]
    assert 1e-4 < difference["relative_error"] < 0.1


# Quantisation and what is measured, against plain arithmetic


def test_int8_rows_are_within_half_a_step_of_each_token_s_own_scale(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = (generator.normal(size=(500, 16)) * 10.0 ** generator.integers(-3, 3, (500, 1))).astype(
        np.float32
    )
    words[7] = 0
    nodes = [helper.make_node("Gather", ["words", "input_ids"], ["hidden"])]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "length", 16])
    graph = helper.make_graph(
        nodes, "g", [ids], [hidden], [numpy_helper.from_array(words, "words")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, tmp_path / "fp32.onnx")
    quantise(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    every = open_onnx(tmp_path / "int8.onnx")({"input_ids": np.arange(500)[None]})["hidden"][0]
    steps = np.abs(words).max(1, keepdims=True) / 127
    assert (np.abs(every - words) <= steps * 0.5001).all()
    assert (tmp_path / "int8.onnx").stat().st_size < 0.4 * (tmp_path / "fp32.onnx").stat().st_size


def test_differences_are_the_formulas(tmp_path: Path) -> None:
    """Of embeddings of two texts of 3 tokens and 1, whose padding holds large numbers."""
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 2, 3, 4))
    a[1, 1:] = b[1, 1:] = 1e6
    seen: list[Any] = []

    def run(hidden: Any) -> Callable[[Any], Any]:
        def of(inputs: dict[str, Any]) -> dict[str, Any]:
            seen.append(inputs)
            return {"last_hidden_state": hidden}

        return of

    found = compare(run(b), run(a), [[5, 6, 7], [8]], pad_id=1)
    assert seen[0]["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert seen[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    pairs = [(a[0].mean(0), b[0].mean(0)), (a[1, 0], b[1, 0])]
    cosines = [float(x @ y / np.sqrt((x @ x) * (y @ y))) for x, y in pairs]
    errors = [float(np.sqrt(((x - y) ** 2).sum() / (y**2).sum())) for x, y in pairs]
    assert found == pytest.approx(
        {
            "segments": 2,
            "tokens": 4,
            "cosine_mean": sum(cosines) / 2,
            "cosine_min": min(cosines),
            "relative_error": sum(errors) / 2,
        }
    )


def test_answers_are_compared_where_there_is_text(tmp_path: Path) -> None:
    logits = np.array([[[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]], [[0.0, 1.0], [9.0, 0.0], [9.0, 0.0]]])
    other = logits.copy()
    other[0, 0] = [0.0, 3.0]  # one of four answers
    other[1, 1:] = [0.0, 9.0]  # padding
    segments = [[5, 6, 7], [8]]
    tags = compare(lambda _: {"logits": logits}, lambda _: {"logits": other}, segments, 1)
    assert tags["same_answer_percent"] == 75
    spans = [{"start_logits": x[..., 0], "end_logits": x[..., 1]} for x in (logits, other)]
    assert compare(lambda _: spans[0], lambda _: spans[1], segments, 1)["same_answer_percent"] == 50
    labels = compare(
        lambda _: {"logits": logits[:, 0]}, lambda _: {"logits": other[:, 0]}, segments, 1
    )
    assert labels["same_answer_percent"] == 50


def test_demo_text_is_in_all_its_languages_and_cut(tokenizers: dict[str, Any]) -> None:
    text = demo_text(tokenizers["xlm-roberta"], max_tokens=64)
    assert len(text.segments) == 60
    assert max(map(len, text.segments)) == 64


# The held-out loss


@pytest.mark.parametrize("objective", [{}, {"relations": {"qk": 1.0, "hh": 1.0}}], ids=["v2", "hh"])
@pytest.mark.parametrize("vocabulary", ["full", "corpus"])
def test_the_held_out_loss_is_the_one_of_training(
    objective: dict[str, Any],
    vocabulary: str,
    make_recipe: Callable[..., Recipe],
    pocket_teacher: Path,
    shards: Path,
    one_rank: Topology,
    tmp_path: Path,
) -> None:
    """Of whole models in transformers' own attention, against packed ones."""
    recipe = make_recipe(
        data={"shards": str(shards)}, objective=objective, student={"vocabulary": vocabulary}
    )
    whole = load_tokenizer(str(pocket_teacher))
    folder = save_random("xlm-roberta", whole, tmp_path / "student")
    model = AutoModel.from_pretrained(folder)
    new_ids = torch.arange(len(whole))
    if vocabulary == "corpus":
        kept = torch.cat([torch.arange(300), torch.arange(301, len(whole))])  # all but id 300
        keep_tokens(model, kept)
        model.save_pretrained(folder)
        trimmed_tokenizer(whole, kept.numpy()).save_pretrained(folder)
        new_ids = torch.where(new_ids < 300, new_ids, new_ids - 1)
        new_ids[300] = whole.unk_token_id
    state = State(
        step=1,
        tokens=1,
        world_size=1,
        identity={"data.shards (content)": ShardReader(str(shards)).digest},
    )
    heldout = Heldout(recipe, state, folder)
    last_layer = LastLayer(model.eval())
    with torch.no_grad():
        found = heldout.losses({"a": last_layer, "b": lambda ids: last_layer(ids * 0 + 9)})
    reader = ShardReader(str(shards))
    loader = Loader(reader, one_rank, batch_size=1, micro=1, seed=0)
    built = build_objective(
        recipe, read_config("x", recipe.teacher.model), read_config("x", str(folder))
    )
    packed = AutoModel.from_pretrained(folder, attn_implementation="packed_segments").eval()
    student = pack_encoder(packed, built.needs, built.projections, new_ids).eval()
    teacher = load_teacher(recipe, torch.device("cpu"), [Target(built.teacher_needs, 6)])
    total = tokens = 0.0
    with torch.no_grad():
        for batch in itertools.chain.from_iterable(
            loader.heldout(name) for name in reader.manifest.heldout_rows
        ):
            losses = built.losses(student(*batch.inputs), teacher(batch), batch)
            total += float(built.total(losses)) * batch.num_tokens
            tokens += batch.num_tokens
    assert heldout.text is not None
    assert sum(map(len, heldout.text.segments)) == tokens
    assert found["a"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["b"] != pytest.approx(found["a"], rel=1e-2)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_last_layer_of_a_whole_model_is_the_cut_one_s(
    model_type: str, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_random(model_type, tokenizers[model_type], tmp_path / "model")
    ids = torch.tensor([[2, 30, 40, 50, 60, 3]])
    with torch.no_grad():
        hidden, *ours = LastLayer(AutoModel.from_pretrained(folder).eval())(ids)
        expected = AutoModel.from_pretrained(folder).eval()(ids).last_hidden_state[0]
        packed = AutoModel.from_pretrained(folder, attn_implementation="packed_segments")
        theirs = CutEncoder(packed).eval()(ids, torch.arange(6)[None], torch.tensor([0, 6]), 6)
    assert torch.equal(hidden, expected)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_longer_texts_than_the_positions_are_cut(
    tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_random("xlm-roberta", tokenizers["xlm-roberta"], tmp_path / "model")
    write_sentence_transformer(folder, 32, 64)
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 64
    assert np.isfinite(model.encode(["word " * 500])).all()
