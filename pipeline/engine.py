"""The DeepSpeed seam: the engine around the student, and its sharded files."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from data_prep.command import ConfigError, RunError, one_line
from pipeline.config import Recipe
from pipeline.ds_config import merge_ds_config as merge_ds_config
from pipeline.fused_layers import fuse
from pipeline.loader import Batch
from pipeline.models import Encoder
from pipeline.objectives import Compared, of_text
from pipeline.progress import part
from pipeline.topology import Topology

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # longest a rank waits, e.g. while rank 0 prepares text


def init_distributed(topology: Topology) -> torch.device:
    """Connect the ranks and return this rank's device.

    Raises:
        RunError: there is an NVIDIA driver but torch cannot use it, so DeepSpeed would train on
            the CPU without saying so.
    """
    driver = Path("/proc/driver/nvidia/version").exists()
    if driver and not torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise RunError(
            "this host has an NVIDIA driver but torch sees no GPU, so training would fall back to "
            "the CPU; repair the driver, or set DS_ACCELERATOR=cpu to mean it"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(topology.threads)
        topology.pin()
    deepspeed = _import_deepspeed()
    with _quiet():
        deepspeed.init_distributed(timeout=COLLECTIVE_TIMEOUT, verbose=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(topology.local_rank)
        return torch.device("cuda", topology.local_rank)
    return torch.device("cpu")


def _import_deepspeed() -> Any:
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime import compiler

    deepspeed.utils.logger.setLevel("ERROR")
    # Used by tensor-parallel inference only; on CPU DeepSpeed would compile it at the first start,
    # for a minute, and fail where there is no compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO imports Muon whatever the optimizer, and Muon asks for torch's compiler, whose import
    # takes as long as torch's own. Nothing here is compiled.
    with mock.patch.object(compiler, "compile", return_value=compiler.dummy_decorator):
        import deepspeed.runtime.zero.muon.muon_optimizer
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its configuration and progress on stdout whatever its log level."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@dataclasses.dataclass(frozen=True)
class StepResult:
    """`grad_norm` before clipping; `applied` is False where the gradient was not finite."""

    grad_norm: float
    applied: bool


class Engine:
    """A student in a DeepSpeed engine.

    Args:
        student: on the CPU or the device, in fp32.
        recipe: gives AdamW its values.
        ds_config: from `merge_ds_config`.
        load_universal: `load` will be given a universal checkpoint.
    """

    def __init__(
        self,
        student: Encoder,
        recipe: Recipe,
        ds_config: dict[str, Any],
        *,
        load_universal: bool,
    ) -> None:
        deepspeed = _import_deepspeed()
        if not recipe.train.compile:
            fuse(student)
        self.fp16 = bool(ds_config.get("fp16", {}).get("enabled", False))
        self.stage = int(ds_config["zero_optimization"]["stage"])
        train = recipe.train
        self._weight_decays = (train.weight_decay, 0.0)
        matrices = [p for p in student.parameters() if p.ndim > 1]
        vectors = [p for p in student.parameters() if p.ndim == 1]
        self._load_universal = load_universal
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": train.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=train.learning_rate,
            betas=train.adam_betas,
            eps=train.adam_eps,
            fused=True,  # one pass over memory in place of ten
        )
        words = student.word_embeddings
        is_fp32 = ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        if words is not None and is_fp32:
            words.weight.grad_dtype = torch.float32  # not rounded on the way to where it is added
        zero = dict(ds_config["zero_optimization"])
        if words is not None and self.stage == 2:
            # A gradient that fits the bucket is rounded to bf16 on its way; a larger one is not.
            bucket = zero.get("reduce_bucket_size", words.weight.numel())
            zero["reduce_bucket_size"] = min(bucket, words.weight.numel() - 1)
        # Ranks that disagree on a tag would write two halves of two checkpoints.
        checkpoint = {"tag_validation": "Fail", "load_universal": load_universal}
        try:
            with _quiet():
                self._engine, *_ = deepspeed.initialize(
                    model=student,
                    optimizer=self._adamw,
                    model_parameters=list(student.parameters()),
                    config={**ds_config, "zero_optimization": zero, "checkpoint": checkpoint},
                )
        except (ValueError, AssertionError, TypeError) as error:  # pydantic's and DeepSpeed's own
            raise ConfigError(
                f"DeepSpeed refuses the ds_config ({one_line(error)}); correct that key"
            ) from error
        # DeepSpeed's writer, so that `snapshot` gets what would be written.
        self._files: dict[str, memoryview] = {}
        self._engine.checkpoint_engine.save = self._keep_file
        self._engine.checkpoint_engine.makedirs = lambda path, exist_ok: None
        self._engine._copy_recovery_script = lambda folder: None
        if words is not None and self.stage < 3:  # which clears sums in a step's first pass alone
            words.is_last = self._engine.is_gradient_accumulation_boundary

    def train(self, mode: bool) -> None:
        """Dropout on or off."""
        self._engine.train(mode)

    @part("student")
    def __call__(self, batch: Batch) -> Compared:
        """What the student gives of the batch."""
        outputs: Compared = self._engine(*batch.inputs)
        return of_text(outputs, batch.num_tokens)

    @part("backward")
    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss` / accumulation steps, averaged over ranks."""
        self._engine.backward(loss)

    def between_micro_batches(self) -> None:
        """Tell DeepSpeed that a micro-batch other than the step's last one is done."""
        self._engine.step()

    @part("optimizer")
    def step(self, learning_rate: float) -> StepResult:
        """Clip, update the weights, clear the gradient; a non-finite gradient updates nothing."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return StepResult(
            grad_norm=float(self._engine.get_global_grad_norm()),
            applied=self._engine.was_step_applied(),
        )

    @part("optimizer")
    def skip_step(self) -> StepResult:
        """Clear the gradient and update nothing, on all ranks at once.

        DeepSpeed does so where the gradient's norm is not finite, so it is told that this one is
        not. It would also lower fp16's loss scale, which has nothing to do with it.
        """
        optimizer = self._engine.optimizer
        with (
            mock.patch(f"{type(optimizer).__module__}.is_invalid_grad_norm", return_value=True),
            mock.patch.object(optimizer, "_update_scale", create=True),
        ):
            self._engine.step()
        assert not self._engine.was_step_applied()
        return StepResult(grad_norm=math.inf, applied=False)

    def replicas(self) -> list[torch.Tensor]:
        """The weights that every rank has a whole copy of: all, or under stage 3 none."""
        return [] if self.stage == 3 else [p.detach() for p in self._engine.module.parameters()]

    def snapshot(self, tag: str) -> dict[str, memoryview]:
        """What this rank has to write of a checkpoint, by file name; called by all ranks at once.

        The copy is in host memory and touches no disk: training may go on when this returns.

        Args:
            tag: the checkpoint's name, of which all ranks have to have the same.
        """
        self._files = {}
        with _quiet():
            self._engine.save_checkpoint("memory", tag=tag, save_latest=False)
        files, self._files = self._files, {}
        return files

    def _keep_file(self, state_dict: Mapping[str, Any], path: str) -> None:
        stream = io.BytesIO()
        torch.save(state_dict, stream)
        self._files[Path(path).name] = stream.getbuffer()

    def load(self, folder: Path, tag: str) -> None:
        """Restore weights and optimizer from folder/tag.

        Raises:
            RunError: DeepSpeed finds nothing there, or something that it would have to run.
        """
        with _quiet(), _refusing_code(folder / tag):
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if loaded is None:
            raise RunError(f"DeepSpeed finds no checkpoint in {folder / tag}; it is damaged")
        if self._load_universal:
            self._mend_universal_load()

    def _mend_universal_load(self) -> None:
        """Undo what DeepSpeed 0.19.8 does to AdamW when stage 3 loads a universal checkpoint.

        All parameters are given one and the same `step` tensor, which then counts every update
        several times, and all groups get the first one's weight decay.
        """
        for state in self._adamw.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        for group, weight_decay in zip(self._adamw.param_groups, self._weight_decays, strict=True):
            group["weight_decay"] = weight_decay


@contextlib.contextmanager
def _refusing_code(path: Path) -> Iterator[None]:
    """Have torch.load take tensors and plain values only, whatever DeepSpeed asks it for.

    Its files are pickles, which may name any function to be called with any arguments.

    Raises:
        RunError: a file under `path` names something else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with (
            mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"),
            torch.serialization.safe_globals(allowed),
        ):
            os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # would contradict
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise RunError(
            f"{path} holds {named[1] if named else 'something'} besides tensors and plain values, "
            "which loading would run: it is not what training writes and is not loaded; delete "
            "that checkpoint to go on from the one before"
        ) from error


