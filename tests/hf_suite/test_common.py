"""transformers' common tests of models, over byrote's classes (make hf-suite)."""

import unittest

import pytest

from tests.hf_suite.source import fetched, load

if not fetched():
    pytest.skip("transformers' own tests are not here: make hf-suite fetches them", allow_module_level=True)

from tests.hf_suite.subjects import MEMORY, deepseek_v3, dlcm, engram

common, training = load("test_modeling_common"), load("test_training_mixin")


class Suite(common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin):
    model_tester = None

    @property
    def all_model_classes(self):
        return self.model_tester.base_model_class, self.model_tester.causal_lm_class


class TestEngram(Suite, unittest.TestCase):
    model_tester = engram()


class TestEngramStreams(Suite, unittest.TestCase):
    model_tester = engram(num_streams=4)


class TestEngramPrediction(Suite, unittest.TestCase):
    model_tester = engram(num_nextn_predict_layers=1, attn_implementation="eager")


class TestDLCM(Suite, unittest.TestCase):
    model_tester = dlcm()


class TestDLCMMemory(Suite, unittest.TestCase):
    model_tester = dlcm(memory_layers=[0], **MEMORY)


class TestDeepseekV3(Suite, unittest.TestCase):
    """Nothing of ours: what transformers' own model of this family gives on the same machine."""

    model_tester = deepseek_v3()
