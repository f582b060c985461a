"""The tokenizer against transformers' own, its length policy, and what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import save_checkpoint, small_tokenizer, tiny_bert
from sentence_transformers.sentence_transformer.modules import Transformer
from transformers import AutoTokenizer

from jaxembed.errors import (
    CorruptCheckpointError,
    InputError,
    InputTooLongError,
    InputTypeError,
    TokenIdError,
)
from jaxembed.tokenizer import Tokenizer, TruncationSide

MAX_LENGTH = 40
VOCAB_SIZE = 30522
TEXTS = [
    "",
    " ",
    "Hello, World!",
    "  white\tspace \n\n around  ",
    "naïve façade ÅNGSTRÖM ﬁne ΣΊΣΥΦΟΣ",
    "你好。世界 — こんにちは 안녕하세요",
    "שלום עולם مرحبا بالعالم สวัสดีชาวโลก",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 and \x00 control \x07 \u200b \ufeff characters",
    "[CLS] written out [SEP] and [MASK] [PAD]",
    "antidisestablishmentarianism " * 12,
    "x" * 300,
    "one two three four five six seven eight nine ten " * 6,
]


@pytest.fixture(scope="module")
def reference(minilm_folder: Path) -> Any:
    """Transformers' tokenizer of MiniLM."""
    return AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture(scope="module")
def tokenizer(minilm_folder: Path) -> Tokenizer:
    """Ours, of the same folder."""
    return Tokenizer.from_folder(minilm_folder, vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH)


def ids(encodings: list[Any]) -> list[list[int]]:
    """The token ids as lists."""
    return [encoding.ids.tolist() for encoding in encodings]


@pytest.mark.parametrize("side", TruncationSide)
@pytest.mark.parametrize("special", [True, False])
def test_every_truncation_equals_transformers(
    tokenizer: Tokenizer, reference: Any, side: TruncationSide, special: bool
) -> None:
    """For every length that has room for the special tokens, on both sides, with special tokens and without."""
    reference.truncation_side = side.value
    for k in range(2 if special else 1, MAX_LENGTH + 1):
        expected = reference(TEXTS, truncation=True, max_length=k, add_special_tokens=special)["input_ids"]
        got = tokenizer.encode_texts(TEXTS, add_special_tokens=special, truncate_to=k, side=side)
        assert ids(got) == expected, f"truncated to {k}"
        assert all(encoding.ids.dtype == np.int32 for encoding in got)


def test_without_truncation_equals_transformers(tokenizer: Tokenizer, reference: Any) -> None:
    """Texts that fit are left whole."""
    short = [text for text in TEXTS if len(text) < 60]
    assert ids(tokenizer.encode_texts(short)) == reference(short)["input_ids"]


def test_room_for_one_token_only(tokenizer: Tokenizer) -> None:
    """Less than the special tokens need: a plain slice, from the side that is kept."""
    cls, sep = 101, 102
    assert ids(tokenizer.encode_texts(["a b c"], truncate_to=1)) == [[cls]]
    assert ids(tokenizer.encode_texts(["a b c"], truncate_to=1, side=TruncationSide.LEFT)) == [[sep]]


def test_special_tokens_survive_a_cut(tokenizer: Tokenizer) -> None:
    """The cut takes from the text between them."""
    assert tokenizer.special_tokens == 2
    whole = ids(tokenizer.encode_texts(["one two three four"]))[0]
    assert ids(tokenizer.encode_texts(["one two three four"], truncate_to=4)) == [[*whole[:3], whole[-1]]]
    left = tokenizer.encode_texts(["one two three four"], truncate_to=4, side=TruncationSide.LEFT)
    assert ids(left) == [[whole[0], *whole[-3:]]]


def test_a_tokenizer_that_only_appends(tmp_path: Path) -> None:
    """Special tokens are found by looking, not taken for one on each side."""
    from tokenizers import processors

    loaded = small_tokenizer()
    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [SEP]", special_tokens=[("[SEP]", 3)]
    )
    loaded.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokenizer = Tokenizer.from_folder(tmp_path, vocab_size=64, max_length=20)
    assert tokenizer.special_tokens == 2
    a = loaded.convert_tokens_to_ids("a")
    assert ids(tokenizer.encode_texts(["a b c"], truncate_to=3)) == [[a, 3, 3]]
    assert ids(tokenizer.encode_texts(["c b a"], truncate_to=3, side=TruncationSide.LEFT)) == [[a, 3, 3]]


