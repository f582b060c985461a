"""The tree of failures: its drawing, its messages and what they carry."""

import inspect
import re

import pytest

from jaxembed import errors


def drawn_tree() -> dict[str, str]:
    """Class -> parent, as the module's docstring draws them."""
    parents: dict[str, str] = {}
    branch: list[str] = ["JaxembedError"]
    for line in inspect.getdoc(errors).splitlines():
        found = re.match(r"(?P<indent>[│ ]*)[├└]── (?P<name>\w+)", line)
        if found:
            depth = len(found["indent"]) // 4 + 1
            branch = [*branch[:depth], found["name"]]
            parents[found["name"]] = branch[depth - 1]
    return parents


def test_the_drawing_is_the_tree() -> None:
    """Every class stands in the docstring under its parent, and every class drawn exists."""
    defined = {
        name: cls.__bases__[0].__name__
        for name, cls in vars(errors).items()
        if inspect.isclass(cls) and issubclass(cls, errors.JaxembedError) and cls is not errors.JaxembedError
    }
    assert drawn_tree() == defined
    assert len(defined) > 10


def test_all_is_every_class() -> None:
    """`__all__` leaves no error out."""
    assert sorted(errors.__all__) == sorted([*drawn_tree(), "JaxembedError"])


def test_only_input_errors_are_value_errors() -> None:
    """A caller's mistake can be caught as ValueError; a broken checkpoint or device cannot."""
    for name in drawn_tree():
        cls = getattr(errors, name)
        assert issubclass(cls, ValueError) == issubclass(cls, errors.InputError), name


def test_input_error_carries_its_item() -> None:
    """The index is for programs; it is None where the error is not about one item."""
    assert errors.InputError("bad").index is None
    assert errors.InputTypeError("bad", index=3).index == 3


def test_too_long() -> None:
    """The message gives the item, its length and the limit."""
    error = errors.InputTooLongError(index=2, length=700, limit=512)
    assert (error.index, error.length, error.limit) == (2, 700, 512)
    assert "input[2] has 700 tokens" in str(error)
    assert "at most 512" in str(error)


def test_token_id() -> None:
    """The message gives item, position, value and range."""
    error = errors.TokenIdError(index=1, position=4, value=-7, vocab_size=100)
    assert (error.index, error.position) == (1, 4)
    assert "input[1][4] is the token id -7" in str(error)
    assert "0 to 99" in str(error)


def test_dimensions() -> None:
    """A program can tell "this size" from "no size but its own"."""
    assert errors.DimensionsError("7 is not allowed").supported
    assert not errors.DimensionsError("no matryoshka", supported=False).supported


@pytest.mark.parametrize(("known", "shown"), [(["a", "b"], "known: 'a', 'b'"), ([], "this model has no prompts")])
def test_prompt_name(known: list[str], shown: str) -> None:
    """The message lists the names there are."""
    message = str(errors.PromptNameError("querry", known))
    assert "'querry'" in message
    assert shown in message


def test_weights_error_lists_everything() -> None:
    """One error, every problem: nobody should repair a checkpoint one message at a time."""
    error = errors.WeightsError("/here", {"missing": ["a", "b"], "unexpected": ["c"]})
    assert error.problems == {"missing": ("a", "b"), "unexpected": ("c",)}
    assert "/here" in str(error)
    assert re.search(r"missing \(2\):\n\s+a\n\s+b\n\s+unexpected \(1\):\n\s+c", str(error))


def test_compile_error_names_every_bucket() -> None:
    """Each failed bucket with its cause."""
    error = errors.CompileError({"1x16": "out of memory", "4x32": "bad layout"})
    assert error.failures == {"1x16": "out of memory", "4x32": "bad layout"}
    assert "bucket 1x16: out of memory" in str(error)
    assert "bucket 4x32: bad layout" in str(error)


def test_non_finite_shortens_a_long_list() -> None:
    """All indices for programs, the first eight for people."""
    assert str(errors.NonFiniteError([3])).endswith("input 3")
    error = errors.NonFiniteError(range(20))
    assert error.indices == tuple(range(20))
    assert str(error).endswith("0, 1, 2, 3, 4, 5, 6, 7, ...")
