"""Random values for fields of config.json, and a check of conversions of such sources."""

import os
import shutil
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import gda
from gda.conversion.verify import VerificationFailed

# Limit for one refusal. It catches a number in a file that decides how long we compute.
SECONDS = 30
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([10**5, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, -1.0, 1e308, float("nan"), float("inf")]),
)
VALUES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 2), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor", "x"]), NUMBERS, max_size=2),
    st.just(...),
)
FUZZ = settings(
    max_examples=50,
    deadline=SECONDS * 1000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def converts_or_says_why(source: Path, place: Path) -> None:
    """`source` converts and verifies, or one short error is raised and no file is left."""
    out = place / "gda"
    reason = None
    try:
        gda.convert(source, out)
    except (ValueError, OSError, VerificationFailed) as error:  # a source's logits can be NaN
        reason = str(error)
    if reason is None:
        shutil.rmtree(out)
    else:
        assert 10 < len(reason) < 1000, reason
    assert sorted(os.listdir(place)) == [source.name]
