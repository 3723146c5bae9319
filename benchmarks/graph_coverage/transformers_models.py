"""Hugging Face models from a configuration: at least 384 wide and 6 layers, language models 512 wide and 4 layers.

Each has the head that it is used with, so that the logits are the output that stays. (Of a model without a head the hidden
states are the output, and the whole residual stream stays with them.) What a row does not name is the configuration's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

_ENCODER = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
_CAUSAL = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1536,
    "use_cache": False,
}


def _pixels(size: int = 224) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, size, size)}


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 1000, (1, 32))}


def _audio() -> dict[str, Any]:
    return {"input_values": torch.randn(1, 16000)}


def _spectrogram() -> dict[str, Any]:
    return {"input_features": torch.randn(1, 80, 3000)}


MODELS: Mapping[str, tuple[str, str, Mapping[str, Any], Callable[[], dict[str, Any]]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _ENCODER, _pixels),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _ENCODER, _pixels),
    "swin": ("SwinForImageClassification", "SwinConfig", {}, _pixels),
    "beit": ("BeitForImageClassification", "BeitConfig", _ENCODER, _pixels),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {}, _pixels),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {}, _pixels),
    "mobilevit": ("MobileViTForImageClassification", "MobileViTConfig", {}, lambda: _pixels(256)),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {}, _pixels),
    "detr": ("DetrForObjectDetection", "DetrConfig", {"d_model": 384}, _pixels),
    "yolos": ("YolosForObjectDetection", "YolosConfig", {"image_size": [224, 224], **_ENCODER}, _pixels),
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER, _tokens),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 384, "n_layers": 6, "n_heads": 6, "hidden_dim": 1536},
        _tokens,
    ),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _ENCODER, _tokens),
    "t5-encoder": (
        "T5ForTokenClassification",
        "T5Config",
        {"d_model": 384, "d_kv": 64, "num_heads": 6, "d_ff": 1536, "num_layers": 6},
        _tokens,
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 512, "n_layer": 4, "n_head": 8, "use_cache": False}, _tokens),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _CAUSAL, _tokens),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _CAUSAL, _tokens),
    "mistral": ("MistralForCausalLM", "MistralConfig", _CAUSAL, _tokens),
    "whisper-encoder": (
        "WhisperForAudioClassification",
        "WhisperConfig",
        {"d_model": 384, "encoder_layers": 6, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536},
        _spectrogram,
    ),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _ENCODER, _audio),
    "wavlm": ("WavLMForSequenceClassification", "WavLMConfig", _ENCODER, _audio),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": _ENCODER}, _pixels),
}
"""Name to model class, configuration class, what is set, and what makes the inputs."""


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model and its keyword arguments."""
    import transformers

    model_class, config_class, options, inputs = MODELS[name]
    if name == "detr":
        backbone = {"backbone_config": transformers.ResNetConfig(out_features=["stage4"]), "backbone": None}
        options = {**options, **backbone, "use_timm_backbone": False, "use_pretrained_backbone": False}
    config = getattr(transformers, config_class)(**options)
    return getattr(transformers, model_class)(config), inputs()
