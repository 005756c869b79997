"""The checkpoints that people have, of fewer layers; ``published_headers`` writes them.

What is changed of a published config.json is the number of layers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from published_headers import (
    FP8,
    Published,
    Tensors,
    attention,
    delta_net,
    drafts,
    ends,
    eyes,
    fp8,
    gguf_attention,
    gguf_delta_net,
    gguf_ends,
    gguf_mixture,
    gguf_mlp,
    mixture,
    mlp,
    norms,
    stored,
)

LAYERS, HYBRID_LAYERS = 2, 4
Part = Callable[[str], Tensors]
NO_HEADS_OF_4 = {4: "14 query heads do not divide among 4 ranks"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DELTA = ("in_proj_qkv.", "in_proj_z.", "in_proj_qkvz.", "out_proj.")


# -- safetensors --


def llama_like(sizes: tuple[int, ...], dim: int, *, is_tied: bool = False, **how: Any) -> Tensors:
    """Return the tensors of llama, mistral, qwen2 or qwen3, of *sizes* as for ``config``."""
    vocab, hidden, inner, heads, kv = sizes
    found = ends("model.", vocab, hidden, is_tied=is_tied)
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        found |= norms(p, hidden) | attention(p, hidden, heads, kv, dim, **how)
        found |= mlp(f"{p}mlp.", hidden, inner)
    return found


def config(model_type: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """Return a config.json of *sizes*: vocabulary, hidden, inner, heads, key-value heads."""
    vocab, hidden, inner, heads, kv = sizes
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_hidden_layers": LAYERS,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-6,
        **more,
    }


LLAMA_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA_8B = (128256, 4096, 14336, 32, 8)
LLAMA_1B = (128256, 2048, 8192, 32, 8)
MISTRAL_7B = (32768, 4096, 14336, 32, 8)
MISTRAL_NEMO = (131072, 5120, 14336, 32, 8)
SMOLLM2 = (49152, 2048, 8192, 32, 32)
QWEN25_7B = (152064, 3584, 18944, 28, 4)
QWEN25_05B = (151936, 896, 4864, 14, 2)
QWEN3_06B = (151936, 1024, 3072, 16, 8)
QWEN3_8B = (151936, 4096, 12288, 32, 8)
QWEN3_32B = (151936, 5120, 25600, 64, 8)
QWEN3_30B = (151936, 2048, 6144, 32, 4)

QWEN25 = {
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
QWEN3 = {
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN3_MOE: dict[str, Any] = {
    **QWEN3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def qwen3_moe() -> Tensors:
    found = ends("model.", 151936, 2048)
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        found |= norms(p, 2048) | attention(p, 2048, 32, 4, 128, has_norms=True)
        found |= mixture(p, 2048, 128, 768)
    return found


QWEN3_NEXT: dict[str, Any] = {
    **config("qwen3_next", (151936, 2048, 5120, 16, 2)),
    "num_hidden_layers": HYBRID_LAYERS,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "use_sliding_window": False,
}


def qwen3_next() -> Tensors:
    hidden = 2048

    def feed_forward(p: str) -> Tensors:
        return norms(p, hidden) | mixture(p, hidden, 512, 512, shared=512)

    def attending(p: str) -> Tensors:
        return attention(p, hidden, 16, 2, 256, has_norms=True, is_gated=True) | feed_forward(p)

    found = ends("model.", 151936, hidden) | drafts(hidden, attending("mtp.layers.0."))
    for layer in range(HYBRID_LAYERS - 1):
        p = f"model.layers.{layer}."
        found |= delta_net(p, hidden, 32, is_grouped=True) | feed_forward(p)
    return found | attending(f"model.layers.{HYBRID_LAYERS - 1}.")


QWEN35_TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_hidden_layers": HYBRID_LAYERS,
    "output_gate_type": "swish",  # Qwen3.6 alone
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 248320,
}
DENSE_27B = {
    "model_type": "qwen3_5_text",
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "linear_num_value_heads": 48,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
}
MOE_35B = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
}


def qwen35(model_type: str, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the config.json of a model that sees, around that of its text half."""
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 248056,
        "video_token_id": 248057,
        "model_type": model_type,
        "text_config": {**QWEN35_TEXT, **text},
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "model_type": model_type,
            "num_heads": 16,
            "out_hidden_size": text["hidden_size"],
        },
        "vision_end_token_id": 248054,
        **more,
    }


