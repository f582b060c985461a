"""Jina Embeddings v3 against transformers' JinaEmbeddingsV3Model; its adapters against the same model, merged."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from parity import SIZES, TINY, TOLERANCE, cosines, randomise, save_checkpoint
from safetensors.numpy import load_file, save_file
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3ForMaskedLM, JinaEmbeddingsV3Model, PreTrainedModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.loading import load
from jaxembed.model import Model
from jaxembed.models import architecture
from jaxembed.models.jina_embeddings_v3 import ARCHITECTURE, ORIGINAL, Config
from jaxembed.tokens import Tokens
from jaxembed.types import NO_TASK

TASKS = ("retrieval.query", "retrieval.passage", "text-matching")
RANK, ALPHA = 3, 2

ORIGINAL_CONFIG = {
    **SIZES,
    "model_type": "xlm-roberta",
    "auto_map": {"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA"},
    "position_embedding_type": "rotary",
    "rotary_emb_base": 20_000.0,
    "type_vocab_size": 1,
    "load_trained_adapters": True,
    "lora_adaptations": list(TASKS),
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout_p": 0.0,
    "lora_main_params_trainable": False,
}

Arrays = dict[str, npt.NDArray[np.float32]]


def port(seed: int = 0, **overrides: Any) -> JinaEmbeddingsV3Model:
    """A random model of the port."""
    return randomise(JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**TINY | {"pad_token_id": 1} | overrides)), seed)


def adapters(base: Arrays, seed: int = 0) -> Arrays:
    """Random adapters of each matrix and table, pooler included, as the original's file has them."""
    random = np.random.default_rng(seed)
    found = {}
    for name, array in base.items():
        if array.ndim == 2:
            rows, columns = array.shape
            embedding = "embeddings." in name
            shapes = ((rows, RANK), (RANK, columns)) if embedding else ((RANK, columns), (rows, RANK))
            for letter, shape in zip("AB", shapes, strict=True):
                values = random.normal(0, 0.5, (len(TASKS), *shape)).astype(np.float32)
                found[f"{name.removesuffix('.weight')}.lora_{letter}"] = values
    return found


def save_original(model: PreTrainedModel, folder: Path, **config: Any) -> Path:
    """Write a model and random adapters under the names of the original's remote code."""
    base = load_file(save_checkpoint(model, folder) / "model.safetensors")
    more = adapters(base)
    arrays = {}
    for name, array in base.items():
        stem = name.removesuffix(".weight")
        adapted = f"{stem}.lora_A" in more
        arrays[f"roberta.{stem}.parametrizations.weight.original" if adapted else f"roberta.{name}"] = array
    for name, array in more.items():
        stem, letter = name.rsplit(".", 1)
        arrays[f"roberta.{stem}.parametrizations.weight.0.{letter}"] = array
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    given = {"hidden_act": model.config.hidden_act, "type_vocab_size": model.config.type_vocab_size}
    (folder / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, **given, **config}))
    return folder


def merged(model: PreTrainedModel, task: int, folder: Path) -> JinaEmbeddingsV3Model:
    """The port's model with one task's products added to its matrices, through the port's own loading."""
    file = save_checkpoint(model, folder) / "model.safetensors"
    base = load_file(file)
    more = adapters(base)
    for name in base:
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A" in more:
            a, b = more[f"{stem}.lora_A"][task], more[f"{stem}.lora_B"][task]
            base[name] = base[name] + ALPHA / RANK * (a @ b if "embeddings." in stem else b @ a)
    save_file(base, file, metadata={"format": "pt"})
    return JinaEmbeddingsV3Model.from_pretrained(folder, attn_implementation="eager").eval()


