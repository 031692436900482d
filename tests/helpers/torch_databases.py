"""torch's own test databases, imported without what they print and warn, and with a reason where they cannot be."""

import warnings

import pytest

pytest.importorskip(
    "expecttest", reason="torch.testing._internal needs expecttest: pip install 'steploop[test]'"
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside torch's own helpers
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_optimizers import optim_db

__all__ = ["module_db", "optim_db"]
