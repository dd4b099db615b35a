"""The loss of the prediction modules against python loops over documents, and where the modules must not matter."""

import pytest
import torch
from torch.nn import functional as F

from byrote import EngramConfig, EngramForCausalLM
from byrote.models.counts import count
from byrote.nn.rope import rotary
from byrote.nn.router import Router
from byrote.train.muon import Muon
from byrote.train.optimizer import Optimizer
from tests.exactness.conftest import build
from tests.models.conftest import make

# Documents of a packed row, then one padded at either side; lengths from one token up.
DOCUMENTS = ([7, 1, 2, 3, 11], [24], [24])
PADDING = (0, 5, -6)  # left, right


def batch(seed=3):
    """ids, mask, position ids and labels [3, 24], and the places of every document: (row, slice)."""
    ids = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(seed))
    mask, positions, labels = torch.ones_like(ids), torch.zeros_like(ids), ids.clone()
    places = []
    for row, (lengths, padding) in enumerate(zip(DOCUMENTS, PADDING, strict=True)):
        if padding:
            dead = slice(0, padding) if padding > 0 else slice(padding, None)
            mask[row, dead], labels[row, dead] = 0, -100
            lengths = [24 - abs(padding)]
        at = max(0, padding)
        for length in lengths:
            positions[row, at : at + length] = torch.arange(length)
            if row:  # in row 0 the main loss predicts over boundaries, as labels say; modules never do
                labels[row, at] = -100
            places.append((row, slice(at, at + length)))
            at += length
    labels[0, 16:18] = labels[1, 9] = -100
    return ids, mask, positions, labels, places


def slow_loss(model, ids, labels, places, total):
    """1/D sum_k CE_k, one document, one module and one token at a time, without any shift or mask."""
    losses = []
    for row, place in places:
        document, wanted = ids[row, place], labels[row, place].tolist()
        embeddings = model.model.embed_tokens(document)
        streams = model(input_ids=document[None], use_cache=False, output_streams=True).streams
        for k, module in enumerate(model.model.mtp, start=1):
            left = len(document) - k
            if left < 1:
                break
            combined = torch.stack(
                [
                    module.project(torch.cat([module.embed_norm(embeddings[i + k]), module.hidden_norm(stream)]))
                    for i in range(left)
                    for stream in streams[0, i]
                ]
            ).view(1, left, *streams.shape[2:])
            angles = rotary(torch.arange(left)[None], model.config.qk_rope_head_dim, theta=model.config.rope_theta)
            streams = module.block(combined, angles, None, alive_only(left)).streams
            logits = model.lm_head(module.norm(module.exit(streams)))[0]
            losses += [
                -logits[i].log_softmax(-1)[wanted[i + k + 1]] for i in range(left - 1) if wanted[i + k + 1] != -100
            ]
    return torch.stack(losses).sum() / total / len(model.model.mtp)


def alive_only(length):
    class Alive:
        alive = torch.ones(1, length, dtype=torch.bool)

    return Alive()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    rows = [memory.lookup.pending.take() for _, memory in model.model.memories.items()]
    dense = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return dense, dict(enumerate(rows))


@pytest.mark.parametrize("given", [True, False], ids=["items given", "items counted"])
@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("num_streams", [1, 4])
def test_loss_and_gradients_are_those_of_the_slow_twin(num_streams, modules, given):
    model = build(num_streams=num_streams, modules=modules).train()
    model.config.balance_loss_alpha = 0.0
    ids, mask, positions, labels, places = batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    total = 37 if given else int((labels[:, 1:] != -100).sum())
    if given:
        inputs["num_items_in_batch"] = total
    out = model(**inputs, mtp_loss_weight=1.0)
    ours = out.loss - model(**inputs, mtp_loss_weight=0.0).loss
    twin = slow_loss(model, ids, labels, places, total)
    torch.testing.assert_close(out.mtp_loss, twin.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours, twin, atol=1e-5, rtol=1e-5)
    (dense, rows), (slow_dense, slow_rows) = gradients(model, ours), gradients(model, twin)
    assert any(name.startswith("model.layers.0") for name in slow_dense)
    for name, expected in slow_dense.items():
        # Relative to the largest: the signed root of the memory's gate is steep near zero.
        assert (dense[name] - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(0.1), name
    for layer, (places_, sums) in slow_rows.items():
        torch.testing.assert_close(_dense(rows[layer], places_), sums, atol=1e-5, rtol=1e-4)


def _dense(found, wanted):
    """Sums of the wanted rows; rows that only the main loss reached must have cancelled."""
    index, sums = found
    extra = ~torch.isin(index, wanted)
    assert float(sums[extra].abs().max() if extra.any() else 0) < 1e-4
    return sums[torch.isin(index, wanted)]


def test_the_weight_is_the_config_s_unless_given():
    model = build(modules=2).train()
    ids, _, _, labels, _ = batch()
    losses = {w: model(input_ids=ids, labels=labels, mtp_loss_weight=w) for w in (None, 0.0, 0.3, 1.0)}
    assert losses[None].loss == losses[0.3].loss
    torch.testing.assert_close(losses[1.0].loss, losses[0.0].loss + losses[0.0].mtp_loss)


def test_evaluation_and_the_trunk_do_not_know_the_modules():
    """In evaluation loss and logits are those of the model without them: drop them, and it is the same model."""
    model, plain = build(modules=2), build()
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys and all(".mtp." in name for name in missing.unexpected_keys)
    ids, mask, positions, labels, _ = batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    for memory, other in zip(model.model.memories.items(), plain.model.memories.items(), strict=True):
        other[1].table = memory[1].table
    ours, theirs = model(**inputs), plain(**inputs)
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.logits, theirs.logits)
    assert ours.mtp_loss is None and ours.streams is None
    model.train(), plain.train()
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert model(input_ids=ids).mtp_loss is None


