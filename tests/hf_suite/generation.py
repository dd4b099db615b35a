"""Ways to generate, each against another that must give the same tokens.

transformers' source distribution leaves its own `GenerationTesterMixin` out (tests.hf_suite.source); these tests ask
what it asks of a language model with a cache, in the words of its public interface.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin

NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class GenerationTesterMixin:
    """Beside `ModelTesterMixin`, whose `model_tester` and `all_generative_model_classes` it takes."""

    def _each(self):
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            torch.manual_seed(0)
            yield model_class(config).eval(), inputs["input_ids"]

    def _same(self, **how: Any) -> None:
        """Generated as `how` says, greedily, are the tokens that generating without a cache gives."""
        for model, ids in self._each():
            plain = model.generate(ids, use_cache=False, **GREEDY)
            self.assertTrue(torch.equal(model.generate(ids, **{**GREEDY, **how}), plain))

    def test_inherits_generation_mixin(self):
        for model_class in self.all_generative_model_classes:
            self.assertTrue(issubclass(model_class, GenerationMixin))

    @torch.no_grad()
    def test_greedy_generate(self):
        for model, ids in self._each():
            expected = ids
            for _ in range(NEW):
                newest = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                expected = torch.cat([expected, newest], dim=1)
            self.assertTrue(torch.equal(model.generate(ids, **GREEDY), expected))
            self.assertTrue(torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected))

    def test_generate_with_static_cache(self):
        self._same(cache_implementation="static")

    def test_generate_in_chunks_of_the_prompt(self):
        self._same(prefill_chunk_size=3)

    def test_prompt_lookup_decoding_matches_greedy_search(self):
        for model, ids in self._each():
            row = ids[:1].repeat(1, 2)
            looked_up = model.generate(row, prompt_lookup_num_tokens=2, **GREEDY)
            self.assertTrue(torch.equal(looked_up, model.generate(row, **GREEDY)))

    def test_assisted_decoding_matches_greedy_search(self):
        for model, ids in self._each():
            torch.manual_seed(1)
            other = type(model)(model.config).eval()
            plain = model.generate(ids[:1], **GREEDY)
            for assistant in (model, other):
                assisted = model.generate(ids[:1], assistant_model=assistant, **GREEDY)
                self.assertTrue(torch.equal(assisted, plain))

    def test_sample_generate(self):
        for model, ids in self._each():
            drawn = []
            for cached in (True, False):
                torch.manual_seed(3)
                drawn.append(model.generate(ids, use_cache=cached, **{**GREEDY, "do_sample": True}))
            self.assertTrue(torch.equal(*drawn))

    def test_beam_search_generate(self):
        for model, ids in self._each():
            found = [
                model.generate(ids, num_beams=3, num_return_sequences=2, use_cache=cached, **GREEDY)
                for cached in (True, False)
            ]
            self.assertEqual(found[0].shape, (2 * len(ids), ids.shape[1] + NEW))
            self.assertTrue(torch.equal(*found))

    def test_generate_dict_outputs(self):
        for model, ids in self._each():
            model.set_attn_implementation("eager")
            outputs = ("scores", "logits", "attentions", "hidden_states")
            asked = {f"output_{output}": True for output in outputs}
            found = model.generate(ids, return_dict_in_generate=True, **asked, **GREEDY)
            self.assertEqual(len(found.scores), NEW)
            self.assertEqual(found.logits[0].shape, (len(ids), model.config.vocab_size))
            layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
            for step, (attentions, states) in enumerate(zip(found.attentions, found.hidden_states, strict=True)):
                seen = ids.shape[1] + step
                new = seen if step == 0 else 1
                self.assertEqual(len(attentions), layers)
                self.assertEqual(len(states), layers + 1)
                self.assertTrue(all(weights.shape == (len(ids), heads, new, seen) for weights in attentions))
                self.assertTrue(all(state.shape == (len(ids), new, model.config.hidden_size) for state in states))

    @torch.no_grad()
    def test_left_padding_compatibility(self):
        for model, ids in self._each():
            padded = torch.nn.functional.pad(ids, (4, 0), value=0)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
            generated = model.generate(padded, attention_mask=mask, **GREEDY)
            self.assertTrue(torch.equal(generated[:, 4:], model.generate(ids, **GREEDY)))

    def test_generate_continue_from_past_key_values(self):
        for model, ids in self._each():
            whole = model.generate(ids, **GREEDY)
            begun = model.generate(ids, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 2})
            went_on = model.generate(
                begun.sequences, past_key_values=begun.past_key_values, **{**GREEDY, "max_new_tokens": NEW - 2}
            )
            self.assertTrue(torch.equal(went_on, whole))

    def test_generate_without_input_ids(self):
        for model, _ in self._each():
            generated = model.generate(bos_token_id=5, **GREEDY)
            self.assertTrue(torch.equal(generated, model.generate(torch.tensor([[5]]), **GREEDY)))

    def test_generate_from_inputs_embeds(self):
        for model, ids in self._each():
            embeds = model.get_input_embeddings()(ids).detach()
            both = model.generate(ids, inputs_embeds=embeds, **GREEDY)
            self.assertTrue(torch.equal(both, model.generate(ids, **GREEDY)))
            if getattr(model, "memory_stack", None) is not None:
                with self.assertRaisesRegex(ValueError, "beside inputs_embeds"):
                    model.generate(inputs_embeds=embeds, **GREEDY)
            else:
                alone = model.generate(inputs_embeds=embeds, **GREEDY)
                self.assertTrue(torch.equal(alone, both[:, ids.shape[1] :]))

    def test_generate_with_and_without_position_ids(self):
        for model, ids in self._each():
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            self.assertTrue(
                torch.equal(model.generate(ids, position_ids=positions, **GREEDY), model.generate(ids, **GREEDY))
            )

    @torch.no_grad()
    def test_forward_with_logits_to_keep(self):
        for model, ids in self._each():
            whole = model(ids).logits
            torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
            torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 2])).logits, whole[:, [0, 2]])

    @torch.no_grad()
    def test_past_key_values_format(self):
        for model, ids in self._each():
            cache = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values
            self.assertEqual(cache.get_seq_length(), ids.shape[1])
            for layer in cache.layers[: model.config.num_hidden_layers]:
                self.assertEqual(layer.keys.shape[::2], (len(ids), ids.shape[1]))

    def test_generate_after_a_round_trip(self):
        for model, ids in self._each():
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                again = type(model).from_pretrained(folder).eval()
            self.assertTrue(torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY)))
