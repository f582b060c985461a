"""Loading: every weight found exactly once, in every form that savers write, or one error that lists it all."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from parity import randomise, save_checkpoint, tiny_bert
from safetensors.numpy import load_file, save_file
from transformers import BertForMaskedLM, BertModel

from jaxembed.blocks import BERT_WEIGHTS
from jaxembed.checkpoint import Checkpoint
from jaxembed.errors import CorruptCheckpointError, UnsupportedModelError, WeightsError
from jaxembed.loading import load
from jaxembed.memory import ALIGNED
from jaxembed.model import Model
from jaxembed.models import REGISTRY, bert
from jaxembed.sharding import MODEL, make_mesh
from jaxembed.tensors import Tensors
from jaxembed.weights import Structure, checkpoint_name, collect

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def hf_model() -> BertModel:
    """What the checkpoints of this file hold."""
    return tiny_bert(seed=5)


@pytest.fixture
def folder(hf_model: BertModel, tmp_path: Path) -> Path:
    """A fresh checkpoint, to be broken."""
    return save_checkpoint(hf_model, tmp_path / "checkpoint")


def rewrite(folder: Path, edit: Callable[[Arrays], Any]) -> None:
    """Change the weights of a checkpoint on disk."""
    arrays = {name: array.copy() for name, array in load_file(folder / "model.safetensors").items()}
    edit(arrays)
    save_file(arrays, folder / "model.safetensors")


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device."""
    return make_mesh(jax.devices()[:1])


def in_their_names(model: Model) -> Arrays:
    """A model's weights as the checkpoint has them: under Hugging Face's names; matrices stand as torch's do."""
    return {
        checkpoint_name(model.architecture, BERT_WEIGHTS, path).name: np.asarray(leaf)
        for path, leaf in model.params.items()
    }


def assert_holds(model: Model, hf_model: Any, dtype: Any = np.float32) -> None:
    """The model's weights are torch's, rounded to `dtype` at most."""
    expected = {name: array.detach().numpy() for name, array in hf_model.named_parameters() if "pooler" not in name}
    got = in_their_names(model)
    assert set(got) == set(expected)
    for name, array in got.items():
        np.testing.assert_array_equal(array, expected[name].astype(dtype).astype(np.float32), err_msg=name)


def test_every_weight_is_the_one_on_disk(folder: Path, hf_model: BertModel) -> None:
    """Name by name and bit by bit."""
    model = load(folder, mesh=one_device())
    assert_holds(model, hf_model)
    assert (model.dimension, model.max_length, model.dtype) == (16, 32, "float32")
    assert model.params.keys() == set(model.paths)
    assert model.checkpoint == Checkpoint.open(folder)


def test_save_and_load_again(folder: Path, tmp_path: Path) -> None:
    """A model's weights, written under the checkpoint's names, load to the same model."""
    model = load(folder, mesh=one_device())
    again = save_checkpoint(tiny_bert(seed=6), tmp_path / "again")
    arrays = {name: np.ascontiguousarray(array) for name, array in in_their_names(model).items()}
    save_file(arrays, again / "model.safetensors")
    for path, leaf in load(again, mesh=one_device()).params.items():
        np.testing.assert_array_equal(leaf, model.params[path], err_msg=path)


def test_one_error_lists_everything(folder: Path) -> None:
    """Missing, left over, misshapen and not finite, each by name; nothing else is on the list."""

    def spoil(arrays: Arrays) -> None:
        del arrays["encoder.layer.1.attention.self.key.bias"]
        del arrays["embeddings.LayerNorm.weight"]
        arrays["encoder.layer.2.output.dense.bias"] = np.zeros(16, np.float32)
        arrays["embeddings.extra.weight"] = np.zeros(3, np.float32)
        arrays["encoder.layer.0.intermediate.dense.weight"] = np.zeros((16, 40), np.float32)
        arrays["encoder.layer.0.output.dense.bias"][7] = np.nan
        arrays["embeddings.word_embeddings.weight"][63, 15] = -np.inf

    rewrite(folder, spoil)
    with pytest.raises(WeightsError) as caught:
        load(folder, mesh=one_device())
    assert str(folder) in str(caught.value)
    assert {title: sorted(entries) for title, entries in caught.value.problems.items()} == {
        "missing": [
            "embeddings.LayerNorm.weight (for embeddings.norm.scale)",
            "encoder.layer.1.attention.self.key.bias (for layers.1.key.bias)",
        ],
        "unexpected": ["embeddings.extra.weight", "encoder.layer.2.output.dense.bias"],
        "misshapen": [
            "encoder.layer.0.intermediate.dense.weight has the shape (16, 40); "
            "as layers.0.up.kernel it must give (40, 16)"
        ],
        "not finite": [
            "embeddings.word_embeddings.weight holds NaN or Inf",
            "encoder.layer.0.output.dense.bias holds NaN or Inf",
        ],
    }


