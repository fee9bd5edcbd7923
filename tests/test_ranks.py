"""Ranks that wait for one another. Run: pytest tests/test_ranks.py"""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_ranks_wait_for_the_first_of_their_node_for_longer_than_a_collective_may_take(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, here / "waiting_ranks.py", tmp_path]
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{os.environ.get('PYTHONPATH', '')}"}

    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    told = [rank.communicate()[0] for rank in ranks]

    assert [rank.returncode for rank in ranks] == [0, 0]
    first, other = ([float(number) for number in re.findall(r"\d+\.\d+", text)] for text in told)
    assert first[1] <= other[0]  # the other began when the first had ended,
    assert other[1] <= first[2]  # and the first left when the other had ended too
