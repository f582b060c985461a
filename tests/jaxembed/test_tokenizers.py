"""Tokenizer folders of every kind, token ids against transformers' own: whole, cut, and of odd texts."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import compare, load, reload, save, tiny_transformer, write
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxembed import tokenizer_files
from jaxembed.cache import switch
from jaxembed.checkpoint import DEFAULT_MODEL, resolve
from jaxembed.errors import InputTooLongError, TokenIdError, UnsupportedModelError
from jaxembed.tokenizer import Tokenizer, TruncationSide
from jaxembed.tokenizer_files import Found, by_transformers, read_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Ünïcode naïve façade: Ångström's ﬁne 2nd café — “quoted” text…",
    "Le modèle est entraîné sur quelques phrases seulement; c'est peu, mais ça suffit.",
    "机器学习模型把文本变成向量。 ベクトルにする 한국어 문장",
    "def f(x):\n    return x ** 2  # 1234567890",
    "Москва и Киев, Αθήνα, שלום, مرحبا",
] * 3
TEXTS = [
    *CORPUS[:6],
    "",
    " ",
    "a",
    "  two  spaces   around  ",
    "tabs\tand\nlines\r\n\n",
    "UPPER lower MiXeD İstanbul ΣΊΣΥΦΟΣ straße",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 and \x00 control \x07 \u200b \ufeff \u00ad \u3000 characters",
    "combining e\u0301 and precomposed é",
    "[CLS] [SEP] <s> </s> <mask> [MASK] <pad> written out <|endoftext|>",
    "supercalifragilisticexpialidocious" * 4,
    "don't won't I'll we've 12,345.67 $5 50%",
    "the dog " * 30,
    "\U0001d518\U0001d52b\U0001d526 ﷽ \U0010ffff",
]

BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
ROBERTA = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}
QWEN = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
T5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def template(backend: Backend, single: str) -> None:
    """Have special tokens put around a text."""
    named = {word for word in single.split() if word != "$A"}
    ids = [(word, backend.token_to_id(word)) for word in sorted(named)]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=ids)


def wordpiece(**normalizer: Any) -> Backend:
    """BERT's kind."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(**normalizer)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(BERT.values()), show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    template(backend, "[CLS] $A [SEP]")
    return backend


def byte_bpe(special: dict[str, str], *, space: bool = False, split: bool = False) -> Backend:
    """GPT-2's kind: pieces of bytes; `split` by Qwen's pattern."""
    backend = Backend(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=not split)
    words, rest = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", r"\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = rf"{words}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{rest}"
    by_pattern = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_])
    backend.pre_tokenizer = by_pattern if split else bytes_
    backend.normalizer = normalizers.NFC() if split else None
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def unigram(special: dict[str, str], single: str, *, lowercase: bool = False) -> Backend:
    """SentencePiece's kind."""
    backend = Backend(models.Unigram())
    steps = [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()] if lowercase else steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    named = list(dict.fromkeys(special.values()))
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=named, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    template(backend, single)
    return backend


def llama(special: dict[str, str]) -> Backend:
    """Llama's and Gemma's kind: BPE of characters, and bytes for those that the vocabulary lacks."""
    named = [*dict.fromkeys(special.values()), *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=named, show_progress=False)
    backend.train_from_iterator(CORPUS[:3], trainer)
    # The bytes are pieces like any other: as special tokens they would be found in texts.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Backend.from_str(json.dumps(state))


def roberta_kind(space: bool) -> Backend:
    """Byte-level BPE between <s> and </s>."""
    backend = byte_bpe(ROBERTA, space=space)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", backend.token_to_id("</s>")), ("<s>", backend.token_to_id("<s>")), add_prefix_space=space
    )
    return backend


def qwen_kind(ends: bool) -> Backend:
    """Qwen's: nothing around a text, or as of Qwen3-Embedding an end behind it."""
    backend = byte_bpe(QWEN, split=True)
    if ends:
        template(backend, "$A <|endoftext|>")
    return backend


def llama_kind() -> Backend:
    """Llama's: a beginning before each text."""
    backend = llama({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})
    template(backend, "<s> $A")
    return backend


ENDS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

