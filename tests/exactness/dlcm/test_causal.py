"""No token sees its future: by prefixes, by perturbation, by gradients, and by what can be learned of pure noise."""

import math

import pytest
import torch

from tests.exactness.dlcm.conftest import LENGTH, SLOW, TOLERANCE, VARIANTS, assert_same, build, full_forward


def test_rows_form_concepts_at_different_steps(model, ids):
    """All other tests mean something only where this holds."""
    boundaries = full_forward(model, ids).boundaries
    assert boundaries[:, 0].all() and 0.15 < boundaries.float().mean() < 0.7
    assert (boundaries[0] != boundaries[1]).any() and len(set(boundaries.sum(dim=1).tolist())) > 1


def test_every_prefix(model, ids):
    whole = full_forward(model, ids)
    for length in range(1, LENGTH):
        assert_same(model, full_forward(model, ids[:, :length]), whole, slice(length))


@pytest.mark.parametrize("at", [9, 22])
def test_another_future(model, ids, at):
    changed = ids.clone()
    changed[:, at:] = (ids[:, at:] * 7 + 1) % 20
    before, after = full_forward(model, ids), full_forward(model, changed)
    assert torch.equal(before.boundaries[:, :at], after.boundaries[:, :at])
    torch.testing.assert_close(before.logits[:, :at], after.logits[:, :at], atol=TOLERANCE, rtol=0)
    assert ((before.logits[:, at:] - after.logits[:, at:]).abs().amax(dim=-1) > 1e-3).all()


def jacobian_ahead(model, ids, boundaries):
    """The largest gradient of any token's logits by a later token's embedding; and the smallest by its own."""
    ahead, own = 0.0, math.inf
    for t in range(0, LENGTH - 1, 2):
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(input_ids=ids, inputs_embeds=x, boundaries=boundaries, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[:, t].square().sum(), x)
        ahead = max(ahead, float(gradient[:, t + 1 :].abs().max()))
        own = min(own, float(gradient[:, t].abs().amax(dim=-1).min()))
    return ahead, own


def test_jacobian_with_boundaries_held(model, ids, forced):
    """Where boundaries are is a step function of the text: gradients do not see it, and prefixes see nothing else."""
    ahead, own = jacobian_ahead(model, ids, forced)
    assert ahead == 0 and own > 0


def test_literal_fails_all_of_these(ids, forced):
    model = build(boundary_convention="literal")
    ahead, _ = jacobian_ahead(model, ids, forced)
    assert ahead > 1e-3
    whole = full_forward(model, ids, boundaries=forced)
    prefix = full_forward(model, ids[:, :12], boundaries=forced[:, :12])
    assert (prefix.logits - whole.logits[:, :12]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("convention", "mode"), [("close", "decoupled"), ("open", "decoupled"), ("close", "e2e"), ("literal", "decoupled")]
)
def test_nothing_can_be_learned_of_noise(convention, mode):
    """Uniform tokens cost ln 4 each, whatever a model learns; unless it sees them."""
    model = build(
        vocab_size=4,
        memory_pad_token_id=0,
        num_encoder_layers=1,
        num_concept_layers=1,
        num_decoder_layers=0,
        boundary_convention=convention,
        boundary_mode=mode,
        compression_ratio=2.0,
    ).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    torch.manual_seed(1)  # of the boundaries that are drawn
    for _ in range(80):
        batch = torch.randint(0, 4, (32, 12), generator=generator)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        batch = torch.randint(0, 4, (1000, 12), generator=generator)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    noise = float(losses.std()) / math.sqrt(len(losses))
    if convention == "literal":
        assert losses.mean() < math.log(4) - 10 * noise - 0.03
    else:
        assert losses.mean() > math.log(4) - 4 * noise


def test_variants_cover_every_option():
    configs = [build(**overrides).config for name, overrides in VARIANTS.items() if name not in SLOW]
    for field, values in {
        "boundary_convention": {"close", "open"},
        "concept_weighting": {"replicated", "uniform"},
        "concept_smoothing": {"ema", "none"},
        "boundary_mode": {"decoupled", "e2e", "rule"},
    }.items():
        assert {getattr(config, field) for config in configs} == values
