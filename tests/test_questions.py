"""Every question of questions.py, asked of every reducer in every kind of model."""

import pytest

import zoo
from questions import MAIN, QUESTIONS

pytestmark = pytest.mark.usefixtures("no_gumbel_noise")


def test_nobody_is_left_out():
    """Every kind of model is asked about every main reducer, and nearly every question is asked of each of them and each rival."""
    assert {(case.model, case.reducer_name) for _, case in QUESTIONS} >= {(kind, name) for kind in zoo.KINDS for name in MAIN}
    of_all = [ask for ask in {ask for ask, _ in QUESTIONS} if {case.model for a, case in QUESTIONS if a is ask} == set(zoo.KINDS)]
    assert len(of_all) == 20
    for ask in of_all:
        assert {case.reducer_name for a, case in QUESTIONS if a is ask} == {*zoo.REDUCERS, *zoo.RIVALS}


@pytest.mark.parametrize(
    ("ask", "case"),
    [pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1]}") for pair in QUESTIONS],
)
def test_question(ask, case):
    ask(case)
