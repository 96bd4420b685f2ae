"""Norms are told apart by what they compute, whichever of a class is looked at first."""

import torch
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from slimlmm import norms


def test_the_kinds_of_norm(monkeypatch):
    monkeypatch.setattr(norms, "_KINDS", {})
    with torch.device("meta"):
        modules = (LlamaRMSNorm(8), GemmaRMSNorm(8), torch.nn.LayerNorm(8))
    assert [norms.kind_of(module) for module in modules] == ["rms", "rms1", "layer"]


def test_a_norm_with_a_weight_per_head_says_nothing_of_its_class(monkeypatch):
    """Cohere norms queries, one row of weights a head, and the stream with one class: the first one seen decided for both."""
    monkeypatch.setattr(norms, "_KINDS", {})
    assert norms.kind_of(CohereLayerNorm((3, 8))) is None
    assert norms.kind_of(CohereLayerNorm(8)) == "layer"
