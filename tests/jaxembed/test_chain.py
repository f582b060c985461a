"""The modules behind the encoder, in folders that sentence-transformers writes: our vectors against its own."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from folders import MIN_COSINE, TEXTS, compare, load, old_modules, reload, save, tiny_transformer, write
from parity import cosines, randomise, save_checkpoint, tiny_bert
from safetensors.numpy import load_file, save_file
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    BoW,
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    WeightedLayerPooling,
    WordEmbeddings,
    WordWeights,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from torch import nn

from jaxembed.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    PickledCheckpointError,
    UnsupportedModelError,
    WeightsError,
)

Record = Callable[[str, object], None]

WIDTH = 16


def dense(before: int, after: int, activation: nn.Module | None = None, **options: Any) -> Dense:
    """A Dense module with random weights; no activation is the identity."""
    made = Dense(before, after, activation_function=activation or nn.Identity(), **options)
    return randomise(made, before * after)


def chain(folder: Path, *behind: Any, **overrides: Any) -> Path:
    """A folder of a tiny BERT and the modules behind it."""
    return save(folder, [tiny_transformer(folder / "hf", **overrides), *behind])


def check(folder: Path, dimension: int, record: Record | None = None) -> None:
    """Our vectors are sentence-transformers'."""
    ours, theirs = load(folder), reload(folder)
    assert ours.dimension == dimension
    least = compare(ours, theirs)
    if record is not None:
        record("1 - min cosine", f"{1 - least:.1e}")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Identity, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU])
def test_dense(activation: type[nn.Module], bias: bool, tmp_path: Path, record_property: Record) -> None:
    """Each activation, with a bias and without."""
    chain(tmp_path, Pooling(WIDTH, "mean"), dense(WIDTH, 24, activation(), bias=bias))
    check(tmp_path, 24, record_property)


@pytest.mark.parametrize("after", [WIDTH, 24])
def test_dense_with_a_residual(after: int, tmp_path: Path, record_property: Record) -> None:
    """Of one size the input is added, of two its projection."""
    chain(tmp_path, Pooling(WIDTH, "cls"), dense(WIDTH, after, nn.Tanh(), use_residual=True))
    assert ("residual.weight" in load_file(tmp_path / "2_Dense" / "model.safetensors")) == (after != WIDTH)
    check(tmp_path, after, record_property)


@pytest.mark.parametrize(
    "behind",
    [
        lambda: [Pooling(WIDTH, "mean"), dense(WIDTH, 24, bias=False), dense(24, WIDTH, bias=False), Normalize()],
        lambda: [Pooling(WIDTH, "mean"), dense(WIDTH, 8, nn.GELU()), dense(8, 40, nn.ReLU()), dense(40, 16)],
        lambda: [Pooling(WIDTH, ["mean", "max", "lasttoken"]), dense(3 * WIDTH, WIDTH, nn.Tanh())],
        lambda: [dense(WIDTH, 24, nn.Tanh(), module_input_name="token_embeddings"), Pooling(24, "mean")],
        lambda: [
            dense(WIDTH, WIDTH, nn.Tanh(), module_input_name="token_embeddings", use_residual=True),
            Pooling(WIDTH, ["max", "cls"]),
            dense(2 * WIDTH, WIDTH),
        ],
        lambda: [Pooling(WIDTH, "mean"), randomise(LayerNorm(WIDTH), 3)],
        lambda: [Pooling(WIDTH, "mean"), randomise(LayerNorm(WIDTH), 3), dense(WIDTH, 8), Normalize()],
        lambda: [Pooling(WIDTH, "mean"), Normalize(), dense(WIDTH, WIDTH)],
        lambda: [Pooling(WIDTH, "mean"), Normalize(), dense(WIDTH, WIDTH), Normalize()],
        lambda: [Pooling(WIDTH, "mean"), Normalize(), Normalize()],
        lambda: [Normalize("token_embeddings"), Pooling(WIDTH, "mean")],
        lambda: [Normalize("token_embeddings"), Pooling(WIDTH, "mean"), Normalize()],
        lambda: [Pooling(WIDTH, "mean"), Dropout(0.5), dense(WIDTH, WIDTH), Dropout(0.5)],
        lambda: [Pooling(WIDTH, "mean"), Normalize(), Dropout(0.5)],
    ],
    ids=[
        "EmbeddingGemma's",
        "three",
        "of several modes",
        "of tokens",
        "of tokens and of texts",
        "LayerNorm",
        "LayerNorm, Dense, Normalize",
        "Normalize, Dense",
        "Normalize on both sides of Dense",
        "Normalize twice",
        "Normalize of tokens",
        "Normalize of tokens and of texts",
        "Dropout",
        "Normalize, Dropout",
    ],
)
def test_chains(behind: Callable[[], list[Any]], tmp_path: Path, record_property: Record) -> None:
    """Modules in a row."""
    made = behind()
    chain(tmp_path, *made)
    widths = [size for module in made if (size := getattr(module, "out_features", None))] or [WIDTH]
    check(tmp_path, widths[-1], record_property)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_weighted_layers(start: int, tmp_path: Path, record_property: Record) -> None:
    """A mean of the layers, the embeddings' output among them; the encoder's config.json says that it gives them."""
    layers = WeightedLayerPooling(WIDTH, num_hidden_layers=2, layer_start=start)
    with torch.no_grad():
        layers.layer_weights.copy_(torch.tensor([0.4, 1.7, -0.6])[: 3 - start])
    chain(tmp_path, layers, Pooling(WIDTH, "mean"), output_hidden_states=True)
    check(tmp_path, WIDTH, record_property)
    plain = chain(tmp_path / "plain", Pooling(WIDTH, "mean"))
    different = cosines(load(tmp_path).encode(TEXTS), load(plain).encode(TEXTS)).min() < 0.99
    # Of the last layer alone the weight cancels.
    assert different == (start < 2)


