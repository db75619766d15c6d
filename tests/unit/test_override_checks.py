"""What the command line says in vain is refused; more of it in the tests of the entry points."""

import pytest

from lckv import cli
from lckv.errors import UserError


@pytest.mark.parametrize("given", ["ridge=7.0", "calibration_tokens=64"])
def test_searches_that_look_at_no_text_need_no_calibration(given):
    with pytest.raises(UserError, match=f"^{given}: has no effect with method=average, which looks at no text"):
        cli.compose(["source=a", "budget=0.5", "method=average", given], "search")
    cli.compose(["source=a", "budget=0.5", "method=activation", given], "search")


def test_an_unknown_method_is_left_to_whoever_knows_them():
    assert cli.compose(["source=a", "budget=0.5", "method=avrage", "ridge=7"], "search").method == "avrage"