def test_integers_are_no_weights(folder: Path) -> None:
    """A quantised matrix has the right name and shape, and without its scale the wrong values."""

    def quantise(arrays: Arrays) -> None:
        name = "encoder.layer.0.output.dense.weight"
        arrays[name] = (arrays[name] * 40).astype(np.int8)

    rewrite(folder, quantise)
    with pytest.raises(WeightsError, match=r"encoder.layer.0.output.dense.weight .*int8"):
        load(folder, mesh=one_device())


def test_two_names_for_one_weight(folder: Path) -> None:
    """The old name and the new one side by side: which is right cannot be known."""

    def add(arrays: Arrays) -> None:
        arrays["embeddings.LayerNorm.gamma"] = arrays["embeddings.LayerNorm.weight"] + 1

    rewrite(folder, add)
    with pytest.raises(WeightsError, match=r"embeddings.LayerNorm.gamma"):
        load(folder, mesh=one_device())


def test_what_an_encoder_has_no_use_for(folder: Path, hf_model: BertModel) -> None:
    """Position ids, the pooler, and the heads of pre-training are rightly left over."""

    def add(arrays: Arrays) -> None:
        assert "pooler.dense.weight" in arrays
        arrays["embeddings.position_ids"] = np.arange(32)[None]
        arrays["cls.predictions.bias"] = np.zeros(64, np.float32)
        arrays["cls.seq_relationship.weight"] = np.zeros((2, 16), np.float32)

    rewrite(folder, add)
    assert_holds(load(folder, mesh=one_device()), hf_model)


def test_ignored_patterns_take_whole_names(folder: Path) -> None:
    """A key that merely contains one is left over all the same."""
    rewrite(folder, lambda arrays: arrays.update({"encoder.pooler.weight": np.zeros(2, np.float32)}))
    with pytest.raises(WeightsError) as caught:
        load(folder, mesh=one_device())
    assert caught.value.problems == {"unexpected": ("encoder.pooler.weight",)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_checkpoints_of_every_float(hf_model: BertModel, tmp_path: Path, dtype: torch.dtype) -> None:
    """Half-precision files load into float32 exactly as they were rounded."""
    rounded = tiny_bert(seed=5).to(dtype)
    model = load(save_checkpoint(rounded, tmp_path), mesh=one_device())
    assert all(leaf.dtype == np.float32 for leaf in model.leaves)
    numpy = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float64: np.float64}
    assert_holds(model, hf_model, numpy[dtype])


def test_bfloat16_matrices(folder: Path, hf_model: BertModel) -> None:
    """Matrices and tables are rounded to nearest; norms and biases stay float32."""
    model = load(folder, dtype="bfloat16", mesh=one_device())
    whole = load(folder, mesh=one_device())
    for path, leaf in model.params.items():
        matrix = leaf.ndim == 2
        assert leaf.dtype == (ml_dtypes.bfloat16 if matrix else np.float32), path
        np.testing.assert_array_equal(leaf, np.asarray(whole.params[path]).astype(leaf.dtype))


