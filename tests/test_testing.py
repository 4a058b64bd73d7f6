"""fastnn/testing.py: a test tool that passes everything is worse than none, so each is shown to fail too."""

import faulthandler
import os
import signal

import pytest
import torch

from fastnn import testing

DTYPES = [*testing.DTYPES, torch.int64, torch.bool]


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guarded_keeps_values_and_strides(side, layout, dtype):
    tensor = testing.laid_out(torch.randint(0, 2, (3, 5, 7)).to(dtype), layout)
    copy = testing.guarded(tensor, side)
    assert copy.stride() == tensor.stride() and copy.dtype == dtype
    assert torch.equal(copy, tensor)


@pytest.mark.parametrize("shape", [(), (0,), (4, 0, 3), (2000, 3)])
def test_guarded_takes_any_shape(shape):
    tensor = torch.randn(shape, requires_grad=True)
    copy = testing.guarded(tensor)
    assert torch.equal(copy, tensor) and copy.requires_grad and copy.is_leaf


def test_guarded_keeps_channels_last():
    tensor = testing.random((2, 3, 5, 7), layout="channels_last")
    assert testing.guarded(tensor).is_contiguous(memory_format=torch.channels_last)


def _dies_of(read) -> int:
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        read()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_a_read_past_the_guard_ends_the_process():
    import ctypes

    after, before = testing.guarded(torch.randn(5)), testing.guarded(torch.randn(5), "before")
    past, ahead = after.data_ptr() + 4 * 5, before.data_ptr() - 1
    assert _dies_of(lambda: ctypes.string_at(past, 1)) == signal.SIGSEGV
    assert _dies_of(lambda: ctypes.string_at(ahead, 1)) == signal.SIGSEGV
    assert _dies_of(lambda: ctypes.string_at(past - 1, 1)) == 0


def test_memory_near_a_guarded_tensor_is_nan():
    tensor = testing.guarded(torch.zeros(5))
    assert tensor.as_strided((1,), (1,), tensor.storage_offset() - 1).isnan().all()
    gaps = testing.guarded(torch.zeros(3, 4)[:, ::2])
    assert gaps.as_strided((1,), (1,), gaps.storage_offset() + 1).isnan().all()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_random_has_the_layout_it_was_asked_for(layout):
    tensor = testing.random((4, 6), layout=layout)
    expected = {"contiguous": (6, 1), "offset": (6, 1), "transposed": (1, 4), "strided": (12, 2), "expanded": (0, 1)}
    assert tensor.stride() == expected[layout] and tensor.isfinite().all()
    assert (tensor.storage_offset() == 1) == (layout == "offset")


def test_integers_are_whole_and_in_range():
    tensor = testing.integers((100,), torch.float16, -2, 2)
    assert torch.equal(tensor, tensor.round()) and tensor.min() == -2 and tensor.max() == 2


def _product(dtype):
    x, w = testing.random((8, 64), dtype), testing.random((16, 64), dtype)
    oracle, magnitude = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    return (x @ w.T), oracle, magnitude


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_measure_takes_torch_and_refuses_an_error(dtype):
    stock, oracle, magnitude = _product(dtype)
    testing.assert_close_to_oracle(oracle.to(dtype), oracle, magnitude, stock=stock)
    wrong = oracle.to(dtype).clone()
    wrong[3, 5] += 64 * torch.finfo(dtype).eps * magnitude[3, 5].item()
    with pytest.raises(AssertionError, match=r"\(3, 5\)"):
        testing.assert_close_to_oracle(wrong, oracle, magnitude)


def test_the_measure_refuses_nan_shape_dtype_and_what_is_far_worse_than_torch():
    stock, oracle, magnitude = _product(torch.float32)
    broken = stock.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="off"):
        testing.assert_close_to_oracle(broken, oracle, magnitude)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close_to_oracle(stock[:1], oracle, magnitude)
    with pytest.raises(AssertionError, match="dtype"):
        testing.assert_close_to_oracle(stock.double(), oracle, magnitude, stock=stock)
    worse = (oracle + 7 * torch.finfo(torch.float32).eps * magnitude).float()
    with pytest.raises(AssertionError, match="torch's own"):
        testing.assert_close_to_oracle(worse, oracle, magnitude, stock=oracle.float())


def test_the_measure_wants_nan_and_infinities_where_the_oracle_has_them():
    oracle = torch.tensor([float("nan"), float("inf"), 1e6, 1.0], dtype=torch.float64)
    magnitude = torch.ones(4)
    testing.assert_close_to_oracle(oracle.half(), oracle, magnitude)
    with pytest.raises(AssertionError, match="NaN"):
        testing.assert_close_to_oracle(torch.tensor([0.0, 0.0, 0.0, 1.0]).half(), oracle, magnitude)


def test_max_error_is_a_share_of_the_magnitude():
    assert testing.max_error(torch.tensor([1.5]), torch.tensor([1.0]).double(), torch.tensor([4.0])) == 0.125
    assert testing.max_error(torch.empty(0), torch.empty(0).double()) == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.nn.functional.linear(x, x),
        lambda x: x @ x,
        lambda x: torch.nn.functional.conv2d(x[None, None], x[None, None, :3, :3]),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
        lambda x: torch.nn.LSTM(8, 4)(x),
        lambda x: torch.nn.GRU(8, 4)(x),
        lambda x: torch.nn.RNN(8, 4)(x),
    ],
)
def test_own_kernels_sees_torchs_operators(call):
    with pytest.raises(AssertionError, match="aten::"):
        testing.assert_own_kernels(lambda: call(torch.randn(8, 8)))


def test_own_kernels_lets_pointwise_work_pass():
    testing.assert_own_kernels(lambda: torch.randn(8, 8, requires_grad=True).relu().sum().backward())


def test_threads_are_set_and_given_back():
    before = torch.get_num_threads()
    with testing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_cases_have_distinct_names():
    for family, cases in testing.CASES.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), family
    assert testing.edges(6, 16)[:2] == [0, 1] and {5, 6, 7, 15, 16, 17} <= set(testing.edges(6, 16))
