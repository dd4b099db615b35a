"""torch.compile changes nothing but the speed: loss, dense gradients and row gradients are those of the eager model."""

import pytest
import torch

from tests.exactness.conftest import build

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("num_streams", "modules"), [(1, 0), (4, 1)])
def test_a_training_step(ids, num_streams, modules):
    def step(compile):
        model = build(num_streams=num_streams, modules=modules).train()
        forward = torch.compile(model) if compile else model
        for _ in range(2):  # the second runs what the first has compiled
            model.zero_grad()
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        rows = [memory.lookup.pending.take() for _, memory in model.model.memories.items()]
        return loss, [p.grad for p in model.parameters() if p.grad is not None], rows

    loss, gradients, rows = step(False)
    its_loss, its_gradients, its_rows = step(True)
    torch.testing.assert_close(its_loss, loss, atol=1e-5, rtol=0)
    for (ids_eager, sums), (ids_compiled, its_sums) in zip(rows, its_rows, strict=True):
        assert torch.equal(ids_eager, ids_compiled)
        gradients.append(sums)
        its_gradients.append(its_sums)
    for ours, theirs in zip(its_gradients, gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp_min(1)
