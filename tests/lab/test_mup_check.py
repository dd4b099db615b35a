"""A DLCM keeps its activations under muP when one of its widths grows, and not without; the verb that says so."""

import json

import numpy as np
import pytest

from byrote.data.prepare import Options as DataOptions
from byrote.data.prepare import prepare
from byrote.lab.studies.mup import check as mup_check
from byrote.lab.studies.mup.check import STAGES, Options, check
from tests.cli.test_commands import WORDS, run


@pytest.mark.parametrize("varied", ["token", "concept"])
def test_a_dlcm_is_flat_with_mup_and_not_without(varied):
    """Over widths of 1 to 8, after 10 steps. What is flat without: the stages of the width that does not vary."""
    with_, without = (check(Options(base=32, vocab_size=64), varied, mup) for mup in (True, False))
    for stage in STAGES:
        assert with_.spread(stage) < 2, stage
    moved = {"token": ("encoder experts", "decoder experts", "up"), "concept": ("concept attention", "concept experts")}
    assert all(without.spread(stage) > 4 for stage in moved[varied])


def test_what_cannot_be():
    with pytest.raises(ValueError, match="base is 40; give a multiple of 32"):
        Options(base=40)
    with pytest.raises(ValueError, match="rate is 0"):
        Options(rate=0.0)
    with pytest.raises(ValueError, match="steps is 0"):
        Options(steps=0)


@pytest.mark.slow
def test_the_verb(tmp_path, monkeypatch):
    """On two widths and three stages, to be quick."""
    monkeypatch.setattr(mup_check, "FACTORS", (1, 4))
    monkeypatch.setattr(mup_check, "STAGES", {stage: STAGES[stage] for stage in ("up", "concept experts", "logits")})
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 40)) for _ in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(DataOptions(f"files:{tmp_path / 'texts.jsonl'}", vocab_size=280), tmp_path / "data")
    out = ("--plot", tmp_path / "check.png", "--json", tmp_path / "check.json")
    said = run("lab", "mup-check", "--base", "32", "--text", tmp_path / "data", "--steps", "2", "--seeds", "2", *out)
    assert "concept experts" in said and "the best rate moves by" in said
    content = json.loads((tmp_path / "check.json").read_text())
    for varied in ("token", "concept"):
        with_, without = (content["spreads"][f"{varied}, {name}"] for name in ("muP", "standard"))
        assert max(with_.values()) < max(without.values()) and f"{max(without.values()):.2f}" in said
    for name in ("muP", "standard"):
        swept = content["sweep"][name]
        losses = np.array(swept["losses"])
        assert losses.shape == (2, 8) and swept["widths"] == [32, 128]
        assert swept["best"] == [swept["rates"][i] for i in losses.argmin(axis=1)]
        each = np.array([seed["losses"] for seed in swept["seeds"]])
        assert len(each) == 2 and (each[0] != each[1]).any()
        np.testing.assert_allclose(losses, each.mean(axis=0))
    assert (tmp_path / "check.png").stat().st_size > 10_000
    assert "seeds is 0" in run("lab", "mup-check", "--seeds", "0", code=2)
    assert "give a multiple of 32" in run("lab", "mup-check", "--base", "8", code=2)
    assert "no prepared corpus" in run("lab", "mup-check", "--base", "32", "--text", tmp_path, code=2)
