"""The Dynamo backend: ``torch.compile(model, backend="fastnn")`` for code that cannot be edited.

Each graph is rewritten (``rewrite.py``) and handed on to inductor. ``fastnn.explain`` tells what was done.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from fastnn import _fallback
from fastnn.nn.rnn import break_at_padding
from fastnn.rewrite import Report, rewrite

_graphs: list[tuple[Report, list[weakref.ref]]] = []  # each compiled graph, and the tensors that it was given


def backend(
    gm: fx.GraphModule, example_inputs: list, *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable:
    """Compile a graph with fastnn's kernels in it: a backend for ``torch.compile``, where it is known as ``"fastnn"``, too.

    What fastnn serves (products by a matrix, convolutions of images, recurrent layers and cells, attention, also where it is
    written by hand) becomes its ops, with bias, activation and a batch norm in evaluation fused in; inductor compiles the
    rest, and training. If the rewritten graph does not compile, the graph as it was is compiled and ``fastnn.explain``
    says why. Recurrent modules are captured, too, where the backend was asked for in the same thread (Dynamo's settings
    are a thread's own). Where attention is written by hand, a query whose keys are all masked by -inf gives zeros instead of NaN.

    Args:
        gm, example_inputs: what Dynamo hands to a backend.
        mode, options: as ``torch.compile`` takes them for inductor.

    Returns:
        The compiled graph.

    Raises:
        RuntimeError: under ``fastnn.set_fallback("error")``, for a call that is one of fastnn's and has no kernel.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    patches |= {name.replace("-", "_"): setting for name, setting in (options or {}).items()}
    return _compile(gm, lambda graph: compile_fx(graph, example_inputs, config_patches=patches), TorchDynamoException)


def _compile(gm: fx.GraphModule, compiler: Callable[[fx.GraphModule], Callable], passed: Any = ()) -> Callable:
    """Compile the rewritten graph, or the graph as it is where that fails."""
    report, tensors = Report(), _tensors(gm)
    try:
        new, report = rewrite(gm)
        compiled = compiler(new)
    except Exception as e:
        if isinstance(e, passed) or _fallback.get_fallback() == "error":
            raise
        report = Report(error=f"{type(e).__name__}: {e}".splitlines()[0])
        compiled = compiler(gm)
    _graphs.append((report, tensors))
    return compiled


def _tensors(gm: fx.GraphModule) -> list[weakref.ref]:
    """The parameters and buffers that a graph was captured with."""
    args = [n.meta.get("grapharg") for n in gm.graph.nodes if n.op == "placeholder"]
    given = [getattr(a, "example", None) for a in args if getattr(a, "is_tensor", False)]
    return [weakref.ref(t) for t in given if isinstance(t, Tensor)]


# ---- recurrent layers ------------------------------------------------------------------------------------------------


class _AllowRnn:
    """``torch._dynamo.config.allow_rnn``: true while Dynamo traces for fastnn's backend, for every other what it was.

    Dynamo breaks its graph at RNN, GRU and LSTM, since inductor would unroll their steps. In a graph that comes here
    they become one op a layer, if their device and dtype have a kernel.
    """

    def __init__(self, before: bool):
        self.before = before

    def __bool__(self) -> bool:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        try:
            compiler = InstructionTranslator.current_tx().output.compiler_fn
        except AttributeError:  # nothing is traced
            return self.before
        while compiler is not None and compiler is not backend:
            compiler = getattr(compiler, "_torchdynamo_orig_backend", None) or getattr(compiler, "compiler_fn", None)
        module = sys._getframe(1).f_locals.get("value")  # what Dynamo asks about
        if compiler is not backend or not isinstance(module, nn.RNNBase):
            return self.before
        return self.before or _fallback.why_not(*module.parameters()) is None

    def __repr__(self) -> str:
        return repr(bool(self))

    def __reduce__(self) -> tuple:
        return bool, (self.before,)  # in a copy of the settings it is a bool


def _let_rnns_in() -> None:
    from torch._dynamo import config

    if not isinstance(config.allow_rnn, _AllowRnn):
        config.allow_rnn = _AllowRnn(bool(config.allow_rnn))  # type: ignore[assignment]
        break_at_padding()


_let_rnns_in()  # at the import of this module, that is when the backend is asked for


# ---- explain ---------------------------------------------------------------------------------------------------------


class CompiledExplanation:
    """What fastnn serves in compiled graphs; prints as a list. Iterating yields a :class:`fastnn.rewrite.Report` each."""

    def __init__(self, reports: list[Report]):
        self.reports = reports

    def __iter__(self) -> Iterator[Report]:
        return iter(self.reports)

    def __len__(self) -> int:
        return len(self.reports)

    def __str__(self) -> str:
        lines = []
        for i, report in enumerate(self.reports):
            lines.append(f"graph {i}: {len(report.served)} calls served by fastnn, {report.left.total()} of its kind left to "
                         f"torch, {report.others} other operations by inductor")  # fmt: skip
            if report.error is not None:
                lines.append(f"  compiled as it was, since the rewritten graph failed: {report.error}")
            lines += [f"  {n} × {what}" for what, n in Counter(map(str, report.served)).items()]
            lines += [f"  {n} × {op} left to torch: {reason}" for (op, reason), n in report.left.items()]
        return "\n".join(lines) or "no graph was compiled by backend='fastnn'"

    __repr__ = __str__


def compiled_graphs(model: nn.Module | None = None) -> CompiledExplanation:
    """Tell what was done to each graph that holds a tensor of ``model``, or to every graph of the process."""
    if model is None:
        return CompiledExplanation([report for report, _ in _graphs])
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    return CompiledExplanation([report for report, refs in _graphs if any(id(r()) in own for r in refs)])
