#!/usr/bin/env python3
"""Fuzzes tools/convert.py: fuzz_convert.py SECONDS DIRECTORY [SEED]. Checkpoints of every form are made here, as trees of
Python values that an encoder turns into a file (safetensors, zip and legacy pickles, GGUF, SentencePiece models, JSON);
trees are mutated, or the bytes, and convert.py runs on the result, within this process's child. What it does wrong ends
the run, and stays in DIRECTORY: an exception, an exit status other than 0, 1 and 2, more than 10 s, more than 1 GB, an
output that is changed although it failed, a file left behind, an output that `tfm` doesn't take. Needs nothing but
the standard library, and build/tfm for the last of these."""
import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TFM = os.path.join(ROOT, "build", "tfm")
SLOW, MEMORY, BEFORE = 10, 1 << 30, b"what was there before"


# ---- encoders: a tree to a file's bytes

def encode_json(tree):
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


# What every tensor is filled with. As bits of anything else (16-bit floats, quantized blocks) it is finite, too.
WEIGHTS = struct.pack("<8f", 0.1, -0.2, 0.3, -0.05, 0.4, 0.2, -0.3, 0.15)


def tensor_data(count):
    return WEIGHTS * (count // 8) + bytes(count % 8 * 4)


def encode_safetensors(tree):
    header = encode_json(tree["header"])
    size = len(header) if tree["header_size"] is None else tree["header_size"]
    return struct.pack("<Q", size) + header + tensor_data(tree["count"])


def pickled(value):
    """A value as torch.save pickles it; lists that begin with an instruction's name stand for other things."""
    if isinstance(value, list) and value[:1] == ["GLOBAL"]:
        return b"c" + value[1].encode() + b"\n" + value[2].encode() + b"\n"
    if isinstance(value, list) and value[:1] == ["TUPLE"]:
        return b"(" + b"".join(map(pickled, value[1:])) + b"t"
    if isinstance(value, list) and value[:1] == ["PERSISTENT"]:
        return pickled(value[1]) + b"Q"
    if isinstance(value, list) and value[:1] == ["CALL"]:
        return pickled(value[1]) + pickled(value[2]) + b"R"
    if isinstance(value, list):
        return b"](" + b"".join(map(pickled, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(pickled(key) + pickled(item) for key, item in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def pickle_tensors(shapes, legacy):
    """A state dict, each tensor with a storage of its own."""
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        count = math.prod(shape)
        strides = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
        reference = ["TUPLE", "storage", ["GLOBAL", "torch", "FloatStorage"], str(i), "cpu", count]
        storage = ["PERSISTENT", reference + [None] * legacy]
        state[name] = ["CALL", ["GLOBAL", "torch._utils", "_rebuild_tensor_v2"],
                       ["TUPLE", storage, 0, ["TUPLE", *shape], ["TUPLE", *strides], False,
                        ["CALL", ["GLOBAL", "collections", "OrderedDict"], ["TUPLE"]]]]
    return {"object": state, "counts": {str(i): math.prod(shape) for i, shape in enumerate(shapes.values())}}


def encode_zip(tree):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\2" + pickled(tree["object"]) + b".")
        archive.writestr("archive/byteorder", tree.get("byteorder", "little"))
        for key, count in tree["counts"].items():
            archive.writestr("archive/data/" + key, tensor_data(count))
    return out.getvalue()


def encode_legacy(tree):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [0x1950A86A20F9469CFC6C, 1001, tree.get("system", system), tree["object"], list(tree["counts"])]
    data = b"".join(b"\x80\2" + pickled(part) + b"." for part in parts)
    return data + b"".join(struct.pack("<Q", count) + tensor_data(count) for count in tree["counts"].values())


def varint(value):
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def encode_protobuf(tree):
    """[[field, value]]: integers, floats (32 bits), texts or messages."""
    out = b""
    for field, value in tree:
        if isinstance(value, float):
            out += varint(field << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(field << 3) + varint(value)
        else:
            data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else encode_protobuf(value)
            out += varint(field << 3 | 2) + varint(len(data)) + data
    return out


# GGUF's types: elements and bytes of a block.
GGUF_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 12: (256, 144),
               13: (256, 176), 14: (256, 210), 30: (1, 2)}
GGUF_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def gguf_value(kind, value):
    if kind == 8:
        data = value.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(data)) + data
    if kind == 9:
        return struct.pack("<IQ", value[0], len(value[1])) + b"".join(gguf_value(value[0], item) for item in value[1])
    return struct.pack("<" + GGUF_LETTERS.get(kind, "I"), value)


def encode_gguf(tree):
    data = b"GGUF" + struct.pack("<IQQ", tree["version"], len(tree["tensors"]) + tree["more_tensors"],
                                 len(tree["values"]) + tree["more_values"])
    for key, (kind, value) in tree["values"].items():
        data += gguf_value(8, key) + struct.pack("<I", kind) + gguf_value(kind, value)
    offset = 0
    for name, (shape, kind, moved) in tree["tensors"].items():
        data += gguf_value(8, name) + struct.pack("<I%dQIQ" % len(shape), len(shape), *shape, kind, offset + moved)
        elements, size = GGUF_BLOCKS.get(kind, (1, 4))
        offset += -(-size * math.prod(shape) // elements // 32) * 32
        if offset > 1 << 20:
            raise ValueError
    return data + bytes(-len(data) % 32) + tensor_data(offset // 4)


ENCODERS = {"json": encode_json, "safetensors": encode_safetensors, "zip": encode_zip, "legacy": encode_legacy,
            "protobuf": encode_protobuf, "gguf": encode_gguf, "text": lambda tree: tree.encode("utf-8", "surrogatepass")}


# ---- seeds: {name: (files, arguments)}; a file is (encoder, tree), the first argument is the file that is converted, or ""
# for the directory

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 12, "vocab_size": 270,
         "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "eos_token_id": [2],
         "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 16}, "hidden_act": "silu", "rope_theta": 10000.0}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16, "vocab_size": 260,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "eos_token_id": 256}


def llama_shapes():
    block = {"self_attn.q_proj": [8, 8], "self_attn.k_proj": [4, 8], "self_attn.v_proj": [4, 8],
             "self_attn.o_proj": [8, 8], "mlp.gate_proj": [12, 8], "mlp.up_proj": [12, 8], "mlp.down_proj": [8, 12],
             "input_layernorm": [8], "post_attention_layernorm": [8]}
    shapes = {"model.layers.0.%s.weight" % name: shape for name, shape in block.items()}
    return {"model.embed_tokens.weight": [270, 8], "model.norm.weight": [8], "lm_head.weight": [270, 8], **shapes}


def gpt2_shapes():
    block = {"ln_1.weight": [8], "ln_1.bias": [8], "attn.c_attn.weight": [8, 24], "attn.c_attn.bias": [24],
             "attn.c_proj.weight": [8, 8], "attn.c_proj.bias": [8], "ln_2.weight": [8], "ln_2.bias": [8],
             "mlp.c_fc.weight": [8, 32], "mlp.c_fc.bias": [32], "mlp.c_proj.weight": [32, 8], "mlp.c_proj.bias": [8]}
    return {"wte.weight": [260, 8], "wpe.weight": [16, 8], "ln_f.weight": [8], "ln_f.bias": [8],
            **{"h.0." + name: shape for name, shape in block.items()}}


BERT = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 12,
        "vocab_size": 9, "max_position_embeddings": 16, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "pad_token_id": 0}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 8, "num_heads": 2, "num_layers": 1,
      "num_decoder_layers": 1, "d_kv": 4, "d_ff": 12, "vocab_size": 8, "feed_forward_proj": "gated-gelu",
      "tie_word_embeddings": False, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
      "layer_norm_epsilon": 1e-6, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def linears(shapes):
    """With the biases of every matrix and norm."""
    return {name + end: shape if end == ".weight" else shape[:1] for name, shape in shapes.items()
            for end in (".weight", ".bias")}


def bert_shapes(head):
    block = {"attention.self.query": [8, 8], "attention.self.key": [8, 8], "attention.self.value": [8, 8],
             "attention.output.dense": [8, 8], "attention.output.LayerNorm": [8], "intermediate.dense": [12, 8],
             "output.dense": [8, 12], "output.LayerNorm": [8]}
    tables = {"word": [9, 8], "position": [16, 8], "token_type": [2, 8]}
    model = {"embeddings.LayerNorm": [8], **{"encoder.layer.0." + name: shape for name, shape in block.items()}}
    model = {**{"embeddings.%s_embeddings.weight" % name: shape for name, shape in tables.items()}, **linears(model)}
    heads = {"lm": {"cls.predictions.transform.dense": [8, 8], "cls.predictions.transform.LayerNorm": [8],
                    "cls.predictions.decoder": [9, 8]},
             "sequence": {"bert.pooler.dense": [8, 8], "classifier": [2, 8]}, "token": {"classifier": [3, 8]}}
    if head is None:
        return {**model, **linears({"pooler.dense": [8, 8]})}
    return {**{"bert." + name: shape for name, shape in model.items()}, **linears(heads[head])}


def t5_shapes():
    shapes = {"shared": [8, 8], "lm_head": [8, 8]}
    for stack, sublayers in (("encoder", ("SelfAttention", "")), ("decoder", ("SelfAttention", "EncDecAttention", ""))):
        for i, attention in enumerate(sublayers):
            layer = "%s.block.0.layer.%d." % (stack, i)
            shapes[layer + "layer_norm"] = [8]
            if attention:
                shapes.update((layer + attention + "." + name, [8, 8]) for name in "qkvo")
            else:
                ffn = {"wi_0": [12, 8], "wi_1": [12, 8], "wo": [8, 12]}
                shapes.update((layer + "DenseReluDense." + name, shape) for name, shape in ffn.items())
        shapes[stack + ".block.0.layer.0.SelfAttention.relative_attention_bias"] = [8, 2]
        shapes[stack + ".final_layer_norm"] = [8]
    return {name + ".weight": shape for name, shape in shapes.items()}


def torch_shapes(stack, prefix):
    """One layer of an nn.TransformerEncoder or an nn.TransformerDecoder, and the norm after it."""
    attentions = ("self_attn",) if stack == "encoder" else ("self_attn", "multihead_attn")
    shapes = linears({"linear1": [12, 8], "linear2": [8, 12], **{name + ".out_proj": [8, 8] for name in attentions},
                      **{"norm%d" % (i + 1): [8] for i in range(len(attentions) + 1)}})
    for name in attentions:
        shapes.update({name + ".in_proj_weight": [24, 8], name + ".in_proj_bias": [24]})
    return {**{prefix + "layers.0." + name: shape for name, shape in shapes.items()}, prefix + "norm.weight": [8],
            prefix + "norm.bias": [8]}


def safetensors(shapes):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * math.prod(shape)]}
        at += 4 * math.prod(shape)
    return "safetensors", {"header": header, "header_size": None, "count": at // 4}


def byte_letters():
    """GPT-2's characters for bytes, by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def byte_bpe():
    tokens = byte_letters() + ["<|endoftext|>", "he", "ll", "hell"]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": True, "lstrip": False, "rstrip": False,
                              "normalized": False, "single_word": False}],
            "normalizer": None, "pre_tokenizer": step, "decoder": step,
            "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
                               "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                               "special_tokens": {}},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
                      "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": [["h", "e"], ["l", "l"], ["he", "ll"]]}}


def unigram():
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["\u2581", -2.0], ["a", -3.0], ["b", -3.5], ["\u2581ab", -4.0]]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    return {"added_tokens": [{"id": i, "content": pieces[i][0], "special": True, "normalized": False, "lstrip": False,
                              "rstrip": False, "single_word": False} for i in range(3)],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": " {2,}"},
                                                                "content": "\u2581"}]},
            "pre_tokenizer": space, "decoder": space,
            "post_processor": {"type": "TemplateProcessing", "pair": [],
                               "single": [{"Sequence": {"id": "A", "type_id": 0}},
                                          {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                               "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
            "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False}}


def wordpiece():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##a", "##b"]
    return {"added_tokens": [{"id": i, "content": tokens[i], "special": True, "normalized": False, "lstrip": False,
                              "rstrip": False, "single_word": False} for i in range(5)],
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                           "strip_accents": None, "lowercase": True},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": {token: i for i, token in enumerate(tokens)}}}


def llama_pieces():
    return ([("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)] + [("<0x%02X>" % i, 0.0, 6) for i in range(256)] +
            [("ab", -1.0, 1), ("\u2581", -2.0, 1), ("a", -3.0, 1), ("b", -4.0, 1), ("<user>", 0.0, 4)])


def sentencepiece(kind, pieces, **roles):
    trainer = [[3, kind], [35, int(any(piece[2] == 6 for piece in pieces))]] + [[{"pad": 43}[k], v] for k, v in roles.items()]
    return "protobuf", ([[1, [[1, text], [2, score], [3, role]]] for text, score, role in pieces] +
                        [[2, trainer], [3, [[1, "identity"], [3, 1], [4, 0], [5, 1]]]])


def gguf_blocks():
    """A model with a matrix of each quantized type; rows of 256, where the larger blocks need that."""
    _, tree = gguf()
    sizes = {"embedding_length": 256, "attention.head_count": 2, "attention.key_length": 16, "attention.value_length": 16}
    tree["values"] = {key: value for key, value in tree["values"].items() if not key.startswith("tokenizer.")}
    tree["values"].update({"llama." + key: [4, size] for key, size in sizes.items()})
    for name in list(tree["tensors"]):
        if name.endswith("norm.weight"):
            tree["tensors"][name] = [[256], 0, 0]
    tree["tensors"]["token_embd.weight"] = [[256, 16], 8, 0]
    for name, shape, kind in (("attn_q", [256, 32], 12), ("attn_k", [256, 32], 13), ("attn_v", [256, 32], 14),
                              ("attn_output", [32, 256], 6), ("ffn_gate", [256, 32], 2), ("ffn_up", [256, 32], 3),
                              ("ffn_down", [32, 256], 7)):
        tree["tensors"]["blk.0.%s.weight" % name] = [shape, kind, 0]
    return "gguf", tree


def gguf():
    sizes = {"embedding_length": 32, "block_count": 1, "context_length": 20, "attention.head_count": 2,
             "feed_forward_length": 32}
    pieces = llama_pieces()
    values = {"general.architecture": [8, "llama"], **{"llama." + key: [4, size] for key, size in sizes.items()},
              "llama.attention.layer_norm_rms_epsilon": [6, 1e-5], "tokenizer.ggml.model": [8, "llama"],
              "tokenizer.ggml.tokens": [9, [8, [piece[0] for piece in pieces]]],
              "tokenizer.ggml.scores": [9, [6, [piece[1] for piece in pieces]]],
              "tokenizer.ggml.token_type": [9, [5, [piece[2] for piece in pieces]]],
              "tokenizer.ggml.bos_token_id": [4, 1], "tokenizer.ggml.eos_token_id": [4, 2]}
    tensors = {"token_embd.weight": [[32, len(pieces)], 0, 0], "output_norm.weight": [[32], 0, 0],
               "blk.0.attn_norm.weight": [[32], 0, 0], "blk.0.ffn_norm.weight": [[32], 0, 0]}
    tensors.update(("blk.0.%s.weight" % name, [[32, 32], 0, 0]) for name in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
    return "gguf", {"version": 3, "more_tensors": 0, "more_values": 0, "values": values, "tensors": tensors}


def seeds():
    llama, spiece = ("json", LLAMA), sentencepiece(2, llama_pieces())
    t5 = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("\u2581", -2.0, 1), ("a", -3.0, 1), ("b", -3.0, 1)]
    shards = [dict(list(llama_shapes().items())[part::2]) for part in range(2)]
    index = {name: "model-%d.safetensors" % (part + 1) for part in range(2) for name in shards[part]}
    nano = pickle_tensors({"transformer." + name: shape[::-1] if name.startswith("h.") else shape
                           for name, shape in gpt2_shapes().items()}, False)
    nano["object"] = {"model": {**nano["object"], "lm_head.weight": nano["object"]["transformer.wte.weight"]},
                      "model_args": {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": True,
                                     "vocab_size": 260, "dropout": 0.0}, "iter_num": 3, "config": {}}
    bert_pieces = ("json", wordpiece())
    modules = [{"idx": i, "name": str(i), "path": path, "type": "sentence_transformers.models." + kind}
               for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))]
    torch_options = ("json", {"nhead": 2, "activation": "gelu", "norm_first": True, "layer_norm_eps": 1e-5})
    both = {**torch_shapes("encoder", "encoder."), **torch_shapes("decoder", "decoder.")}
    split = {name.replace("in_proj_weight", part + "_proj_weight"): [8, 8] if "in_proj_weight" in name else shape
             for part in "qkv" for name, shape in torch_shapes("encoder", "net.").items()}
    return {
        "gpt2": ({"config.json": ("json", GPT2), "model.safetensors": safetensors(gpt2_shapes()),
                  "tokenizer.json": ("json", byte_bpe())}, [""]),
        "llama": ({"config.json": llama, "model.safetensors": safetensors(llama_shapes()), "tokenizer.model": spiece}, [""]),
        "shards": ({"config.json": llama,
                    "model.safetensors.index.json": ("json", {"metadata": {"total_size": 0}, "weight_map": index}),
                    "model-1.safetensors": safetensors(shards[0]), "model-2.safetensors": safetensors(shards[1])}, [""]),
        "zip": ({"config.json": llama, "pytorch_model.bin": ("zip", pickle_tensors(llama_shapes(), False))}, [""]),
        "legacy": ({"config.json": llama, "pytorch_model.bin": ("legacy", pickle_tensors(llama_shapes(), True))}, [""]),
        "nanogpt": ({"ckpt.pt": ("zip", nano)}, ["ckpt.pt"]),
        "bert_lm": ({"config.json": ("json", {**BERT, "architectures": ["BertForMaskedLM"]}), "tokenizer.json": bert_pieces,
                     "model.safetensors": safetensors(bert_shapes("lm"))}, [""]),
        "bert_sequence": ({"config.json": ("json", {**BERT, "architectures": ["BertForSequenceClassification"],
                                                    "id2label": {"0": "no", "1": "yes"}}), "tokenizer.json": bert_pieces,
                           "model.safetensors": safetensors(bert_shapes("sequence"))}, [""]),
        "bert_token": ({"config.json": ("json", {**BERT, "architectures": ["BertForTokenClassification"]}),
                        "pytorch_model.bin": ("zip", pickle_tensors(bert_shapes("token"), False))}, [""]),
        "sentences": ({"modules.json": ("json", modules), "config.json": ("json", {**BERT, "architectures": ["BertModel"]}),
                       "1_Pooling/config.json": ("json", {"word_embedding_dimension": 8, "pooling_mode_cls_token": False,
                                                          "pooling_mode_mean_tokens": True}),
                       "sentence_bert_config.json": ("json", {"max_seq_length": 12, "do_lower_case": False}),
                       "config_sentence_transformers.json": ("json", {"default_prompt_name": None, "prompts": {}}),
                       "tokenizer.json": bert_pieces, "model.safetensors": safetensors(bert_shapes(None))}, [""]),
        "t5": ({"config.json": ("json", T5), "model.safetensors": safetensors(t5_shapes()),
                "tokenizer_config.json": ("json", {"extra_ids": 2, "tokenizer_class": "T5Tokenizer"}),
                "spiece.model": sentencepiece(1, t5, pad=0)}, [""]),
        "torch": ({"model.pt": ("zip", pickle_tensors(both, False)), "options.json": torch_options},
                  ["model.pt", "--arch", "nn.Transformer", "--config", "options.json"]),
        "torch_split": ({"model.safetensors": safetensors(split), "options.json": torch_options},
                        ["model.safetensors", "--arch", "nn.TransformerEncoder", "--config", "options.json"]),
        "gguf": ({"model.gguf": gguf()}, ["model.gguf"]),
        "gguf_blocks": ({"model.gguf": gguf_blocks()}, ["model.gguf"]),
        "byte_bpe": ({"tokenizer.json": ("json", byte_bpe())}, [""]),
        "unigram": ({"tokenizer.json": ("json", unigram())}, [""]),
        "wordpiece": ({"tokenizer.json": ("json", wordpiece())}, [""]),
        "vocab": ({"vocab.txt": ("text", "\n".join(wordpiece()["model"]["vocab"]) + "\n"),
                   "tokenizer_config.json": ("json", {"do_lower_case": True, "tokenizer_class": "BertTokenizer",
                                                      "model_max_length": 512, "strip_accents": None})}, [""]),
        "merges": ({"vocab.json": ("json", byte_bpe()["model"]["vocab"]), "merges.txt": ("text", "#version: 0.2\nh e\nl l\n"),
                    "special_tokens_map.json": ("json", {"eos_token": {"content": "<|endoftext|>", "lstrip": False}})}, [""]),
        "spiece": ({"spiece.model": sentencepiece(1, t5, pad=0)}, [""]),
        "sentencepiece": ({"tokenizer.model": spiece}, [""]),
    }


# ---- mutations

WORDS = ["", "F16", "BF16", "F64", "I64", "F8_E4M3", "BPE", "Unigram", "WordPiece", "gpt2", "gelu", "yarn", "linear",
         "\udc80", "\0", "a" * 5000, "../x", "/etc/hostname", "torch", "HalfStorage", "os", "system", "\u2581", "[UNK]",
         "tokenizer.model", "ByteLevel", "Sequence", "Split"]
NUMBERS = [0, 1, -1, 2, 3, 7, 8, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 63) - 1, 1 << 63,
           (1 << 64) - 1, 1 << 64, 10 ** 30, -(1 << 63), 0.5, -0.0, 1e308, 1e-320, math.inf, -math.inf, math.nan]


def places(tree, found):
    """(container, key) of everything in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found.append((tree, key))
        places(value, found)
    return found


def another(value, rng):
    """What takes a value's place: something close, or of another type."""
    choice = rng.randrange(8)
    if choice < 3 and isinstance(value, (int, float)) and not isinstance(value, bool):
        return value + rng.choice([-1, 1, 2, -2]) if choice else rng.choice(NUMBERS)
    if choice < 3 and isinstance(value, str):
        return rng.choice([value[:-1], value + "x", value * 2, value.upper(), rng.choice(WORDS)])
    if choice < 3 and isinstance(value, bool):
        return not value
    if choice == 3:
        nested = []
        for _ in range(rng.choice([1, 10, 2000])):
            nested = [nested] if rng.randrange(2) else {"a": nested}
        return nested
    return rng.choice([None, True, False, [], {}, [value], {"a": value}, rng.choice(NUMBERS), rng.choice(WORDS),
                       str(value)[:1000], copy.deepcopy(value)])


def mutate_tree(tree, rng):
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not isinstance(tree, (dict, list)) or rng.randrange(60) == 0:
            return another(tree, rng)
        found = places(tree, [])
        if not found:
            return tree
        # a level first, so that a long vocabulary doesn't take all of the changes
        holders = list({id(container): container for container, _ in found}.values())
        container = rng.choice(holders)
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = rng.choice(keys)
        choice = rng.randrange(8)
        if choice == 0:
            del container[key]
        elif choice == 1 and isinstance(container, dict):
            container[rng.choice([rng.choice(WORDS), str(key) + "x", str(rng.choice(keys))])] = container.pop(key)
        elif choice == 1:
            container.insert(key, copy.deepcopy(container[key]))
        elif choice == 2:
            container[key] = copy.deepcopy(container[rng.choice(keys)])
        else:
            container[key] = another(container[key], rng)
    return tree


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if not data:
            return b""
        # what is before the weights matters more
        at = rng.randrange(min(len(data), rng.choice([16, 256, 4096, len(data)])))
        if rng.randrange(6) == 0:
            at = len(data) - 1 - min(at, len(data) - 1)
        choice = rng.randrange(7)
        if rng.randrange(40) == 0:  # deeply nested
            data[at:at] = rng.choice([b"[", b"(", b"]", b'{"a":', b"}", b"\x85", b" "]) * rng.choice([100, 3000, 100000])
        elif choice == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            data[at] = rng.choice(b"\0\xff\x7f\x80()[]{}tueQRcX.\x80\x8a\"\\,:PKh") if rng.randrange(3) else rng.randrange(256)
        elif choice == 2:
            width = rng.choice([1, 2, 4, 8])
            data[at:at + width] = (int(rng.choice(NUMBERS[:18])) & (1 << 8 * width) - 1).to_bytes(width, "little")
        elif choice == 3:
            del data[at:at + rng.choice([1, 2, 8, 100])]
        elif choice == 4:
            size = rng.choice([1, 2, 8, 100])
            data[at:at] = data[at:at + size]
        elif choice == 5:
            del data[at:]
        else:
            other = rng.randrange(len(data))
            data[at:at + 8] = data[other:other + 8]
    return bytes(data)


def mutated(files, rng):
    """The files' bytes, most of them as they were."""
    out = {name: ENCODERS[kind](tree) for name, (kind, tree) in files.items()}
    for name in rng.sample(sorted(files), 1 if rng.randrange(4) else min(2, len(files))):
        kind, tree = files[name]
        if rng.randrange(4):
            with contextlib.suppress(Exception):  # a tree that its encoder can't express
                out[name] = ENCODERS[kind](mutate_tree(tree, rng))
        if rng.randrange(3) == 0:
            out[name] = mutate_bytes(out[name], rng)
        if rng.randrange(200) == 0:
            del out[name]
    return out


# ---- running it

class TooSlow(BaseException):
    pass


def too_slow(*_):
    raise TooSlow


def load_converter():
    spec = importlib.util.spec_from_file_location("convert", os.path.join(ROOT, "tools", "convert.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_case(directory, files):
    shutil.rmtree(os.path.join(directory, "in"), ignore_errors=True)
    os.makedirs(os.path.join(directory, "out"), exist_ok=True)
    for name, data in files.items():
        path = os.path.join(directory, "in", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, "out", "a.npy"))
    with open(os.path.join(directory, "out", "a.tfm"), "wb") as file:
        file.write(BEFORE)


def command(directory, files, arguments):
    """The arguments of convert.py, with the paths of the files."""
    paths = [os.path.join(directory, "in", word) if word in files or not word else word for word in arguments]
    return [paths[0], os.path.join(directory, "out", "a.tfm")] + paths[1:]


def run_case(convert, directory, arguments):
    """(exit status or None, what is wrong or None)"""
    said, out = io.StringIO(), arguments[1]
    signal.setitimer(signal.ITIMER_REAL, SLOW)
    try:
        with contextlib.redirect_stderr(said):
            status = convert.main(arguments)
    except TooSlow:
        return None, "takes more than %d s" % SLOW
    except BaseException:
        return None, traceback.format_exc(limit=-12)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    lines = said.getvalue().strip()
    if status not in (0, 1, 2):
        return status, "exit status %s" % status
    if "out of memory" in lines:
        return status, "takes more than %d bytes of memory" % MEMORY
    if status and (not lines.startswith("convert.py: ") or "\n" in lines):
        return status, "not one sentence: " + lines[:500]
    if os.listdir(os.path.dirname(out)) != ["a.tfm"]:
        return status, "left behind: %s" % os.listdir(os.path.dirname(out))
    with open(out, "rb") as file:
        if (file.read(len(BEFORE)) == BEFORE) != (status != 0):
            return status, "exit status %d, but the output is not what it should be" % status
    return status, refused(out) if status == 0 and os.path.exists(TFM) else None


def refused(path):
    """What the program `tfm` says of a file that it can neither evaluate as a model nor use as a tokenizer."""
    said = []
    for command in (["info", path], ["tokenize", path], ["dump", path, "--ids", "0", "--what", "hidden", "-o", path[:-3] + "npy"]):
        done = subprocess.run([TFM] + command, input=b"a b", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
        said.append("tfm %s, exit status %d: %s" % (command[0], done.returncode, done.stderr.decode(errors="replace")))
        if b"is not finite" in done.stderr:  # a quantized block's scale: data, at which convert.py doesn't look
            return None
        if done.returncode not in (0, 1) or command[0] == "info" and done.returncode:
            return said[-1]
        if command[0] != "info" and done.returncode == 0:
            return None
        if b"no token embeddings" in done.stderr:  # layers alone: it was loaded
            return None
    return "".join(said)


def work(seconds, directory, seed):
    """In a child process: its memory is limited, and if it dies the case is still there. Returns an exit status."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, too_slow)
    convert, rng, done, n, converted = load_converter(), random.Random(seed), time.monotonic() + seconds, 0, 0
    case, known = os.path.join(directory, "case"), seeds()
    for name, (files, arguments) in known.items():
        write_case(case, {key: ENCODERS[kind](tree) for key, (kind, tree) in files.items()})
        status, wrong = run_case(convert, case, command(case, files, arguments))
        if status != 0 or wrong:
            print("the seed %s: exit status %s; %s" % (name, status, wrong))
            return 1
    while time.monotonic() < done:
        files, arguments = known[rng.choice(list(known))]
        arguments = command(case, files, arguments)
        write_case(case, mutated(files, rng))
        status, wrong = run_case(convert, case, arguments)
        n += 1
        converted += status == 0
        if wrong:
            print("convert.py %s: %s" % (" ".join(arguments), wrong))
            print("number_of_executed_units: %d" % n)
            return 1
    print("%d of them converted" % converted)
    print("number_of_executed_units: %d" % n)
    return 0


def main():
    seconds, directory = float(sys.argv[1]), sys.argv[2]
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else int.from_bytes(os.urandom(4), "little")
    print("seed %d" % seed, flush=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = work(seconds, directory, seed)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    _, state = os.waitpid(child, 0)
    if os.WIFSIGNALED(state):
        print("convert.py was ended by signal %d; its input is %s/case/in" % (os.WTERMSIG(state), directory))
        return 1
    return os.WEXITSTATUS(state)


if __name__ == "__main__":
    sys.exit(main())