def test_too_long_names_the_item(tokenizer: Tokenizer) -> None:
    """The first item over the limit, its length, and the limit."""
    with pytest.raises(InputTooLongError) as caught:
        tokenizer.encode_texts(["short", "long " * 50])
    assert (caught.value.index, caught.value.length, caught.value.limit) == (1, 52, MAX_LENGTH)
    assert len(tokenizer.encode_texts(["long " * 38])[0]) == MAX_LENGTH


@pytest.mark.parametrize("k", [0, -1, MAX_LENGTH + 1])
def test_a_truncation_out_of_range(tokenizer: Tokenizer, k: int) -> None:
    """Refused for texts and for token ids, with the range."""
    for encode, item in ((tokenizer.encode_texts, "a"), (tokenizer.encode_ids, [5])):
        with pytest.raises(InputError, match=f"truncate to {k} tokens; allowed: 1 to {MAX_LENGTH}") as caught:
            encode([item], truncate_to=k)
        assert caught.value.index is None


def test_no_texts_and_no_ids(tokenizer: Tokenizer) -> None:
    """Nothing in, nothing out."""
    assert tokenizer.encode_texts([]) == []
    assert tokenizer.encode_ids([]) == []


def test_a_tokenizer_file_with_padding_and_truncation(tmp_path: Path) -> None:
    """What a saver left switched on in tokenizer.json does not count."""
    loaded = small_tokenizer()
    loaded.backend_tokenizer.enable_padding(length=16)
    loaded.backend_tokenizer.enable_truncation(3)
    loaded.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokenizer = Tokenizer.from_folder(tmp_path, vocab_size=64, max_length=20)
    assert [len(one) for one in tokenizer.encode_texts(["a b c d e f", "a"])] == [8, 3]


@pytest.mark.parametrize("prompt", ["", "query: ", "Represent this:\n", "[CLS] "])
def test_a_prompt_is_put_before_the_text(tokenizer: Tokenizer, reference: Any, prompt: str) -> None:
    """As one string: the prompt's last letters may join the text's first."""
    texts = ["hello", "", " world"]
    got = tokenizer.encode_texts(texts, prompt=prompt)
    assert ids(got) == reference([prompt + text for text in texts])["input_ids"]
    assert [encoding.prompt_length for encoding in got] == [0, 0, 0]


@pytest.mark.parametrize("prompt", ["query: ", "Represent this:\n", "  ", "?", "[SEP]", "ends in [SEP]"])
@pytest.mark.parametrize("truncate_to", [None, 8, 4])
def test_prompt_lengths_are_sentence_transformers_own(
    minilm_folder: Path, prompt: str, truncate_to: int | None
) -> None:
    """Counted alone, with the leading special token and without the trailing one, and cut as the text is cut."""
    limit = truncate_to or MAX_LENGTH
    tokenizer = Tokenizer.from_folder(minilm_folder, vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH, measure_prompts=True)
    transformer = Transformer(str(minilm_folder), processor_kwargs={"model_max_length": limit})
    texts = ["hello", "", "hello world, how are you"]
    for prompt_repeated in (prompt, prompt * 30):
        got = tokenizer.encode_texts(texts, prompt=prompt_repeated, truncate_to=limit)
        expected = transformer.preprocess(texts, prompt=prompt_repeated)
        for encoding, mask in zip(got, expected["attention_mask"], strict=True):
            assert len(encoding) == mask.sum()
            assert encoding.prompt_length == expected["prompt_length"]


def test_a_cut_on_the_left_takes_the_prompt_first() -> None:
    """What pooling leaves out is the rest of the prompt, not as many tokens of the text."""
    tokenizer = Tokenizer(
        small_tokenizer().backend_tokenizer,
        special_ids=frozenset(range(5)),
        vocab_size=64,
        max_length=20,
        measure_prompts=True,
    )
    left = TruncationSide.LEFT
    whole = tokenizer.encode_texts(["c d e"], prompt="a b ")[0]
    assert (len(whole), whole.prompt_length) == (7, 3)
    # [CLS] counts as part of the prompt, as it does when nothing is cut.
    for k, prompt_length in ((7, 3), (6, 2), (5, 1), (4, 1)):
        cut = tokenizer.encode_texts(["c d e"], prompt="a b ", truncate_to=k, side=left)[0]
        assert (len(cut), cut.prompt_length) == (k, prompt_length)
    # The same for a prompt that is longer than what is left of it and of the text together.
    for k, prompt_length in ((12, 8), (8, 4), (6, 2), (5, 1), (3, 1)):
        cut = tokenizer.encode_texts(["c d e"], prompt="a b a b a b a b ", truncate_to=k, side=left)[0]
        assert (len(cut), cut.prompt_length) == (k, prompt_length)


