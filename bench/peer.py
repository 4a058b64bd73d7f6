"""Peers in processes of their own: two pools of spinning threads in one process measure their fight.

The parent asks a :class:`Peer` to load a problem and then takes turns with it. The child is this file run as a program:
``peer.py onnx`` runs ONNX models in ONNX Runtime, ``peer.py openvino`` the same in OpenVINO, and ``peer.py compile`` the
problems of bench/ under torch.compile, weights frozen.
"""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}  # the peers that run ONNX models, and their packages


def available(kind: str) -> bool:
    """Return whether the packages of a peer that runs ONNX models are installed."""
    return all(importlib.util.find_spec(name) for name in ("onnx", RUNTIMES[kind]))


def activation(name: str | None, source: str) -> list[tuple]:
    """Return the nodes that apply an activation to ``source`` and end in ``OUT``."""
    if name == "silu":
        return [("Sigmoid", source, "SIGMOID"), ("Mul", f"{source} SIGMOID", "OUT")]
    if name == "relu6":
        return [("Clip", f"{source} ZERO SIX", "OUT")]
    if name == "gelu_tanh":
        return [("Gelu", source, "OUT", {"approximate": "tanh"})]
    operator = {None: "Identity", "hardswish": "HardSwish"}.get(name) or name.capitalize()  # Relu, Gelu, Sigmoid, Tanh
    return [(operator, source, "OUT")]


def model(nodes: list[tuple], inputs: dict, weights: dict) -> tuple[bytes, dict]:
    """Make an ONNX model.

    Args:
        nodes: (operator, input names, output names[, attributes]), the names in one string with spaces between; ``-``
            stands for an input left out. The model's output is named ``OUT``.
        inputs: numpy arrays fed at each run, by name.
        weights: numpy arrays that are constants of the model, by name. ``ZERO`` and ``SIX`` are there already.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights = {"ZERO": np.float32(0).reshape(()), "SIX": np.float32(6).reshape(())} | weights
    made = []
    for operator, sources, targets, *attributes in nodes:
        names = ["" if name == "-" else name for name in sources.split()]
        made.append(helper.make_node(operator, names, targets.split(), **(attributes[0] if attributes else {})))
    used = {name for node in made for name in node.input}
    graph = helper.make_graph(
        made,
        "problem",
        [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in inputs.items()
        ],
        [helper.make_tensor_value_info("OUT", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in weights.items() if k in used],
    )
    opset = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString(), inputs


AWAKE = 0.003  # seconds


def timed(call: Callable[[], object], calls: int) -> float:
    """Run ``calls`` times and return the seconds of one.

    It runs for some milliseconds before the clock starts: threads that slept may wake on one core together, and the
    first call then waits until the kernel has moved one of them.
    """
    awake = time.perf_counter() + AWAKE
    while time.perf_counter() < awake:
        call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


class Peer:
    """A child that has one problem loaded at a time.

    Args:
        kind: ``"onnx"``, ``"openvino"`` or ``"compile"``.
    """

    def __init__(self, kind: str):
        self._kind = kind
        command = [sys.executable, __file__, kind]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    @property
    def id(self) -> int:
        """The child's process id."""
        return self._child.pid

    def _ask(self, *message):
        try:
            pickle.dump(message, self._child.stdin)
            self._child.stdin.flush()
            answer = pickle.load(self._child.stdout)
        except (BrokenPipeError, EOFError):
            raise RuntimeError(f"{self._kind}: its process ended with {self._child.wait()}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def load(self, *problem) -> None:
        """Load a problem: what the child's loader takes."""
        self._ask("load", problem)

    def results(self) -> list:
        """Return the output, and in training the gradients, as numpy arrays."""
        return self._ask("results")

    def turn(self, calls: int) -> float:
        """Run ``calls`` times and return the seconds of one; the threads of both processes sleep before the clock starts."""
        time.sleep(0.005)
        seconds = self._ask("turn", calls)
        time.sleep(0.005)
        return seconds

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()


# ---- the child -------------------------------------------------------------------------------------------------------


def load_onnx(model: bytes, feeds: dict, threads: int):
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    run = partial(session.run, None, feeds)
    return lambda: run()[:1], partial(timed, run)


def load_openvino(model: bytes, feeds: dict, threads: int):
    sys.modules["openvino_telemetry"] = None  # with it, an import of openvino reports to Intel
    import openvino

    core = openvino.Core()
    properties = {
        "PERFORMANCE_HINT": "LATENCY",  # one stream
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # as nobody's threads are
    }
    request = core.compile_model(core.read_model(model=model), "CPU", properties).create_infer_request()
    for name, array in feeds.items():  # once: to pass them from Python takes it longer than a small problem
        request.set_tensor(name, openvino.Tensor(array))

    def results():
        request.infer()
        return [request.get_output_tensor().data]

    return results, partial(timed, request.infer)


def load_compiled(family: str, name: str, dtype: str, training: bool, threads: int):
    """Compile torch's side of a problem; in the forward direction its weights are constants of a module."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import importlib

    import torch

    from bench import measure

    torch.set_num_threads(threads)
    torch.compiler.reset()
    torch._inductor.config.freezing = not training
    problems = importlib.import_module(f"bench.{family}").PROBLEMS
    built = next(problem for problem in problems if problem.id == name).build(getattr(torch, dtype))
    tensors, wanted = measure.leaves(built, training)
    function = built.torch
    if not training and built.inputs is not None:
        function, tensors = Constants(function, tensors[built.inputs :]), tensors[: built.inputs]
    compiled = torch.compile(function, dynamic=False)
    results = measure.results(compiled, tensors, wanted, training)
    return lambda: [t.float().numpy() for t in results], measure.calls(compiled, tensors, training)


def Constants(function, weights):
    """Return a module in eval whose forward calls ``function`` with the inputs and its own weights."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, weight in enumerate(weights):
                self.register_parameter(f"weight{i}", None if weight is None else torch.nn.Parameter(weight, False))

        def forward(self, *inputs):
            return function(*inputs, *(getattr(self, f"weight{i}") for i in range(len(weights))))

    return Module().eval()


def _serve(kind: str) -> None:
    out = sys.stdout.buffer
    sys.stdout = sys.stderr  # what a compiler prints is no answer
    load = {"onnx": load_onnx, "openvino": load_openvino, "compile": load_compiled}[kind]
    loaded = None
    while True:
        try:
            what, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if what == "load":
                loaded = None  # the threads of the one before end first
                loaded = load(*arguments[0])
                answer = None
            else:
                answer = loaded[0]() if what == "results" else loaded[1](*arguments)
        except Exception as error:
            answer = f"{kind}: {type(error).__name__}: {error}"
        pickle.dump(answer, out)
        out.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
