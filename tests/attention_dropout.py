"""What attention's dropout keeps to on every device."""

import torch

from fastnn.functional import scaled_dot_product_attention as attention


def check_that_it_follows_torch_s_generator(device):
    query, key, value = (torch.randn(2, 3, length, 64, device=device) for length in (10, 20, 20))
    torch.manual_seed(7)
    first = attention(query, key, value, dropout_p=0.5)
    second = attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(7)
    assert torch.equal(attention(query, key, value, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    assert (attention(query, key, value, dropout_p=1.0) == 0).all()


def check_that_it_drops_the_share_it_says(device):
    weights = torch.eye(256, device=device).expand(1, 4, 256, 256)
    zeros = torch.zeros(1, 4, 256, 8, device=device)
    for p in (0.1, 0.5, 0.9):
        dropped = attention(zeros, zeros, weights, dropout_p=p)
        assert abs((dropped == 0).double().mean().item() - p) < 0.01
        torch.testing.assert_close(dropped.max().item(), 1 / 256 / (1 - p), rtol=1e-5, atol=0)
