"""Which of transformers' tests run, and when: all in `make hf-suite` and `make test-all`, a part in `make test`."""

import pytest

from tests.hf_suite.exclusions import NOT_OURS

MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "torch_compile_test",
)
# Between them they have every part; what one of them passes and another class does not is found by the whole.
DAILY = ("TestEngramStreams", "TestDLCMMemory")
LONG = ("test_training_overfit", "test_bc_torch_dtype")


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' own tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.cls is None or item.path.name != "test_common.py":
            continue
        suite, test = item.cls.__name__, item.name
        for exclusion in NOT_OURS:
            if suite in exclusion.suites and test.startswith(exclusion.test):
                item.add_marker(pytest.mark.skip(reason=exclusion.reason))
        if suite not in DAILY or test.startswith(LONG):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter):
    """Passed, failed and skipped of each class, in tests; a test of which one part fails has failed."""
    counts = {}
    for outcome in ("passed", "skipped", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            path, _, test = report.nodeid.partition("::")
            if path.endswith("hf_suite/test_common.py"):
                counts.setdefault(test.partition("::")[0], {})[test] = outcome
    for suite, outcomes in counts.items():
        found = list(outcomes.values())
        told = ", ".join(f"{found.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
        terminalreporter.write_line(f"{suite}: {told}")
