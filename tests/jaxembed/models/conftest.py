"""The one fixture that every architecture's test needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import check_parity, randomise
from transformers import PreTrainedModel


@pytest.fixture
def parity(tmp_path: Path, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`parity(hf_model, ...)` gives the model random weights and compares it with ours, layer by layer.

    The options are those of `check_parity`. `make parity` collects what is recorded here into the documentation.
    """

    def check(hf_model: PreTrainedModel, **options: Any) -> None:
        worst = check_parity(randomise(hf_model, options.get("seed", 0)), tmp_path, **options)
        record_property("reference", type(hf_model).__name__)
        record_property("max abs diff", f"{worst:.1e}")

    return check
