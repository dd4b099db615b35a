"""The tests of transformers that cannot hold for a class of ours, and why.

(part of the class's name, beginning of the test's): what a user should know.
"""

NOT_OURS: dict[tuple[str, str], str] = {
    ("DLCM", "test_model_outputs_equivalence"): (
        "it subtracts outputs from each other, and torch does not subtract bool ones: `boundaries` and `alive`; "
        "test_outputs_as_tuples asks the same of them"
    ),
}
