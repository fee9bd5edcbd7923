"""The emulator answers what `make test-hpu` asks a card. Run: pytest tests/conformance/test_card_questions.py"""

import card_questions
import pytest


@pytest.mark.filterwarnings("ignore:.*reduce_scatter_tensor")
def test_the_emulator_answers_as_the_questions_for_a_card_say():
    rows = card_questions.ask()

    assert [row for row in rows if row["answer"] != row["emulator"]] == []
