"""Fixtures of the tests of caches."""

from tests.contract.caches import name, no_grad  # noqa: F401
