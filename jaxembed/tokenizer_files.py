"""A checkpoint's tokenizer files -> a `tokenizers.Tokenizer`, as transformers reads them. Knows no length policy."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxembed.cache import current
from jaxembed.errors import CorruptCheckpointError, UnsupportedModelError
from jaxembed.routes import read_json

__all__ = [
    "REMOTE",
    "Found",
    "around",
    "by_transformers",
    "lower",
    "mark",
    "read_tokenizer",
    "read_tokenizer_json",
    "unknown_id",
]


logger = logging.getLogger(__name__)

KIND = "tokenizers"


class Found(NamedTuple):
    """What the files say.

    Attributes:
        backend: the tokenizer.
        special_ids: ids that count as special.
        side: which end is cut of what is too long, "right" or "left".
        typed: whether the model is given token types.
        roles: transformers' names of special tokens, such as "mask_token" -> ids.
        left_padded: whether transformers would pad on the left.
    """

    backend: Any
    special_ids: frozenset[int]
    side: str
    typed: bool
    roles: Mapping[str, int]
    left_padded: bool


def read_tokenizer(folder: Path) -> Found:
    """The tokenizer of a model of transformers; see `by_transformers`, which makes it.

    What was made once is kept in the cache, where the process has one: transformers takes longer to import than all
    else of a start.
    """
    cache = current()
    if cache is None:
        return by_transformers(folder)
    key = cache.key([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in tokenizer_files(folder)])
    kept = cache.read(KIND, key)
    if kept is not None:
        return unpacked(kept)
    found = by_transformers(folder)
    try:
        content = packed(found)
    except Exception as error:  # The tokenizers package raises no narrower class for a part that is Python's.
        logger.debug("the tokenizer of %s cannot be kept: %s", folder, error)
    else:
        cache.write(KIND, key, content)
    return found


def tokenizer_files(folder: Path) -> list[Path]:
    """All files of a folder that a tokenizer may be made from: those that hold no weights."""
    weights = {".safetensors", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".gguf", ".ot", ".npz"}
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix not in weights)


def packed(found: Found) -> bytes:
    """A tokenizer as bytes."""
    plain = found._asdict() | {"backend": found.backend.to_str(), "special_ids": sorted(found.special_ids)}
    return json.dumps(plain).encode()


def unpacked(content: bytes) -> Found:
    """What `packed` packed."""
    from tokenizers import Tokenizer

    found = Found(**json.loads(content))
    return found._replace(backend=Tokenizer.from_str(found.backend), special_ids=frozenset(found.special_ids))


def by_transformers(folder: Path) -> Found:
    """The tokenizer of a folder as transformers makes it.

    Where tokenizer_config.json names remote code, it does what that code does, which is never run. transformers and
    sentence-transformers do so only where they are told to trust it, and else leave out in silence what it adds.

    Raises:
        CorruptCheckpointError: the folder has no usable tokenizer files.
        UnsupportedModelError: its tokenizer is not one of the tokenizers package's, or cannot be made one here; or it
            is remote code that is not replaced.
    """
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    follow = remote_behaviour(settings)
    # It warns at import that there is no torch, as if that were a fault.
    logging.getLogger("transformers").addFilter(not_about_torch)
    # Imported here: half a second that only a loaded model needs.
    from transformers import AutoTokenizer

    if needs_sentencepiece(folder):
        raise UnsupportedModelError(
            f"cannot load a tokenizer from {folder}: it holds a SentencePiece model and no tokenizer.json. Convert it "
            "once, where the packages sentencepiece and protobuf are installed: "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # The tokenizers package raises no narrower class for a malformed file.
        raise CorruptCheckpointError(f"cannot load a tokenizer from {folder}: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"cannot load a tokenizer from {folder}: transformers has {type(loaded).__name__} in Python only; "
            "supported: those of the tokenizers package"
        )
    if backend.get_vocab_size() <= len(loaded.all_special_ids):
        # What transformers makes of a folder without tokenizer files.
        raise CorruptCheckpointError(f"cannot load a tokenizer from {folder}: it has no vocabulary")
    if follow is not None:
        follow(loaded, settings)
    named = {role: backend.token_to_id(str(token)) for role, token in loaded.special_tokens_map.items()}
    return Found(
        backend=backend,
        special_ids=frozenset(loaded.all_special_ids),
        side=str(loaded.truncation_side),
        typed="token_type_ids" in loaded.model_input_names,
        roles={role: number for role, number in named.items() if number is not None},
        left_padded=loaded.padding_side == "left",
    )


def end_like_qwen2(loaded: Any, settings: Mapping[str, Any]) -> None:
    """Put around texts what the remote Qwen2Tokenizer does: the end token behind each, or nothing.

    transformers' own class of that name ignores `add_eos_token` (gte-Qwen2, stella_en_1.5B_v5).

    Args:
        loaded: transformers' own tokenizer of the folder.
        settings: tokenizer_config.json.

    Raises:
        CorruptCheckpointError: there is no end token to put.
    """
    from tokenizers.processors import TemplateProcessing

    first, second, tokens = ["$A:0"], ["$B:1"], []
    if settings.get("add_eos_token"):
        end = loaded.eos_token
        if end is None:
            raise CorruptCheckpointError("tokenizer_config.json says add_eos_token, but there is no eos_token")
        first, second, tokens = [*first, f"{end}:0"], [*second, f"{end}:1"], [(end, loaded.eos_token_id)]
    # The remote code too replaces what tokenizer.json says.
    loaded.backend_tokenizer.post_processor = TemplateProcessing(first, [*first, *second], tokens)


REMOTE: Mapping[str, Callable[[Any, Mapping[str, Any]], None]] = MappingProxyType(
    {
        "tokenization_qwen.Qwen2Tokenizer": end_like_qwen2,
        "tokenization_qwen.Qwen2TokenizerFast": end_like_qwen2,
    }
)
"""Remote code that a tokenizer_config.json may name -> what makes transformers' own tokenizer do the same."""


