"""The registry: Hugging Face's model_type -> Architecture. One line each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxembed.architecture import Architecture
from jaxembed.errors import UnsupportedModelError
from jaxembed.models import (
    albert,
    bert,
    deberta_v2,
    distilbert,
    electra,
    ernie,
    eurobert,
    gemma3_text,
    gte,
    jina_bert_v2,
    jina_embeddings_v3,
    llama,
    mistral,
    modernbert,
    mpnet,
    nomic_bert,
    qwen2,
    qwen3,
    roberta,
    sparse_static_embedding,
    static_embedding,
    t5,
)

__all__ = ["REGISTRY", "REMOTE", "architecture"]

REGISTRY: Mapping[str, Architecture] = MappingProxyType(
    {
        "albert": albert.ARCHITECTURE,
        "bert": bert.ARCHITECTURE,
        "camembert": roberta.ARCHITECTURE,
        "deberta-v2": deberta_v2.ARCHITECTURE,
        "distilbert": distilbert.ARCHITECTURE,
        "electra": electra.ARCHITECTURE,
        "ernie": ernie.ARCHITECTURE,
        "eurobert": eurobert.ARCHITECTURE,
        "gemma3_text": gemma3_text.ARCHITECTURE,
        "gte": gte.ARCHITECTURE,
        "jina_embeddings_v3": jina_embeddings_v3.ARCHITECTURE,
        "llama": llama.ARCHITECTURE,
        "mistral": mistral.ARCHITECTURE,
        "modernbert": modernbert.ARCHITECTURE,
        "mpnet": mpnet.ARCHITECTURE,
        "mt5": t5.ARCHITECTURE,
        "new": gte.ARCHITECTURE,
        "nomic_bert": nomic_bert.ARCHITECTURE,
        "qwen2": qwen2.ARCHITECTURE,
        "qwen3": qwen3.ARCHITECTURE,
        "roberta": roberta.ARCHITECTURE,
        "sparse_static_embedding": sparse_static_embedding.ARCHITECTURE,
        "static_embedding": static_embedding.ARCHITECTURE,
        "t5": t5.ARCHITECTURE,
        "xlm-roberta": roberta.ARCHITECTURE,
    }
)

REMOTE: Mapping[str, Architecture] = MappingProxyType(
    {
        "EuroBertModel": eurobert.ARCHITECTURE,
        "GteModel": gte.ARCHITECTURE,
        "JinaBertModel": jina_bert_v2.ARCHITECTURE,
        "NewModel": gte.ARCHITECTURE,
        "NomicBertModel": nomic_bert.ARCHITECTURE,
        "Qwen2Model": qwen2.ORIGINAL,
        "XLMRobertaLoRA": jina_embeddings_v3.ORIGINAL,
    }
)
"""Class that a config.json's `auto_map` names as AutoModel -> the architecture that replaces that remote code."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json: by the remote class it names in `auto_map`, else by its `model_type`.

    Raises:
        UnsupportedModelError: not in the registry. A remote class that is not known is refused even where the
            model_type is known: what it computes may be anything.
    """
    remote = remote_class(config)
    if remote is not None:
        if remote not in REMOTE:
            raise UnsupportedModelError(
                f"config.json asks for the remote code {remote!r}, which is never run here; replaced are: "
                f"{', '.join(sorted(REMOTE)) or 'none'}"
            )
        return REMOTE[remote]
    model_type = config.get("model_type")
    found = REGISTRY.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise UnsupportedModelError(
            f"config.json says model_type {model_type!r}; supported: {', '.join(sorted(REGISTRY))}"
        )
    return found


def remote_class(config: Mapping[str, Any]) -> str | None:
    """The class that `auto_map` names for AutoModel, without repository and file; None where there is none."""
    named = (config.get("auto_map") or {}).get("AutoModel")
    return str(named).rsplit(".", 1)[-1] if named else None
