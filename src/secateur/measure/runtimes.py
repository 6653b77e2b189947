"""What runs a model: `eager`, `compiled` and `onnx_runtime`, each a function of a model and inputs -> what to call.

What comes back is a module, so that `latency` and `compare_latency` time it as they time any other:

    sc.compare_latency(onnx_runtime(model, x), onnx_runtime(smaller, x), x)
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.graph.nested import Nested, as_arguments, tensors_in
from secateur.measure.accuracy import evaluating
from secateur.measure.layers import Alone
from secateur.measure.onnx_layers import NODES, layer_graph

Runtime = Callable[[nn.Module, Nested], nn.Module]
"""A model and inputs for it -> a module that takes such inputs and runs the model's forward pass."""


def eager(model: nn.Module, example_inputs: Nested) -> nn.Module:
    """The model as it is.

    >>> net = nn.Linear(3, 2)
    >>> eager(net, torch.zeros(1, 3)) is net
    True
    """
    return model


def compiled(model: nn.Module, example_inputs: Nested) -> nn.Module:
    """The model through `torch.compile`, for these shapes; it is compiled in the first call, which takes seconds."""
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def onnx_runtime(model: nn.Module, example_inputs: Nested) -> nn.Module:
    """The model in ONNX Runtime, on the CPU with as many threads as torch has now.

    Weights are constants of the graph, so that it fuses and lays them out as it does in use. Its threads stop waiting
    for work when a run ends: otherwise those of one session would slow the next one's.

    Args:
        model: on the CPU; exported in eval mode.
        example_inputs: as `find_groups` takes them; the session is for their shapes.

    Raises:
        ModelError: the packages onnx, onnxscript and onnxruntime are not installed, or the model cannot be exported.
    """
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ModelError("ONNX Runtime is not installed; install the extra: pip install secateur[onnx].") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if isinstance(model, Alone) and not model.kwargs and model.op.overloadpacket.__name__ in NODES:
        graph = layer_graph(model, as_arguments(example_inputs)[0])
    else:
        graph = _exported(model, example_inputs)
    return Session(onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]))


class Session(nn.Module):
    """A session of ONNX Runtime as a module: tensors go in by their order, and come out as a tuple."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.names = [item.name for item in session.get_inputs()]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Run the session."""
        tensors = tensors_in((args, kwargs))
        feed = {name: tensor.numpy() for name, tensor in zip(self.names, tensors)}
        return tuple(torch.from_numpy(array) for array in self.session.run(None, feed))


def _exported(model: nn.Module, example_inputs: Nested) -> bytes:
    args, kwargs = as_arguments(example_inputs)
    try:
        with _quiet(), evaluating(model), torch.no_grad():
            program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
    except ImportError as error:
        raise ModelError("a model is exported by onnxscript; install the extra: pip install secateur[onnx].") from error
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(
            f"the model cannot be exported to ONNX: {str(error).splitlines()[0]} Take another runtime, such as eager."
        ) from error
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own affairs, and prints."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