KINDS: dict[str, tuple[Callable[[], Backend], dict[str, str], str, int]] = {
    "BERT": (lambda: wordpiece(lowercase=True), BERT, "BertTokenizer", 2),
    "BERT, cased": (lambda: wordpiece(lowercase=False), BERT, "BertTokenizer", 2),
    "BERT, accents": (lambda: wordpiece(lowercase=True, strip_accents=False), BERT, "BertTokenizer", 2),
    "BERT, any class": (lambda: wordpiece(lowercase=True), BERT, "PreTrainedTokenizerFast", 2),
    "MPNet": (lambda: wordpiece(lowercase=True), BERT, "MPNetTokenizer", 2),
    "RoBERTa": (lambda: roberta_kind(False), ROBERTA, "RobertaTokenizer", 2),
    "RoBERTa, spaced": (lambda: roberta_kind(True), ROBERTA, "RobertaTokenizer", 2),
    "GPT-2": (lambda: byte_bpe(QWEN), QWEN, "GPT2Tokenizer", 0),
    "Qwen2": (lambda: qwen_kind(False), QWEN, "Qwen2Tokenizer", 0),
    "Qwen3-Embedding": (lambda: qwen_kind(True), QWEN, "Qwen2Tokenizer", 1),
    "Qwen3-Embedding, any class": (lambda: qwen_kind(True), QWEN, "PreTrainedTokenizerFast", 1),
    "XLM-RoBERTa": (lambda: unigram(ROBERTA, "<s> $A </s>"), ROBERTA, "XLMRobertaTokenizer", 2),
    "XLM-RoBERTa, any class": (lambda: unigram(ROBERTA, "<s> $A </s>"), ROBERTA, "PreTrainedTokenizerFast", 2),
    "T5": (lambda: unigram(T5, "$A </s>"), T5, "T5Tokenizer", 1),
    "ALBERT": (
        lambda: unigram(BERT | {"unk_token": "<unk>"}, "[CLS] $A [SEP]", lowercase=True),
        BERT | {"unk_token": "<unk>"},
        "AlbertTokenizer",
        2,
    ),
    "DeBERTa": (
        lambda: unigram(BERT | {"unk_token": "<unk>"}, "[CLS] $A [SEP]"),
        BERT | {"unk_token": "<unk>"},
        "DebertaV2Tokenizer",
        2,
    ),
    "CamemBERT": (lambda: unigram(ROBERTA, "<s> $A </s>"), ROBERTA, "CamembertTokenizer", 2),
    "Llama": (llama_kind, ENDS, "LlamaTokenizer", 1),
    "Llama, any class": (llama_kind, ENDS, "PreTrainedTokenizerFast", 1),
    "Gemma": (llama_kind, ENDS, "GemmaTokenizer", 1),
}
"""What makes it, its special tokens by name, the class that tokenizer_config.json names, tokens around a text."""


def saved(folder: Path, kind: str, **options: Any) -> Path:
    """A folder as it stands on the hub: tokenizer.json and a tokenizer_config.json that names the class of old."""
    make, special, named, _ = KINDS[kind]
    made = PreTrainedTokenizerFast(tokenizer_object=make(), **special, **options)
    made.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return write(folder, {"tokenizer_config.json": config | {"tokenizer_class": named}})


def ours_of(folder: Path, *, max_length: int = 4096, **options: Any) -> tuple[Tokenizer, Any]:
    """Our tokenizer of a folder, and transformers'."""
    theirs = AutoTokenizer.from_pretrained(folder)
    return Tokenizer.from_folder(folder, vocab_size=len(theirs), max_length=max_length, **options), theirs


def ids(encodings: list[Any]) -> list[list[int]]:
    """The token ids as lists."""
    return [encoding.ids.tolist() for encoding in encodings]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, tmp_path: Path) -> None:
    """All texts, whole and cut to every length, on either side, with special tokens and without."""
    ours, theirs = ours_of(saved(tmp_path, kind))
    special = KINDS[kind][3]
    assert ours.special_tokens == special
    whole = theirs(TEXTS)["input_ids"]
    assert ids(ours.encode_texts(TEXTS)) == whole
    assert max(map(len, whole)) > 60, "the texts are too easy"
    for side in TruncationSide:
        theirs.truncation_side = side.value
        for length in (special, special + 1, special + 2, 7, 16, 33, 64):
            for around in (True, False):
                if not length:
                    continue
                want = theirs(TEXTS, truncation=True, max_length=length, add_special_tokens=around)["input_ids"]
                got = ours.encode_texts(TEXTS, truncate_to=length, side=side, add_special_tokens=around)
                assert ids(got) == want, f"cut to {length} on the {side}, special tokens: {around}"
    for text, row in zip(TEXTS, whole, strict=True):
        if len(row) > 16:
            with pytest.raises(InputTooLongError, match=f"has {len(row)} tokens"):
                ours_of(tmp_path, max_length=16)[0].encode_texts([text])
            break