def test_token_ids_are_taken_as_they_are(tokenizer: Tokenizer) -> None:
    """Lists, tuples and arrays of every integer type; no special tokens are added; a cut is a slice."""
    given = [[5, 6, 7], (5, 6, 7), range(5, 8), np.array([5, 6, 7], np.uint8), np.array([5, 6, 7], np.int64)]
    given.append([np.int16(5), np.int64(6), 7])
    assert ids(tokenizer.encode_ids(given)) == [[5, 6, 7]] * 6
    assert ids(tokenizer.encode_ids([[0, VOCAB_SIZE - 1]])) == [[0, VOCAB_SIZE - 1]]
    assert ids(tokenizer.encode_ids([[5, 6, 7]], truncate_to=2)) == [[5, 6]]
    assert ids(tokenizer.encode_ids([[5, 6, 7]], truncate_to=2, side=TruncationSide.LEFT)) == [[6, 7]]
    encoding = tokenizer.encode_ids([[5]])[0]
    assert (encoding.ids.dtype, encoding.prompt_length) == (np.int32, 0)


def test_an_encoding_does_not_share_the_caller_s_array(tokenizer: Tokenizer) -> None:
    """What the caller writes later must not change what waits in a queue."""
    given = np.array([5, 6, 7], np.int32)
    encoding = tokenizer.encode_ids([given])[0]
    given[:] = 0
    assert encoding.ids.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("item", "position", "value"),
    [
        ([5, -1], 1, -1),
        ([5, VOCAB_SIZE], 1, VOCAB_SIZE),
        ([VOCAB_SIZE + 3, -1], 0, VOCAB_SIZE + 3),
        ([1, 2, 2**31], 2, 2**31),
        ([1, 2**32 + 5], 1, 2**32 + 5),
        ([-(2**63)], 0, -(2**63)),
        ([2**63], 0, 2**63),
        ([5, 2**63, -1], 1, 2**63),
        ([5, 2**64, 6], 1, 2**64),
        ([-(10**30), 5], 0, -(10**30)),
        (np.array([7, 2**63], np.uint64), 1, 2**63),
    ],
)
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, item: Any, position: int, value: int) -> None:
    """The first bad one is named by place and value, however large it is: nothing wraps around into the range."""
    with pytest.raises(TokenIdError, match=f"is the token id {value}, but .* 0 to {VOCAB_SIZE - 1}") as caught:
        tokenizer.encode_ids([[5], item])
    assert (caught.value.index, caught.value.position) == (1, position)


@pytest.mark.parametrize(
    "item",
    [
        [True, False],
        [5, True],
        [1.0, 2.0],
        [1, 2.5],
        [float("nan")],
        ["a"],
        [5, "a"],
        [5, None],
        [[5, 6], [7, 8]],
        [[5, 6], [7]],
        "text",
        b"bytes",
        bytearray(b"bytes"),
        {5: 6},
        5,
        None,
        np.array([1.0]),
        np.array([True]),
        np.array([[5]]),
        [10**30, None],
        [10**30, True],
    ],
    ids=repr,
)
def test_what_is_no_list_of_integers(tokenizer: Tokenizer, item: Any) -> None:
    """Truth values and floats are no token ids, also when they stand among integers."""
    with pytest.raises(InputTypeError, match=r"input\[1\] must be a list of integers") as caught:
        tokenizer.encode_ids([[5], item])
    assert caught.value.index == 1


@pytest.mark.parametrize("item", [[], (), np.zeros(0, np.int32)])
def test_an_empty_list_of_ids(tokenizer: Tokenizer, item: Any) -> None:
    """There is nothing to pool."""
    with pytest.raises(InputError, match=r"input\[1\] is empty") as caught:
        tokenizer.encode_ids([[5], item])
    assert caught.value.index == 1


def test_too_many_ids(tokenizer: Tokenizer) -> None:
    """Over the model's length and truncation not asked."""
    with pytest.raises(InputTooLongError) as caught:
        tokenizer.encode_ids([[5], [5] * (MAX_LENGTH + 1)])
    assert (caught.value.index, caught.value.length) == (1, MAX_LENGTH + 1)
    assert len(tokenizer.encode_ids([[5] * MAX_LENGTH])[0]) == MAX_LENGTH


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("item", ["half \ud83d of a pair", "\udc00"])
def test_half_a_surrogate_pair(minilm_folder: Path, item: str, prompt: str, lowercase: bool) -> None:
    """JSON can carry one; no tokenizer can read it."""
    tokenizer = Tokenizer.from_folder(minilm_folder, vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH, lowercase=lowercase)
    with pytest.raises(InputTypeError, match=r"input\[2\] holds half of a surrogate pair") as caught:
        tokenizer.encode_texts(["fine", "😀", item, "\ud800"], prompt=prompt)
    assert caught.value.index == 2


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("item", [5, None, b"bytes", ["a"], ("a", "b"), [5]], ids=repr)
def test_an_item_that_is_no_string(minilm_folder: Path, item: Any, prompt: str, lowercase: bool) -> None:
    """Named by place and type; a pair of strings is no text either, though tokenizers would take it for one."""
    tokenizer = Tokenizer.from_folder(minilm_folder, vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH, lowercase=lowercase)
    with pytest.raises(InputTypeError, match=rf"input\[1\] must be a string, not {type(item).__name__}") as caught:
        tokenizer.encode_texts(["fine", item], prompt=prompt)
    assert caught.value.index == 1


