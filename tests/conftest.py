"""One thread and one seed for every test, and assertions in the shared lists as readable as those in the tests."""

import gc

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("questions", "zoo")
settings.register_profile("repeatable", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)
gc.freeze()  # torch's own modules are a million objects that every collection would walk: a fifth of the time of compiling


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
