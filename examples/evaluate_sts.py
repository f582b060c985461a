"""How well a model's similarities follow people's: `python examples/evaluate_sts.py [FILE.tsv] [--model ID_OR_FOLDER]`.

Spearman's correlation between the scores of sentence pairs in a TSV file and the cosines of their vectors, as the STS
benchmarks report it. The sample beside this script shows that it runs; 20 pairs tell nothing of a model.
"""

import argparse
import csv
from pathlib import Path

from scipy.stats import spearmanr

from jaxembed import Embedder

SAMPLE = Path(__file__).with_name("sts_sample.tsv")
NAMES = ("sentence1", "sentence2", "score")


def read_pairs(path: Path, columns: list[str] | None) -> tuple[list[str], list[str], list[float]]:
    """Both sentences and the score of each line; `columns` are names in the header, or numbers from 1."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    if not rows:
        raise SystemExit(f"{path} is empty")
    header, wanted = rows[0], columns or list(NAMES)
    if set(wanted) <= set(header):
        places, rows = [header.index(name) for name in wanted], rows[1:]
    elif columns is None:
        places = [0, 1, 2]  # no header
    elif all(column.isdecimal() and int(column) for column in columns):
        places = [int(column) - 1 for column in columns]
    else:
        raise SystemExit(f"{path}: the first line has no columns {', '.join(columns)}, but: {', '.join(header)}")
    try:
        first, second, scores = zip(*([row[place] for place in places] for row in rows), strict=True)
        return list(first), list(second), [float(score) for score in scores]
    except (IndexError, ValueError) as error:
        raise SystemExit(f"{path}: not every line has two sentences and a number ({error}); see --columns") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Spearman correlation of a model with scored sentence pairs.")
    parser.add_argument("file", nargs="?", type=Path, default=SAMPLE, help="TSV; by default the sample")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or hub id")
    parser.add_argument("--dimensions", type=int, help="cut vectors to this size (matryoshka)")
    parser.add_argument(
        "--columns",
        nargs=3,
        metavar=("FIRST", "SECOND", "SCORE"),
        help=f"names in the header, or numbers from 1; by default {' '.join(NAMES)}, or 1 2 3 where there is no header",
    )
    options = parser.parse_args()
    first, second, scores = read_pairs(options.file, options.columns)

    embedder = Embedder.from_pretrained(options.model)
    # One call: texts of like length share a batch, whichever side they are on.
    vectors = embedder.encode([*first, *second], dimensions=options.dimensions, normalize=True)
    cosines = (vectors[: len(first)] * vectors[len(first) :]).sum(axis=1)
    # Equal scores share the mean of their ranks.
    correlation = spearmanr(scores, cosines).statistic
    print(f"{len(scores)} pairs, {vectors.shape[1]} dimensions: Spearman {100 * correlation:.2f}")


if __name__ == "__main__":
    main()
