"""The model as a pure function: jit, grad and vmap over `apply`, and a few steps of fine-tuning in plain JAX.

`python examples/gradients.py`. Needs no server and no training library.
"""

import jax
import jax.numpy as jnp

from jaxembed import Embedder

PAIRS = [
    ("What causes tides?", "The moon pulls at the water of the seas."),
    ("How is glass made?", "Sand is melted with soda and lime."),
    ("Why is the sky blue?", "Air scatters short wavelengths more than long ones."),
    ("What do bees make?", "Foragers turn nectar into honey in the hive."),
    ("How do planes stay up?", "The wing pushes air down and is pushed up."),
    ("What is rust?", "Iron takes up oxygen in the presence of water."),
    ("Why do leaves fall?", "Trees close the stalk off to save water in winter."),
    ("How do fish breathe?", "Gills take oxygen out of the water."),
]
LENGTH = 24
TEMPERATURE = 0.05
RATE = 0.02
STEPS = 6


def main() -> None:
    embedder = Embedder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    params = embedder.params  # a flat dict: "layers.0.query.kernel" -> array

    def tokens(texts: list[str]) -> tuple[jax.Array, jax.Array]:
        """Ids and mask, [n, LENGTH], padded by hand: apply() takes arrays and knows no text."""
        rows = [one.ids for one in embedder.tokenizer.encode_texts(texts, truncate_to=LENGTH)]
        ids = jnp.array([[*row, *[0] * (LENGTH - len(row))] for row in rows])
        return ids, jnp.array([[1] * len(row) + [0] * (LENGTH - len(row)) for row in rows])

    questions = tokens([question for question, _ in PAIRS])
    answers = tokens([answer for _, answer in PAIRS])

    # jit: the same numbers as encode().
    vectors = jax.jit(embedder.apply)(params, *questions)
    encoded = embedder.encode([question for question, _ in PAIRS])
    print(f"jit(apply) and encode differ by at most {jnp.abs(vectors - encoded).max():.1e}")

    # vmap + grad: how much each pair alone would move the first norm's bias, one gradient for each pair.
    name = "embeddings.norm.bias"

    def distance(bias: jax.Array, question: tuple[jax.Array, ...], answer: tuple[jax.Array, ...]) -> jax.Array:
        moved = {**params, name: bias}
        a, b = (embedder.apply(moved, ids[None], mask[None])[0] for ids, mask in (question, answer))
        return 1.0 - a @ b

    pulls = jax.jit(jax.vmap(jax.grad(distance), in_axes=(None, 0, 0)))(params[name], questions, answers)
    norms = " ".join(f"{norm:.3f}" for norm in jnp.linalg.norm(pulls, axis=1))
    print(f"one gradient for each pair, {pulls.shape}, with the norms {norms}")

    # grad over all weights: in-batch negatives, every other answer is a wrong one (https://arxiv.org/abs/1705.00652).
    def loss(params: dict[str, jax.Array]) -> jax.Array:
        scores = embedder.apply(params, *questions) @ embedder.apply(params, *answers).T / TEMPERATURE
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(scores, axis=1)))

    @jax.jit
    def step(params: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda weight, slope: weight - RATE * slope, params, gradients), value

    for number in range(STEPS):
        params, value = step(params)
        print(f"after {number} steps: loss {value:.4f}")


if __name__ == "__main__":
    main()
