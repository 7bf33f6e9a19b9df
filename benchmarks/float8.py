"""What 8-bit products do to a teacher's relations, next to bf16: the loss that the error alone is.

    python benchmarks/float8.py [--teacher FOLDER]

The relations of the teacher in bf16 and in float8 are held against those of the same teacher in
fp32, as if each were a student: the KL a token in nats, by relation, on the demo's text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json

import torch

from benchmarks.harness import arguments, device, report
from pipeline.config import ROOT, Objective, Recipe, Teacher, Train
from pipeline.loader import Batch
from pipeline.models import load_teacher, load_tokenizer, read_config
from pipeline.objectives import Compared, build_objective

LONGEST = 128
TEXT = ROOT / "recipes" / "demo_text"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = arguments(__doc__)
    parser.add_argument("--teacher", default=str(ROOT / "models" / "pocket-teacher"))
    parser.add_argument("--heads", type=int, default=16, help="relation heads")
    parser.add_argument("--documents", type=int, default=10, help="of each language")
    options = parser.parse_args(argv)
    batch = read(options.teacher, options.documents).to(device())

    def recipe(dtype: str) -> Recipe:
        return Recipe(
            output_dir="unused",
            teacher=Teacher(model=options.teacher, dtype=dtype),
            objective=Objective(num_relation_heads=options.heads),
            train=Train(max_steps=1, batch_size=1, micro_batch_size=1),
        )

    def outputs(dtype: str) -> Compared:
        return load_teacher(recipe(dtype), device())(batch)

    config = read_config("--teacher", options.teacher)
    objective = build_objective(recipe("float32"), config, config)
    exact = outputs("float32")
    rows = []
    for dtype in ("bfloat16", "float8"):
        losses = objective.losses(outputs(dtype), exact, batch)
        row = {f"KL of {name}, nats": float(loss) for name, loss in losses.items()}
        rows.append({"teacher": dtype, **row, "sum": sum(row.values())})
    ratio = rows[1]["sum"] / rows[0]["sum"]
    facts = {"model": Path(options.teacher).name, "tokens": batch.num_tokens}
    report("float8", rows, ("error of float8 / error of bf16", ratio), options, **facts)


def read(teacher: str, documents: int) -> Batch:
    """The first documents of every language of the demo's text, as one batch."""
    texts = [
        json.loads(line)["text"]
        for path in sorted(TEXT.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()[:documents]
    ]
    ids = load_tokenizer(teacher)(texts, truncation=True, max_length=LONGEST)["input_ids"]
    lengths = torch.tensor([len(row) for row in ids])
    return Batch(
        input_ids=torch.cat([torch.tensor(row) for row in ids])[None],
        positions=torch.cat([torch.arange(int(n)) for n in lengths])[None],
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        max_seqlen=LONGEST,
        first_position=0,
        row_ids=(),
    )


if __name__ == "__main__":
    main()
