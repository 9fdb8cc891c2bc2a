"""Random Evo 2 weights, spelled for each format straight from its tables and without Cistron's converters."""

from __future__ import annotations

from typing import Any

import torch

WIDTH, HEADS, MLP, GROUPS, TAPS, STATE, VOCABULARY, CACHE = 32, 2, 48, 8, 16, 16, 512, 40
PATTERN = "SDH*D"

NATIVE = {
    "hidden_size": WIDTH,
    "layer_pattern": PATTERN,
    "num_attention_heads": HEADS,
    "mlp_size": MLP,
    "num_filter_groups": GROUPS,
    "hcm_filter_length": TAPS,
    "max_length": 256,
}
SAVANNA = {
    "num_layers": len(PATTERN),
    "hidden-size": WIDTH,
    "num_attention_heads": HEADS,
    "num_groups_hyena": WIDTH,
    "num_groups_hyena_medium": GROUPS,
    "num_groups_hyena_short": GROUPS,
    "operator-config": [[["hyena_se"], 1], [["hyena_mr", "hyena"], 1], [["flash_te"], 1], [["hyena_mr"], 1]],
    "short-conv-L": 3,
    "hyena_se_len": 7,
    "hyena_mr_len": TAPS,
    "hyena_filter_order": STATE,
    "seq_length": 256,
    "pos_emb": "rotary",
    "rotary_emb_base": 10_000,
    "norm": "rmsnorm",
    "train-iters": 3,
}
PROVIDER = {
    "_target_": "bionemo.evo2.models.evo2_provider.HyenaModelProvider",
    "num_layers": len(PATTERN),
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": MLP,
    "hybrid_override_pattern": PATTERN,
    "num_groups_hyena": WIDTH,
    "num_groups_hyena_medium": GROUPS,
    "num_groups_hyena_short": GROUPS,
    "hyena_medium_conv_len": TAPS,
    "seq_length": 256,
    "rotary_base": 10_000,
    "vocab_size": None,
    "recompute_granularity": "full",
}
Tensors = dict[str, torch.Tensor]


