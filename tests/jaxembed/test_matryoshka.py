"""Which sizes a model allows, by where that is said and by the operator's policy."""

from typing import Any

import pytest

from jaxembed.errors import DimensionsError
from jaxembed.matryoshka import UNDECLARED, Matryoshka, Policy


@pytest.mark.parametrize(
    ("name", "config", "sizes", "trained"),
    [
        ("somebody/plain", {}, (), False),
        ("somebody/listed", {"matryoshka_dimensions": [256, 64, 128]}, (64, 128, 256), True),
        ("somebody/empty", {"matryoshka_dimensions": []}, (), False),
        ("somebody/any", {"is_matryoshka": True}, (), True),
        ("somebody/not", {"is_matryoshka": False}, (), False),
        ("nomic-ai/nomic-embed-text-v1.5", {}, (64, 128, 256, 512, 768), True),
        ("Qwen/Qwen3-Embedding-0.6B", {}, (), True),
        ("nomic-ai/nomic-embed-text-v1.5", {"matryoshka_dimensions": [100]}, (100,), True),
    ],
)
def test_where_it_is_said(name: str, config: dict[str, Any], sizes: tuple[int, ...], trained: bool) -> None:
    """config.json first, then the table of models that do not say so themselves."""
    found = Matryoshka.of(name, config, 768)
    assert (found.native, found.sizes, found.trained) == (768, sizes, trained)
    assert found.policy is Policy.STRICT


def test_the_operator_has_the_last_word() -> None:
    """An override replaces what the files say; an empty one declares every size."""
    config = {"matryoshka_dimensions": [64]}
    assert Matryoshka.of("x", config, 768, override=[32, 16]) == Matryoshka(768, (16, 32), True)
    every = Matryoshka.of("x", {}, 768, override=[])
    assert all(every.check(size) for size in (1, 77, 768))


def test_the_table_holds_sizes_that_make_sense() -> None:
    """Positive and written once."""
    for name, sizes in UNDECLARED.items():
        assert len(set(sizes)) == len(sizes), name
        assert all(size >= 1 for size in sizes), name


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("sizes", [(), (64, 128)])
def test_the_native_size_is_always_allowed(policy: Policy, trained: bool, sizes: tuple[int, ...]) -> None:
    """Asking for what the model gives anyway is never an error."""
    assert Matryoshka(384, sizes, trained, policy).check(384)


def test_strict_refuses_an_untrained_model_as_a_whole() -> None:
    """The error says that no other size would do either."""
    with pytest.raises(DimensionsError, match=r"not trained with matryoshka.*384 dimensions only") as caught:
        Matryoshka(384).check(128)
    assert not caught.value.supported


def test_strict_refuses_an_undeclared_size_and_lists_the_others() -> None:
    """The list holds the native size too."""
    with pytest.raises(DimensionsError, match="dimensions is 100; allowed: 64, 128, 384") as caught:
        Matryoshka(384, (64, 128), True).check(100)
    assert caught.value.supported
    assert Matryoshka(384, (64, 128), True).check(64)


@pytest.mark.parametrize("policy", [Policy.WARN, Policy.OFF])
def test_lenient_policies_let_through_what_exists(policy: Policy) -> None:
    """True for what the model is trained for, False (worth a warning) for the rest."""
    trained = Matryoshka(384, (64, 128), True, policy)
    assert trained.check(64) is True
    assert trained.check(65) is False
    assert Matryoshka(384, (), False, policy).check(65) is False
    assert Matryoshka(384, (), True, policy).check(65) is True


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("size", [0, -1, 385, 10**9])
def test_no_policy_allows_what_does_not_exist(policy: Policy, size: int) -> None:
    """Sizes outside 1 to D are refused, and the range is named."""
    with pytest.raises(DimensionsError, match=f"dimensions is {size}; allowed: 1 to 384"):
        Matryoshka(384, (), True, policy).check(size)