def qwen35_text(hidden: int, heads: int, kv: int, values: int, feed_forward: Part) -> Tensors:
    """Return all tensors, with *feed_forward* the part of a layer behind the mixer."""

    def attending(p: str) -> Tensors:
        mixer = attention(p, hidden, heads, kv, 256, has_norms=True, is_gated=True)
        return mixer | norms(p, hidden) | feed_forward(p)

    found = ends("model.language_model.", 248320, hidden) | eyes(hidden)
    found |= drafts(hidden, attending("mtp.layers.0."))
    for layer in range(HYBRID_LAYERS - 1):
        p = f"model.language_model.layers.{layer}."
        found |= delta_net(p, hidden, values) | norms(p, hidden) | feed_forward(p)
    return found | attending(f"model.language_model.layers.{HYBRID_LAYERS - 1}.")


def qwen35_27b() -> Tensors:
    return qwen35_text(5120, 24, 4, 48, lambda p: mlp(f"{p}mlp.", 5120, 17408))


def qwen35_35b(*, is_fused: bool) -> Tensors:
    return qwen35_text(
        *(2048, 16, 2, 32),
        lambda p: mixture(p, 2048, 256, 512, shared=512, is_fused=is_fused),
    )


EYES_AND_DRAFTS = ("model.visual.", "mtp.")
WITHOUT = ["lm_head", "model.visual", "mtp.fc", "model.language_model.embed_tokens"]

