"""Tools around Hugging Face models: each does its work, or refuses by words that say what to do."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from byrote import EngramConfig
from tests.models.conftest import VOCABULARY, logits, make


class Logits(torch.nn.Module):
    """What exporters take: tensors in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@torch.no_grad()
def test_programs_of_one_run_are_refused(ids):
    net = Logits(make().eval())
    with pytest.raises(ValueError, match=r"torch\.jit\.trace keeps the operations of one run"):
        torch.jit.trace(net, (ids,))
    with pytest.raises(ValueError, match=r"torch\.export keeps the operations of one run"):
        torch.export.export(net, (ids,))


@torch.no_grad()
def test_one_graph_is_refused(ids):
    net = torch.compile(Logits(make().eval()), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="compile without fullgraph=True"):
        net(ids)


def test_paged_generation_is_refused_and_not_offered(ids):
    """`transformers serve` asks whether it is there, and goes on with `generate`."""
    model = make()
    assert not hasattr(model, "init_continuous_batching")
    with pytest.raises(ValueError, match="call generate"):
        model.generate_batch(ids.tolist())


def test_a_config_has_no_code_beside_it(tmp_path):
    config = make().config
    assert config.auto_map == {}
    config.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_the_vocabulary_map_goes_through_from_config(auto, ids, folded):
    config = EngramConfig.from_preset("nano", vocabulary=folded, memory_layers=[1])
    with torch.no_grad():
        assert auto.from_config(config, vocabulary=folded).eval()(ids)[0].isfinite().all()
        with pytest.raises(RuntimeError, match=r"vocabulary=\.\.\."):
            auto.from_config(config).eval()(ids)


@pytest.mark.parametrize("num_streams", [1, 4])
@pytest.mark.parametrize("how", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {}])
def test_loaded_by_either_class_it_computes_the_same(num_streams, how, ids, tmp_path):
    model = make(num_streams=num_streams).eval()
    model.save_pretrained(tmp_path)
    expected = logits(model, ids)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval(), ids), expected)
    trunk = AutoModel.from_pretrained(tmp_path, **how).eval()
    with torch.no_grad():
        hidden = trunk(ids, use_cache=False).last_hidden_state
        assert torch.equal(hidden, model.model(ids, use_cache=False).last_hidden_state)


def test_buffers_offloaded_are_refused_and_weights_are_not(ids):
    accelerate = pytest.importorskip("accelerate")
    model = make(num_streams=4).eval()
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **greedy)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model.generate(ids, **greedy), expected)
    other = make()
    accelerate.cpu_offload(other, execution_device="cpu", offload_buffers=True)
    with pytest.raises(ValueError, match="offload_buffers=False"):
        other(ids)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_trunk_alone_is_trained_under_checkpointing(use_reentrant, ids):
    gradients = []
    for checkpointing in (False, True):
        trunk = make(num_streams=4).model.train()
        if checkpointing:
            trunk.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        trunk(ids).last_hidden_state[..., :8].sum().backward()
        gradients.append({name: p.grad for name, p in trunk.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_aligned_targets_are_what_is_predicted(ids):
    model = make(num_nextn_predict_layers=1)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    for training in (True, False):
        model.train(training)
        own = model(ids, labels=ids)
        given = model(ids, labels=torch.zeros_like(ids), shift_labels=shifted)
        alone = model(ids, shift_labels=shifted)
        assert own.loss == given.loss == alone.loss
        assert own.mtp_loss == given.mtp_loss
    with pytest.raises(ValueError, match=r"shift_labels\[0, 0\] is 64"):
        model(ids, shift_labels=torch.full_like(ids, VOCABULARY))


def test_buffers_are_made_anew_off_the_meta_device(ids, folded):
    config = EngramConfig.from_preset("nano", vocabulary=folded, memory_layers=[1])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, vocabulary=folded)
    model.to_empty(device="cpu")
    model.init_weights()
    assert torch.equal(model.memory_stack.vocabulary, torch.from_numpy(np.asarray(folded)))
    assert all(int(memory.generation) == 0 for _, memory in model.memory_stack.items())
    assert model.eval()(ids).logits.isfinite().all()


def test_exact_parts_are_named_by_what_a_model_has(tmp_path):
    assert make(n_routed_experts=8).model._keep_in_fp32_modules_strict == {"selection_bias"}
    named = make(num_streams=4)._keep_in_fp32_modules_strict
    assert named == {"attention_connection", "experts_connection", "exit", "selection_bias"}
