"""Pairs of texts in one row of tokens, cut and typed as transformers' tokenizers do it."""

import itertools

import numpy as np
import pytest
from parity import small_tokenizer
from tokenizers import processors

from jaxembed.errors import InputError, UnsupportedModelError
from jaxembed.pairs import kept_of_pair, second_start
from jaxembed.tokenizer import Tokenizer, TruncationSide

TEMPLATES = {
    "bert": processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    ),
    "roberta": processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_length_is_cut_as_there(template: str, side: str) -> None:
    """Token for token, with the types, for texts of 0 to 9 tokens and limits from the special tokens alone on."""
    theirs = small_tokenizer(truncation_side=side, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    theirs.backend_tokenizer.post_processor = TEMPLATES[template]
    backend = small_tokenizer().backend_tokenizer
    backend.post_processor = TEMPLATES[template]
    ours = Tokenizer(backend, special_ids=frozenset(), vocab_size=62, max_length=32, side=TruncationSide(side))
    pairs = [
        ("a b c d e f g h i"[: 2 * n], "j k l m n o p q r"[: 2 * m]) for n, m in itertools.product(range(10), range(10))
    ]
    for limit in range(4, 24):
        want = theirs([list(pair) for pair in pairs], truncation="longest_first", max_length=limit)
        for pair, got, ids, types in zip(
            pairs,
            ours.encode_pairs(pairs, truncate_to=limit),
            want["input_ids"],
            want["token_type_ids"],
            strict=True,
        ):
            assert got.ids.tolist() == ids, (pair, limit)
            assert got.second_start == (types.index(1) if 1 in types else 0), (pair, limit)


def test_fewer_than_the_special_tokens() -> None:
    """A plain slice, as of single texts."""
    texts = [None, 0, None, 1, None]
    assert kept_of_pair(texts, 2).tolist() == [True, True, False, False, False]
    assert kept_of_pair(texts, 2, left=True).tolist() == [False, False, False, True, True]
    assert kept_of_pair(texts, 3).tolist() == [True, False, True, False, True]


def test_where_the_second_text_begins() -> None:
    """Other templates than BERT's and RoBERTa's are refused: a row holds one number."""
    assert second_start(np.array([0, 0, 1, 1], np.int32)) == 2
    assert second_start(np.zeros(3, np.int32)) == 0
    assert second_start(np.zeros(0, np.int32)) == 0
    for types in ([0, 1, 0], [1, 1], [0, 2, 2], [0, 1, 2], [2, 1, 1], [0, 2]):
        with pytest.raises(UnsupportedModelError, match="supported: 0s, then 1s"):
            second_start(np.array(types, np.int32))


def test_what_the_limit_may_be() -> None:
    """As of single texts."""
    ours = Tokenizer(small_tokenizer().backend_tokenizer, special_ids=frozenset(), vocab_size=62, max_length=32)
    for limit in (0, 33):
        with pytest.raises(InputError, match=f"cannot truncate to {limit} tokens; allowed: 1 to 32"):
            ours.encode_pairs([("a", "b")], truncate_to=limit)
    assert ours.encode_pairs([]) == []
