"""What must hold of an extension built against a CUDA build of torch, on a machine that may have no GPU. (make check-cuda-link)

It has loaded; each op that says it has CUDA kernels has them registered, with its backward; ``python -m fastnn.info``
says so; the CPU's kernels still serve; and where there is no GPU, torch says so and not the extension.
"""

import torch
import torch.nn.functional as F

KINDS = ("", "_train", "_backward")  # the operators of an op that run kernels; _pack is for the CPU alone


def defined():
    """The names of all operators."""
    return set(torch._C._dispatch_get_all_op_names())


def has_kernel(name, key):
    """Whether there is an operator of that name, and it has a kernel under that dispatch key."""
    return name in defined() and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def operators(op, has_kernel):
    """The operators of an op of ``_C.cuda_ops`` that run kernels: those with one for the CPU."""
    return [name for name in (f"fastnn::{op}{kind}" for kind in KINDS) if has_kernel(name, "CPU")]


def mistakes(cuda_ops, defined, has_kernel):
    """What is wrong with the dispatcher's table: ``has_kernel(operator, dispatch key)``, false where there is none."""
    if not cuda_ops:
        return ["the extension says that no op has CUDA kernels: it was built without CUDA"]

    found, promised = [], set()
    for op in cuda_ops:
        names = operators(op, has_kernel)
        promised.update(names)
        if f"fastnn::{op}" not in names:
            found.append(f"fastnn::{op} has no CPU kernel")
        found += [f"{name} has no CUDA kernel" for name in names if not has_kernel(name, "CUDA")]
    for name in sorted(name for name in defined if name.startswith("fastnn::") and name not in promised):
        if has_kernel(name, "CUDA"):
            found.append(f"{name} has a CUDA kernel, and cuda_ops does not say so")
    return found


def near(name, own, stock):
    torch.testing.assert_close(own, stock, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name} on the CPU: {text}")


def check_cpu():
    """A call and a gradient of each family."""
    import fastnn
    from fastnn.functional import conv2d, linear, scaled_dot_product_attention

    fastnn.set_fallback("error")
    torch.manual_seed(0)
    x, w, b = torch.randn(9, 33), torch.randn(17, 33, requires_grad=True), torch.randn(17)
    own, stock = linear(x, w, b, activation="gelu"), F.gelu(F.linear(x, w, b))
    near("linear", own, stock)
    near("linear's gradient", *(torch.autograd.grad(y.sum(), w)[0] for y in (own, stock)))
    image, kernel = torch.randn(2, 5, 13, 11), torch.randn(7, 5, 3, 3)
    near("conv2d", conv2d(image, kernel, padding=1), F.conv2d(image, kernel, padding=1))
    stock = torch.nn.LSTM(12, 10)
    own = fastnn.nn.LSTM(12, 10)
    own.load_state_dict(stock.state_dict())
    steps = torch.randn(6, 3, 12)
    near("rnn", own(steps)[0], stock(steps)[0])
    query = torch.randn(2, 3, 19, 16, requires_grad=True)
    key, value = torch.randn(2, 3, 23, 16), torch.randn(2, 3, 23, 16)
    own = scaled_dot_product_attention(query, key, value)
    stock = F.scaled_dot_product_attention(query, key, value)
    near("attention", own, stock)
    near("attention's gradient", *(torch.autograd.grad(y.square().sum(), query)[0] for y in (own, stock)))


def check_info(cuda_ops):
    from fastnn import info

    rows = dict(info.collect().rows)
    assert rows["cuda"] == f"kernels of {', '.join(cuda_ops)}", rows


def check_without_a_gpu():
    if torch.cuda.is_available():
        return "a GPU is here"
    try:
        torch.ones(3, device="cuda")
    except (RuntimeError, AssertionError) as refusal:
        assert "fastnn" not in str(refusal), refusal
        return f"no GPU is here: {str(refusal).splitlines()[0]}"
    raise AssertionError("torch made a tensor on a GPU that it does not see")


def main():
    from fastnn import _C

    print(f"{_C.__file__}\ntorch {torch.__version__}, CUDA {torch.version.cuda}")
    assert torch.version.cuda is not None, "this torch is built without CUDA"
    found = mistakes(_C.cuda_ops, defined(), has_kernel)
    assert not found, "\n".join(found)
    print("registered:", ", ".join(name for op in _C.cuda_ops for name in operators(op, has_kernel)))
    check_info(_C.cuda_ops)
    check_cpu()
    print(f"the CPU's kernels are right; {check_without_a_gpu()}")


if __name__ == "__main__":
    main()
