"""What of PEFT's test suite does not apply to PiSSA, each with its reason."""

TESTS: dict[str, str] = {}
"""Regular expression for a test's id -> why it is not run."""

REFUSALS: dict[str, str] = {}
"""Part of an error of ours -> why it is right. Counts only if the model is as it was before."""
