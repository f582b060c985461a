"""Texts to vectors with the library alone: `python examples/encode.py`. Needs no server."""

from jaxembed import Embedder

TEXTS = [
    "A man is eating a piece of bread.",
    "Someone has lunch.",
    "The stock exchange closed lower today.",
]


def main() -> None:
    embedder = Embedder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    print(f"{embedder.dimension} dimensions, at most {embedder.max_length} tokens an input")

    vectors = embedder.encode(TEXTS)  # float32 [3, 384]; a single string gives [384]
    print("how alike (cosine), every text with every text:")
    for text, row in zip(TEXTS, embedder.similarity(vectors, vectors), strict=True):
        print("  " + "  ".join(f"{value:5.2f}" for value in row) + f"   {text}")

    # Retrieval models have prompts of their own for the two sides; this one has none, so both equal encode().
    query = embedder.encode_query("What does he eat?")
    documents = embedder.encode_document(TEXTS)
    best = int(embedder.similarity(query, documents)[0].argmax())
    print(f"nearest to 'What does he eat?': {TEXTS[best]}")

    # The library cuts over-long texts to max_length unless told to refuse them.
    long = "word " * 1000
    print(f"a text of 1000 words: {embedder.encode(long).shape}")
    try:
        embedder.encode(long, truncate=False)
    except ValueError as error:
        print(f"with truncate=False: {error}")


if __name__ == "__main__":
    main()
