"""Heads on encoders against their originals: classification and masked language modelling, for every architecture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from headed import KINDS, original
from parity import TINY, TOLERANCE, randomise, save_checkpoint, tiny_bert
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedModel

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION
from jaxembed.errors import UnsupportedModelError, WeightsError
from jaxembed.heads import count_labels
from jaxembed.loading import load
from jaxembed.model import Model
from jaxembed.sharding import make_mesh
from jaxembed.tokens import Tokens
from jaxembed.types import Output


def logits(model: Model, tokens: Tokens) -> np.ndarray:
    """What the head gives."""
    encoder = model.encoder(model.leaves)
    hidden = encoder.hidden_states(tokens)[-1]
    return np.asarray(encoder.head(hidden, tokens.mask if model.head == SEQUENCE_CLASSIFICATION else encoder))


def difference(folder: Path, theirs: PreTrainedModel) -> float:
    """How far a folder's head is from the original, in rows of all lengths and, where there are, of two types."""
    ours = load(folder, mesh=make_mesh(jax.devices()[:1]))
    lengths = np.array([ours.max_length, 1, 2, 9, 0], np.int32)
    random = np.random.default_rng(0)
    ids = random.integers(5, 62, (len(lengths), ours.max_length), np.int32)
    mask = np.arange(ours.max_length)[None, :] < lengths[:, None]
    typed = getattr(theirs.config, "type_vocab_size", 0) > 1
    types = random.integers(0, 2 if typed else 1, ids.shape, np.int32)
    got = logits(ours, Tokens.plain(jax.numpy.array(ids), jax.numpy.array(mask))._replace(token_types=types))
    assert np.isfinite(got).all()
    real = lengths > 0
    padded = np.where(mask, ids, getattr(theirs.config, "pad_token_id", None) or 0)[real]
    call = {"token_type_ids": torch.from_numpy(types[real].astype(np.int64))} if typed else {}
    with torch.no_grad():
        want = theirs(
            input_ids=torch.from_numpy(padded.astype(np.int64)),
            attention_mask=torch.from_numpy(mask[real].astype(np.int64)),
            **call,
        ).logits.numpy()
    assert got[real].shape == want.shape
    apart = np.abs(got[real] - want)
    return float((apart if apart.ndim == 2 else apart[mask[real]]).max())