def test_weighted_layers_of_an_encoder_that_gives_none(tmp_path: Path) -> None:
    """There the module does nothing, whatever its weights."""
    layers = WeightedLayerPooling(WIDTH, num_hidden_layers=2, layer_start=0)
    chain(tmp_path, layers, Pooling(WIDTH, "mean"))
    check(tmp_path, WIDTH)
    settings = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    write(tmp_path, {"sentence_bert_config.json": {**settings, "config_args": {"output_hidden_states": True}}})
    check(tmp_path, WIDTH)
    plain = chain(tmp_path / "plain", Pooling(WIDTH, "mean"))
    assert cosines(load(tmp_path).encode(TEXTS), load(plain).encode(TEXTS)).min() < 0.99


OLD_POOLING = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
TANH = "torch.nn.modules.activation.Tanh"


@pytest.mark.parametrize("version", [2, 5])
def test_dense_of_older_versions(version: int, tmp_path: Path, record_property: Record) -> None:
    """Other class paths, no `module_input_name`, no config.json of Normalize."""
    save_checkpoint(tiny_bert(), tmp_path)
    config = {"in_features": WIDTH, "out_features": 24, "bias": True, "activation_function": TANH}
    if version == 5:
        config |= {"module_input_name": "sentence_embedding", "module_output_name": None}
    made = {name: value.numpy() for name, value in dense(WIDTH, 24).state_dict().items()}
    write(
        tmp_path,
        {
            "modules.json": old_modules("Transformer", "Pooling", "Dense", "Normalize"),
            "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False},
            "1_Pooling/config.json": OLD_POOLING,
            "2_Dense/config.json": config,
        },
    )
    save_file(made, tmp_path / "2_Dense" / "model.safetensors")
    assert reload(tmp_path)[2].activation_function.__class__ is nn.Tanh
    check(tmp_path, 24, record_property)


def test_other_modules_of_older_versions(tmp_path: Path) -> None:
    """WeightedLayerPooling, Dropout and LayerNorm, with the keys that they had."""
    save_checkpoint(tiny_bert(output_hidden_states=True), tmp_path)
    write(
        tmp_path,
        {
            "modules.json": old_modules("Transformer", "WeightedLayerPooling", "Pooling", "Dropout", "LayerNorm"),
            "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False},
            "1_WeightedLayerPooling/config.json": {
                "word_embedding_dimension": WIDTH,
                "layer_start": 1,
                "num_hidden_layers": 2,
            },
            "2_Pooling/config.json": OLD_POOLING,
            "3_Dropout/config.json": {"dropout": 0.1},
            "4_LayerNorm/config.json": {"dimension": WIDTH},
        },
    )
    weights = np.array([0.3, 1.1], np.float32)
    save_file({"layer_weights": weights}, tmp_path / "1_WeightedLayerPooling" / "model.safetensors")
    made = randomise(LayerNorm(WIDTH), 1).state_dict()
    save_file({name: value.numpy() for name, value in made.items()}, tmp_path / "4_LayerNorm" / "model.safetensors")
    check(tmp_path, WIDTH)


