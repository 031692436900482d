"""Hypothesis profiles: ``ci`` is seeded and bounded; ``pytest --hypothesis-profile=thorough`` runs 10,000 examples a law."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Building a small network for each example is slow by Hypothesis's measure, not by ours.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

# Explaining a failure runs many examples more; the smallest one says enough.
_PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink]

settings.register_profile(
    "ci",
    phases=_PHASES,
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=_SLOW,
)
settings.register_profile(
    "thorough",
    phases=_PHASES,
    max_examples=10_000,
    deadline=None,
    print_blob=True,
    suppress_health_check=_SLOW,
)
# For ``mutmut run``: a mutant is killed or it is not, no smaller example is looked for.
settings.register_profile(
    "mutation",
    settings.get_profile("ci"),
    phases=[Phase.explicit, Phase.generate],
    max_examples=15,
    report_multiple_bugs=False,
)
settings.load_profile("ci")

# The tensors here have a handful of entries: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _the_same_weights_every_time():
    """A test that makes a model without a seed of its own passes or fails alike in every run, in any order."""
    torch.manual_seed(0)
