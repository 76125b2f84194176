"""Language models of transformers, small and with random weights."""

from __future__ import annotations

from typing import Any

import transformers as t
from torch import nn

from zoo import case
from zoo.case import BATCH, CLASSES, DTYPE, HEADS, INNER, LENGTH, ROUNDED, WIDTH, WORDS, Built, Entry, Loss, words

LLAMA = dict(
    vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=2,
    intermediate_size=INNER, max_position_embeddings=32, use_cache=False, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
BERT = dict(
    vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=INNER,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip


def decoder(model: type[Any], config: type[Any], **settings: Any) -> Any:
    """A causal language model against the next words."""

    def build() -> Built:
        made = model(config(**settings))
        made.config._experts_implementation = "batched_mm"  # the default's grouped product has no float64
        ids = words()
        return Loss(case.in_own_dtype(made).to(DTYPE), "logits"), {"input_ids": ids, "labels": ids.roll(-1, 1)}

    return build


def encoder(model: type[Any], config: type[Any], output: str = "logits", **settings: Any) -> Any:
    """A masked language model against all words, the last two of every text hidden by the attention mask."""

    def build() -> Built:
        made: nn.Module = case.in_own_dtype(model(config(**settings))).to(DTYPE)
        mask = words(BATCH, LENGTH, high=2, low=1)
        mask[1, -2:] = 0
        return Loss(made, output), {"input_ids": words(low=3), "attention_mask": mask, "labels": words()}

    return build


def translator(model: type[Any], config: type[Any], **settings: Any) -> Any:
    def build() -> Built:
        made = case.in_own_dtype(model(config(use_cache=False, **settings))).to(DTYPE)
        target = words(BATCH, LENGTH - 2, low=3)
        inputs = {"input_ids": words(low=3), "decoder_input_ids": target, "labels": target.roll(-1, 1)}
        return Loss(made, "logits"), inputs

    return build


def classifier(model: type[Any], config: type[Any], **settings: Any) -> Any:
    def build() -> Built:
        made = model(config(num_labels=CLASSES, **settings)).to(DTYPE)
        return Loss(made, "logits"), {"input_ids": words(low=3), "labels": words(BATCH, high=CLASSES)}

    return build


OPT = dict(
    vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, ffn_dim=INNER,
    max_position_embeddings=32, word_embed_proj_dim=WIDTH, use_cache=False,
)  # fmt: skip
GPT2 = dict(
    vocab_size=WORDS, n_embd=WIDTH, n_layer=1, n_head=HEADS, n_positions=32, use_cache=False, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
BLOOM = dict(vocab_size=WORDS, hidden_size=WIDTH, n_layer=1, n_head=HEADS, use_cache=False)
T5 = dict(
    vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=1, num_heads=HEADS, pad_token_id=0,
    decoder_start_token_id=0,
)  # fmt: skip
BART = dict(
    vocab_size=WORDS, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, max_position_embeddings=32,
)  # fmt: skip
DISTILBERT = dict(
    vocab_size=WORDS, dim=WIDTH, n_layers=1, n_heads=HEADS, hidden_dim=INNER, max_position_embeddings=32,
)  # fmt: skip
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
MAMBA = dict(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1, state_size=4, use_cache=False)
LONG = {**LLAMA, "num_hidden_layers": 2}
MOST = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}

TEXT: dict[str, Entry] = {
    "llama": Entry(decoder(t.LlamaForCausalLM, t.LlamaConfig, **LLAMA)),
    "mistral": Entry(decoder(t.MistralForCausalLM, t.MistralConfig, **LLAMA, sliding_window=4)),
    "mixtral": Entry(decoder(t.MixtralForCausalLM, t.MixtralConfig, **EXPERTS)),
    "qwen2": Entry(decoder(t.Qwen2ForCausalLM, t.Qwen2Config, **LLAMA)),
    "qwen3": Entry(decoder(t.Qwen3ForCausalLM, t.Qwen3Config, **LLAMA, head_dim=8)),
    "gemma2": Entry(decoder(t.Gemma2ForCausalLM, t.Gemma2Config, **LONG, head_dim=8, sliding_window=4), ROUNDED),
    "phi3": Entry(decoder(t.Phi3ForCausalLM, t.Phi3Config, **LLAMA)),
    "gpt2": Entry(decoder(t.GPT2LMHeadModel, t.GPT2Config, **GPT2)),
    "gpt_neox": Entry(decoder(t.GPTNeoXForCausalLM, t.GPTNeoXConfig, **BERT, use_cache=False)),
    "opt": Entry(decoder(t.OPTForCausalLM, t.OPTConfig, **OPT)),
    "bloom": Entry(decoder(t.BloomForCausalLM, t.BloomConfig, **BLOOM), ROUNDED),
    "falcon": Entry(decoder(t.FalconForCausalLM, t.FalconConfig, **BERT, use_cache=False)),
    "qwen2_moe": Entry(
        decoder(t.Qwen2MoeForCausalLM, t.Qwen2MoeConfig, **MOST, shared_expert_intermediate_size=16), ROUNDED
    ),
    "gpt_oss": Entry(decoder(t.GptOssForCausalLM, t.GptOssConfig, **EXPERTS, head_dim=8, sliding_window=4), ROUNDED),
    "recurrent_gemma": Entry(
        decoder(t.RecurrentGemmaForCausalLM, t.RecurrentGemmaConfig, **LLAMA, attention_window_size=4), ROUNDED
    ),
    "mamba": Entry(decoder(t.MambaForCausalLM, t.MambaConfig, **MAMBA), ROUNDED),
    "bert": Entry(encoder(t.BertForMaskedLM, t.BertConfig, **BERT)),
    "roberta": Entry(encoder(t.RobertaForMaskedLM, t.RobertaConfig, **BERT)),
    "distilbert": Entry(encoder(t.DistilBertForMaskedLM, t.DistilBertConfig, **DISTILBERT)),
    "albert": Entry(encoder(t.AlbertForMaskedLM, t.AlbertConfig, **BERT, embedding_size=16)),
    "electra": Entry(classifier(t.ElectraForSequenceClassification, t.ElectraConfig, **BERT, embedding_size=16)),
    "deberta": Entry(encoder(t.DebertaV2ForMaskedLM, t.DebertaV2Config, **DEBERTA)),
    "fnet": Entry(encoder(t.FNetForMaskedLM, t.FNetConfig, **BERT)),
    "conv_bert": Entry(encoder(t.ConvBertForMaskedLM, t.ConvBertConfig, **BERT, embedding_size=16)),
    "t5": Entry(translator(t.T5ForConditionalGeneration, t.T5Config, **T5), ROUNDED),
    "bart": Entry(translator(t.BartForConditionalGeneration, t.BartConfig, **BART)),
}