@pytest.mark.parametrize("kind", ["BERT", "Qwen3-Embedding", "T5", "Llama"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_not_its_business(kind: str, padding: str, tmp_path: Path) -> None:
    """Sides and lengths of padding in the files change nothing, nor does a cut that tokenizer.json asks for."""
    saved(tmp_path, kind, padding_side=padding)
    plain, _ = ours_of(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["padding_side"] == padding
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_padding(direction=padding, length=40)
    backend.enable_truncation(9)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, _ = ours_of(tmp_path)
    assert ids(ours.encode_texts(TEXTS)) == ids(plain.encode_texts(TEXTS))


@pytest.mark.parametrize("kind", ["BERT", "RoBERTa", "Qwen3-Embedding", "XLM-RoBERTa", "Llama"])
def test_added_tokens(kind: str, tmp_path: Path) -> None:
    """Words added to a vocabulary, special ones and others, with what they do to the spaces around them."""
    make, special, named, _ = KINDS[kind]
    made = PreTrainedTokenizerFast(tokenizer_object=make(), **special)
    made.add_tokens(
        [
            "dogs",
            AddedToken("Fox", single_word=True, normalized=False),
            AddedToken("<left>", lstrip=True),
            AddedToken("<right>", rstrip=True, normalized=False),
        ]
    )
    made.add_special_tokens(
        {"additional_special_tokens": ["<|query|>", AddedToken("<both>", lstrip=True, rstrip=True)]}
    )
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path, {"tokenizer_config.json": config | {"tokenizer_class": named}})
    ours, theirs = ours_of(tmp_path)
    texts = [
        "two dogs and DOGS, hotdogs",
        "a Fox, Foxes, fox",
        "x <left> y <right> z",
        "<|query|> what is it <both> that",
        "  <both>  ",
        *TEXTS,
    ]
    whole = theirs(texts)["input_ids"]
    assert ids(ours.encode_texts(texts)) == whole
    base = made.vocab_size
    assert sum(any(one >= base for one in row) for row in whole) >= 5
    cut = theirs(texts, truncation=True, max_length=6)["input_ids"]
    assert ids(ours.encode_texts(texts, truncate_to=6)) == cut
    # A model that was not made larger for them has no vectors for them.
    small = Tokenizer.from_folder(tmp_path, vocab_size=base, max_length=100)
    with pytest.raises(TokenIdError, match=rf"input\[1\]\[\d\] is the token id \d+, but .* 0 to {base - 1}"):
        small.encode_texts(["a", "two dogs"])


def test_the_side_that_the_files_name(tmp_path: Path) -> None:
    """A tokenizer that keeps the end of a text: so does the Embedder, and a caller may say otherwise."""
    folder = save(tmp_path / "model", [tiny_transformer(tmp_path / "hf"), Pooling(16, "mean")])
    name = "tokenizer_config.json"
    write(folder, {name: json.loads((folder / name).read_text()) | {"truncation_side": "left"}})
    ours, theirs = load(folder), reload(folder)
    texts = ["a b c d e " * 10 + "x y z", "x y z " + "a b c d e " * 10]
    compare(ours, theirs, texts)
    kept = ids(ours.tokenizer.encode_texts(texts, truncate_to=5))
    assert kept == theirs.tokenizer(texts, truncation=True, max_length=5)["input_ids"]
    assert kept == ids(ours.tokenizer.encode_texts(texts, truncate_to=5, side=TruncationSide.LEFT))
    assert kept != ids(ours.tokenizer.encode_texts(texts, truncate_to=5, side=TruncationSide.RIGHT))
    assert ids(ours.tokenizer.encode_ids([[1, 2, 3, 4]], truncate_to=2)) == [[3, 4]]


def test_special_tokens_around_are_found_without_any_letter(tmp_path: Path) -> None:
    """A vocabulary that has no Latin letter, and drops what it does not know."""
    backend = Backend(models.BPE({"<s>": 0, "</s>": 1, "猫": 2, "犬": 3}, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template(backend, "<s> $A </s>")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    ours, theirs = ours_of(tmp_path)
    assert ids(ours.encode_texts(["a"])) == [[0, 1]]
    texts = ["猫犬猫犬猫犬", "a猫", ""]
    want = theirs(texts, truncation=True, max_length=4)["input_ids"]
    assert ids(ours.encode_texts(texts, truncate_to=4)) == want == [[0, 2, 3, 1], [0, 2, 1], [0, 1]]


def vocabulary(backend: Backend) -> list[str]:
    """Its tokens, by id."""
    return [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]


@pytest.mark.parametrize(
    "options",
    [
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": True, "tokenize_chinese_chars": False},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("named", ["BertTokenizer", "BertTokenizerFast", None])
def test_a_vocabulary_alone(named: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    """Folders of before 2020: vocab.txt, and flags in tokenizer_config.json; the class may be told by the model."""
    words = vocabulary(wordpiece(lowercase=options.get("do_lower_case", True)))
    config = options if named is None else options | {"tokenizer_class": named}
    write(
        tmp_path,
        {
            "vocab.txt": "\n".join(words).encode(),
            "tokenizer_config.json": config,
            "config.json": {"model_type": "bert"},
        },
    )
    ours, theirs = ours_of(tmp_path)
    assert ours.special_tokens == 2
    assert ids(ours.encode_texts(TEXTS)) == theirs(TEXTS)["input_ids"]
    cut = theirs(TEXTS, truncation=True, max_length=9)["input_ids"]
    assert ids(ours.encode_texts(TEXTS, truncate_to=9)) == cut
    folded = ids(ours.encode_texts(["THE QUICK"])) == ids(ours.encode_texts(["the quick"]))
    assert folded == options.get("do_lower_case", True)


@pytest.mark.parametrize(
    ("named", "model_type", "special"),
    [("RobertaTokenizer", "roberta", 2), ("Qwen2Tokenizer", "qwen2", 0), ("GPT2Tokenizer", "gpt2", 0)],
)
def test_a_vocabulary_and_merges(named: str, model_type: str, special: int, tmp_path: Path) -> None:
    """vocab.json and merges.txt, without tokenizer.json."""
    backend = byte_bpe(ROBERTA if special else QWEN, split=named == "Qwen2Tokenizer")
    backend.model.save(str(tmp_path))
    write(
        tmp_path,
        {
            "tokenizer_config.json": {"tokenizer_class": named, **(ROBERTA if special else QWEN)},
            "config.json": {"model_type": model_type},
        },
    )
    ours, theirs = ours_of(tmp_path)
    assert ours.special_tokens == special
    assert ids(ours.encode_texts(TEXTS)) == theirs(TEXTS)["input_ids"]


@pytest.mark.parametrize(
    ("file", "named", "model_type"),
    [
        ("sentencepiece.bpe.model", "XLMRobertaTokenizer", "xlm-roberta"),
        ("spiece.model", "T5Tokenizer", "t5"),
        ("spm.model", "DebertaV2Tokenizer", "deberta-v2"),
        ("tokenizer.model", None, "llama"),
    ],
)
def test_a_sentencepiece_model_alone(
    file: str, named: str | None, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package that reads it: the message says what to do. transformers speaks of tiktoken."""
    files = {file: b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "config.json": {"model_type": model_type}}
    write(tmp_path, files if named is None else {**files, "tokenizer_config.json": {"tokenizer_class": named}})
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    with pytest.raises(UnsupportedModelError, match=r"a SentencePiece model and no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_folder(tmp_path, vocab_size=64, max_length=20)
    # A tokenizer.json beside it is all that is needed.
    saved(tmp_path, "XLM-RoBERTa")
    ours, theirs = ours_of(tmp_path)
    assert ids(ours.encode_texts(TEXTS)) == theirs(TEXTS)["input_ids"]


@pytest.mark.parametrize("named", ["ByT5Tokenizer", "CanineTokenizer"])
def test_tokenizers_in_python(named: str, tmp_path: Path) -> None:
    """transformers has some that are not of the tokenizers package: refused by name."""
    write(tmp_path, {"tokenizer_config.json": {"tokenizer_class": named}, "config.json": {"model_type": "t5"}})
    with pytest.raises(UnsupportedModelError, match=f"transformers has {named} in Python only"):
        Tokenizer.from_folder(tmp_path, vocab_size=400, max_length=20)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    """A tokenizer class of the checkpoint's own is refused by name."""
    write(
        tmp_path,
        {
            "tokenizer_config.json": {
                "tokenizer_class": "MyTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]},
            },
            "tokenization_my.py": b"raise SystemExit('it was run')",
            "config.json": {"model_type": "bert"},
        },
    )
    with pytest.raises(UnsupportedModelError, match=r"remote code 'tokenization_my\.MyTokenizer', which is never run"):
        Tokenizer.from_folder(tmp_path, vocab_size=400, max_length=20)


def test_kept_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache transformers makes a folder's tokenizer once; another file in the folder makes it another one."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((resolve(DEFAULT_MODEL) / name).read_bytes())
    made = []

    def counted(asked: Path) -> Found:
        made.append(asked)
        return by_transformers(asked)

    monkeypatch.setattr(tokenizer_files, "by_transformers", counted)
    switch(tmp_path / "cache")
    try:
        first, second = read_tokenizer(folder), read_tokenizer(folder)
        assert made == [folder]
        assert first._replace(backend=None) == second._replace(backend=None)
        assert first.backend.to_str() == second.backend.to_str()
        for text in TEXTS:
            assert first.backend.encode(text).ids == second.backend.encode(text).ids
        (folder / "model.safetensors").write_bytes(b"weights are no part of it")
        read_tokenizer(folder)
        assert len(made) == 1
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "truncation_side": "left"}))
        assert (first.side, read_tokenizer(folder).side) == ("right", "left")
    finally:
        switch(None)
