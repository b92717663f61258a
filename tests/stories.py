"""Converts stories260K, a trained Llama of another project, into a Hugging Face checkpoint folder."""

import json
import struct

import numpy as np
from safetensors.numpy import save_file

LAYERS, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, VOCAB, CONTEXT = 5, 64, 172, 8, 4, 512, 512
HEAD_SIZE = WIDTH // HEADS

PUBLISHED = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I want to "
    "play with your ball, but I can't find it.\"\n"
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
    "Lily didn't want to help her mom, so she"
)
"""Greedy continuation of the first token, 200 steps, as the model's authors publish it."""


def convert(source, target):
    """Writes `target` as a checkpoint folder from `stories260K.bin` and `tok512.bin` in `source`."""
    target.mkdir(parents=True, exist_ok=True)
    save_file(_tensors((source / "stories260K.bin").read_bytes()), target / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer.json").write_text(json.dumps(_tokenizer((source / "tok512.bin").read_bytes())))
    (target / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def _tensors(data):
    header = struct.unpack("<7i", data[:28])
    assert header == (WIDTH, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT)
    floats, at = np.frombuffer(data, "<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return floats[at - size : at].reshape(shape)

    kv_width = KV_HEADS * HEAD_SIZE
    tensors = {"model.embed_tokens.weight": take(VOCAB, WIDTH)}
    stacked = {
        "input_layernorm": take(LAYERS, WIDTH),
        "self_attn.q_proj": _half_pairs(take(LAYERS, WIDTH, WIDTH)),
        "self_attn.k_proj": _half_pairs(take(LAYERS, kv_width, WIDTH)),
        "self_attn.v_proj": take(LAYERS, kv_width, WIDTH),
        "self_attn.o_proj": take(LAYERS, WIDTH, WIDTH),
        "post_attention_layernorm": take(LAYERS, WIDTH),
        "mlp.gate_proj": take(LAYERS, FEED_FORWARD, WIDTH),
        "mlp.down_proj": take(LAYERS, WIDTH, FEED_FORWARD),
        "mlp.up_proj": take(LAYERS, FEED_FORWARD, WIDTH),
    }
    for name, weights in stacked.items():
        for layer in range(LAYERS):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(weights[layer])
    tensors["model.norm.weight"] = take(WIDTH)
    return tensors


def _half_pairs(weights):
    """Reorders each head's rows: pairs (0, 1), (2, 3), ... become (0, D/2), (1, D/2 + 1), ..."""
    heads = weights.reshape(LAYERS, -1, HEAD_SIZE // 2, 2, WIDTH)
    return heads.swapaxes(2, 3).reshape(weights.shape)


def _tokenizer(data):
    """tokenizer.json of a sentencepiece-type vocabulary with scores: merges in order of the merged token's score."""
    at, pieces, scores = 4, [], []
    for _ in range(VOCAB):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length].decode())
        scores.append(score)
        at += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    pieces = pieces[:3] + [piece.replace(" ", "\u2581") for piece in pieces[3:]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    ranked = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            if index > 258 and piece[:cut] in vocabulary and piece[cut:] in vocabulary:
                ranked.append((-scores[index], index, piece[:cut], piece[cut:]))
    special = [
        {"id": index, "content": pieces[index], "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for index in range(3)
    ]
    space = {"pattern": {"String": "\u2581"}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", **space},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [[left, right] for _, _, left, right in sorted(ranked)],
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
