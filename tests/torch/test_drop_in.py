"""All of drop_in holds for rnnfast, and docs/drop-in.md says what does."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

import drop_in
import rnnfast

PAGE = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text()
ROWS = {row[0]: row[1:] for row in re.findall(r"^\| (.*) \| (.*) \| (.*) \| (.*) \|$", PAGE, re.M)}

every_item = pytest.mark.parametrize("item", drop_in.ITEMS, ids=lambda item: item.run.__name__)
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch about its own parts


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@every_item
def test_rnnfast(item):
    for kind in item.kinds:
        item.run(rnnfast, kind)


@every_item
def test_the_page(item):
    assert ROWS[item.what][1:] == ("yes", item.note)


@pytest.mark.slow
@every_item
def test_the_page_of_torch(item):
    if item.unsafe:
        assert ROWS[item.what][0] == item.unsafe
    elif torch.__version__.split("+")[0] in PAGE:
        assert ROWS[item.what][0] == drop_in.result(item, torch.nn)


def test_no_other_rows():
    assert set(ROWS) - {item.what for item in drop_in.ITEMS} == {"---"}