def test_modules_in_folders_of_their_own(tmp_path: Path) -> None:
    """Version 1 put the transformer beside the others; the order is the list's."""
    save_checkpoint(tiny_bert(), tmp_path / "0_BERT")
    listed = old_modules("Transformer", "Pooling", "Normalize")
    listed[0] |= {"path": "0_BERT", "idx": 5}
    write(
        tmp_path,
        {
            "modules.json": listed,
            "0_BERT/sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": True},
            "1_Pooling/config.json": OLD_POOLING,
        },
    )
    check(tmp_path, WIDTH)


def test_an_activation_that_is_not_named(tmp_path: Path) -> None:
    """Tanh, there as here."""
    chain(tmp_path, Pooling(WIDTH, "mean"), dense(WIDTH, 8))
    write(tmp_path, {"2_Dense/config.json": {"in_features": WIDTH, "out_features": 8}})
    assert isinstance(reload(tmp_path)[2].activation_function, nn.Tanh)
    check(tmp_path, 8)


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "the encoder"])
def test_weights_in_bfloat16(whole: bool, tmp_path: Path) -> None:
    """Stored in bfloat16 and computed in float32, as sentence-transformers does when told to."""
    behind = [Pooling(WIDTH, "mean"), dense(WIDTH, 24, nn.Tanh()), randomise(LayerNorm(24), 0)]
    made = [tiny_transformer(tmp_path / "hf"), *behind]
    for module in made if whole else made[:1]:
        module.to(torch.bfloat16)
    # SentenceTransformer brings all modules to the dtype of the first.
    save(tmp_path, made)
    if not whole:
        save_file(
            {name: value.float().numpy() for name, value in dense(WIDTH, 24).state_dict().items()},
            tmp_path / "2_Dense" / "model.safetensors",
        )
    check(tmp_path, 24)


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two Dense modules and a Normalize."""
    folder = tmp_path_factory.mktemp("projected")
    return chain(folder, Pooling(WIDTH, "mean"), dense(WIDTH, 24, nn.Tanh()), dense(24, 20), Normalize())


def test_dimensions_are_cut_behind_dense(projected: Path) -> None:
    """The projection is whole; then comes the cut, then the norm."""
    ours, theirs = load(projected), reload(projected)
    got, want = ours.encode(TEXTS, dimensions=6), theirs.encode(TEXTS, truncate_dim=6, normalize_embeddings=True)
    assert got.shape == want.shape == (len(TEXTS), 6)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert ours.encode(TEXTS, dimensions=20).shape == (len(TEXTS), 20)


@pytest.mark.parametrize(("size", "expected"), [(6, 6), (20, 20), (64, 20)])
def test_truncate_dim(projected: Path, tmp_path: Path, size: int, expected: int) -> None:
    """The default size is of the last module's vectors; one beyond them cuts nothing."""
    save(tmp_path, list(reload(projected).children())[:-1], truncate_dim=size)
    ours, theirs = load(tmp_path), reload(tmp_path)
    assert json.loads((tmp_path / "config_sentence_transformers.json").read_text())["truncate_dim"] == size
    assert ours.encode("a").shape == theirs.encode("a").shape == (expected,)
    compare(ours, theirs)


def test_matrices_in_bfloat16_on_request(projected: Path) -> None:
    """`dtype` reaches the modules behind the encoder."""
    ours, exact = load(projected, dtype="bfloat16"), load(projected)
    assert str(ours.params["2_Dense.linear.kernel"].dtype) == "bfloat16"
    assert str(ours.params["2_Dense.linear.bias"].dtype) == "float32"
    got, want = ours.encode(TEXTS), exact.encode(TEXTS)
    least = cosines(got, want).min()
    assert 0.99 < least < MIN_COSINE


def test_apply_goes_through_the_chain(projected: Path) -> None:
    """The pure function gives what `encode` gives."""
    ours = load(projected)
    ids, mask = jnp.array([[2, 5, 6, 3, 0]]), jnp.array([[1, 1, 1, 1, 0]])
    got = np.asarray(ours.apply(ours.params, ids, mask))
    np.testing.assert_allclose(got, ours.encode([[2, 5, 6, 3]]), rtol=0, atol=1e-6)


