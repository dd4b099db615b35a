"""Loops where numba finds no place for its cache, as in a container with read-only files."""

import pytest

from byrote.compiled.loops import compiled

caching = pytest.importorskip("numba.core.caching")


def double(x):
    return 2 * x


@pytest.mark.parametrize("signature", [None, "int64(int64)"])
def test_no_place_that_can_be_written(signature, monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        pytest.importorskip("numba").njit(cache=True)(double)
    assert compiled(signature)(double)(21) == 42


def test_a_loop_with_a_signature_is_compiled_when_it_is_first_called(monkeypatch):
    made = []
    monkeypatch.setattr("byrote.compiled.loops._made", lambda function, *_: made.append(function) or function)
    loop = compiled("int64(int64)")(double)
    assert not made
    assert loop(21) == 42 and loop(4) == 8 and made == [double]
