"""The table of block forms: by which names a block of layers is known, and which tensor of it is which.

A row speaks of one form of block and of all models that share it; no class of a model is named or imported. A
model fits a row if its blocks have the row's children and no others that hold parameters, because one more
norm is another form. Paths are dotted and lie in a block; ``.x`` lies in the module that owns the list of
blocks, ``^x`` in the base model. Knows names only: `sites` reads models with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: In a condition: the attribute is there and is not None; it is absent or None.
PRESENT, ABSENT = object(), object()


@dataclass(frozen=True)
class Branch:
    """One sublayer of a block: what is computed beside the stream and then added to it.

    Attributes
    ----------
    part : str
        ``attention``, ``cross`` or ``mlp``.
    at : str
        The sublayer's module, whose path its sites are named by. A branch whose `at` is not there is left
        out: decoders have cross-attention, encoders of the same form have none.
    last : tuple of str
        The last linear (for attention the output projection); the first name that is there counts.
    added : str or None
        The module whose result is added to the stream; None means `at`. It is another one where `at`
        returns the sum (BLOOM), or where a norm comes between (Gemma 2).
    stream : str or None
        The module whose first argument is the stream that the result is added to; ``""`` is the block
        itself, None means that there is none (the identity path is shared by two branches, or scaled).
    asks : str or None
        The module that calls the attention function; None means `at`.
    weights : str
        The nn.Dropout that is called on the attention weights where no attention function is.
    weights_if : tuple of (path, value)
        What must hold for that.
    flat : bool
        Its rows are flattened to (B x T, C).
    """

    part: str
    at: str
    last: tuple[str, ...]
    stream: str | None = None
    added: str | None = None
    asks: str | None = None
    weights: str = ""
    weights_if: tuple[tuple[str, Any], ...] = ()
    flat: bool = False


@dataclass(frozen=True)
class Form:
    """A row of the table.

    Attributes
    ----------
    name : str
        Whose form it is, in words.
    has : tuple of str
        Paths that must be there; `may` lists further children that are known.
    branches : tuple of Branch
        In the order in which they run.
    norms : tuple of str
        Final norms in the owner, the first that is there counts; `last_norm` is, where there is none, the
        norm that ends the last block.
    own : dict
        Path of an own nn.Dropout or of an attribute with a rate -> the kinds that its tensors are. A part
        ``config.`` of a path says that the number is read from the config of the module before it.
    when : tuple of (path, value)
        What must hold, else the row does not fit.
    embedding : str or None
        The module whose output enters the first layer; None means the input of the first block.
    up : int
        Steps from the module that holds the list to the owner.
    shared : bool
        The blocks are visited several times in one forward.
    first_counts : bool
        The first block hands something to the others, so it cannot be skipped as a layer.
    """

    name: str
    has: tuple[str, ...]
    branches: tuple[Branch, ...]
    norms: tuple[str, ...] = ()
    last_norm: str = ""
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    when: tuple[tuple[str, Any], ...] = ()
    may: tuple[str, ...] = ()
    embedding: str | None = None
    up: int = 0
    shared: bool = False
    first_counts: bool = False


_DOWN = ("mlp.down_proj", "mlp.c_proj", "mlp.fc2")
_LLAMA_OWN = {
    ".embedding_dropout": ("embedding",),
    "self_attn.attention_dropout": ("attention",),
    "self_attn.residual_dropout": ("residual.attention",),
    "resid_attn_dropout": ("residual.attention",),
    "mlp.residual_dropout": ("residual.mlp",),
    "resid_mlp_dropout": ("residual.mlp",),
}
_FC_OWN = {
    ".dropout": ("embedding",),
    "self_attn.dropout": ("attention",),
    "encoder_attn.dropout": ("attention.cross",),
    "activation_dropout": ("activation",),
    "dropout": ("residual.attention", "residual.cross", "residual.mlp"),
}
_FC = ("self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
_FC_MAY = ("encoder_attn", "encoder_attn_layer_norm")
_BERT_OWN = {
    "^embeddings.dropout": ("embedding",),
    "attention.self.dropout": ("attention",),
    "attention.output.dropout": ("residual.attention",),
    "crossattention.self.dropout": ("attention.cross",),
    "crossattention.output.dropout": ("residual.cross",),
    "output.dropout": ("residual.mlp",),
}
_NEOX_OWN = {
    ".emb_dropout": ("embedding",),
    "attention.attention_dropout": ("attention",),
    "post_attention_dropout": ("residual.attention",),
    "post_mlp_dropout": ("residual.mlp",),
}
_NEOX = ("input_layernorm", "post_attention_layernorm", "attention.dense", "mlp.dense_4h_to_h")
_TORCH_OWN = {
    "dropout": ("activation",),
    "dropout1": ("residual.attention",),
    "dropout2": ("residual.mlp",),
    "self_attn.dropout": ("attention",),
}
_TORCH_DECODER_OWN = {
    **_TORCH_OWN,
    "dropout2": ("residual.cross",),
    "dropout3": ("residual.mlp",),
    "multihead_attn.dropout": ("attention.cross",),
}
_T5 = ("layer.0.SelfAttention.o", "layer.0.layer_norm")
_T5_OWN = {
    ".dropout": ("embedding", "output"),
    "layer.0.SelfAttention.dropout": ("attention",),
    "layer.0.dropout": ("residual.attention",),
}
_FALCON = ("self_attention.dense", "mlp.dense_4h_to_h")
_FALCON_WEIGHTS: tuple[tuple[str, Any], ...] = (
    ("config.alibi", True),
    ("config._attn_implementation", "eager"),
)


def _llama(
    attention: str | None, mlp: str | None, after: tuple[str | None, str | None]
) -> tuple[Branch, ...]:
    return (
        Branch("attention", "self_attn", ("self_attn.o_proj",), attention, after[0]),
        Branch("mlp", "mlp", _DOWN, mlp, after[1]),
    )


def _fully_connected(self_attention: str, cross: str, mlp: str, flat: bool = False) -> tuple[Branch, ...]:
    return (
        Branch("attention", "self_attn", ("self_attn.out_proj",), self_attention),
        Branch("cross", "encoder_attn", ("encoder_attn.out_proj",), cross),
        Branch("mlp", "fc2", ("fc2",), mlp, flat=flat),
    )


def _neox(attention: str | None, mlp: str | None) -> tuple[Branch, ...]:
    return (
        Branch("attention", "attention", ("attention.dense",), attention),
        Branch("mlp", "mlp", ("mlp.dense_4h_to_h",), mlp),
    )


def _falcon(attention: str | None, mlp: str | None) -> tuple[Branch, ...]:
    return (
        Branch(
            "attention",
            "self_attention",
            ("self_attention.dense",),
            attention,
            weights="self_attention.attention_dropout",
            weights_if=_FALCON_WEIGHTS,
        ),
        Branch("mlp", "mlp", ("mlp.dense_4h_to_h",), mlp),
    )


def _bert(at: str, part: str, stream: str) -> Branch:
    dense = f"{at}.output.dense"
    return Branch(part, at, (dense,), stream, dense, f"{at}.self")


def _t5(cross: str, last: int) -> tuple[Branch, ...]:
    own, mlp = "layer.0.SelfAttention", f"layer.{last}.DenseReluDense"
    found = [Branch("attention", own, (f"{own}.o",), "layer.0.layer_norm")]
    if cross:
        found.append(Branch("cross", cross, (f"{cross}.o",), "layer.1.layer_norm"))
    return (*found, Branch("mlp", mlp, (f"{mlp}.wo",), f"layer.{last}.layer_norm"))


def _torch(attention: str, cross: str, mlp: str) -> tuple[Branch, ...]:
    return (
        Branch("attention", "self_attn", (), attention),
        Branch("cross", "multihead_attn", (), cross),
        Branch("mlp", "linear2", ("linear2",), mlp),
    )


FORMS = (
    Form(
        "GPT-2",
        ("ln_1", "attn.c_proj", "ln_2", "mlp.c_proj"),
        (
            Branch("attention", "attn", ("attn.c_proj",), "ln_1"),
            Branch("cross", "crossattention", ("crossattention.c_proj",), "ln_cross_attn"),
            Branch("mlp", "mlp", ("mlp.c_proj",), "ln_2"),
        ),
        norms=("ln_f",),
        own={
            ".drop": ("embedding",),
            "attn.attn_dropout": ("attention",),
            "attn.resid_dropout": ("residual.attention",),
            "crossattention.attn_dropout": ("attention.cross",),
            "crossattention.resid_dropout": ("residual.cross",),
            "mlp.dropout": ("residual.mlp",),
        },
        may=("crossattention", "ln_cross_attn"),
    ),
    Form(
        "Gemma 2 and 3: a norm before and after each sublayer",
        (
            "self_attn.o_proj",
            "mlp",
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        _llama(
            "input_layernorm",
            "pre_feedforward_layernorm",
            ("post_attention_layernorm", "post_feedforward_layernorm"),
        ),
        norms=("norm",),
        own=_LLAMA_OWN,
    ),
    Form(
        "OLMo 2: a norm after each sublayer",
        ("self_attn.o_proj", "mlp", "post_attention_layernorm", "post_feedforward_layernorm"),
        _llama("", "mlp", ("post_attention_layernorm", "post_feedforward_layernorm")),
        norms=("norm",),
        own=_LLAMA_OWN,
    ),
    Form(
        "Llama, Mistral, Mixtral, Qwen, Phi-3, DeepSeek, Granite and their kin",
        ("self_attn.o_proj", "mlp", "input_layernorm", "post_attention_layernorm"),
        _llama("input_layernorm", "post_attention_layernorm", (None, None)),
        norms=("norm",),
        own=_LLAMA_OWN,
        may=("resid_attn_dropout", "resid_mlp_dropout"),
    ),
    Form(
        "GPT-NeoX, one sublayer after the other",
        _NEOX,
        _neox("input_layernorm", "post_attention_layernorm"),
        norms=("final_layer_norm",),
        own=_NEOX_OWN,
        when=(("use_parallel_residual", False),),
    ),
    Form(
        "GPT-NeoX, both sublayers side by side",
        _NEOX,
        _neox(None, None),
        norms=("final_layer_norm",),
        own=_NEOX_OWN,
        when=(("use_parallel_residual", True),),
    ),
    Form(
        "OPT, norm before",
        _FC,
        _fully_connected("self_attn_layer_norm", "", "final_layer_norm", flat=True),
        norms=("final_layer_norm",),
        own=_FC_OWN,
        when=(("do_layer_norm_before", True),),
    ),
    Form(
        "OPT, norm after",
        _FC,
        _fully_connected("", "", "fc1", flat=True),
        last_norm="final_layer_norm",
        own=_FC_OWN,
        when=(("do_layer_norm_before", False),),
    ),
    Form(
        "Whisper, mBART and their kin: norm before",
        _FC,
        _fully_connected("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        norms=("layer_norm",),
        own=_FC_OWN,
        when=((".layer_norm", PRESENT),),
        may=_FC_MAY,
    ),
    Form(
        "BART, Marian and their kin: norm after",
        _FC,
        _fully_connected("", "encoder_attn", "fc1"),
        last_norm="final_layer_norm",
        own=_FC_OWN,
        when=((".layer_norm", ABSENT),),
        may=_FC_MAY,
    ),
    Form(
        "BLOOM: its sublayers return the sum",
        ("input_layernorm", "self_attention.dense", "post_attention_layernorm", "mlp.dense_4h_to_h"),
        (
            Branch(
                "attention",
                "self_attention",
                ("self_attention.dense",),
                "input_layernorm",
                "self_attention.dense",
                weights="self_attention.attention_dropout",
            ),
            Branch("mlp", "mlp", ("mlp.dense_4h_to_h",), "post_attention_layernorm", "mlp.dense_4h_to_h"),
        ),
        norms=("ln_f",),
        own={
            "self_attention.attention_dropout": ("attention",),
            "self_attention.hidden_dropout": ("residual.attention",),
            "mlp.hidden_dropout": ("residual.mlp",),
        },
        when=(
            ("apply_residual_connection_post_layernorm", False),
            # With both, the last linear's weight is used in slices and the module never called.
            ("mlp.slow_but_exact", False),
        ),
    ),
    Form(
        "Falcon, one sublayer after the other",
        (*_FALCON, "input_layernorm", "post_attention_layernorm"),
        _falcon("input_layernorm", "post_attention_layernorm"),
        norms=("ln_f",),
        own={
            "self_attention.attention_dropout": ("attention",),
            # No slip: what is added after the attention is dropped at the rate for attention weights.
            "config.attention_dropout": ("residual.attention",),
            "config.hidden_dropout": ("residual.mlp",),
        },
        when=(("config.parallel_attn", False), ("config.new_decoder_architecture", False)),
    ),
    Form(
        "Falcon, both sublayers side by side",
        _FALCON,
        _falcon(None, None),
        norms=("ln_f",),
        own={
            "self_attention.attention_dropout": ("attention",),
            "config.hidden_dropout": ("residual.attention", "residual.mlp"),
        },
        when=(("config.parallel_attn", True),),
        may=("input_layernorm", "ln_attn", "ln_mlp"),
    ),
    Form(
        "BERT, RoBERTa, ELECTRA and their kin",
        ("attention.self", "attention.output.dense", "intermediate", "output.dense"),
        (
            _bert("attention", "attention", ""),
            _bert("crossattention", "cross", "crossattention"),
            Branch("mlp", "output", ("output.dense",), "intermediate", "output.dense"),
        ),
        last_norm="output.LayerNorm",
        own=_BERT_OWN,
        may=("crossattention",),
    ),
    Form(
        "DistilBERT",
        ("attention.out_lin", "sa_layer_norm", "ffn.lin2", "output_layer_norm"),
        (
            Branch("attention", "attention", ("attention.out_lin",), ""),
            Branch("mlp", "ffn", ("ffn.lin2",), "ffn"),
        ),
        last_norm="output_layer_norm",
        own={
            "^embeddings.dropout": ("embedding",),
            "attention.dropout": ("attention",),
            "ffn.dropout": ("residual.mlp",),
        },
    ),
    Form(
        "ALBERT: one block for all layers",
        ("full_layer_layer_norm", "attention.dense", "ffn", "ffn_output"),
        (
            Branch("attention", "attention", ("attention.dense",), "", "attention.dense"),
            Branch("mlp", "ffn_output", ("ffn_output",), "ffn"),
        ),
        own={
            "^embeddings.dropout": ("embedding",),
            "attention.attention_dropout": ("attention",),
            "attention.output_dropout": ("residual.attention",),
        },
        may=("dropout",),
        embedding=".embedding_hidden_mapping_in",
        up=2,
        shared=True,
    ),
    Form(
        "ModernBERT",
        ("attn_norm", "attn.Wo", "mlp_norm", "mlp.Wo"),
        (
            Branch("attention", "attn", ("attn.Wo",), "attn_norm"),
            Branch("mlp", "mlp", ("mlp.Wo",), "mlp_norm"),
        ),
        norms=("final_norm",),
        own={
            ".embeddings.drop": ("embedding",),
            "attn.attention_dropout": ("attention",),
            "attn.out_drop": ("residual.attention",),
            "mlp.drop": ("activation",),
        },
    ),
    Form(
        "T5 and its kin, decoder",
        (*_T5, "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"),
        _t5("layer.1.EncDecAttention", 2),
        norms=("final_layer_norm",),
        own={
            **_T5_OWN,
            "layer.1.EncDecAttention.dropout": ("attention.cross",),
            "layer.1.dropout": ("residual.cross",),
            "layer.2.DenseReluDense.dropout": ("activation",),
            "layer.2.dropout": ("residual.mlp",),
        },
        first_counts=True,
    ),
    Form(
        "T5 and its kin, encoder",
        (*_T5, "layer.1.DenseReluDense.wo"),
        _t5("", 1),
        norms=("final_layer_norm",),
        own={
            **_T5_OWN,
            "layer.1.DenseReluDense.dropout": ("activation",),
            "layer.1.dropout": ("residual.mlp",),
        },
        first_counts=True,
    ),
    Form(
        "ViT",
        ("attention.o_proj", "layernorm_before", "layernorm_after", "mlp.fc2"),
        (
            Branch("attention", "attention", ("attention.o_proj",), "layernorm_before"),
            Branch("mlp", "mlp", ("mlp.fc2",), "layernorm_after"),
        ),
        norms=("layernorm",),
        own={
            ".embeddings.dropout": ("embedding",),
            "attention.attention_dropout": ("attention",),
            "dropout": ("residual.attention", "residual.mlp"),
        },
    ),
    Form(
        "nn.TransformerDecoderLayer, norm before",
        ("self_attn", "multihead_attn", "linear1", "linear2", "norm1", "norm2", "norm3"),
        _torch("norm1", "norm2", "norm3"),
        norms=("norm",),
        own=_TORCH_DECODER_OWN,
        when=(("norm_first", True),),
    ),
    Form(
        "nn.TransformerDecoderLayer, norm after",
        ("self_attn", "multihead_attn", "linear1", "linear2", "norm1", "norm2", "norm3"),
        _torch("", "multihead_attn", "linear1"),
        norms=("norm",),
        last_norm="norm3",
        own=_TORCH_DECODER_OWN,
        when=(("norm_first", False),),
    ),
    Form(
        "nn.TransformerEncoderLayer, norm before",
        ("self_attn", "linear1", "linear2", "norm1", "norm2"),
        _torch("norm1", "", "norm2"),
        norms=("norm",),
        own=_TORCH_OWN,
        when=(("norm_first", True),),
    ),
    Form(
        "nn.TransformerEncoderLayer, norm after",
        ("self_attn", "linear1", "linear2", "norm1", "norm2"),
        _torch("", "", "linear1"),
        norms=("norm",),
        last_norm="norm2",
        own=_TORCH_OWN,
        when=(("norm_first", False),),
    ),
)

# --- Names for blocks that fit no row: what a child that is called so is. ---

ATTENTION = ("self_attn", "self_attention", "attn", "attention", "SelfAttention")
FEED_FORWARD = ("mlp", "ffn", "feed_forward", "feedforward", "ff", "intermediate")
PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "o", "out_lin", "proj")
LAST = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "wo", "Wo", "w2", "lin2", "linear2", "fc_out")
FINAL_NORM = (
    "norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "norm_f", "layernorm", "layer_norm",
)  # fmt: skip

#: Where an attention module, or its config, says how many query heads there are.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
#: Attributes of a block that scale a branch before it is added: the identity path is then not the plain sum.
SCALES = ("residual_multiplier", "residual_scale")
#: Stacked experts beside which dense ones run on every token.
EXPERTS = "experts"
SHARED_EXPERTS = ("shared_experts", "shared_expert")
#: Attributes that guard a call of a random function -> what that is.
GUARDS = {
    "layerdrop": "whole layers are skipped (LayerDrop)",
    "jitter_noise": "the router's input is scaled at random (jitter)",
    "router_jitter_noise": "the router's input is scaled at random (jitter)",
    "drop_prob": "branches are dropped for whole examples (DropPath)",
}