def whitespace() -> WhitespaceTokenizer:
    """A tokenizer of words."""
    return WhitespaceTokenizer(vocab=["a", "b", "c"], stop_words=[])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda first: [first, CNN(WIDTH, 8), Pooling(24, "mean")], "the module 'CNN' .* is not supported"),
        (lambda first: [first, LSTM(WIDTH, 8), Pooling(16, "mean")], "the module 'LSTM' .* is not supported"),
        (
            lambda first: [first, WordWeights(vocab=["a"], word_weights={"a": 2.0}), Pooling(WIDTH, "mean")],
            "the module 'WordWeights' .* is not supported; supported: Dense, Dropout",
        ),
        (lambda first: [BoW(vocab=["a", "b"])], "begins with BoW; supported: MLMTransformer, "),
        (
            lambda first: [WordEmbeddings(whitespace(), np.zeros((3, 4), np.float32)), Pooling(4, "mean")],
            "begins with WordEmbeddings; supported",
        ),
    ],
    ids=["CNN", "LSTM", "WordWeights", "BoW", "WordEmbeddings"],
)
def test_modules_that_are_refused(made: Callable[[Any], list[Any]], message: str, tmp_path: Path) -> None:
    """By name, with what is supported."""
    save(tmp_path, made(tiny_transformer(tmp_path / "hf")))
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("sentence_transformers.models.CLIPModel", "", "begins with CLIPModel; supported: MLMTransformer"),
        ("modeling_some.Transformer", "", r"begins with modeling_some\.Transformer; supported: MLMTransformer"),
        ("modeling_some.Pooling", "1_Pooling", r"the module 'modeling_some\.Pooling' .* is not supported"),
    ],
)
def test_classes_of_others_are_refused(kind: str, path: str, message: str, projected: Path, tmp_path: Path) -> None:
    """A class of the same name may compute something else."""
    copied(projected, tmp_path)
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed[bool(path)]["type"] = kind
    write(tmp_path, {"modules.json": listed})
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path)