def frequencies(base: float = 1e4) -> torch.Tensor:
    size = WIDTH // HEADS
    exact = torch.tensor([base ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float32)
    return exact.bfloat16()


def random_layers(seed: int = 0, *, nvidia: bool = False) -> list[Tensors]:
    """Draw each layer's tensors under short neutral names; matrices are bf16, factors of filters fp32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 0.2) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    layers = []
    for symbol in PATTERN:
        layer = {
            "norm1": draw(WIDTH, scale=1),
            "norm2": draw(WIDTH, scale=1),
            "w1": draw(MLP, WIDTH),
            "w2": draw(MLP, WIDTH),
            "w3": draw(WIDTH, MLP),
            "in": draw(3 * WIDTH, WIDTH),
            "out": draw(WIDTH, WIDTH),
        }
        if symbol == "*":
            layer["inv_freq"] = frequencies()
        else:
            layer["short"] = draw(3 * WIDTH, 3)
        if symbol != "*" or not nvidia:
            layer["out_bias"] = draw(WIDTH)
        if symbol == "S":
            layer["h"] = draw(GROUPS, 1, 7)
        if symbol == "D":
            layer["h"] = draw(GROUPS, CACHE, dtype=torch.float32)
            layer["decay"] = draw(GROUPS, CACHE, dtype=torch.float32).abs()
        if symbol == "H":
            layer |= {name: draw(WIDTH, STATE, dtype=torch.float32) for name in ("gamma", "R", "p")}
        if symbol in "DH":
            layer["D"] = draw(WIDTH)
        elif symbol == "S" and nvidia:
            layer["D"] = draw(GROUPS)
        layers.append(layer)
    layers.append({"embedding": draw(VOCABULARY, WIDTH), "norm": draw(WIDTH, scale=1), "head": draw(VOCABULARY, WIDTH)})
    return layers


def native(layers: list[Tensors], *, tied: bool = True) -> Tensors:
    names = {
        "norm1": "mixer_norm.weight",
        "norm2": "mlp_norm.weight",
        "w1": "mlp.gate.weight",
        "w2": "mlp.value.weight",
        "w3": "mlp.output.weight",
        "out": "mixer.output.weight",
        "out_bias": "mixer.output.bias",
        "short": "mixer.projection_taps",
        "inv_freq": "mixer.rotary.inv_freq",
        "h": "mixer.filter.taps",
        "decay": "mixer.filter.decay",
        "gamma": "mixer.filter.gamma",
        "p": "mixer.filter.p",
        "R": "mixer.filter.residues",
        "D": "mixer.filter.skip",
    }
    tensors = {"embedding.weight": layers[-1]["embedding"], "final_norm.weight": layers[-1]["norm"]}
    if not tied:
        tensors["unembed.weight"] = layers[-1]["head"]
    for index, (symbol, layer) in enumerate(zip(PATTERN, layers, strict=False)):
        for key, tensor in layer.items():
            if key == "in":
                name = "mixer.qkv.weight" if symbol == "*" else "mixer.projection.weight"
                tensor = by_kind(tensor) if symbol == "*" else tensor
            else:
                name = names[key]
            if key in {"h", "decay"}:
                tensor = tensor[:, 0] if symbol == "S" else tensor[:, :TAPS]
            tensors[f"blocks.{index}.{name}"] = tensor
    return tensors


def by_kind(rows: torch.Tensor) -> torch.Tensor:
    """Collect all queries, then all keys, then all values from rows that lie head by head."""
    size = WIDTH // HEADS
    order = [(head * 3 + kind) * size + i for kind in range(3) for head in range(HEADS) for i in range(size)]
    return rows[order]


def savanna(layers: list[Tensors], *, norm_place: int = 3, tied: bool = True) -> Tensors:
    count = len(PATTERN)
    tensors = {
        "sequential.0.word_embeddings.weight": layers[-1]["embedding"],
        f"sequential.{count + norm_place}.norm.weight": layers[-1]["norm"],
    }
    if not tied:
        tensors[f"sequential.{count + norm_place + 1}.final_linear.weight"] = layers[-1]["head"]
    names = {
        "norm1": "input_layernorm.weight",
        "norm2": "pre_mlp_layernorm.weight",
        "w1": "mlp.w1.weight",
        "w2": "mlp.w2.weight",
        "w3": "mlp.w3.weight",
        "in": "mixer.dense_projection.weight",
        "out": "mixer.dense.weight",
        "out_bias": "mixer.dense.bias",
        "short": "mixer.hyena_proj_conv.short_conv_weight",
        "inv_freq": "mixer.rotary_emb.inv_freq",
        "decay": "mixer.mixer.filter.decay",
        "gamma": "mixer.mixer.filter.gamma",
        "p": "mixer.mixer.filter.p",
        "R": "mixer.mixer.filter.R",
        "D": "mixer.mixer.conv_bias",
    }
    taps = {"S": "mixer.mixer.short_conv.short_conv_weight", "D": "mixer.mixer.filter.h"}
    for index, (symbol, layer) in enumerate(zip(PATTERN, layers, strict=False)):
        for key, tensor in layer.items():
            tensors[f"sequential.{index + 2}.{taps[symbol] if key == 'h' else names[key]}"] = tensor
    return tensors


def mbridge(layers: list[Tensors], *, fused: bool = True, tied: bool = True) -> Tensors:
    tensors = {
        "embedding.word_embeddings.weight": layers[-1]["embedding"],
        "decoder.final_norm.weight": layers[-1]["norm"],
    }
    if not tied:
        tensors["output_layer.weight"] = layers[-1]["head"]
    hyena = {
        "in": "mixer.dense_projection.weight",
        "out": "mixer.dense.weight",
        "out_bias": "mixer.dense.bias",
        "short": "mixer.hyena_proj_conv.short_conv_weight",
        "decay": "mixer.mixer.filter.decay",
        "gamma": "mixer.mixer.filter.gamma",
        "p": "mixer.mixer.filter.p",
        "R": "mixer.mixer.filter.R",
        "D": "mixer.mixer.conv_bias",
        "norm1": "mixer.dense_projection.layer_norm_weight" if fused else "norm.weight",
    }
    attention = {
        "in": "self_attention.linear_qkv.weight",
        "out": "self_attention.linear_proj.weight",
        "out_bias": "self_attention.linear_proj.bias",
        "norm1": "self_attention.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight",
    }
    for index, (symbol, layer) in enumerate(zip(PATTERN, layers, strict=False)):
        prefix = f"decoder.layers.{index}"
        norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
        tensors[f"{prefix}.{norm}"] = layer["norm2"]
        tensors[f"{prefix}.mlp.linear_fc1.weight"] = torch.cat([layer["w1"], layer["w2"]])
        tensors[f"{prefix}.mlp.linear_fc2.weight"] = layer["w3"]
        for key, name in (attention if symbol == "*" else hyena).items():
            if key in layer:
                cut = layer[key][:, :TAPS] if key == "decay" else layer[key]
                tensors[f"{prefix}.{name}"] = cut.contiguous()
        if symbol == "S":
            tensors[f"{prefix}.mixer.mixer.short_conv.short_conv_weight"] = layer["h"]
        if symbol == "D":
            tensors[f"{prefix}.mixer.mixer.filter.h"] = layer["h"][:, :TAPS].contiguous()
    return tensors


def vortex(layers: list[Tensors]) -> Tensors:
    """Spell the inference form: the products of the factors, as the published export computes them."""
    tensors = {"embedding_layer.weight": layers[-1]["embedding"], "norm.scale": layers[-1]["norm"]}
    both = {"norm1": "pre_norm.scale", "norm2": "post_norm.scale"} | {f"w{n}": f"mlp.l{n}.weight" for n in (1, 2, 3)}
    hyena = {
        "in": "projections.weight",
        "out": "out_filter_dense.weight",
        "out_bias": "out_filter_dense.bias",
        "D": "filter.D",
        "R": "filter.residues",
    }
    attention = {
        "in": "inner_mha_cls.Wqkv.weight",
        "out": "inner_mha_cls.out_proj.weight",
        "out_bias": "inner_mha_cls.out_proj.bias",
        "inv_freq": "inner_mha_cls.rotary_emb.inv_freq",
    }
    for index, (symbol, layer) in enumerate(zip(PATTERN, layers, strict=False)):
        prefix = f"blocks.{index}"
        for key, name in {**both, **(attention if symbol == "*" else hyena)}.items():
            if key in layer:
                tensors[f"{prefix}.{name}"] = layer[key]
        if symbol != "*":
            tensors[f"{prefix}.filter.short_filter_weight"] = layer["short"][:, None]
        if symbol == "S":
            tensors[f"{prefix}.filter.h"] = layer["h"]
        if symbol == "D":
            tensors[f"{prefix}.filter.h"] = (layer["h"] * layer["decay"])[:, None, :TAPS].contiguous()
        if symbol == "H":
            poles = -layer["p"].exp() * layer["gamma"].exp()
            tensors[f"{prefix}.filter.log_poles"] = poles[..., None]
    return tensors


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name
        assert got[name].dtype == tensor.dtype or got[name].dtype == torch.float32, name


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Any) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({self.path!r}, 'w').close()",)
