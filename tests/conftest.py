"""One thread and one seed for every test, and assertions in the shared lists as readable as those in the tests."""

import gc

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("questions", "zoo")
settings.register_profile("repeatable", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)
gc.set_threshold(100_000, 50, 100)
gc.freeze()  # torch's own modules are a million objects that every collection would walk: a fifth of the time of compiling


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_gumbel_noise(monkeypatch):
    """Learned heads in training decide by what is likelier, so that two forwards decide alike."""

    def most_likely(logits, tau=1, hard=False, dim=-1):
        soft = (logits / tau).softmax(dim)
        return torch.nn.functional.one_hot(soft.argmax(dim), soft.shape[dim]) - soft.detach() + soft if hard else soft

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", most_likely)