def test_lower_case_is_sentence_transformers_own(tmp_path: Path) -> None:
    """`do_lower_case`: a Greek sigma at a word's end and special tokens in a text come out as they do there."""
    folder = save_checkpoint(tiny_bert(vocab_size=80), tmp_path / "hf", lowercase=False)
    with (folder / "tokenizer.json").open(encoding="utf-8") as file:
        content = json.load(file)
    for letter in "σςοδ":
        for piece in (letter, f"##{letter}"):
            content["model"]["vocab"][piece] = len(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert len(content["model"]["vocab"]) <= 80
    texts = ["ABC abc", "[SEP] A [MASK]", "ΟΔΟΣ", "ΣΟΔΟΣ ΟΔΟΣ.", "İ ẞ"]
    reference = Transformer(str(folder), do_lower_case=True)
    expected = [row[row != 0].tolist() for row in reference.preprocess(texts)["input_ids"]]
    tokenizer = Tokenizer.from_folder(folder, vocab_size=80, max_length=32, lowercase=True)
    assert ids(tokenizer.encode_texts(texts)) == expected
    assert ids(tokenizer.encode_texts([""], prompt="A [SEP]")) == ids(tokenizer.encode_texts(["a [SEP]"]))
    plain = Tokenizer.from_folder(folder, vocab_size=80, max_length=32)
    assert ids(plain.encode_texts(["ABC"])) != ids(plain.encode_texts(["abc"]))


def test_many_threads_share_one_tokenizer(tokenizer: Tokenizer, reference: Any) -> None:
    """Each with its own truncation: none sees another's."""
    reference.truncation_side = "right"
    expected = {k: reference(TEXTS, truncation=True, max_length=k)["input_ids"] for k in range(2, MAX_LENGTH + 1)}

    def run(k: int) -> bool:
        return ids(tokenizer.encode_texts(TEXTS, truncate_to=k)) == expected[k]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, [*expected] * 5))


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "model_max_length": 512}},
        {"tokenizer.json": "{"},
        {"tokenizer.json": {}},
        {"tokenizer.json": {"version": "1.0", "added_tokens": [], "model": {"type": "Nonsense"}}},
    ],
    ids=repr,
)
def test_a_folder_without_a_usable_tokenizer(tmp_path: Path, files: dict[str, Any]) -> None:
    """The error names the folder. A tokenizer of nothing but special tokens, which knows no word, is none."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CorruptCheckpointError, match=str(tmp_path)):
        Tokenizer.from_folder(tmp_path, vocab_size=64, max_length=20)


@pytest.mark.parametrize("text", ["", "a", "naïve café, 漢字 😀", "word " * 90, "word " * 200])
def test_a_text_alone_has_the_ids_it_has_in_a_batch(tokenizer: Tokenizer, text: str) -> None:
    [alone] = tokenizer.encode_texts([text], truncate_to=MAX_LENGTH)
    _, among, _ = tokenizer.encode_texts(["x", text, "y z"], truncate_to=MAX_LENGTH)
    np.testing.assert_array_equal(alone.ids, among.ids)
    assert alone.ids.dtype == among.ids.dtype == np.int32


def test_half_a_surrogate_pair_alone(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputTypeError, match=r"input\[0\] holds half of a surrogate pair"):
        tokenizer.encode_texts(["\ud800"])


@pytest.mark.parametrize(("texts", "index"), [(["zebra"], 0), (["the", "", "a zebra"], 2)])
def test_a_token_without_a_vector_names_its_text(minilm_folder: Path, texts: list[str], index: int) -> None:
    zebra = Tokenizer.from_folder(minilm_folder, vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH).token_id("zebra")
    assert zebra is not None
    tokenizer = Tokenizer.from_folder(minilm_folder, vocab_size=zebra, max_length=MAX_LENGTH)
    with pytest.raises(TokenIdError, match=f"is the token id {zebra}, but") as caught:
        tokenizer.encode_texts(texts)
    assert caught.value.index == index
