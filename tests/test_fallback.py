"""fastnn/_fallback.py: which calls have a kernel, what happens to those that have none, and that it is recorded."""

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import _C, _fallback, functional


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_why_not_names_the_reason():
    x = torch.randn(3)
    assert _fallback.why_not(x, None, x.double(), x.half(), x.bfloat16(), x.to("meta")) is None
    assert "int64" in _fallback.why_not(x, x.long())
    assert "complex" in _fallback.why_not(x.to(torch.complex64))
    assert "layout" in _fallback.why_not(x.to_sparse())
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)], layout=torch.strided)
    assert "nested" in _fallback.why_not(nested)


def test_the_mode_is_torch_until_it_is_set():
    assert fastnn.get_fallback() == "torch"
    fastnn.set_fallback("error")
    assert fastnn.get_fallback() == "error"
    with pytest.raises(ValueError, match="mode must be 'torch' or 'error'; got 'never'"):
        fastnn.set_fallback("never")
    assert fastnn.get_fallback() == "error"


def test_torch_serves_a_dtype_without_a_kernel_and_it_is_counted():
    x, w = torch.randint(-3, 3, (4, 8)), torch.randint(-3, 3, (5, 8))
    before = _fallback.calls.total()
    assert torch.equal(functional.linear(x, w), F.linear(x, w))
    assert _fallback.calls.total() == before + 1
    assert any(op == "linear" and "int64" in reason for op, reason in _fallback.calls)


def test_torch_serves_complex_numbers_with_gradients():
    x = torch.randn(4, 8, dtype=torch.complex64, requires_grad=True)
    w = torch.randn(5, 8, dtype=torch.complex64)
    functional.linear(x, w).abs().sum().backward()
    expected = x.detach().clone().requires_grad_()
    F.linear(expected, w).abs().sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_under_error_a_call_without_a_kernel_raises_and_one_with_a_kernel_does_not():
    fastnn.set_fallback("error")
    x, w = torch.ones(4, 8), torch.ones(5, 8)
    assert functional.linear(x, w).sum() == 4 * 5 * 8
    with pytest.raises(RuntimeError, match=r"fastnn\.linear: no kernel takes this input: dtype torch\.int64"):
        functional.linear(x.long(), w.long())


def test_a_tensor_subclass_with_its_own_functions_keeps_them():
    seen = []

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", str(function)))
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(4, 8).as_subclass(Loud)
    output = functional.linear(x, torch.randn(5, 8))
    assert isinstance(output, Loud) and seen


def test_a_mistake_is_an_error_and_not_a_fallback():
    before = _fallback.calls.total()
    with pytest.raises(RuntimeError, match=r"fastnn\.linear"):
        functional.linear(torch.randn(4, 8), torch.randn(5, 9))
    assert _fallback.calls.total() == before


@pytest.mark.skipif(
    not torch.cuda.is_available() or bool(_C.cuda_ops), reason="needs a GPU and an extension without CUDA"
)
def test_where_cuda_is_not_built_torch_serves_or_an_error_says_so():
    query, key, value = (torch.randn(1, 2, length, 8, device="cuda") for length in (4, 5, 5))
    own, stock = (
        f(query, key, value) for f in (functional.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(own, stock)
    fastnn.set_fallback("error")
    with pytest.raises(RuntimeError, match="fastnn.attention: no kernel takes this input: device cuda has no kernel"):
        functional.scaled_dot_product_attention(query, key, value)
