"""Group texts by meaning with k-means: `python examples/clustering.py`. Needs scikit-learn, and no server."""

try:
    from sklearn.cluster import KMeans
except ImportError:
    raise SystemExit("this example needs scikit-learn: pip install scikit-learn") from None

from jaxembed import Embedder

TEXTS = [
    "The goalkeeper saved a penalty in the last minute.",
    "Whisk the eggs with sugar until pale.",
    "The central bank raised its interest rate.",
    "She won the marathon in a record time.",
    "Let the dough rest for an hour before baking.",
    "Shares fell after the profit warning.",
    "The striker was sold to another club.",
    "Simmer the sauce on a low heat.",
    "Inflation slowed for the third month running.",
]


def main() -> None:
    vectors = Embedder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2").encode(TEXTS)
    labels = KMeans(n_clusters=3, n_init=10, random_state=0).fit_predict(vectors)
    for cluster in range(3):
        print(f"cluster {cluster}")
        for text, label in zip(TEXTS, labels, strict=True):
            if label == cluster:
                print(f"  {text}")


if __name__ == "__main__":
    main()