def convert_to_universal(folder: Path, tag: str, destination: Path) -> None:
    """Write folder/tag to destination/tag in the form that any ranks and ZeRO stage can load.

    Raises:
        RunError: DeepSpeed's converter fails.
    """
    shutil.rmtree(destination, ignore_errors=True)
    _import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(folder / tag),
        output_folder=str(destination / tag),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with (
            _quiet(),
            contextlib.redirect_stderr(io.StringIO()),
            _refusing_code(folder / tag),
        ):
            ds_to_universal.main(options)
            _fit_every_stage(destination / tag)
    except RunError:
        raise
    except Exception as error:  # whatever it meets in damaged files
        raise RunError(
            f"{folder / tag} cannot be converted for other ranks or another ZeRO stage "
            f"({one_line(error)}); resume with those that it was written by"
        ) from error


def _fit_every_stage(folder: Path) -> None:
    """Add to a universal checkpoint what the other ZeRO stages read.

    DeepSpeed 0.19.8 writes what the stage needs that it comes from: 3 has the optimizer's step in a
    nest of its own and bare tensors, 1 and 2 have a step and dicts of tensors for each parameter.
    The model's file, of which a universal load takes counters only, has another name in each.
    """
    import deepspeed

    path = folder / "zero" / "optimizer_state.pt"
    state = torch.load(path)
    parameters = [file.parent for file in sorted(folder.glob("zero/*/fp32.pt"))]
    if "optimizer_state_dict" in state:
        step = state["optimizer_state_dict"]["state"][0]["step"]
        for parameter in parameters:
            for name in ("fp32", "exp_avg", "exp_avg_sq"):
                torch.save(
                    {"param": torch.load(parameter / f"{name}.pt")}, parameter / f"{name}.pt"
                )
            torch.save(step, parameter / "step.pt")
        state["ds_version"] = deepspeed.__version__
    else:
        step = torch.load(parameters[0] / "step.pt")
        groups = state["param_groups"]
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save(state, path)
    names = {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"}
    there = next(name for name in names if (folder / name).exists())
    for name in names - {there}:
        shutil.copyfile(folder / there, folder / name)


def read_weights(
    folder: Path, tag: str, shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """The student's fp32 master weights from the shards of any ZeRO stage and number of ranks.

    The universal form is the one that all of DeepSpeed's optimizers can be read by: zero_to_fp32
    does not know stage 1 with fp32 accumulation.

    Args:
        folder: checkpoints; DeepSpeed's files are pickles, so only those of a run that you trust.
        tag: the checkpoint's folder name.
        shapes: of the trained parameters, by their names in the whole model.

    Raises:
        RunError: a parameter is missing or of another shape.
    """
    converted = folder / f".universal-{os.getpid()}"
    try:
        convert_to_universal(folder, tag, converted)
        return _universal_weights(converted / tag / "zero", shapes)
    finally:
        shutil.rmtree(converted, ignore_errors=True)


def _universal_weights(folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        path = folder / f"model.{name}" / "fp32.pt"
        if not path.exists():
            raise RunError(f"the checkpoint has no parameter {name!r}: it is of another student")
        flat = torch.load(path, weights_only=True)["param"]
        if flat.numel() != shape.numel():
            raise RunError(
                f"the checkpoint has {name!r} with {flat.numel()} values, not {tuple(shape)}: it "
                "is of another student"
            )
        weights[name] = flat.reshape(shape)
    return weights
