"""The real all-MiniLM-L6-v2 against sentence-transformers, and against itself on other shapes and devices."""

# ruff: noqa: RUF001
# Letters that look like others are what the corpus is for.

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import numpy.typing as npt
import pytest
from parity import cosines
from sentence_transformers import SentenceTransformer

from jaxembed import Bucket, Embedder, Ladder, make_mesh, program
from jaxembed.packing import Row, pack

MIN_COSINE = 0.99999
MAX_DIFFERENCE = 2e-6
"""Against torch, for every text."""
SAME = 1e-6
"""Against ourselves: the same text in another batch, bucket or mesh."""

Vectors = npt.NDArray[np.float32]
Record = Callable[[str, object], None]

WORDS = (
    # English, with punctuation and words of several pieces.
    "the quick brown fox jumps over a lazy dog; embeddings aren't magic -- they're vectors! $3.50 100% e.g. "
    "antidisestablishmentarianism supercalifragilistic TensorFlow JAX v0.10.1 https://example.org/a?b=c#d "
    'user@example.org C++ O\'Neill re-entrant 1,234,567.89 3rd 20th-century "quoted" (brackets) [square] {curly} '
    # Latin with marks, composed and decomposed, and letters that change under normalisation.
    "Übergröße naïve façade Ångström jalapeño Łódź İstanbul ışık straße ﬁne ﬂow cafe\u0301 Z\u030cizˇek ǅ ſ ½ ² Ⅷ ª "
    "việt nghĩa đường tiếng pingüino œuvre æther þorn "
    # Greek, Cyrillic, Armenian, Georgian.
    "ΣΊΣΥΦΟΣ φιλοσοφία λόγος Москва ёжик объявление Україна ґанок Հայաստան բարեւ საქართველო გამარჯობა "
    # Hebrew and Arabic, with vowel points and marks of direction.
    "שלום עולם שָׁלוֹם \u200fעברית\u200e مرحبا بالعالم العَرَبِيَّة ٣٫١٤ فارسی اردو "
    # Indic scripts, Thai, Khmer, Tibetan, Ethiopic.
    "नमस्ते दुनिया विद्यालय বাংলা ভাষা தமிழ் తెలుగు ಕನ್ನಡ മലയാളം สวัสดีชาวโลก ភាសាខ្មែរ བོད་སྐད ሰላም "
    # Chinese, Japanese, Korean, and full-width forms.
    "你好。世界 机器学习 漢字 𠮷野家 こんにちは カタカナ ﾊﾝｶｸ 東京タワー 안녕하세요 대한민국 ＡＢＣ１２３ 『引用』 "
    # Emoji: plain, with skin tone, joined, flags; symbols and letters outside the basic plane.
    "😀 👍🏽 👩\u200d👩\u200d👧\u200d👦 🇫🇷 ❤️ ☃ ♞ ∑∫√∞≠≤ αβγ→∂ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒳 𐍈𐌰 𓀀 ⠃⠗ ① "
    # Control and format characters inside and between words.
    "nul\x00l be\x07ll es\x1bc de\x7fl so\u00adft zero\u200bwidth joi\u2060ner \ufeffbom \ufffdreplaced \ue000 "
    "li\u2028ne pa\u2029ra "
    # What a tokenizer could take for its own.
    "[CLS] [SEP] [PAD] [MASK] [UNK] ##ing <s> </s> <|endoftext|> "
).split(" ")

