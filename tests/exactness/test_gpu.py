"""The same on a CUDA device: `make gpu`. Row ids are integers, so they equal the CPU's to the last bit."""

import pytest
import torch
from transformers import DynamicCache

from byrote.train.optimizer import Optimizer
from tests.exactness.conftest import build, full_forward
from tests.exactness.test_cached import in_chunks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def on_gpu(convolution, moe, shape):
    return build(convolution=convolution, moe=moe, **shape).cuda()


def test_row_ids_and_logits_equal_the_cpu(model, on_gpu, ids):
    expected, expected_rows = full_forward(model, ids)
    logits, rows = full_forward(on_gpu, ids.cuda())
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-4, rtol=0)
    for layer, layer_rows in rows.items():
        assert torch.equal(layer_rows.cpu(), expected_rows[layer])


@pytest.mark.parametrize("sizes", [[10] + [1] * 14, [7, 9, 8]])
def test_cached_decode_equals_the_full_forward(on_gpu, ids, sizes):
    expected, _ = full_forward(on_gpu, ids.cuda())
    logits, _, _ = in_chunks(on_gpu, ids.cuda(), sizes)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_drafts_and_plain_greedy_agree(on_gpu, ids):
    prompt = ids[:1].repeat(1, 2).cuda()
    plain = on_gpu.generate(prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(on_gpu.generate(prompt, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3), plain)
    lazy = on_gpu.generate(prompt, max_new_tokens=20, do_sample=False, past_key_values=DynamicCache())
    assert torch.equal(lazy, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss(on_gpu, ids, dtype):
    on_gpu.train()
    optimizer, losses = Optimizer(on_gpu, lr=3e-3), []
    for _ in range(30):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = on_gpu(input_ids=ids.cuda(), labels=ids.cuda()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0] and optimizer.rows_touched > 0
