"""Fixtures of the tests of caches."""

from tests.contract.caches import no_grad  # noqa: F401