def test_routers_of_the_modules_count_only_places_with_a_next_token():
    model = build(modules=2).train()
    ids, mask, positions, labels, places = batch()
    model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels)
    for k, module in enumerate(model.model.mtp, start=1):
        known = sum(max(0, place.stop - place.start - k) for _, place in places)
        assert int(module.block.experts.router.counts.sum()) == known * model.config.num_experts_per_tok
    assert sum(isinstance(m, Router) for m in model.modules()) == 2 + 2


def test_the_balance_loss_of_the_modules_joins():
    model = build(modules=1).train()
    ids, _, _, labels, _ = batch()
    losses = {}
    for alpha in (0.0, 1.0):
        model.config.balance_loss_alpha = alpha
        losses[alpha] = model(input_ids=ids, labels=labels, mtp_loss_weight=0.0).loss
    model.zero_grad()
    (losses[1.0] - losses[0.0]).backward()
    assert float(model.model.mtp[0].block.experts.router.weight.grad.abs().max()) > 1e-5


def test_blocks_are_as_the_last_of_the_trunk():
    dense, sparse = make(first_k_dense_replace=4, num_nextn_predict_layers=1), make(num_nextn_predict_layers=2)
    kinds = [type(module.block.experts).__name__ for module in (*dense.model.mtp, *sparse.model.mtp)]
    assert kinds == ["MLP", "DeepSeekMoE", "DeepSeekMoE"]
    assert all(module.block.memory is None for module in sparse.model.mtp)


@pytest.mark.parametrize(("field", "value"), [("num_nextn_predict_layers", -1), ("mtp_loss_weight", -0.1)])
def test_bad_fields(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        EngramConfig.from_preset("nano", **{field: value})


@pytest.mark.parametrize("num_streams", [1, 4])
def test_saved_and_loaded(tmp_path, num_streams):
    model = build(num_streams=num_streams, modules=2)
    model.save_pretrained(tmp_path)
    back, info = EngramForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    half = EngramForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.mtp[0].project.weight.dtype == torch.bfloat16
    if num_streams > 1:
        assert half.model.mtp[1].exit.weight.dtype == half.model.mtp[1].block.attention_connection.scale.dtype
        assert half.model.mtp[1].exit.weight.dtype == torch.float32


def test_initialization_covers_the_modules():
    model = make(num_nextn_predict_layers=1, num_streams=4, initializer_range=0.3)
    module = model.model.mtp[0]
    assert 0.25 < float(module.project.weight.detach().std()) < 0.35
    assert 0.25 < float(module.block.experts.experts.gate_up.detach().std()) < 0.35
    assert all(bool((norm.weight == 1).all()) for norm in (module.embed_norm, module.hidden_norm, module.norm))


def test_their_matrices_go_to_muon():
    model = make(num_nextn_predict_layers=1)
    optimizer = Optimizer(model, muon=Muon())
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    module = model.model.mtp[0]
    for matrix in (module.project.weight, module.block.attention.o_proj.weight, module.block.experts.router.weight):
        assert groups[id(matrix)]["kind"] == "muon"
    assert groups[id(module.norm.weight)]["kind"] == "adamw" and groups[id(module.norm.weight)]["weight_decay"] == 0


def test_counts_keep_them_apart():
    with_modules, without = (count(make(num_nextn_predict_layers=d).config) for d in (2, 0))
    model = make(num_nextn_predict_layers=2)
    assert without.prediction == 0
    assert with_modules.prediction == sum(p.numel() for p in model.model.mtp.parameters())
    for field in ("total", "active", "table", "experts"):
        assert getattr(with_modules, field) == getattr(without, field), field
    # Two blocks of a backbone of four, and the head three times instead of once: more, but not twice as much.
    assert without.flops_per_token < with_modules.flops_per_token < 2 * without.flops_per_token


def test_autocast_trains_the_modules():
    model = make(num_nextn_predict_layers=2, num_streams=4).train()
    optimizer = Optimizer(model, lr=3e-3)
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.mtp_loss))
    assert losses[-1] < 0.7 * losses[0]
    assert F.relu(torch.tensor(losses)).isfinite().all()