def states(model: Model, ids: Any, lengths: Any, tasks: Any) -> list[Any]:
    """Our hidden states of rows that ask for tasks."""

    @jax.jit
    def run(leaves: Any, ids: jax.Array, lengths: jax.Array, tasks: jax.Array) -> Any:
        mask = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
        return model.encoder(leaves).hidden_states(Tokens.plain(ids, mask)._replace(tasks=tasks))

    return [np.asarray(state) for state in run(model.leaves, ids, lengths, np.array(tasks, np.int32))]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"hidden_act": "relu", "num_attention_heads": 4, "type_vocab_size": 3},
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2, "intermediate_size": 7, "num_hidden_layers": 3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ],
    ids=lambda overrides: "-".join(overrides) or "plain",
)
@pytest.mark.parametrize("fused", [True, False], ids=["as saved", "own names"])
def test_parity(overrides: dict[str, Any], fused: bool, parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch, under both kinds of names that transformers writes."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        save_checkpoint(model, folder)
        model.save_pretrained(folder, save_original_format=fused)
        assert any("Wqkv" in name for name in load_file(folder / "model.safetensors")) is fused
        return folder

    parity(port(**overrides), save=save)


@pytest.mark.parametrize("overrides", [{}, {"hidden_act": "gelu_pytorch_tanh", "type_vocab_size": 2}])
def test_original_without_task_is_the_port(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """A row that asks for no task sees no adapter."""
    parity(port(**overrides), save=save_original)


def test_original_reads_its_own_name_of_theta(parity: Callable[..., None]) -> None:
    """`rotary_emb_base`, and 10000 where the file says nothing."""
    model = port(rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    parity(model, save=lambda model, folder: save_original(model, folder, rotary_emb_base=300))
    absent = {name: value for name, value in ORIGINAL_CONFIG.items() if name != "rotary_emb_base"}
    assert Config.from_original(absent) == Config.from_original({**ORIGINAL_CONFIG, "rotary_emb_base": 10_000})
    assert Config.from_original(ORIGINAL_CONFIG).rotary == Config.from_hf(SIZES).rotary


def test_tasks_mixed_in_a_batch(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Each row is what the model with its task merged gives; different tasks give different vectors."""
    model = port(type_vocab_size=2)
    ours = load(save_original(model, tmp_path / "ours"))
    assert ours.architecture is ORIGINAL and ORIGINAL.tasks(ours.checkpoint.config) == TASKS
    tasks = [0, NO_TASK, 2, 1, 1, 0, -7, 2]
    lengths = np.array([32, 32, 32, 32, 1, 17, 5, 0], np.int32)
    random = np.random.default_rng(0)
    ids = random.integers(0, 64, (len(tasks), 32), np.int32)
    ids[:4] = ids[0]
    got = states(ours, ids, lengths, tasks)
    assert all(np.isfinite(state).all() for state in got)
    references = {task: merged(model, task, tmp_path / str(task)) for task in range(len(TASKS))}
    worst = 0.0
    for row, (task, length) in enumerate(zip(tasks, lengths, strict=True)):
        if length:
            with torch.no_grad():
                wanted = references.get(task, model)(
                    torch.from_numpy(ids[row : row + 1, :length].astype(np.int64)), output_hidden_states=True
                )
            for layer, (mine, theirs) in enumerate(zip(got, wanted.hidden_states, strict=True)):
                difference = float(np.abs(mine[row, :length] - theirs[0].numpy()).max())
                assert difference <= TOLERANCE, f"row {row}, task {task}, state {layer}: {difference:.1e}"
                worst = max(worst, difference)
        alone = states(ours, ids[row : row + 1], lengths[row : row + 1], [task])
        assert np.abs(alone[-1][0, :length] - got[-1][row, :length]).max(initial=0) <= TOLERANCE
    record_property("reference", "JinaEmbeddingsV3Model with merged adapters")
    record_property("max abs diff", f"{worst:.1e}")
    vectors = got[-1][:4].mean(axis=1)
    for row in range(1, 4):
        assert cosines(vectors[:row], np.repeat(vectors[row : row + 1], row, axis=0)).max() < 0.99


def test_tasks_reach_the_second_text_of_a_pair(tmp_path: Path) -> None:
    """The table of token types has adapters too: with all else equal, a task changes a pair's second text."""
    model = port(type_vocab_size=2)
    ours = load(save_original(model, tmp_path / "ours"))
    ids = np.arange(8, dtype=np.int32)[None]
    types = (np.arange(8, dtype=np.int32) >= 5).astype(np.int32)[None]
    plain = Tokens.plain(jnp.asarray(ids), jnp.ones(ids.shape, bool))
    tokens = plain._replace(token_types=jnp.asarray(types), tasks=jnp.array([1], jnp.int32))
    got = jax.jit(lambda leaves, tokens: ours.encoder(leaves).hidden_states(tokens)[-1])(ours.leaves, tokens)
    reference = merged(model, 1, tmp_path / "merged")
    with torch.no_grad():
        wanted = reference(
            torch.from_numpy(ids.astype(np.int64)), token_type_ids=torch.from_numpy(types.astype(np.int64))
        )
    assert np.abs(np.asarray(got) - wanted.last_hidden_state.numpy()).max() <= TOLERANCE


def test_bfloat16(tmp_path: Path) -> None:
    """Adapters in bfloat16 lie near those in float32, and nearer to their own task than to another."""
    folder = save_original(port(), tmp_path)
    ids = np.tile(np.arange(32, dtype=np.int32), (4, 1))
    lengths, tasks = np.full(4, 32, np.int32), [NO_TASK, 0, 1, 2]
    exact, rounded = (
        states(load(folder, dtype=d), ids, lengths, tasks)[-1].mean(axis=1) for d in ("float32", "bfloat16")
    )
    assert cosines(exact, rounded).min() > 0.999 > cosines(exact, np.roll(rounded, 1, axis=0)).max()


def test_encoder_inside_a_language_model(tmp_path: Path) -> None:
    """A checkpoint with "roberta." before each name and a head beside it loads, and the head is left out."""
    config = JinaEmbeddingsV3Config(**TINY, pad_token_id=1)
    model = randomise(JinaEmbeddingsV3ForMaskedLM(config), 0)
    names = set(load_file(save_checkpoint(model, tmp_path) / "model.safetensors"))
    assert {"lm_head.bias", "roberta.emb_ln.weight"} <= names
    assert "word.table" in load(tmp_path).paths


def test_port_has_no_tasks() -> None:
    """The port's repository names tasks whose adapters are in other folders: none of them is offered."""
    config = {**ORIGINAL_CONFIG, "model_type": "jina_embeddings_v3", "auto_map": None}
    assert architecture(config) is ARCHITECTURE
    assert tuple(ARCHITECTURE.tasks(config)) == Config.from_hf(config).lora_adaptations == ()


def test_original_before_its_adapters_were_trained() -> None:
    """Without `load_trained_adapters` the file holds no adapters, whatever tasks it names."""
    for config in ({**ORIGINAL_CONFIG, "load_trained_adapters": False}, {**SIZES, "lora_adaptations": list(TASKS)}):
        assert ORIGINAL.tasks(config) == Config.from_original(config).lora_adaptations == ()


def test_original_has_the_published_defaults() -> None:
    """The adapters' order, rank and scaling of the published file."""
    names = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
    config = {**ORIGINAL_CONFIG, "lora_adaptations": list(names), "lora_rank": 4, "lora_alpha": 1}
    del config["max_position_embeddings"]
    read = Config.from_original(config)
    assert (read.lora_adaptations, read.lora_rank, read.lora_alpha) == (names, 4, 1)
    assert (read.max_length, read.hidden_act, read.layer_norm_eps) == (8194, "gelu", 1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'; supported: 'rotary'"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'"),
        ({"hidden_act": "gelu_fast"}, "activation is 'gelu_fast'"),
        ({"head_dim": 4}, "head_dim is 4; supported: 8"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
    ],
)
@pytest.mark.parametrize("read", [Config.from_hf, Config.from_original], ids=["port", "original"])
def test_what_is_not_jina_v3_is_refused(
    read: Callable[[Mapping[str, Any]], Config], overrides: dict[str, Any], message: str
) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        read({**ORIGINAL_CONFIG, **overrides})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rotary_emb_dim": 4}, "rotary_emb_dim is 4; supported: 8"),
        ({"rotary_emb_scale_base": 512}, "rotary_emb_scale_base is 512; supported: None"),
        ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved is True; supported: False"),
        ({"lora_adaptations": None}, "lora_adaptations is None; supported: a list of tasks"),
        ({"lora_adaptations": []}, "lora_adaptations is .."),
        ({"lora_rank": 0}, "lora_rank 0; supported: at least 1"),
    ],
)
def test_what_the_remote_code_alone_can_do_is_refused(overrides: dict[str, Any], message: str) -> None:
    """Options of the original that no published model sets."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_original({**ORIGINAL_CONFIG, **overrides})


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
)
@pytest.mark.parametrize("read", [Config.from_hf, Config.from_original], ids=["port", "original"])
def test_missing_field_is_named(read: Callable[[Mapping[str, Any]], Config], field: str) -> None:
    """Sizes have no defaults here: a file without one is refused by name."""
    with pytest.raises(UnsupportedModelError, match=field):
        read({name: value for name, value in ORIGINAL_CONFIG.items() if name != field})
