"""Ranks that wait for one another. Run: pytest tests/test_ranks.py"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import InputError
from align.training import ranks


def test_ranks_wait_for_the_first_of_their_node_for_longer_than_a_collective_may_take(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, here / "waiting_ranks.py", tmp_path]
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{os.environ.get('PYTHONPATH', '')}"}

    started = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    told = [rank.communicate()[0] for rank in started]

    assert [rank.returncode for rank in started] == [0, 0]
    first, other = ([float(number) for number in re.findall(r"\d+\.\d+", text)] for text in told)
    assert first[1] <= other[0]  # the other began when the first had ended,
    assert other[1] <= first[2]  # and the first left when the other had ended too


def test_what_one_rank_refuses_ends_all_and_what_one_denies_is_not_so(monkeypatch):
    for elsewhere, agreed in ((True, True), (False, False)):
        monkeypatch.setattr(ranks, "all_ranks", lambda value, other=elsewhere: [value, other])
        assert ranks.agree(lambda: True) is agreed

    monkeypatch.setattr(ranks, "all_ranks", lambda value: [value, InputError("refused elsewhere")])
    with pytest.raises(InputError, match="refused elsewhere"):
        ranks.agree(lambda: True)