def remote_behaviour(settings: Mapping[str, Any]) -> Callable[[Any, Mapping[str, Any]], None] | None:
    """What replaces the remote code that a tokenizer_config.json names in `auto_map`; None where it names none.

    Raises:
        UnsupportedModelError: it is not known: what it does to a text may be anything.
    """
    named = settings.get("auto_map") or {}
    # Older files have the classes themselves here. Of two the second is the fast one, which is taken if there is one.
    classes = named.get("AutoTokenizer") if isinstance(named, Mapping) else named
    given = [name for name in ([classes] if isinstance(classes, str) else classes or []) if name]
    if not given:
        return None
    # "repository--file.Class" where the code stands in another repository.
    name = str(given[-1]).rsplit("--", 1)[-1]
    if name not in REMOTE:
        raise UnsupportedModelError(
            f"tokenizer_config.json asks for the remote code {name!r}, which is never run here; replaced are: "
            f"{', '.join(sorted(REMOTE))}"
        )
    return REMOTE[name]


def read_tokenizer_json(folder: Path) -> Found:
    """A tokenizer.json by itself, as static embeddings have it.

    Raises:
        CorruptCheckpointError: it is missing or malformed.
    """
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # The package raises no narrower class.
        raise CorruptCheckpointError(f"cannot load a tokenizer from {folder}: {error}") from None
    side = (backend.truncation or {}).get("direction", "right")
    return Found(backend, frozenset(), str(side).lower(), typed=False, roles={}, left_padded=False)


def not_about_torch(record: logging.LogRecord) -> bool:
    """A logging filter; one object, because a logger keeps every other one that it is given."""
    return "PyTorch was not found" not in record.getMessage()


def needs_sentencepiece(folder: Path) -> bool:
    """Whether a folder has its vocabulary as a SentencePiece model alone, and the package that reads it is missing.

    transformers would then take the file for one of another kind, and say that tiktoken is missing.
    """
    found = not (folder / "tokenizer.json").is_file() and any(folder.glob("*.model"))
    return found and importlib.util.find_spec("sentencepiece") is None


def around(backend: Any) -> tuple[int, int]:
    """How many special tokens a tokenizer puts before and behind a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    # Not a text of its own vocabulary, which may lack any letter.
    text: Any = Tokenizer(WordLevel({"a": 0}, unk_token="a")).encode("a")
    mask = backend.post_process(text).special_tokens_mask
    prefix = next((i for i, special in enumerate(mask) if not special), len(mask))
    return prefix, len(mask) - prefix - 1


def unknown_id(backend: Any) -> int | None:
    """The id of the token for what the vocabulary lacks; None where there is none."""
    token = getattr(backend.model, "unk_token", None)
    found = backend.token_to_id(token) if token else json.loads(backend.to_str())["model"].get("unk_id")
    return None if found is None else int(found)


def mark(backend: Any, markers: Sequence[str]) -> None:
    """Have a `tokenizers.Tokenizer` take a marker, or its first word, as one token, if the vocabulary has it."""
    from tokenizers import AddedToken

    for marker in markers:
        names = [name for name in (marker, *marker.split()[:1]) if name.strip()]
        token = next((name for name in names if backend.token_to_id(name) is not None), None)
        if token is not None and backend.encode(token, add_special_tokens=False).tokens != [token]:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])


def lower(backend: Any) -> None:
    """Have a `tokenizers.Tokenizer` lowercase first, unless it does so already; special tokens stay as they are."""
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Chain

    own: Any = backend.normalizer
    chained = isinstance(own, Chain)
    steps: list[Any] = [] if own is None else [*own] if chained else [own]
    if not any(isinstance(step, Lowercase) or getattr(step, "lowercase", False) for step in steps):
        backend.normalizer = Chain([Lowercase(), *steps])
