"""Joint steps recorded as CUDA graphs: `model.cuda_graph`.

Eager PyTorch launches the kernels of a step one by one. A small network keeps a GPU busy for less
time than Python needs for that. A CUDA graph has the kernels of all widths, forward and backward,
and launches them with one call. The optimizer step and everything that reads results stay eager.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from tq_lightning.errors import UserError, first_line
from tq_lightning.training.compiling import GRAPH_MODES
from tq_lightning.training.joint import JointGradients

# eager steps of a kind before it is recorded: they compile, choose algorithms and fill caches
WARM_UP_STEPS = 3
# recorded kinds of steps; further ones run eagerly. Each keeps its gradients on the GPU.
MAX_GRAPHS = 16

Step = Callable[[Any], JointGradients]
# function -> (its results, a function that computes them again in the same memory)
Record = Callable[[Callable[[], JointGradients]], tuple[JointGradients, Callable[[], None]]]


def check_cuda_graph(trainer: Any, hparams: Any) -> None:
    """Check that a fit can record its steps.

    Raises:
        UserError: no GPU, several devices, float16, or a mode of torch.compile with CUDA graphs.
    """
    if trainer.strategy.root_device.type != "cuda":
        raise UserError(
            f"model.cuda_graph: CUDA graphs need an NVIDIA GPU, and this run uses "
            f"{trainer.strategy.root_device.type}; pass --model.cuda_graph false"
        )
    strategy = type(trainer.strategy).__name__
    if strategy != "SingleDeviceStrategy":
        raise UserError(
            f"model.cuda_graph: got {strategy}, and a graph records the step of a single device; "
            "pass --trainer.devices 1 --trainer.strategy auto, or --model.cuda_graph false"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise UserError(
            f"model.cuda_graph: got trainer.precision={trainer.precision}, whose loss scale "
            "changes from step to step; pass bf16-mixed or 32-true"
        )
    if hparams.compile and hparams.compile_mode in GRAPH_MODES:
        raise UserError(
            f"model.cuda_graph: got model.compile_mode={hparams.compile_mode}, which records "
            "graphs of its own; pass default or max-autotune-no-cudagraphs"
        )


class CudaGraphs:
    """Records functions as CUDA graphs, which share their memory for intermediate results."""

    def __init__(self) -> None:
        self._last: Any = None  # kept, because a pool without a graph cannot be used again

    def record(
        self, function: Callable[[], JointGradients]
    ) -> tuple[JointGradients, Callable[[], None]]:
        """Record the kernels of `function`, without running them.

        Returns:
            (results, replay): tensors that each call of `replay()` computes again. The replay of
            another graph may overwrite them.
        """
        graph = torch.cuda.CUDAGraph()
        # weights that autocast has converted before must not be part of the graph, nor those of
        # the graph be used after it
        torch.clear_autocast_cache()
        # the thread of the data loader that pins memory may go on meanwhile
        pool = None if self._last is None else self._last.pool()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = function()
        torch.clear_autocast_cache()
        self._last = graph
        return results, graph.replay


class _RecordedStep:
    """A step with its own memory for the batch and for the results."""

    def __init__(self, step: Step, batch: Any, record: Record) -> None:
        static = apply_to_collection(batch, Tensor, torch.clone)
        self._inputs = _tensors(static)
        self._results, self._replay = record(lambda: step(static))

    def __call__(self, batch: Any) -> JointGradients:
        torch._foreach_copy_(self._inputs, _tensors(batch))
        self._replay()
        results = self._results
        # copies: the next step overwrites the results, and gradients may accumulate until then
        grads = iter(_copies([g for g in results.grads if g is not None]))
        return JointGradients(
            results.losses.clone(),
            results.finite,
            [None if g is None else next(grads) for g in results.grads],
            results.parameters,
        )


class StepGraphs:
    """Run joint steps, and record each kind of step after `WARM_UP_STEPS` of it.

    A kind is a set of widths and loss weights with batches of one shape. Graphs read and write the
    memory of the model, so all of them are dropped if a parameter, buffer or module was replaced,
    moved, frozen or switched between training and evaluation mode.

    Args:
        record: records a function; None for CUDA graphs. Tests on a CPU pass another one.
    """

    def __init__(self, record: Record | None = None) -> None:
        self._record = record or CudaGraphs().record
        self._seen: dict[Any, int] = {}
        self._steps: dict[Any, _RecordedStep] = {}
        self._memory: list[Any] = []

    def __call__(self, model: Any, kind: Any, step: Step, batch: Any) -> JointGradients:
        """Return step(batch), for a `batch` of tensors in tuples, lists and mappings.

        Args:
            model: the model in training, whose attribute `fused_model` keeps the weights.
            kind: what the step depends on besides the batch; hashable.
            step: computes gradients without reading from the device.
            batch: tensors on the device of the model.

        Raises:
            UserError: the step cannot be recorded.
        """
        if self._steps and not self._is_current(model):
            self._steps.clear()
            self._seen.clear()
        key = (kind, repr(apply_to_collection(batch, Tensor, _layout)))
        recorded = self._steps.get(key)
        if recorded is not None:
            return recorded(batch)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= WARM_UP_STEPS or len(self._steps) >= MAX_GRAPHS:
            return step(batch)
        self._memory = _memory(model)
        try:
            recorded = self._steps[key] = _RecordedStep(step, batch, self._record)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"model.cuda_graph: the joint step can't be recorded as a CUDA graph "
                f"({first_line(error)}); pass --model.cuda_graph false"
            ) from error
        return recorded(batch)

    def _is_current(self, model: Any) -> bool:
        fused, slots, modules = self._memory
        if model.fused_model is not fused or (fused is not None and not fused.is_current()):
            return False
        same = all(slot.get(name) is t and t.data_ptr() == at for slot, name, t, at in slots)
        return same and all(module.training == mode for module, mode in modules)


def _memory(model: Any) -> list[Any]:
    """Describe the memory of the model and its modes."""
    modules = list(model.modules())
    slots = [
        (slot, name, t, t.data_ptr())
        for m in modules
        for slot in (m._parameters, m._buffers)
        for name, t in slot.items()
        if t is not None
    ]
    return [model.fused_model, slots, [(m, m.training) for m in modules]]


def _layout(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} {t.stride()}"


def _tensors(batch: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    return tensors


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies
