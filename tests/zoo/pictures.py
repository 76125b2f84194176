"""Models of pictures and sound, of transformers, small and with random weights."""

from __future__ import annotations

from typing import Any

import transformers as t

from zoo.case import BATCH, CLASSES, DTYPE, HEADS, INNER, LENGTH, ROUNDED, WIDTH, WORDS, Built, Entry, Loss, real, words

PATCHES = dict(
    hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=INNER, image_size=16,
    patch_size=8,
)  # fmt: skip


def classifier(model: type[Any], config: type[Any], side: int = 16, **settings: Any) -> Any:
    def build() -> Built:
        made = model(config(num_labels=CLASSES, **settings)).to(DTYPE)
        return Loss(made, "logits"), {"pixel_values": real(BATCH, 3, side, side), "labels": words(BATCH, high=CLASSES)}

    return build


def features(model: type[Any], config: type[Any], output: str, side: int = 16, **settings: Any) -> Any:
    def build() -> Built:
        return Loss(model(config(**settings)).to(DTYPE), output), {"pixel_values": real(BATCH, 3, side, side)}

    return build


def clip() -> Built:
    tower = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=INNER)
    config = t.CLIPConfig(
        text_config={**tower, "vocab_size": WORDS, "max_position_embeddings": LENGTH, "eos_token_id": 2},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    inputs = {"input_ids": words(low=3), "pixel_values": real(BATCH, 3, 16, 16)}
    return Loss(t.CLIPModel(config).to(DTYPE), "logits_per_image"), inputs


def whisper() -> Built:
    config = t.WhisperConfig(
        vocab_size=WORDS, num_mel_bins=8, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, max_source_positions=8,
        max_target_positions=16, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    target = words(BATCH, 6, low=3)
    inputs = {"input_features": real(BATCH, 8, 16), "decoder_input_ids": target, "labels": target.roll(-1, 1)}
    return Loss(t.WhisperForConditionalGeneration(config).to(DTYPE), "logits"), inputs


def wav2vec2() -> Built:
    config = t.Wav2Vec2Config(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=INNER,
        conv_dim=(16, 16), conv_stride=(4, 2), conv_kernel=(8, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.0, mask_feature_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    return Loss(t.Wav2Vec2ForCTC(config).to(DTYPE), "logits"), {"input_values": real(BATCH, 200)}


CONVNEXT = dict(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, drop_path_rate=0.3, patch_size=2)
RESNET = dict(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
SEGFORMER = dict(
    num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[3, 3], strides=[2, 2],
    num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=16,
)  # fmt: skip
SWIN = dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4)
MOBILENET = dict(depth_multiplier=0.35, min_depth=8)
EFFICIENT = dict(
    width_coefficient=1.0, depth_coefficient=1.0, in_channels=[32, 16], out_channels=[16, 24], kernel_sizes=[3, 5],
    strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 4], hidden_dim=1280, depthwise_padding=[],
)  # fmt: skip

PICTURES: dict[str, Entry] = {
    "vit": Entry(classifier(t.ViTForImageClassification, t.ViTConfig, **PATCHES)),
    "deit": Entry(classifier(t.DeiTForImageClassification, t.DeiTConfig, **PATCHES)),
    "beit": Entry(classifier(t.BeitForImageClassification, t.BeitConfig, **PATCHES)),
    "swin": Entry(classifier(t.SwinForImageClassification, t.SwinConfig, **SWIN)),
    "convnext": Entry(classifier(t.ConvNextForImageClassification, t.ConvNextConfig, **CONVNEXT)),
    "resnet": Entry(classifier(t.ResNetForImageClassification, t.ResNetConfig, **RESNET)),
    "mobilenet": Entry(classifier(t.MobileNetV2ForImageClassification, t.MobileNetV2Config, 32, **MOBILENET)),
    "efficientnet": Entry(classifier(t.EfficientNetForImageClassification, t.EfficientNetConfig, 16, **EFFICIENT)),
    "segformer": Entry(features(t.SegformerForSemanticSegmentation, t.SegformerConfig, "logits", **SEGFORMER)),
    "clip": Entry(clip),
    "whisper": Entry(whisper),
    "wav2vec2": Entry(wav2vec2, ROUNDED),
}
