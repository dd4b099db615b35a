"""RMSNorm in the precision of its weight."""

import torch
from torch.nn import functional as F

from byrote.nn.norm import RMSNorm


def test_the_weights_precision_and_the_inputs():
    norm, x = RMSNorm(8, eps=1e-6), torch.randn(2, 3, 8)
    torch.nn.init.normal_(norm.weight)
    assert torch.equal(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-6))
    half = norm(x.bfloat16())
    assert torch.equal(half, norm(x.bfloat16().float()).bfloat16())
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert norm.double()(x.double()).dtype == torch.float64