CASES = [
    *((kind, task, {}) for kind in KINDS for task in ("SequenceClassification", "MaskedLM")),
    ("Albert", "MaskedLM", {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    ("Bert", "MaskedLM", {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    ("Bert", "MaskedLM", {"tie_word_embeddings": False}),
    ("Bert", "SequenceClassification", {"num_labels": 1}),
    ("Bert", "SequenceClassification", {"id2label": {0: "no", 1: "yes", 2: "perhaps"}}),
    ("DebertaV2", "SequenceClassification", {"pooler_hidden_act": "tanh", "num_labels": 3}),
    ("DebertaV2", "MaskedLM", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    ("DistilBert", "SequenceClassification", {"num_labels": 1, "activation": "relu"}),
    ("DistilBert", "MaskedLM", {"activation": "relu"}),
    ("Electra", "MaskedLM", {"hidden_act": "relu", "embedding_size": 16}),
    ("Electra", "SequenceClassification", {"hidden_act": "relu"}),
    ("ModernBert", "SequenceClassification", {"classifier_pooling": "mean", "num_labels": 1, "norm_bias": True}),
    ("ModernBert", "SequenceClassification", {"classifier_bias": True, "classifier_activation": "silu"}),
    ("ModernBert", "MaskedLM", {"decoder_bias": False, "classifier_bias": True, "norm_bias": True}),
    ("ModernBert", "MaskedLM", {"tie_word_embeddings": False, "classifier_activation": "relu", "norm_eps": 1e-3}),
    ("Roberta", "MaskedLM", {"hidden_act": "relu", "tie_word_embeddings": False}),
    ("XLMRoberta", "SequenceClassification", {"num_labels": 1, "hidden_act": "relu"}),
]


@pytest.mark.parametrize(("kind", "task", "overrides"), CASES, ids=str)
def test_parity(
    kind: str, task: str, overrides: dict[str, Any], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The logits agree with torch at every real token."""
    theirs = original(kind, task, **overrides)
    apart = difference(save_checkpoint(theirs, tmp_path), theirs)
    record_property("max abs diff", f"{apart:.1e}")
    assert apart <= TOLERANCE


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Change the arrays of a checkpoint."""
    file = folder / "model.safetensors"
    arrays = {name: array.clone() for name, array in change(load_file(file)).items()}
    save_file(arrays, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("values", ["equal", "other"])
def test_a_stored_decoder_is_used(values: str, tmp_path: Path) -> None:
    """As transformers does from version 5 on, also where config.json says that the word table serves."""
    theirs = original("Bert", "MaskedLM")
    table = theirs.bert.embeddings.word_embeddings.weight.detach()
    own = table if values == "equal" else table.flip(0)
    bias = theirs.cls.predictions.bias.detach() + 1
    extra = {"cls.predictions.decoder.weight": own, "cls.predictions.decoder.bias": bias}
    folder = rewrite(save_checkpoint(theirs, tmp_path), lambda arrays: {**arrays, **extra})
    reloaded = BertForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert (reloaded.cls.predictions.decoder.weight == own).all()
    assert (reloaded.cls.predictions.decoder.bias == bias).all()
    assert difference(folder, reloaded) <= TOLERANCE


def test_the_decoder_s_bias_under_its_other_name(tmp_path: Path) -> None:
    """Some savers keep the one name, some the other."""
    theirs = original("Bert", "MaskedLM")
    old, new = "cls.predictions.bias", "cls.predictions.decoder.bias"
    folder = rewrite(
        save_checkpoint(theirs, tmp_path),
        lambda arrays: {new if name == old else name: array for name, array in arrays.items()},
    )
    assert difference(folder, theirs) <= TOLERANCE


def test_a_head_for_sentence_pairs_beside_it(tmp_path: Path) -> None:
    """BERT was trained with two heads: the other one, and the pooler that it is on, are left out."""
    theirs = original("Bert", "PreTraining")
    folder = save_checkpoint(theirs, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    reloaded = BertForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert difference(folder, reloaded) <= TOLERANCE


def test_what_a_model_with_a_head_gives(tmp_path: Path) -> None:
    """Vectors too, where modules.json does not say otherwise."""
    always = {Output.DENSE, Output.TOKENS}
    given = load(save_checkpoint(original("Bert", "SequenceClassification"), tmp_path / "a"))
    assert (given.head, given.outputs) == (SEQUENCE_CLASSIFICATION, always | {Output.SCORES})
    given = load(save_checkpoint(original("Bert", "MaskedLM"), tmp_path / "b"))
    assert (given.head, given.outputs) == (FILL_MASK, always | {Output.SPARSE})


@pytest.mark.parametrize("named", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_a_head_in_name_only(named: str, tmp_path: Path) -> None:
    """config.json may name the class that training began with. Nothing of its head is there: it is an encoder."""
    model = tiny_bert()
    model.pooler = None
    folder = save_checkpoint(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [named]}))
    given = load(folder)
    assert (given.head, given.outputs) == (None, {Output.DENSE, Output.TOKENS})


def test_an_encoder_without_a_head_of_this_kind(tmp_path: Path) -> None:
    """An architecture that has none gives what it can."""
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=40, num_layers=1, num_heads=2)
    folder = save_checkpoint(randomise(transformers.T5EncoderModel(config), 0), tmp_path)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "architectures": ["T5ForSequenceClassification"]}))
    assert load(folder).outputs == {Output.DENSE, Output.TOKENS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: {k: v for k, v in arrays.items() if k != "classifier.bias"}, "classifier.bias"),
        (lambda arrays: {**arrays, "classifier.second.weight": torch.ones(2)}, "classifier.second.weight"),
        (
            lambda arrays: {**arrays, "classifier.weight": torch.ones(3, 16)},
            r"classifier.weight has the shape \(3, 16\)",
        ),
    ],
    ids=["missing", "left over", "misshapen"],
)
def test_a_head_must_fit_whole(change: Callable[..., Any], message: str, tmp_path: Path) -> None:
    """What an encoder alone leaves out is looked at where the head is loaded."""
    folder = rewrite(save_checkpoint(original("Bert", "SequenceClassification"), tmp_path), change)
    with pytest.raises(WeightsError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("ModernBert", {"classifier_pooling": "last"}, "classifier_pooling is 'last'; supported: cls, mean"),
        ("ModernBert", {"classifier_activation": "gelu_fast"}, "the activation is 'gelu_fast'"),
        ("DebertaV2", {"pooler_hidden_act": "mish"}, "the activation is 'mish'"),
    ],
)
def test_unsupported_heads(kind: str, option: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Named, with what is supported."""
    folder = save_checkpoint(original(kind, "SequenceClassification"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **option}))
    with pytest.raises(UnsupportedModelError, match=message):
        load(folder)


def test_counting_labels() -> None:
    """By their names; by number; 2 where nothing is said, as Hugging Face has it."""
    assert count_labels({"id2label": {"0": "LABEL_0"}}) == 1
    assert count_labels({"num_labels": 3}) == 3
    assert count_labels({}) == BertConfig().num_labels == 2
    assert BertForSequenceClassification(BertConfig(**TINY)).classifier.out_features == 2
