"""The emulator answers what `make test-hpu` asks a card. Run: pytest tests/conformance/test_card_questions.py"""

import card_questions
import pytest
from conftest import ROOT


@pytest.mark.filterwarnings("ignore:.*reduce_scatter_tensor")
def test_the_emulator_answers_as_the_questions_for_a_card_say():
    rows = card_questions.ask()

    assert [row for row in rows if row["answer"] != row["emulator"]] == []


def test_the_document_lists_what_a_card_is_asked():
    document = (ROOT / "docs" / "emulator.md").read_text()
    rows = card_questions.as_table()

    listed = document.partition("## What a card is asked")[2]
    assert [line for line in listed.splitlines() if line.startswith("| ") and not line.startswith("| about")] == rows
    assert f"{len(card_questions.questions()) + len(card_questions.OF_PROCESSES)} questions" in listed
