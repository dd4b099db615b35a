import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from byrote.nn.router import Router, load, sequence_balance_loss
from tests.processes import on_ranks

D, E, K = 16, 8, 2


def slow_route(router, x):
    """One token at a time, in plain Python: (ids best first, their gates)."""
    logits = (x.double() @ router.weight.double().T).tolist()
    scores = torch.tensor(logits).sigmoid() if router.scores == "sigmoid" else torch.tensor(logits).softmax(-1)
    scores = scores.tolist()
    biased = [s + b for s, b in zip(scores, router.selection_bias.tolist(), strict=True)]
    size = len(scores) // router.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(router.n_group)]
    deciding = 2 if router.scores == "sigmoid" else 1
    groups.sort(key=lambda group: -sum(sorted((biased[i] for i in group), reverse=True)[:deciding]))
    open_experts = [i for group in groups[: router.topk_group] for i in group]
    ids = sorted(open_experts, key=lambda i: -biased[i])[: router.top_k]
    norm = sum(scores[i] for i in ids) if router.renormalize else 1.0
    return ids, [router.route_scale * scores[i] / norm for i in ids]


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (8, 3)])
def test_slow_twin(scores, renormalize, n_group, topk_group):
    torch.manual_seed(0)
    router = Router(
        D,
        E,
        K,
        scores=scores,
        renormalize=renormalize,
        route_scale=1.5,
        n_group=n_group,
        topk_group=topk_group,
    )
    router.selection_bias.normal_(std=0.1)
    x = torch.randn(2, 20, D)
    ids, gates, all_scores = router(x)
    assert ids.shape == gates.shape == (2, 20, K) and all_scores.shape == (2, 20, E)
    for token, its_ids, its_gates in zip(x.flatten(0, 1), ids.flatten(0, 1), gates.flatten(0, 1), strict=True):
        expected_ids, expected_gates = slow_route(router, token)
        assert its_ids.tolist() == expected_ids
        torch.testing.assert_close(its_gates, torch.tensor(expected_gates))


def test_bias_selects_and_never_weighs():
    router = Router(D, E, E)
    x = torch.randn(1, 5, D)
    _, before, _ = router(x)
    router.selection_bias.normal_()
    ids, after, scores = router(x)
    assert not torch.equal(before, after)  # another order of the same experts
    torch.testing.assert_close(after, scores.gather(-1, ids) / scores.sum(-1, keepdim=True))
    assert "selection_bias" in router.state_dict() and "selection_bias" not in dict(router.named_parameters())


def test_counts_over_accumulation_then_one_update():
    torch.manual_seed(0)
    router = Router(D, E, K)
    batches = torch.randn(3, 2, 10, D)
    ids = []
    for batch in batches:
        chosen, _, _ = router(batch)
        router.record(load(chosen, E))
        ids.append(chosen)
    counts = torch.bincount(torch.cat(ids).flatten(), minlength=E)
    assert torch.equal(router.counts, counts)
    max_vio = router.update_bias(0.001)
    assert max_vio.item() == pytest.approx(counts.max().item() / counts.float().mean().item() - 1)
    direction = torch.sign(counts.float().mean() - counts)
    torch.testing.assert_close(router.selection_bias, 0.001 * (direction - direction.mean()))
    assert router.counts is None
    assert abs(router.selection_bias.sum().item()) < 1e-8


def test_evaluation_and_dead_tokens_do_not_count():
    router = Router(D, E, K)
    ids, _, _ = router(torch.randn(2, 5, D))
    router.eval().record(load(ids, E))
    assert router.counts is None
    alive = torch.zeros(2, 5, dtype=torch.bool)
    router.train().record(load(ids, E, alive))
    assert router.counts.sum() == 0
    alive[1, 2] = True
    assert torch.equal(load(ids, E, alive).nonzero().flatten(), ids[1, 2].sort().values)


def test_update_without_a_load_changes_nothing():
    router = Router(D, E, K)
    router.selection_bias.normal_()
    before = router.selection_bias.clone()
    assert router.update_bias(0.1) == 0
    assert torch.equal(router.selection_bias, before)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_bias_stays_float32_with_its_values(cast):
    router = Router(D, E, K)
    router.selection_bias.uniform_(-0.001, 0.001).add_(1.0)
    before = router.selection_bias.clone()
    model = cast(torch.nn.Sequential(router))
    assert router.weight.dtype != torch.float32
    assert router.selection_bias.dtype == torch.float32 and torch.equal(router.selection_bias, before)
    assert torch.equal(model.state_dict()["0.selection_bias"], before)
    assert torch.equal(copy.deepcopy(model)[0].selection_bias, before)


