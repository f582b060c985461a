"""jaxembed, for worker.py: with its default ladder, or with shapes refined for each set."""

PACKAGES = ("jaxembed", "jax", "jaxlib", "transformers", "tokenizers")


class Jaxembed:
    """`Embedder.encode`; the first vector comes without any cache of executables.

    Args:
        model: folder or hub id.
        dtype: "float32" or "bfloat16".
        refined: whether the shapes are chosen anew by the texts, as a server does after `--refine-after` inputs: "no";
            "each", for each set by itself; or "all", for all of them together.
    """

    def __init__(self, model, dtype, refined):
        from jaxembed import Embedder

        self._embedder = Embedder.from_pretrained(model, dtype=dtype)
        self._refined = refined
        self._ladders = {}

    @property
    def note(self):
        """What the vectors are computed on."""
        import jax

        return f"on {jax.default_backend()} ({jax.devices()[0].device_kind})"

    def ready(self, sets):
        """Compile every shape."""
        from jaxembed.warmup import cache_folder, use_cache, warm

        # Executables of an earlier run are taken as a server takes them: this shortens the start, nothing else.
        use_cache(cache_folder())
        engine = self._embedder.engine
        warm(engine)
        default = engine.ladder
        if self._refined == "all":
            together = [text for texts in sets.values() for text in texts]
            sets = {name: together for name in sets}
        for name, texts in sets.items():
            # Each from the same start: otherwise the second choice would be timed against the first.
            engine.adopt(default)
            self._ladders[name] = default if self._refined == "no" else self._embedder.refine(texts)

    def use(self, name):
        """Plan by the shapes chosen for a set."""
        self._embedder.engine.adopt(self._ladders[name])

    def encode(self, texts):
        return self._embedder.encode(texts)

    def dispatch(self):
        """Seconds of the longest dispatch."""
        from jaxembed.refinement import least_seconds

        engine = self._embedder.engine
        return max(least_seconds(engine, engine.ladder.buckets).values())


def make(**options):
    """See `Jaxembed`."""
    return Jaxembed(**options)
