"""What `make parity` writes into the documents; the comparisons themselves are the other tests."""

import pytest
from parity_report import BEGIN, END, ROOT, Measured, compact, detailed, measure, replace, short

REAL = [("a model", "its original", "1.0e-6")]


def test_what_is_outside_the_markers_stays() -> None:
    """Writing twice is writing once."""
    once = replace(f"before\n{BEGIN}\nold\n{END}\nafter\n", "new")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter\n" == replace(once, "new")


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_document_without_its_markers_is_refused(text: str) -> None:
    """Rather than written wrongly."""
    with pytest.raises(ValueError, match="parity:begin"):
        replace(text, "new")


@pytest.mark.parametrize("document", ["README.md", "docs/numerics.md"])
def test_the_documents_have_the_markers(document: str) -> None:
    """Both of them that are written."""
    assert "new" in replace((ROOT / document).read_text(encoding="utf-8"), "new")


def test_the_worst_of_each_file_is_reported() -> None:
    """Of all its configurations and references; a file that nothing was compared for is there to be seen."""
    found = [Measured("roberta", 42, ["camembert", "roberta"], []), Measured("gte", 170, ["new"], ["NewModel"])]
    measure(
        found,
        [
            ("roberta", "test_parity[0]", {"reference": "RobertaModel", "max abs diff": "1.1e-06"}),
            ("roberta", "test_parity[1]", {"reference": "CamembertModel", "max abs diff": "2.3e-06"}),
            ("roberta", "test_514_positions", {}),
        ],
    )
    assert "| `camembert`, `roberta` | `CamembertModel`, `RobertaModel` | 2.3e-6 |" in compact(found, REAL)
    assert "| `roberta.py` | 42 | `CamembertModel`, `RobertaModel` | 2 | 2.3e-6 |" in detailed(found, REAL)
    assert "| `new`; remote code `NewModel` | `gte.py` | 170 | nothing yet | 0 | - |" in detailed(found, REAL)


def test_a_comparison_must_belong_to_a_model() -> None:
    """A test file that is named after none would be lost from the tables."""
    with pytest.raises(SystemExit, match=r"no jaxembed/models/other\.py"):
        measure([], [("other", "test_parity", {"reference": "X", "max abs diff": "1e-06"})])


def test_originals_of_the_tests_are_marked() -> None:
    """A class that transformers has stands alone."""
    one = Measured("bert", 29, ["bert"], [], {"BertModel", "OriginalBert of its time"}, 2, 1.0)
    assert "| `BertModel`, `OriginalBert` of its time (in the tests) |" in compact([one], REAL)


def test_exponents_are_short() -> None:
    """As the documents write them."""
    assert [short(figure) for figure in ("2.3e-06", 1.3e-12, 0.0)] == ["2.3e-6", "1.3e-12", "0.0e+0"]