def test_bias_is_float32_under_a_half_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = Router(D, E, K)
    finally:
        torch.set_default_dtype(torch.float32)
    assert router.weight.dtype == torch.bfloat16 and router.selection_bias.dtype == torch.float32


def test_meta_bias_can_be_materialized():
    with torch.device("meta"):
        router = Router(D, E, K)
    router = router.bfloat16().to_empty(device="cpu")
    assert router.selection_bias.dtype == torch.float32 and router.selection_bias.device.type == "cpu"


def test_bias_balances_a_skewed_router():
    torch.manual_seed(0)
    router = Router(D, E, K)
    with torch.no_grad():
        router.weight[:, 0] = torch.linspace(-2, 2, E)
    violations = []
    for _ in range(300):
        x = torch.randn(8, 32, D)
        x[..., 0] = 1.0  # every token prefers the last experts
        ids, _, _ = router(x)
        router.record(load(ids, E))
        violations.append(router.update_bias(0.01).item())
    assert violations[0] > 1.0
    assert sum(violations[-50:]) / 50 < 0.25


def update_on_a_rank(rank, weight, batches, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(batches))
    router = Router(D, E, K)
    router.load_state_dict({"weight": weight, "selection_bias": torch.zeros(E)})
    ids, _, _ = router(batches[rank])
    router.record(load(ids, E))
    max_vio = router.update_bias(0.001)
    torch.save((router.selection_bias, max_vio), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_both_batches(tmp_path):
    torch.manual_seed(0)
    router = Router(D, E, K)
    batches = torch.randn(2, 3, 10, D)
    arguments = (router.weight.detach(), batches, str(tmp_path))
    on_ranks(update_on_a_rank, arguments, 2)
    ids, _, _ = router(batches.flatten(0, 1))
    router.record(load(ids, E))
    max_vio = router.update_bias(0.001)
    for rank in range(2):
        bias, violation = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(bias, router.selection_bias) and violation == max_vio


@pytest.mark.parametrize("dead", [False, True])
def test_sequence_balance_loss_against_a_slow_twin(dead):
    torch.manual_seed(0)
    scores = torch.rand(3, 7, E).double().requires_grad_()
    alive = torch.rand(3, 7) < 0.6 if dead else torch.ones(3, 7, dtype=torch.bool)
    alive[1] = not dead
    alive[0, 0] = True
    expected = []
    for row, living in zip(scores, alive, strict=True):
        tokens = [t for t in range(7) if living[t]]
        loss = torch.zeros((), dtype=torch.float64)
        for expert in range(E):
            chosen = sum(expert in row[t].topk(K).indices for t in tokens)
            share = sum((row[t, expert] / row[t].sum() for t in tokens), torch.zeros(()))
            if tokens:
                loss = loss + E / (K * len(tokens)) * chosen * share / len(tokens)
        expected.append(loss)
    expected = torch.stack(expected)
    actual = sequence_balance_loss(scores, K, alive if dead else None)
    torch.testing.assert_close(actual, expected)
    upstream = torch.rand(3).double()
    ours = torch.autograd.grad(actual, scores, upstream)
    theirs = torch.autograd.grad(expected, scores, upstream)
    torch.testing.assert_close(ours, theirs)
    assert not dead or actual[1] == 0


def test_even_scores_cost_one():
    scores = torch.eye(E).repeat(1, 3, 1) + 1e-9  # with top-1, each expert in turn, and all of the share
    assert sequence_balance_loss(scores, 1).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k=0 of num_experts=8: give"),
        ({"top_k": 9}, "top_k=9 of num_experts=8: give"),
        ({"n_group": 3}, "n_group=3 does not divide num_experts=8: give"),
        ({"n_group": 4, "topk_group": 5}, "topk_group=5 of n_group=4: give"),
        (
            {"n_group": 4, "topk_group": 1, "top_k": 3},
            "top_k=3 experts do not fit in topk_group=1 groups",
        ),
        ({"scores": "tanh"}, "scores='tanh' is unknown: give"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        Router(**{"hidden_size": D, "num_experts": E, "top_k": K} | change)
