"""What "equal" means against an oracle in float32."""

import pytest


@pytest.fixture
def assert_near():
    """Equal to 1e-5, in units of the largest number there is (or of 1, if all are smaller)."""

    def check(ours, theirs, name="value"):
        ours, theirs = ours.detach(), theirs.detach()
        assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
        error = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
        assert error <= 1e-5, f"{name}: off by {error:.1e}"

    return check