SAFETENSORS = [
    Published(
        "llama-3.1-8b",
        config("llama", LLAMA_8B, **LLAMA, rope_scaling=LLAMA_ROPE),
        llama_like(LLAMA_8B, 128),
    ),
    Published(
        "llama-3.2-1b",
        config(
            "llama",
            LLAMA_1B,
            **{**LLAMA, "tie_word_embeddings": True, "head_dim": 64},
            rope_scaling={**LLAMA_ROPE, "factor": 32.0},
        ),
        llama_like(LLAMA_1B, 64, is_tied=True),
    ),
    Published(
        "mistral-7b-v0.3",
        config(
            "mistral",
            MISTRAL_7B,
            max_position_embeddings=32768,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
        llama_like(MISTRAL_7B, 128),
    ),
    Published(
        "mistral-nemo",
        config(
            "mistral",
            MISTRAL_NEMO,
            head_dim=128,
            max_position_embeddings=131072,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
        llama_like(MISTRAL_NEMO, 128),
    ),
    Published(
        "smollm2-1.7b",
        config(
            "llama",
            SMOLLM2,
            **{**LLAMA, "tie_word_embeddings": True, "max_position_embeddings": 8192},
            rope_scaling=None,
            rope_interleaved=False,
            is_llama_config=True,
        ),
        llama_like(SMOLLM2, 64, is_tied=True),
    ),
    Published(
        "qwen2.5-7b-with-yarn",
        config("qwen2", QWEN25_7B, **QWEN25, rope_scaling=YARN),
        llama_like(QWEN25_7B, 128, has_bias=True),
    ),
    Published(
        "qwen2.5-0.5b",
        config("qwen2", QWEN25_05B, **{**QWEN25, "tie_word_embeddings": True}),
        llama_like(QWEN25_05B, 64, has_bias=True, is_tied=True),
        refused=NO_HEADS_OF_4,
    ),
    Published(
        "qwen3-0.6b",
        config("qwen3", QWEN3_06B, **{**QWEN3, "tie_word_embeddings": True}),
        # tied, and yet its file has a copy of the embedding for a head
        llama_like(QWEN3_06B, 128, has_norms=True),
        left_out=("lm_head.",),
    ),
    Published(
        "qwen3-8b", config("qwen3", QWEN3_8B, **QWEN3), llama_like(QWEN3_8B, 128, has_norms=True)
    ),
    Published(
        "qwen3-32b",
        config("qwen3", QWEN3_32B, **QWEN3),
        llama_like(QWEN3_32B, 128, has_norms=True),
    ),
    Published(
        "qwen3-8b-fp8",
        config("qwen3", QWEN3_8B, **QWEN3, quantization_config=FP8),
        fp8(llama_like(QWEN3_8B, 128, has_norms=True), *PROJECTIONS),
    ),
    Published("qwen3-30b-a3b", config("qwen3_moe", QWEN3_30B, **QWEN3_MOE), qwen3_moe()),
    Published(
        "qwen3-30b-a3b-fp8",
        config("qwen3_moe", QWEN3_30B, **QWEN3_MOE, quantization_config=FP8),
        fp8(qwen3_moe(), *PROJECTIONS),
    ),
    Published("qwen3-next-80b-a3b", QWEN3_NEXT, qwen3_next(), left_out=("mtp.",)),
    Published(
        "qwen3-next-80b-a3b-fp8",
        {**QWEN3_NEXT, "quantization_config": {**FP8, "modules_to_not_convert": ["lm_head"]}},
        fp8(qwen3_next(), *PROJECTIONS, *DELTA),
        left_out=("mtp.",),
    ),
    Published("qwen3.6-27b", qwen35("qwen3_5", DENSE_27B), qwen35_27b(), left_out=EYES_AND_DRAFTS),
    Published(
        "qwen3.6-27b-fp8",
        qwen35(
            "qwen3_5", DENSE_27B, quantization_config={**FP8, "modules_to_not_convert": WITHOUT}
        ),
        fp8(qwen35_27b(), *PROJECTIONS, *DELTA),
        left_out=EYES_AND_DRAFTS,
    ),
    Published(
        "qwen3.5-35b-a3b",
        qwen35("qwen3_5_moe", MOE_35B),
        qwen35_35b(is_fused=True),
        left_out=EYES_AND_DRAFTS,
    ),
    Published(
        "qwen3.5-35b-a3b-fp8",
        qwen35(
            "qwen3_5_moe", MOE_35B, quantization_config={**FP8, "modules_to_not_convert": WITHOUT}
        ),
        fp8(qwen35_35b(is_fused=False), *PROJECTIONS, *DELTA),
        left_out=EYES_AND_DRAFTS,
    ),
]


# -- GGUF --


def metadata(name: str, sizes: tuple[int, ...], layers: int, **more: Any) -> dict[str, Any]:
    """Return what every GGUF file says, of *sizes* as those of ``config``."""
    vocab, hidden, inner, heads, kv = sizes
    return {
        "general.architecture": name,
        "general.file_type": 15,
        "general.quantization_version": 2,
        f"{name}.block_count": layers,
        f"{name}.vocab_size": vocab,
        f"{name}.embedding_length": hidden,
        f"{name}.feed_forward_length": inner,
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": kv,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"{name}.{key}": value for key, value in more.items()},
    }


def heads_of(dim: int) -> dict[str, int]:
    return {"attention.key_length": dim, "attention.value_length": dim}


def gguf_llama_like(
    sizes: tuple[int, ...], dim: int, kind: str, more: str, head: str | None, **how: Any
) -> Tensors:
    """Return tensors of *kind*, of which values and the way down of layer 0 are of *more*."""
    vocab, hidden, inner, heads, kv = sizes
    found = gguf_ends(vocab, hidden, kind, head)
    for layer in range(LAYERS):
        p, larger = f"blk.{layer}.", (more if layer == 0 else kind)
        found |= gguf_attention(p, hidden, heads, kv, dim, kinds=(kind, larger), **how)
        found |= stored(p, {"ffn_norm": ("F32", (hidden,))})
        found |= gguf_mlp(p, hidden, inner, (kind, larger))
    return found


def gguf_qwen3_moe() -> Tensors:
    found = gguf_ends(151936, 2048, "Q4_K", "Q6_K")
    for layer in range(LAYERS):
        p, larger = f"blk.{layer}.", ("Q6_K" if layer == 0 else "Q4_K")
        found |= gguf_attention(p, 2048, 32, 4, 128, kinds=("Q4_K", larger), has_norms=True)
        found |= stored(p, {"ffn_norm": ("F32", (2048,))})
        found |= gguf_mixture(p, 2048, 128, 768, kinds=("Q4_K", larger))
    return found


def gguf_hybrid(
    ends_of: Tensors, heads: tuple[int, ...], values: int, feed_forward: Part, projections: str
) -> Tensors:
    """Return tensors of Q4_K, with *feed_forward* the part of a layer behind the mixer."""
    hidden = heads[0]
    found = dict(ends_of)
    for layer in range(HYBRID_LAYERS):
        p = f"blk.{layer}."
        found |= stored(p, {"post_attention_norm": ("F32", (hidden,))}) | feed_forward(p)
        found |= (
            gguf_attention(p, *heads, kinds=("Q4_K", "Q6_K"), has_norms=True, is_gated=True)
            if layer == HYBRID_LAYERS - 1
            else gguf_delta_net(p, hidden, values, "Q4_K", projections=projections)
        )
    return found


def gguf_27b() -> Tensors:
    """Return Qwen3.6-27B with the layer that drafts tokens, which is the last block."""
    last, hidden = f"blk.{HYBRID_LAYERS}.", 5120
    found = gguf_hybrid(
        gguf_ends(248320, hidden, "Q4_K", "Q6_K"),
        (hidden, 24, 4, 256),
        48,
        lambda p: gguf_mlp(p, hidden, 17408, ("Q4_K", "Q6_K")),
        "qwen35",
    )
    found |= gguf_attention(
        *(last, hidden, 24, 4, 256), kinds=("Q8_0", "Q8_0"), has_norms=True, is_gated=True
    )
    found |= gguf_mlp(last, hidden, 17408, ("Q8_0", "Q8_0"))
    return found | stored(
        last,
        {
            "post_attention_norm": ("F32", (hidden,)),
            "nextn.eh_proj": ("Q8_0", (hidden, 2 * hidden)),
            **dict.fromkeys(
                ("nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"), ("F32", (hidden,))
            ),
        },
    )


def gguf_35b(*, is_fused: bool) -> Tensors:
    return gguf_hybrid(
        gguf_ends(248320, 2048, "Q4_K", "Q6_K"),
        (2048, 16, 2, 256),
        32,
        lambda p: gguf_mixture(
            p, 2048, 256, 512, kinds=("Q4_K", "Q6_K"), shared=512, is_fused=is_fused
        ),
        "qwen35",
    )


def gguf_next(projections: str) -> Tensors:
    return gguf_hybrid(
        gguf_ends(151936, 2048, "Q4_K", "Q6_K"),
        (2048, 16, 2, 256),
        32,
        lambda p: gguf_mixture(p, 2048, 512, 512, kinds=("Q4_K", "Q6_K"), shared=512),
        projections,
    )


HYBRID = {
    **heads_of(256),
    "context_length": 262144,
    "rope.freq_base": 1e7,
    "rope.dimension_count": 64,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
}
EXPERTS_512 = {
    "expert_count": 512,
    "expert_used_count": 10,
    "expert_feed_forward_length": 512,
    "expert_shared_feed_forward_length": 512,
    "ssm.time_step_rank": 32,
    "ssm.inner_size": 4096,
}
EXPERTS_256 = {**EXPERTS_512, "expert_count": 256, "expert_used_count": 8}
SECTIONS = {"rope.dimension_sections": [11, 11, 10, 0], "full_attention_interval": 4}
LLAMA_GGUF = {"context_length": 131072, "rope.freq_base": 500000.0, "rope.dimension_count": 128}
QWEN3_GGUF = {**heads_of(128), "context_length": 40960, "rope.freq_base": 1000000.0}
NEXT = (151936, 2048, 5120, 16, 2)

NO_BLOCKS_OF_4 = {4: "2 blocks of 256 columns of layers.0.mlp.experts.down_proj.weight"}

GGUF = [
    Published(
        "llama-3.1-8b-q4_k_m",
        metadata("llama", LLAMA_8B, LAYERS, **LLAMA_GGUF),
        {
            "rope_freqs.weight": ("F32", (64,)),
            **gguf_llama_like(LLAMA_8B, 128, "Q4_K", "Q6_K", "Q6_K"),
        },
        left_out=("rope_freqs.",),
        is_gguf=True,
    ),
    Published(
        "mistral-nemo-q4_k_m",
        metadata(
            "llama",
            MISTRAL_NEMO,
            LAYERS,
            **{**LLAMA_GGUF, **heads_of(128), "rope.freq_base": 1000000.0},
        ),
        gguf_llama_like(MISTRAL_NEMO, 128, "Q4_K", "Q6_K", "Q6_K"),
        is_gguf=True,
    ),
    Published(
        "qwen2.5-7b-q4_k_m",
        metadata("qwen2", QWEN25_7B, LAYERS, **{"context_length": 32768, "rope.freq_base": 1e6}),
        gguf_llama_like(QWEN25_7B, 128, "Q4_K", "Q6_K", "Q6_K", has_bias=True),
        is_gguf=True,
        refused={4: "14 blocks of 256 columns of layers.0.self_attn.o_proj.weight"},
    ),
    Published(
        "qwen2.5-0.5b-q4_k_m",  # no row of 896 is of whole blocks of 256; those of the way down are
        metadata("qwen2", QWEN25_05B, LAYERS, **{"context_length": 32768, "rope.freq_base": 1e6}),
        gguf_llama_like(QWEN25_05B, 64, "Q5_0", "Q8_0", None, has_bias=True)
        | {
            f"blk.{n}.ffn_down.weight": (kind, (896, 4864))
            for n, kind in enumerate(("Q6_K", "Q4_K"))
        },
        is_gguf=True,
        refused=NO_HEADS_OF_4,
    ),
    Published(
        "qwen3-8b-q5_k_m",
        metadata("qwen3", QWEN3_8B, LAYERS, **QWEN3_GGUF),
        gguf_llama_like(QWEN3_8B, 128, "Q5_K", "Q6_K", "Q6_K", has_norms=True),
        is_gguf=True,
    ),
    Published(
        "qwen3-8b-iq4_xs",
        metadata("qwen3", QWEN3_8B, LAYERS, **QWEN3_GGUF),
        gguf_llama_like(QWEN3_8B, 128, "IQ4_XS", "Q5_K", "Q6_K", has_norms=True),
        is_gguf=True,
    ),
    Published(
        "qwen3-30b-a3b-q4_k_m",
        metadata(
            "qwen3moe",
            QWEN3_30B,
            LAYERS,
            **QWEN3_GGUF,
            expert_count=128,
            expert_used_count=8,
            expert_feed_forward_length=768,
        ),
        gguf_qwen3_moe(),
        is_gguf=True,
        refused={4: "3 blocks of 256 columns of layers.0.mlp.experts.down_proj.weight"},
    ),
    Published(
        "qwen3-next-80b-a3b-q4_k_m",
        metadata("qwen3next", NEXT, HYBRID_LAYERS, **HYBRID, **EXPERTS_512),
        gguf_next("qwen3next"),
        is_gguf=True,
        refused=NO_BLOCKS_OF_4,
    ),
    Published(
        "qwen3-next-80b-a3b-of-2025",  # before llama.cpp split the projections
        metadata("qwen3next", NEXT, HYBRID_LAYERS, **HYBRID, **EXPERTS_512),
        gguf_next("ssm_in"),
        is_gguf=True,
        refused=NO_BLOCKS_OF_4,
    ),
    Published(
        "qwen3.6-27b-q4_k_m",
        metadata(
            "qwen35",
            (248320, 5120, 17408, 24, 4),
            HYBRID_LAYERS + 1,
            **{**HYBRID, **SECTIONS, "ssm.time_step_rank": 48, "ssm.inner_size": 6144},
            nextn_predict_layers=1,
        ),
        gguf_27b(),
        left_out=("blk.4.",),
        is_gguf=True,
    ),
    Published(
        "qwen3.5-35b-a3b-q4_k_m",
        metadata(
            "qwen35moe",
            (248320, 2048, 512, 16, 2),
            HYBRID_LAYERS,
            **HYBRID,
            **SECTIONS,
            **EXPERTS_256,
        ),
        gguf_35b(is_fused=False),
        is_gguf=True,
        refused=NO_BLOCKS_OF_4,
    ),
    Published(
        "qwen3.5-35b-a3b-fused",
        metadata(
            "qwen35moe",
            (248320, 2048, 512, 16, 2),
            HYBRID_LAYERS,
            **HYBRID,
            **SECTIONS,
            **EXPERTS_256,
        ),
        gguf_35b(is_fused=True),
        is_gguf=True,
        refused=NO_BLOCKS_OF_4,
    ),
]
