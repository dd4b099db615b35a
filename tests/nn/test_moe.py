import pytest
import torch
from torch.utils.checkpoint import checkpoint

from byrote.nn.moe import MLP, DeepSeekMoE, Experts

D, W, E, K = 32, 16, 8, 3


def gradients(experts, path, x, ids, gates, upstream):
    experts.zero_grad()
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    y = path(x, ids, gates)
    y.backward(upstream)
    return [y.detach(), x.grad, gates.grad, experts.gate_up.grad.clone(), experts.down.grad.clone()]


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("used", [[0], [1, 2, 6], list(range(E))], ids=["one expert", "some idle", "all"])
def test_grouped_equals_loop(tokens, used):
    torch.manual_seed(0)
    experts = Experts(D, W, E)
    choices = min(K, len(used))
    ids = torch.tensor(used)[torch.rand(tokens, len(used)).topk(choices, dim=-1).indices]
    x, gates, upstream = torch.randn(tokens, D), torch.rand(tokens, choices), torch.randn(tokens, D)
    grouped = gradients(experts, experts.forward, x, ids, gates, upstream)
    looped = gradients(experts, experts.loop, x, ids, gates, upstream)
    for one, other in zip(grouped, looped, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    idle = [expert for expert in range(E) if expert not in ids]
    assert not grouped[3][idle].any() and not grouped[4][idle].any()


def test_two_runs_are_bitwise_equal():
    torch.manual_seed(0)
    experts = Experts(D, W, E)
    ids = torch.rand(500, E).topk(K, dim=-1).indices
    x, gates, upstream = torch.randn(500, D), torch.rand(500, K), torch.randn(500, D)
    first, second = (gradients(experts, experts.forward, x, ids, gates, upstream) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_sum_can_be_differentiated():
    moe = DeepSeekMoE(D, W, E, K)
    y, _ = moe(torch.randn(2, 5, D))
    y.sum().backward()  # its gradient has strides of zero, which grouped_mm alone refuses
    assert moe.experts.down.grad.any()


def test_bfloat16_autocast():
    torch.manual_seed(0)
    moe = DeepSeekMoE(D, W, E, K, W)
    x = torch.randn(2, 20, D)
    exact, _ = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stats = moe(x)
        (y.float().sum() + stats.balance_loss.sum()).backward()
        experts = moe.experts
        ids, gates, _ = moe.router(x.flatten(0, 1))
        assert gates.dtype == torch.float32  # the router stays exact
        grouped, looped = experts(x.flatten(0, 1), ids, gates), experts.loop(x.flatten(0, 1), ids, gates)
    assert experts.gate_up.grad.dtype == torch.float32 and experts.gate_up.grad.isfinite().all()
    torch.testing.assert_close(y.float(), exact, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(grouped.float(), looped.float(), atol=3e-2, rtol=3e-2)


def test_bfloat16_parameters():
    moe = DeepSeekMoE(D, W, E, K).bfloat16()
    y, _ = moe(torch.randn(1, 4, D, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and moe.router.weight.grad.dtype == torch.bfloat16


def test_output_is_shared_plus_routed():
    torch.manual_seed(0)
    moe = DeepSeekMoE(D, W, E, K, shared_width=24)
    assert moe.shared.gate_proj.weight.shape == (24, D)
    x = torch.randn(1, 4, D)
    y, _ = moe(x)
    shared, moe.shared = moe.shared, None
    routed, _ = moe(x)
    torch.testing.assert_close(y, routed + shared(x))
    ids, gates, _ = moe.router(x)
    expected = torch.zeros(D)
    for expert, gate in zip(ids[0, 2], gates[0, 2], strict=True):
        mlp = MLP(D, W)
        mlp.gate_proj.weight, mlp.up_proj.weight = map(
            torch.nn.Parameter, moe.experts.gate_up[expert].detach().chunk(2)
        )
        mlp.down_proj.weight = torch.nn.Parameter(moe.experts.down[expert].detach())
        expected = expected + gate * mlp(x[0, 2])
    torch.testing.assert_close(routed[0, 2], expected)


def test_dead_tokens_have_no_load():
    moe = DeepSeekMoE(D, W, E, K)
    x, alive = torch.randn(2, 6, D), torch.rand(2, 6) < 0.5
    alive[0, 0] = True
    _, stats = moe(x, alive)
    ids, _, _ = moe.router(x)
    assert stats.counts.tolist() == torch.bincount(ids[alive].flatten(), minlength=E).tolist()
    assert moe(x)[1].counts.sum() == 2 * 6 * K
    changed = torch.where(alive[..., None], x, torch.randn_like(x))
    torch.testing.assert_close(moe(changed, alive)[1].balance_loss, stats.balance_loss)


def test_evaluation_has_no_balance_loss():
    moe = DeepSeekMoE(D, W, E, K).eval()
    _, stats = moe(torch.randn(1, 4, D))
    assert stats == (None, None)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once_and_keeps_the_gradients(use_reentrant):
    torch.manual_seed(0)
    moe = DeepSeekMoE(D, W, E, K, W)
    alive = torch.rand(2, 9) < 0.8

    def block(x):
        y, stats = moe(x, alive)
        return x + y, *stats

    def step(run):
        moe.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(2, 9, D, requires_grad=True)
        y, counts, balance = run(x)
        moe.router.record(counts)
        (y.square().sum() + 0.1 * balance.sum()).backward()
        return [x.grad, *(parameter.grad for parameter in moe.parameters())]

    plain = step(block)
    assert moe.router.counts.sum() == alive.sum() * K
    moe.router.counts = None
    recomputed = step(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert moe.router.counts.sum() == alive.sum() * K
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_width": -1}, "shared_width=-1: give 0"),
        ({"expert_width": 12}, "expert_width=12: give a multiple of 8"),
        ({"hidden_size": 20}, "hidden_size=20: give a multiple of 8"),
        ({"top_k": 9}, "top_k=9 of num_experts=8: give"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        DeepSeekMoE(**{"hidden_size": D, "expert_width": W, "num_experts": E, "top_k": K} | change)
