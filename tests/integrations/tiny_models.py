"""Tiny random models of many architectures, made in memory, and bases for them.

Sizes are as small as each architecture allows, with grouped KV heads wherever it has them. Output
weights are scaled so that logits have a standard deviation of about 2: differences can be read
without knowing the model. No token ends a generation.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

import loki_attn
from loki_attn.basis import Basis, LayerBasis

LOGIT_STD = 2.0
WINDOW = 8

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
FULL_AND_SLIDING = {
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model of one architecture.

    Attributes:
        stem: What the names of its config and model classes begin with.
        settings: What differs from `COMMON`.
        head: What the name of the model class ends with.
        config: Name of the config class, where it does not begin with the stem.
        stock: The stock attention to compare with; None for the model's own default.
        not_yet_in: The newest tested transformers in which the model's attention was written
            otherwise (no interface, or keys expanded before the cache).
    """

    stem: str
    settings: dict[str, Any] = field(default_factory=dict)
    head: str = "ForCausalLM"
    config: str = ""
    stock: str | None = None
    not_yet_in: str = ""

    @property
    def missing(self) -> str:
        """Why this version of transformers cannot be tested with it; empty if it can."""
        version = transformers.__version__
        if not hasattr(transformers, self.stem + self.head):
            return f"transformers {version} has no {self.stem}"
        if self.not_yet_in and Version(version) <= Version(self.not_yet_in):
            return f"in transformers {version}, {self.stem} attends in another way"
        return ""


