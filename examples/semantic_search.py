"""Search through a running server, with the standard library alone: `python examples/semantic_search.py [URL]`.

Start the server first: `make serve`.
"""

import json
import sys
import urllib.error
import urllib.request

import numpy as np

DOCUMENTS = [
    "Paris is the capital of France.",
    "London stands on the river Thames.",
    "The Bundestag meets in Berlin.",
    "Water boils at a lower temperature on a mountain.",
    "A cat sleeps for most of the day.",
    "The Louvre holds the Mona Lisa.",
]
QUERIES = ["What is the capital of France?", "Where is the German parliament?", "How long do pets rest?"]


def embed(url: str, texts: list[str]) -> np.ndarray:
    """float32 [n, d] from POST /v1/embeddings. `model` is left out: the server's own model answers."""
    body = json.dumps({"input": texts}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return np.array([item["embedding"] for item in answer["data"]], np.float32)


def main() -> None:
    url = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    try:
        documents, queries = embed(url, DOCUMENTS), embed(url, QUERIES)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url} answered {error.code}: {json.load(error)['error']['message']}") from None
    except OSError as error:
        raise SystemExit(f"no server at {url} ({error}); start one with 'make serve'") from None
    # Vectors of this model have length 1: the dot product is the cosine.
    for query, scores in zip(QUERIES, queries @ documents.T, strict=True):
        print(query)
        for i in np.argsort(-scores)[:2]:
            print(f"  {scores[i]:.3f}  {DOCUMENTS[i]}")


if __name__ == "__main__":
    main()
