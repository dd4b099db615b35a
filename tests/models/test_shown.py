"""What a forward shows of its inside, against what the layers do."""

import pytest
import torch

from byrote import DLCMConfig, DLCMForCausalLM
from tests.models.conftest import VOCABULARY, make


def dlcm():
    torch.manual_seed(0)
    return DLCMForCausalLM(DLCMConfig(vocab_size=VOCABULARY, memory_layers=[0], num_streams=1)).eval()


MODELS = {
    "one stream": lambda: make().eval(),
    "four streams": lambda: make(num_streams=4).eval(),
    "concepts": dlcm,
}


@pytest.fixture(params=MODELS)
def shown(request):
    return MODELS[request.param]()


def blocks(model):
    trunk = model.model
    return list(trunk.layers) if hasattr(trunk, "layers") else [*trunk.encoder, *trunk.decoder]


@torch.no_grad()
def test_hidden_states_are_what_blocks_read_and_the_head_reads(shown, ids):
    read = []
    for block in blocks(shown):
        block.register_forward_pre_hook(lambda module, args: read.append(args[0].mean(dim=2)))
    outputs = shown.model(ids, output_hidden_states=True, use_cache=False)
    assert len(outputs.hidden_states) == shown.config.num_hidden_layers + 1
    for state, expected in zip(outputs.hidden_states[:-1], read, strict=True):
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-6)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert torch.equal(shown.lm_head(outputs.hidden_states[-1]), shown(ids, use_cache=False).logits)


@torch.no_grad()
def test_some_hidden_states(shown, ids):
    whole = shown(ids, output_hidden_states=True).hidden_states
    some = shown(ids, output_hidden_states=[0, -1, 99]).hidden_states
    assert torch.equal(some[0], whole[0])
    assert torch.equal(some[-1], whole[-1])
    assert some[1:-1] == (None,) * (len(whole) - 2)


@torch.no_grad()
def test_the_config_asks_for_hidden_states_and_for_tuples(shown, ids):
    named = shown(ids, output_hidden_states=True, use_cache=False)
    shown.config.output_hidden_states, shown.config.return_dict = True, False
    plain = shown(ids, use_cache=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.logits)
    flat = [x for field in plain for x in (field if isinstance(field, tuple) else [field])]
    expected = [x for field in named.to_tuple() for x in (field if isinstance(field, tuple) else [field])]
    assert len(flat) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(flat, expected, strict=True))


@torch.no_grad()
def test_weights_are_refused_unless_they_are_made(shown, ids):
    with pytest.raises(ValueError, match="set_attn_implementation\\('eager'\\)"):
        shown(ids, output_attentions=True)
    assert shown(ids).attentions is None


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
def test_eager_attention_is_that_of_torch_and_shows_its_weights(shown, ids, padding):
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    expected = shown(ids, attention_mask=mask, use_cache=False).logits
    shown.set_attn_implementation("eager")
    outputs = shown(ids, attention_mask=mask, use_cache=False, output_attentions=True)
    assert len(outputs.attentions) == shown.config.num_hidden_layers
    for weights in outputs.attentions:
        assert weights.shape == (len(ids), shown.config.num_attention_heads, ids.shape[1], ids.shape[1])
        torch.testing.assert_close(
            weights.sum(dim=-1)[:, :, padding:], torch.ones(1).expand(2, 4, len(ids[0]) - padding)
        )
        assert not weights[1, :, padding:, :padding].any()
        assert not weights.triu(1).any()
    torch.testing.assert_close(outputs.logits[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-6)


def test_a_step_behind_a_cache_shows_weights_over_all_of_it(shown, ids):
    shown.set_attn_implementation("eager")
    with torch.no_grad():
        expected = shown(ids, use_cache=False).logits[:, -1:]
        cache = shown(ids[:, :-1], use_cache=True).past_key_values
        outputs = shown(ids[:, -1:], past_key_values=cache, output_attentions=True)
    assert all(weights.shape[2:] == (1, ids.shape[1]) for weights in outputs.attentions)
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=2e-6)


def test_gradients_reach_what_is_shown(ids):
    model = make()
    model.set_attn_implementation("eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    watched = [*outputs.hidden_states[:-1], *outputs.attentions]
    gradients = torch.autograd.grad(outputs.logits.sum(), watched)
    assert all(bool(gradient.abs().sum() > 0) and bool(gradient.isfinite().all()) for gradient in gradients)