def test_an_encoder_inside_a_larger_model(hf_model: BertModel, tmp_path: Path) -> None:
    """Saved as BertForMaskedLM, every name begins with "bert."; the head is left over where none is asked for."""
    larger = randomise(BertForMaskedLM(hf_model.config), seed=1)
    larger.bert.load_state_dict(hf_model.state_dict(), strict=False)
    folder = save_checkpoint(larger, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert all(name.startswith(("bert.", "cls.")) for name in load_file(folder / "model.safetensors"))
    assert_holds(load(folder, mesh=one_device()), hf_model)


def test_tensorflow_s_names_for_norms(folder: Path, hf_model: BertModel) -> None:
    """`LayerNorm.gamma` and `.beta`."""

    def rename(arrays: Arrays) -> None:
        for name in [name for name in arrays if "LayerNorm" in name]:
            arrays[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = (
                arrays.pop(name)
            )

    rewrite(folder, rename)
    assert "embeddings.LayerNorm.gamma" in load_file(folder / "model.safetensors")
    assert_holds(load(folder, mesh=one_device()), hf_model)


def test_missing_names_are_given_as_they_stand_in_the_file(folder: Path) -> None:
    """With the prefix that the others have, so that they can be searched for."""

    def change(arrays: Arrays) -> None:
        for name in list(arrays):
            arrays[f"bert.{name}"] = arrays.pop(name)
        del arrays["bert.embeddings.LayerNorm.bias"]

    rewrite(folder, change)
    with pytest.raises(WeightsError) as caught:
        load(folder, mesh=one_device())
    assert caught.value.problems == {"missing": ("bert.embeddings.LayerNorm.bias (for embeddings.norm.bias)",)}


def test_a_sharded_checkpoint(hf_model: BertModel, tmp_path: Path) -> None:
    """As transformers splits a large model."""
    hf_model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_holds(load(tmp_path, mesh=one_device()), hf_model)
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(CorruptCheckpointError, match="model-00002-of-"):
        load(tmp_path, mesh=one_device())


def test_a_model_of_many_layers(tmp_path: Path) -> None:
    """Layer 10 is neither layer 1 nor layer 0."""
    deep = tiny_bert(seed=2, num_hidden_layers=12)
    assert_holds(load(save_checkpoint(deep, tmp_path), mesh=one_device()), deep)


@pytest.mark.parametrize("dtype", ["float16", "int8", "fp32", "", None])
def test_an_impossible_dtype(folder: Path, dtype: Any) -> None:
    """The message lists what is allowed."""
    with pytest.raises(ValueError, match="allowed: float32, bfloat16"):
        unchecked(load)(folder, dtype=dtype, mesh=one_device())


def unchecked(function: Any) -> Any:
    """A function without the run-time type checks of the tests, as users call it."""
    return getattr(function, "__wrapped__", function)


@pytest.mark.parametrize("max_length", [0, -1, 33, 10**9])
def test_an_impossible_length(folder: Path, max_length: int) -> None:
    """More tokens than there are positions, or none."""
    with pytest.raises(ValueError, match=f"max_length is {max_length}; allowed: 1 to 32"):
        load(folder, max_length=max_length, mesh=one_device())


def test_which_length_counts(folder: Path) -> None:
    """The checkpoint's own, capped by the positions; an explicit one may exceed the former, not the latter."""
    sentence = folder / "sentence_bert_config.json"
    sentence.write_text(json.dumps({"max_seq_length": 20}))
    assert load(folder, mesh=one_device()).max_length == 20
    assert load(folder, mesh=one_device(), max_length=30).max_length == 30
    assert load(folder, mesh=one_device(), max_length=1).max_length == 1
    sentence.write_text(json.dumps({"max_seq_length": 100}))
    assert load(folder, mesh=one_device()).max_length == 32


@pytest.mark.parametrize("model_type", ["clip", None, 3, ["bert"]])
def test_an_unknown_model_type(folder: Path, model_type: Any) -> None:
    """Named, with the list of those there are."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match=r"model_type .*; supported: .*bert, "):
        load(folder, mesh=one_device())


def test_a_gap_in_the_table(folder: Path) -> None:
    """Who adds an architecture learns which parameter has no line."""
    weights = {path: weight for path, weight in BERT_WEIGHTS.items() if path != "layers.{n}.down.bias"}
    arch = dataclasses.replace(bert.ARCHITECTURE, weights=weights)
    config = arch.config(json.loads((folder / "config.json").read_text()))
    structure = Structure(lambda: arch.build(config, "float32"))
    with pytest.raises(UnsupportedModelError, match=r"models/bert: WEIGHTS has no line for 'layers.\{n\}.down.bias'"):
        collect(arch, structure, Tensors(folder))


@pytest.mark.parametrize("name", REGISTRY)
def test_every_entry_of_the_registry_says_its_own_name(name: str) -> None:
    """The architecture is also there under its own `model_type`, which several names may share."""
    assert REGISTRY[REGISTRY[name].model_type] is REGISTRY[name]


def test_weights_over_a_mesh(folder: Path, hf_model: BertModel) -> None:
    """Each device holds its part of heads and feed-forward, a copy of the rest, and together they are the whole."""
    model = load(folder, mesh=make_mesh(model_parallel=2))
    assert_holds(model, hf_model)
    kernel = model.params["layers.0.up.kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(MODEL, None)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(20, 16)}
    assert model.params["embeddings.word.table"].sharding.is_fully_replicated


def test_a_file_that_changes_does_not_change_the_model(folder: Path, hf_model: BertModel) -> None:
    """Weights are read from a mapped file; once loaded, they are the device's own."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    # JAX may take an aligned array over without a copy: here the data begins at a multiple of 64 bytes.
    padded = header + -header % 64
    with file.open("wb") as stream:
        stream.write((padded - 8).to_bytes(8, "little") + content[8:header].ljust(padded - 8) + content[header:])
    model = load(folder, mesh=one_device())
    with file.open("r+b") as stream:
        stream.seek(padded)
        stream.write(bytes(len(content) - header))
    assert_holds(model, hf_model)


def test_weights_on_a_cpu_lie_one_behind_another(folder: Path, hf_model: BertModel) -> None:
    """JAX takes them over where they are: a copy of its own would lie elsewhere."""
    model = load(folder, mesh=one_device())
    begins = sorted((leaf.unsafe_buffer_pointer(), leaf.nbytes) for leaf in model.leaves)
    assert all(0 <= after - begin - size < ALIGNED for (begin, size), (after, _) in itertools.pairwise(begins))
    assert_holds(model, hf_model)