SPACES = (" ", " ", " ", " ", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", " \n\n ", "")


def corpus() -> list[str]:
    """240 texts of up to 512 words, the same on every run: half of them short, every tenth of one script alone."""
    source = random.Random(20)
    words = [word for word in WORDS if word]
    counts = [1 + i % 12 for i in range(120)]
    counts += [13 + i for i in range(60)]
    counts += [min(512, 73 + 12 * i) for i in range(40)]
    texts = []
    for i, count in enumerate(counts):
        start = source.randrange(len(words))
        near = [words[(start + j) % len(words)] for j in range(8)]
        chosen = source.choices(near if i % 10 == 0 else words, k=count)
        texts.append("".join(word + source.choice(SPACES) for word in chosen))
    texts += ["", " ", "\n", "\u200b", "\x00", "a", ".", "...", "  leading", "trailing  ", "\t\ttabs\t\t", "ALL CAPS"]
    texts += ["x" * 99, "x" * 101, "x" * 5000, "é" * 300, "中" * 300, "a" + "\u0301" * 50]
    texts += [" ".join(words), " ".join(reversed(words))]
    return texts


TEXTS = corpus()


def difference(a: Vectors, b: Vectors) -> float:
    """Largest absolute difference."""
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module", autouse=True)
def optimised() -> Iterator[None]:
    """Machine code as users have it, which most tests do without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "compiler_options", lambda *_: {"xla_backend_optimization_level": 3})
        yield


@pytest.fixture(scope="module")
def minilm(minilm_folder: Path) -> Embedder:
    """The model on one device, with executables of its own."""
    return Embedder.from_pretrained(minilm_folder, mesh=make_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def theirs(minilm_folder: Path) -> Vectors:
    """Sentence-transformers' vectors of the corpus."""
    return np.asarray(SentenceTransformer(str(minilm_folder), device="cpu").encode(TEXTS))


@pytest.fixture(scope="module")
def ours(minilm: Embedder) -> Vectors:
    """The corpus through the default ladder on one device."""
    return minilm.encode(TEXTS)


def test_the_corpus_is_what_it_says(minilm: Embedder) -> None:
    """At least 200 texts, of 1 to 512 words, from a few tokens to more than the model takes."""
    assert len(set(TEXTS)) == len(TEXTS) >= 200
    longest = max(TEXTS[:220], key=lambda text: len(text.split()))
    assert len(longest.split()) > 400
    lengths = [len(one) for one in minilm.tokenizer.encode_texts(TEXTS, truncate_to=256)]
    assert min(lengths) == 2
    assert lengths.count(256) >= 20
    assert len(set(lengths)) > 80


def test_every_text_agrees_with_sentence_transformers(ours: Vectors, theirs: Vectors, record_property: Record) -> None:
    """Direction and every single number."""
    assert ours.shape == theirs.shape == (len(TEXTS), 384)
    cosine = cosines(ours, theirs)
    worst = np.abs(ours - theirs).max(axis=1)
    record_property("texts", len(TEXTS))
    record_property("1 - min cosine", f"{1 - cosine.min():.1e}")
    record_property("max abs diff", f"{worst.max():.1e}")
    assert cosine.min() >= MIN_COSINE, f"least for {TEXTS[int(cosine.argmin())]!r:.80}"
    assert worst.max() <= MAX_DIFFERENCE, f"most for {TEXTS[int(worst.argmax())]!r:.80}"


def test_vectors_are_unit_vectors(ours: Vectors) -> None:
    """The model ends in Normalize."""
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


def test_alone_as_in_a_batch(minilm: Embedder, ours: Vectors, record_property: Record) -> None:
    """Each text by itself, as a string and as a list of one."""
    chosen = range(0, len(TEXTS), 8)
    alone = np.stack([minilm.encode(TEXTS[i]) for i in chosen])
    listed = np.concatenate([minilm.encode([TEXTS[i]]) for i in chosen])
    np.testing.assert_array_equal(alone, listed)
    worst = difference(alone, ours[list(chosen)])
    record_property("max abs diff", f"{worst:.1e}")
    assert worst <= SAME


def test_any_bucket_of_the_ladder(minilm: Embedder, ours: Vectors, record_property: Record) -> None:
    """Texts of several lengths through every bucket that takes them, alone and among others."""
    chosen = [TEXTS.index("a"), 0, 3, 7, 118, 125, 140, 170, 200, 219]
    encodings = minilm.tokenizer.encode_texts([TEXTS[i] for i in chosen], truncate_to=minilm.max_length)
    worst, used = 0.0, set()
    for bucket in minilm.engine.ladder.buckets:
        minilm.engine.compile(bucket)
        fitting = [k for k, encoding in enumerate(encodings) if len(encoding) <= bucket.seq_len]
        groups: list[list[int]] = [[]]
        for k in fitting:
            together = sum(len(encodings[one]) for one in (*groups[-1], k))
            if len(groups[-1]) == bucket.batch_size or together > bucket.tokens:
                groups.append([])
            groups[-1].append(k)
        for group in (*groups, groups[-1][::-1], fitting[:1], fitting[-1:]):
            got = minilm.engine.run(pack(bucket, [Row(encodings[k], 384, True, k) for k in group]))
            worst = max(worst, difference(got, ours[[chosen[k] for k in group]]))
            used.update(group)
    assert used == set(range(len(chosen)))
    record_property("buckets", len(minilm.engine.ladder))
    record_property("max abs diff", f"{worst:.1e}")
    assert worst <= SAME


@pytest.mark.parametrize(("devices", "model_parallel"), [(2, 1), (8, 1), (2, 2), (8, 2)])
def test_any_number_of_devices(
    minilm_folder: Path, ours: Vectors, devices: int, model_parallel: int, record_property: Record
) -> None:
    """Data parallel over all of them, or with the weights split between pairs."""
    mesh = make_mesh(jax.devices()[:devices], model_parallel=model_parallel)
    ladder = Ladder([Bucket(8, 32), Bucket(8, 256)])
    chosen = [*range(0, 120, 10), *range(120, 220, 20)]
    got = Embedder.from_pretrained(minilm_folder, ladder=ladder, mesh=mesh).encode([TEXTS[i] for i in chosen])
    worst = difference(got, ours[chosen])
    record_property("max abs diff", f"{worst:.1e}")
    assert worst <= SAME


def test_bfloat16(minilm_folder: Path, ours: Vectors, record_property: Record) -> None:
    """Half the memory: close to float32, and measurably not the same."""
    half = Embedder.from_pretrained(
        minilm_folder,
        dtype="bfloat16",
        ladder=Ladder([Bucket(16, 64), Bucket(4, 256)]),
        mesh=make_mesh(jax.devices()[:1]),
    )
    least = float(cosines(half.encode(TEXTS), ours).min())
    record_property("min cosine", f"{least:.6f}")
    assert 0.999 <= least < 0.9999999


def test_meaning(minilm: Embedder) -> None:
    """Not only equal to a reference: the vectors do what they are for."""
    query = minilm.encode_query("How do I bake bread?")
    documents = minilm.encode_document(
        ["The stock market fell on Tuesday.", "Knead the dough and put the loaf into a hot oven.", "Cats sleep a lot."]
    )
    assert minilm.similarity(query, documents)[0].argmax() == 1
