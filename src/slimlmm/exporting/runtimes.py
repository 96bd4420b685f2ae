"""What runs a graph: ONNX Runtime or OpenVINO, on CPU threads; both are written from the same ONNX file."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slimlmm.errors import UserError

Array = NDArray[Any]


class Graph(Protocol):
    """A compiled graph."""

    def __call__(self, *inputs: Array) -> list[Array]:
        """Return its outputs, in the order in which they were traced, as arrays of the caller's own."""


class OnnxGraph:
    """A graph in ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        runtime = needed("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [one.name for one in self._session.get_inputs()]

    def __call__(self, *inputs: Array) -> list[Array]:
        """Run it once."""
        found: list[Array] = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        return found


class OpenVinoGraph:
    """A graph in OpenVINO; in fp32, whatever half precision the processor has units for, because that is what was checked."""

    def __init__(self, path: Path, threads: int) -> None:
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        model: Any = needed("openvino").Core().compile_model(str(path), "CPU", settings)
        self._request = model.create_infer_request()
        self._outputs = range(len(model.outputs))

    def __call__(self, *inputs: Array) -> list[Array]:
        """Run it once; outputs are copied, because the next run writes into the same memory."""
        self._request.infer(dict(enumerate(inputs)), share_inputs=True)
        return [np.array(self._request.get_output_tensor(number).data) for number in self._outputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A target of `export`: how an ONNX graph becomes its file, and what runs that.

    `finish(onnx, folder, int8)` writes the runtime's own file of the same stem into `folder`.
    """

    suffix: str
    libraries: tuple[str, ...]
    finish: Callable[[Path, Path, bool], None]
    graph: Callable[[Path, int], Graph]
    int8: str


def needed(name: str) -> ModuleType:
    """Return an optional library, or refuse with how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs {error.name or name}, which is not installed: pip install 'slimlmm[export]'."
        ) from error


def _onnx(source: Path, folder: Path, int8: bool) -> None:
    """Write an ONNX graph as it is, or its matrix products in 8 bits.

    Weights are symmetric per output channel, activations by the range of each call. Seven bits of the eight are used
    (`reduce_range`): processors without VNNI add pairs of products in 16 bits, which overflow with all eight.
    """
    target = folder / source.name
    if not int8:
        onnx = needed("onnx")
        onnx.save(onnx.load(source), target, save_as_external_data=True, location=f"{target.name}.data")
        return
    tools = needed("onnxruntime.quantization")
    tools.quantize_dynamic(
        source,
        target,
        weight_type=tools.QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"MatMulConstBOnly": True},
        use_external_data_format=True,
    )


def _openvino(source: Path, folder: Path, int8: bool) -> None:
    """Write an ONNX graph in OpenVINO's format, or that with its weights in 8 bits, asymmetric per channel."""
    runtime = needed("openvino")
    model = runtime.Core().read_model(str(source))
    if int8:
        os.environ.setdefault("NNCF_CI", "1")  # nncf tells its maker of every use unless this is set
        nncf = needed("nncf")
        nncf.set_log_level("ERROR")
        with redirect_stdout(sys.stderr):  # its progress bar would stand in front of --json
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    runtime.save_model(model, str(folder / f"{source.stem}.xml"), compress_to_fp16=False)


RUNTIMES = {
    "onnx": Runtime(
        suffix=".onnx",
        libraries=("onnxruntime", "onnx"),
        finish=_onnx,
        graph=OnnxGraph,
        int8="weights int8 per channel, activations uint8 by the range of each call, in matrix products",
    ),
    "openvino": Runtime(
        suffix=".xml",
        libraries=("openvino", "nncf"),
        finish=_openvino,
        graph=OpenVinoGraph,
        int8="weights int8 per channel, arithmetic in fp32",
    ),
}
