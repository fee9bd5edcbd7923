"""Every row of docs/models.md, against plain transformers. Run: pytest tests/test_families.py"""

import re

import pytest
from conftest import ROOT
from family_models import CONFIGS
from measure_families import RIGHT, describe, make_plain, measure


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_plain(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("row", CONFIGS)
def test_a_family_is_right_or_refused_as_its_page_says(row, plain):
    result = measure(plain / str(list(CONFIGS).index(row)))

    assert all(difference < RIGHT for _, difference in (result["packed"], result["shared"]))
    assert {result[way] for way in ("alone", "batch", "no cache")} == {"right"}
    assert {result[flag] for flag in ("beams", "reuse_cache", "buckets")} <= {"right", "refused"}
    page = [without_figures(line) for line in (ROOT / "docs" / "models.md").read_text().splitlines()]
    assert without_figures(describe(row, result)) in page


def without_figures(line):
    return re.sub(r", \de[+-]\d\d", "", line)
