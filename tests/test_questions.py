"""Every question of questions.py, asked of every reducer in every kind of model."""

import pytest

from questions import QUESTIONS, Case, Question

pytestmark = pytest.mark.usefixtures("no_gumbel_noise")
WRONG = {  # what is known to be: question, kinds of models, reducers (all, where none is named), and why
    "exports_with_dynamic_batch": (
        ("hf-vit", "hf-deit", "hf-dinov2", "hf-dinov2-registers", "hf-mae", "hf-ijepa", "hf-msn"),
        (),
        "transformers gives its layers a mask of nothing but True while it is exported, which blocks refuse as one of padding",
    ),
}


def known_wrong(ask: Question, case: Case) -> list[pytest.MarkDecorator]:
    kinds, reducers, reason = WRONG.get(ask.__name__, ((), (), ""))
    applies = case.model in kinds and (not reducers or case.reducer_name in reducers)
    return [pytest.mark.xfail(reason=reason, strict=True)] if applies else []


@pytest.mark.parametrize(
    ("ask", "case"),
    [pytest.param(ask, case, id=f"{ask.__name__}-{case}", marks=known_wrong(ask, case)) for ask, case in QUESTIONS],
)
def test_question(ask, case):
    ask(case)