def copied(source: Path, folder: Path) -> Path:
    """A copy of a folder, to be broken."""
    files = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    return write(folder, files)


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        (lambda: [Pooling(WIDTH, "mean"), dense(8, 4)], "Dense takes 8 features, but gets 16"),
        (lambda: [Pooling(WIDTH, ["mean", "cls"]), dense(16, 4)], "Dense takes 16 features, but gets 32"),
        (lambda: [Pooling(WIDTH, "mean"), dense(16, 4), dense(16, 4)], "Dense takes 16 features, but gets 4"),
        (lambda: [Pooling(WIDTH, "mean"), LayerNorm(8)], "LayerNorm takes 8 features, but gets 16"),
        (
            lambda: [WeightedLayerPooling(WIDTH, num_hidden_layers=3, layer_start=1), Pooling(WIDTH, "mean")],
            "WeightedLayerPooling is of 3 layers, but the model has 2",
        ),
        (
            lambda: [WeightedLayerPooling(WIDTH, num_hidden_layers=2, layer_start=-1), Pooling(WIDTH, "mean")],
            "layer_start is -1; allowed: 0 to 2",
        ),
        (
            lambda: [
                dense(WIDTH, WIDTH, module_input_name="token_embeddings"),
                WeightedLayerPooling(WIDTH, num_hidden_layers=2, layer_start=1),
                Pooling(WIDTH, "mean"),
            ],
            "the module 'WeightedLayerPooling' .* must be the first one",
        ),
        (
            lambda: [
                Pooling(WIDTH, "mean"),
                dense(WIDTH, 4, module_output_name="token_embeddings"),
            ],
            "reads 'sentence_embedding' and writes 'token_embeddings'",
        ),
        (lambda: [Pooling(WIDTH, "mean"), Normalize("scores")], "Normalize of 'scores'"),
        (lambda: [dense(WIDTH, 4), Pooling(WIDTH, "mean")], "'Dense' .* cannot stand before Pooling"),
        (
            lambda: [Pooling(WIDTH, "mean"), dense(WIDTH, 4, module_input_name="token_embeddings")],
            "'Dense' .* cannot stand behind Pooling",
        ),
        (lambda: [Pooling(WIDTH, "mean"), dense(WIDTH, 4, nn.Softplus())], "the activation is 'torch.*Softplus'"),
    ],
)
def test_what_does_not_fit_is_refused(behind: Callable[[], list[Any]], message: str, tmp_path: Path) -> None:
    """Sizes, places and options; the message says what was given."""
    chain(tmp_path, *behind(), output_hidden_states=True)
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "error", "message"),
    [
        (
            "2_Dense",
            {"activation_function": "somebody.Tanh"},
            UnsupportedModelError,
            "the activation is 'somebody.Tanh'",
        ),
        ("2_Dense", {"activation_function": "torchy.nn.Tanh"}, UnsupportedModelError, "supported: torch's GELU, Id"),
        ("2_Dense", {"activation_function": None}, UnsupportedModelError, "the activation is None"),
        ("2_Dense", {"in_features": "many"}, CorruptCheckpointError, "2_Dense/config.json is malformed: .*many"),
        ("2_Dense", {"out_features": None}, CorruptCheckpointError, "2_Dense/config.json is malformed"),
        ("2_Dense", {"bias": False}, WeightsError, r"unexpected \(1\):\s+linear.bias"),
        ("2_Dense", {"use_residual": True}, WeightsError, r"missing \(1\):\s+residual.weight"),
        ("2_Dense", {"out_features": 25}, UnsupportedModelError, "Dense takes 24 features, but gets 25"),
        ("3_Dense", {"out_features": 21}, WeightsError, r"misshapen \(2\):\s+linear.bias has the shape \(20,\)"),
        ("1_Pooling", {"pooling_mode": []}, UnsupportedModelError, r"pooling_mode is \[\]"),
        ("1_Pooling", {"pooling_mode_attention": True}, UnsupportedModelError, "pooling by pooling_mode_attention"),
        ("1_Pooling", {"pooling_mode": 7}, CorruptCheckpointError, "1_Pooling/config.json is malformed"),
    ],
)
def test_changed_settings_are_refused(
    file: str, changes: dict[str, Any], error: type[Exception], message: str, projected: Path, tmp_path: Path
) -> None:
    """Nothing is guessed, and a leftover weight is an error."""
    copied(projected, tmp_path)
    name = f"{file}/config.json"
    write(tmp_path, {name: json.loads((tmp_path / name).read_text()) | changes})
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_pooling_modes_that_are_not_known_but_off(projected: Path, tmp_path: Path) -> None:
    """A boolean that says no changes nothing."""
    copied(projected, tmp_path)
    name = "1_Pooling/config.json"
    write(tmp_path, {name: json.loads((tmp_path / name).read_text()) | {"pooling_mode_attention": False}})
    np.testing.assert_array_equal(load(tmp_path).encode(TEXTS), load(projected).encode(TEXTS))


def test_a_module_with_a_pickle_alone(projected: Path, tmp_path: Path) -> None:
    """Refused with the way out, which works."""
    copied(projected, tmp_path)
    file = tmp_path / "2_Dense" / "model.safetensors"
    torch.save(
        {name: torch.tensor(array) for name, array in load_file(file).items()}, file.with_name("pytorch_model.bin")
    )
    file.unlink()
    with pytest.raises(
        PickledCheckpointError, match=r"2_Dense holds its weights only as pytorch_model\.bin"
    ) as refused:
        load(tmp_path)
    code = re.search(r"safetensors\.torch\.save_file\(.*\)$", str(refused.value))
    assert code is not None
    import safetensors.torch

    exec(code[0], {"safetensors": safetensors, "torch": torch, "folder": str(file.parent)})
    np.testing.assert_array_equal(load(tmp_path).encode(TEXTS), load(projected).encode(TEXTS))


def test_a_module_without_weights(projected: Path, tmp_path: Path) -> None:
    """The message names its folder."""
    copied(projected, tmp_path)
    (tmp_path / "3_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match="3_Dense holds no weights"):
        load(tmp_path)


@pytest.mark.parametrize("path", ["../x", "1_Pooling/../../x", "/tmp", "..\\x/../.."])
def test_a_module_outside_of_the_folder(path: str, projected: Path, tmp_path: Path) -> None:
    """modules.json comes from somebody else, and reads nothing that is not its own."""
    copied(projected, tmp_path / "model")
    copied(projected / "1_Pooling", tmp_path / "x")
    listed = json.loads((tmp_path / "model" / "modules.json").read_text())
    listed[1]["path"] = path
    write(tmp_path / "model", {"modules.json": listed})
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        load(tmp_path / "model")
