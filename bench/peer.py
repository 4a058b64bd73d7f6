"""ONNX Runtime as a peer, in a process of its own: two pools of spinning threads in one process measure their fight.

The parent imports this file for :func:`model` and :class:`Peer`; run as a program, it is the child.
"""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import time


def available() -> bool:
    """Return whether the packages onnx and onnxruntime are installed."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def activation(name: str | None, source: str) -> list[tuple]:
    """Return the nodes that apply an activation to ``source`` and end in ``OUT``."""
    if name == "silu":
        return [("Sigmoid", source, "SIGMOID"), ("Mul", f"{source} SIGMOID", "OUT")]
    if name == "relu6":
        return [("Clip", f"{source} ZERO SIX", "OUT")]
    operator = {None: "Identity", "relu": "Relu", "gelu": "Gelu", "gelu_tanh": "Gelu", "tanh": "Tanh"}[name]
    return [(operator, source, "OUT", {"approximate": "tanh"} if name == "gelu_tanh" else {})]


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


class Peer:
    """ONNX Runtime with one model loaded; ``turn(calls)`` returns the seconds of a call."""

    def __init__(self, onnx: tuple[bytes, dict], threads: int):
        self._child = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ask((*onnx, threads))

    def _ask(self, message):
        pickle.dump(message, self._child.stdin)
        self._child.stdin.flush()
        answer = pickle.load(self._child.stdout)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def output(self):
        """Return the model's output as a numpy array."""
        return self._ask("output")

    def turn(self, calls: int) -> float:
        """Run ``calls`` times; both processes' threads have gone to sleep before the clock starts."""
        time.sleep(0.005)
        seconds = self._ask(calls)
        time.sleep(0.005)
        return seconds

    def close(self) -> None:
        self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()


def _serve() -> None:
    import onnxruntime

    def say(answer):
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()

    onnxruntime.set_default_logger_severity(3)
    session = feeds = None
    while True:
        try:
            message = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if isinstance(message, tuple):
                model, feeds, threads = message
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
                session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
                session.run(None, feeds)
                say(0.0)
            elif message == "output":
                say(session.run(None, feeds)[0])
            else:
                start = time.perf_counter()
                for _ in range(message):
                    session.run(None, feeds)
                say((time.perf_counter() - start) / message)
        except Exception as error:
            say(f"onnxruntime: {error}")


if __name__ == "__main__":
    _serve()
