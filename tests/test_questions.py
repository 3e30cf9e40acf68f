"""Every question of questions.py, asked of every reducer in every kind of model."""

import pytest

from questions import QUESTIONS

pytestmark = pytest.mark.usefixtures("no_gumbel_noise")


@pytest.mark.parametrize(
    ("ask", "case"),
    [pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1]}") for pair in QUESTIONS],
)
def test_question(ask, case):
    ask(case)
