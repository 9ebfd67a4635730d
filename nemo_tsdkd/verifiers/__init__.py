"""Verifiers: is the answer in a response right? By name in one registry, which `validation.verifier` picks from."""

import nemo_tsdkd.verifiers.exact
import nemo_tsdkd.verifiers.math
import nemo_tsdkd.verifiers.reasoning_gym  # noqa: F401  each registers its verifier
from nemo_tsdkd.verifiers.verdict import NONE, VERIFIERS, Verdict, require_verifier, verifier

__all__ = ["NONE", "VERIFIERS", "Verdict", "require_verifier", "verifier"]