SERVED = {
    "Llama": Architecture("Llama"),
    "Llama, MHA": Architecture("Llama", {"num_key_value_heads": 4}),
    "Qwen2": Architecture("Qwen2"),
    "Qwen3": Architecture("Qwen3", {"head_dim": 32}),
    "Gemma": Architecture("Gemma", {"head_dim": 32}),
    "Gemma2 (soft-cap, windows)": Architecture(
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        stock="eager",
    ),
    "Gemma3 (windows)": Architecture(
        "Gemma3", {**FULL_AND_SLIDING, "head_dim": 16}, config="Gemma3TextConfig"
    ),
    "Mistral": Architecture("Mistral", {"sliding_window": None}),
    "Mistral (window 8)": Architecture("Mistral", {"sliding_window": WINDOW}),
    "Ministral (windows)": Architecture("Ministral", {**FULL_AND_SLIDING, "head_dim": 16}),
    "Mixtral": Architecture(
        "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    ),
    "Phi": Architecture("Phi", {"partial_rotary_factor": 0.5}),
    "Phi3": Architecture("Phi3", {"sliding_window": None}),
    "GPT-NeoX": Architecture("GPTNeoX", {"rotary_pct": 0.25}),
    "GPT-2": Architecture("GPT2", GPT, head="LMHeadModel"),
    "GPT-BigCode": Architecture("GPTBigCode", GPT),
    "gpt-oss (sinks, windows)": Architecture(
        "GptOss",
        {**FULL_AND_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        stock="eager",
    ),
    "OLMo": Architecture("Olmo"),
    "OLMo2": Architecture("Olmo2"),
    "OLMo3 (windows)": Architecture("Olmo3", FULL_AND_SLIDING),
    "OLMoE": Architecture("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": Architecture("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 48}),
    "Qwen3-MoE": Architecture("Qwen3Moe", {**MOE, "head_dim": 16}),
    "Qwen3-Next (linear layers)": Architecture(
        "Qwen3Next",
        {
            **MOE,
            "head_dim": 16,
            "shared_expert_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "StableLM": Architecture("StableLm"),
    "Starcoder2": Architecture("Starcoder2", {"sliding_window": None}),
    "Cohere": Architecture("Cohere", {"logit_scale": 1.0}),
    "Cohere2 (windows)": Architecture("Cohere2", {**FULL_AND_SLIDING, "logit_scale": 1.0}),
    "Granite": Architecture("Granite", {"attention_multiplier": 0.2}),
    "GraniteMoE": Architecture(
        "GraniteMoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.2},
    ),
    "SmolLM3 (layers without RoPE)": Architecture("SmolLM3", {"no_rope_layers": [1, 0]}),
    "GLM": Architecture("Glm", {"head_dim": 16}),
    "GLM4": Architecture("Glm4", {"head_dim": 16}),
    "OPT": Architecture("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Persimmon": Architecture("Persimmon"),
    "Nemotron": Architecture("Nemotron", not_yet_in="5.5.4"),
    "Arcee": Architecture("Arcee"),
    "Apertus": Architecture("Apertus"),
    "Helium": Architecture("Helium", {"head_dim": 16}),
    "Seed-OSS": Architecture("SeedOss", {"head_dim": 16}),
    "Ernie 4.5": Architecture("Ernie4_5", {"head_dim": 16}),
    "EXAONE4 (windows)": Architecture("Exaone4", FULL_AND_SLIDING),
    "BioGPT": Architecture("BioGpt"),
}

LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}

REFUSED = {
    "Falcon": Architecture("Falcon", {"new_decoder_architecture": True}),
    "Bloom": Architecture("Bloom", GPT),
    "GPT-J": Architecture("GPTJ", {**GPT, "rotary_dim": 8}),
    "DeepSeek-V2": Architecture("DeepseekV2", LATENT, not_yet_in="5.13.1"),
    "DeepSeek-V3": Architecture("DeepseekV3", LATENT, not_yet_in="5.13.1"),
    "DeepSeek-V3.2": Architecture("DeepseekV32", {**LATENT, **INDEXER}),
    "GLM-MoE-DSA": Architecture("GlmMoeDsa", {**LATENT, **INDEXER}),
    "DiffLlama": Architecture("DiffLlama", not_yet_in="5.5.4"),
    "Mamba": Architecture("Mamba"),
    "T5": Architecture(
        "T5",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "decoder_start_token_id": 0},
        head="ForConditionalGeneration",
    ),
    "Llama base model": Architecture("Llama", head="Model"),
    "Llama classifier": Architecture("Llama", head="ForSequenceClassification"),
}


def build(
    architecture: Architecture | str = "Llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> transformers.PreTrainedModel:
    """Make a tiny model, in evaluation mode."""
    if isinstance(architecture, str):
        architecture = SERVED[architecture]
    chosen = {**COMMON, **architecture.settings, **settings}
    name = architecture.config or architecture.stem + "Config"
    config = copy.deepcopy(getattr(transformers, name)(**chosen))
    torch.manual_seed(seed)
    model = getattr(transformers, architecture.stem + architecture.head)(config).eval()
    if architecture.stock:
        model.set_attn_implementation(architecture.stock)
    _enliven(model)
    return model.to(dtype)


def random_basis(
    model: transformers.PreTrainedModel, *, orthogonal: bool = True, seed: int = 1
) -> Basis | None:
    """A basis that knows nothing of the model; exact all the same where all rows are read.

    None for a model without full-attention layers.
    """
    draw = torch.Generator().manual_seed(seed)
    with loki_attn.attach(model, "dense", verify_first=False) as attachment:
        shapes = attachment.shapes
    if not shapes:
        return None
    layers = {}
    for index, shape in shapes.items():
        size = (shape.num_kv_heads, shape.head_dim, shape.head_dim)
        key_map = torch.linalg.qr(torch.randn(size, generator=draw, dtype=torch.float64)).Q
        if not orthogonal:
            key_map = key_map * torch.linspace(2.0, 0.5, shape.head_dim, dtype=torch.float64)
        layers[index] = LayerBasis(
            key_map=key_map.float(),
            query_map=key_map.float() if orthogonal else key_map.inverse().mT.contiguous().float(),
            spectrum=torch.linspace(2.0, 0.5, shape.head_dim).double().expand(size[:2]),
        )
    return Basis(kind="random", side="post", orthogonal=orthogonal, layers=layers)


def prompts(batch: int = 1, tokens: int = 12, seed: int = 3) -> torch.Tensor:
    """Random token ids [batch, tokens], none of them the padding."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, 97, (batch, tokens), generator=draw)


def greedy(model: transformers.PreTrainedModel, ids: torch.Tensor, new: int = 12, **more: Any):
    """Generate greedily; returns tokens [batch, length] and logits [batch, new, vocab]."""
    done = model.generate(
        ids,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )
    return done.sequences, torch.stack(done.logits, 1)


def left_padded(batch: int = 2, tokens: int = 12) -> dict[str, torch.Tensor]:
    """A batch whose rows are shorter and shorter, padded on the left."""
    ids = prompts(batch, tokens)
    mask = torch.ones_like(ids)
    for row in range(batch):
        ids[row, : 4 * row], mask[row, : 4 * row] = 0, 0
    return {"ids": ids, "attention_mask": mask}


def _enliven(model: transformers.PreTrainedModel) -> None:
    """Make norms, biases and sinks matter, and logits as spread as `LOGIT_STD`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "sinks" in name:
                parameter.copy_(torch.randn_like(parameter))
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or model.config.is_encoder_decoder:
            return
        try:
            spread = model(input_ids=prompts(2, 16)).logits.std()
        except Exception as error:
            raise RuntimeError(f"{type(model).__name__} does not run at all") from error
        head.weight.mul_(LOGIT_STD / spread)
