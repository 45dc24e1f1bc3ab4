#!/usr/bin/env python3
"""Writes tests/golden/: inputs, weights and expected outputs from PyTorch and transformers, for the C tests.

usage: tests/make_golden.py [--check] [--demo CHECKPOINT] [layers] [options] [models] [encoders] [tokenizer] [wordpiece]
                            [sentencepiece] [sampling] [beams] [vectors]

Needs torch, transformers, sentencepiece and protobuf. Everything is seeded: the same versions write the same files. --check writes nothing: it
says whether the files are what would be written, but for the last bits of random numbers, which other CPUs compute
otherwise. Expected values are computed
in float64 from weights and inputs that are exact in float32, so that they are what PyTorch means and not how it rounds.

--demo is the checkpoint directory of the demo model (examples/models/stories.tfm), whose tokenizer the tokenizer's
golden file is for; without it that file is not checked.

The files are .tfm files (see tfm.h): arrays by name. So the tests read them with tfm_file_find.
"""

import argparse
import copy
import io
import itertools
import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
import types
import unicodedata
import zlib

import sentencepiece
import tokenizers
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from torch import nn

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
GOLDEN = os.path.join(TESTS, "golden")


def quiet():
    """No warnings and progress bars from transformers."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# A .tfm file of arrays
# ---------------------------------------------------------------------------------------------------------------------

def padded(data, alignment=8):
    return data + bytes(-len(data) % alignment)


class Arrays:
    """Arrays by name: float32 and float16 tensors, integers (int32) and bytes."""
    BYTES, I32 = 4, 5
    DTYPES = {torch.float32: (1, "<f4"), torch.float16: (2, "<f2")}

    def __init__(self):
        self.tensors = {}
        self.meta = {}

    def floats(self, name, tensor, dtype=torch.float32):
        assert name not in self.tensors, name
        self.tensors[name] = tensor.detach().to(dtype).contiguous()

    def ints(self, name, values):
        values = list(values)
        assert name not in self.meta, name
        self.meta[name] = (self.I32, struct.pack("<%di" % len(values), *values))

    def bytes(self, name, data):
        assert name not in self.meta, name
        self.meta[name] = (self.BYTES, data)

    def directory(self, start):
        """The tensor directory and the data, for data that starts at `start`."""
        entries, data = [], b""
        for name, tensor in self.tensors.items():
            code, kind = self.DTYPES[tensor.dtype]
            raw = tensor.numpy().astype(kind).tobytes()
            data = padded(data, 64)
            shape = list(tensor.shape) + [1] * (4 - tensor.dim())
            entries.append(struct.pack("<4I4QQQII", len(name), code, 0, tensor.dim(), *shape, start + len(data),
                                       len(raw), zlib.crc32(raw), 0) + padded(name.encode()))
            data += raw
        return b"".join(entries), data

    def write(self, path):
        meta = b"".join(struct.pack("<IIQ", len(key), kind, len(value)) + padded(key.encode()) + padded(value)
                        for key, (kind, value) in self.meta.items())
        before = 64 + len(meta) + len(self.directory(0)[0])
        start = before + -before % 64
        directory, data = self.directory(start)
        header = struct.pack("<8sIIQQQQQI", b"TFMH\r\n\x1a\n", 1, 0, start + len(data), 64, len(meta), 64 + len(meta),
                             len(directory), len(self.tensors))
        front = header + struct.pack("<I", zlib.crc32(header + meta + directory)) + meta + directory
        with open(path, "wb") as file:
            file.write(padded(front, 64) + data)


def read_arrays(path):
    """All arrays of a .tfm file by name: metadata as bytes, tensors flat. Of another file its bytes."""
    with open(path, "rb") as file:
        data = file.read()
    if not path.endswith(".tfm"):
        return {"text": data}
    meta_at, meta_size, directory_at, _, n_tensors = struct.unpack_from("<QQQQI", data, 24)
    arrays, at = {}, meta_at
    while at < meta_at + meta_size:
        key_size, _, size = struct.unpack_from("<IIQ", data, at)
        value = at + 16 + key_size + -key_size % 8
        arrays["metadata " + data[at + 16:at + 16 + key_size].decode()] = data[value:value + size]
        at = value + size + -size % 8
    at = directory_at
    for _ in range(n_tensors):
        name_size, dtype = struct.unpack_from("<II", data, at)
        offset, size = struct.unpack_from("<QQ", data, at + 48)
        dtype = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16}[dtype]
        tensor = torch.frombuffer(bytearray(data[offset:offset + size]), dtype=dtype)
        arrays[data[at + 72:at + 72 + name_size].decode()] = tensor
        at += 72 + name_size + -name_size % 8
    return arrays


def differences(found, expected):
    """The names of the arrays that differ."""
    names = [name for name in sorted(set(found) | set(expected)) if name not in found or name not in expected]
    for name in sorted(set(found) & set(expected)):
        a, b = found[name], expected[name]
        if isinstance(a, bytes) or isinstance(b, bytes) or a.dtype != b.dtype or a.shape != b.shape:
            same = isinstance(a, bytes) and a == b
        else:
            finite = b.isfinite()
            limit = b[finite].abs().max().item() * (1e-5 if a.dtype == torch.float32 else 1e-2) if finite.any() else 0
            same = torch.equal(a[~finite], b[~finite]) and bool(((a - b)[finite].abs() <= limit).all())
        if not same:
            names.append(name)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {  # PyTorch's, in float64
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": transformers.activations.ACT2FN["quick_gelu"],
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
ACTIVATION_CODES = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "silu": 5, "tanh": 6}  # tfm.h's


def randn(*shape):
    """Normal numbers that are exact in float32, as float64."""
    return torch.randn(*shape, dtype=torch.float32).double()


def shaken(module, scale=1.0):
    """The module with weights that leave nothing at its initial 0 or 1, exact in float16, as float64."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(scale)
    return module.half().double().eval()


def put_linear(out, name, weight, bias):
    """Weight and bias; a matrix in float16, which is exact (see shaken) and small."""
    out.floats(name + ".weight", weight, torch.float16 if weight.dim() == 2 else torch.float32)
    if bias is not None:
        out.floats(name + ".bias", bias)


def norm_cases(out):
    cases = []
    for kind, n, bias in itertools.product(("layer", "rms"), (1, 7, 16, 33, 100), (True, False)):
        if kind == "rms" and bias:
            continue
        norm = nn.LayerNorm(n, bias=bias, eps=1e-5) if kind == "layer" else nn.RMSNorm(n, eps=1e-6)
        norm = shaken(norm)
        x = randn(5, n) * torch.tensor([1, 1e-3, 40, 1, 1]).double()[:, None] \
            + torch.tensor([0, 0, 0, 5, 0]).double()[:, None]
        x[4] = 0
        x = x.float().double()
        name = "norm.%d" % len(cases)
        out.ints(name, [kind == "rms", 5, n, bias])
        out.floats(name + ".eps", torch.tensor([norm.eps]))
        out.floats(name + ".x", x)
        put_linear(out, name, norm.weight, norm.bias if kind == "layer" else None)
        out.floats(name + ".y", norm(x))
        cases.append(name)
    out.ints("norm", [len(cases)])


def activation_cases(out):
    large = torch.tensor([13, 20, 50, 87, 88, 89, 100, 1e4, 1e10, 1e30])
    small = torch.tensor([0, 1e-30, 1e-10, 1e-4, 1e-2])
    x = torch.cat([torch.linspace(-12, 12, 241), large, -large, small, -small]).float()
    out.floats("activation.x", x)
    for name, function in ACTIVATIONS.items():
        out.floats("activation." + name, function(x.double()))


def linear_cases(out):
    shapes = [(1, 1, 1, True), (7, 33, 3, True), (16, 16, 5, False), (33, 49, 2, True), (100, 7, 9, False),
              (3, 17, 270, True)]
    for i, (n_in, n_out, rows, bias) in enumerate(shapes):
        name = "linear.%d" % i
        linear = nn.Linear(n_in, n_out, bias=bias).double()
        x = randn(rows, n_in)
        out.ints(name, [n_out, n_in, rows, bias])
        out.floats(name + ".x", x)
        out.floats(name + ".weight", linear.weight)  # not rounded: the test packs it into each type
        if bias:
            out.floats(name + ".bias", linear.bias)
        for suffix, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
            if suffix != "f32" and rows > 100:
                continue  # one large case is enough
            out.floats("%s.%s" % (name, suffix),
                       nn.functional.linear(x, linear.weight.to(dtype).double(), linear.bias))
    out.ints("linear", [len(shapes)])


def put_attention(out, name, heads, kv_heads, head_dim, causal, lengths, x, y, mask=None):
    """What the test reads of an attention or a block: its shape, its sequences' lengths, the rows of all of them."""
    out.ints(name, [heads, kv_heads, head_dim, x.shape[-1], causal, mask is not None])
    out.ints(name + ".lengths", lengths)
    out.floats(name + ".x", x)
    out.floats(name + ".y", y)
    if mask is not None:
        out.floats(name + ".mask", mask)


def float_mask(length):
    """Scores to add, a fourth of them -infinity, but every token sees itself."""
    mask = randn(length, length)
    mask[torch.rand(length, length) < 0.25] = -math.inf
    mask.fill_diagonal_(0.5)
    return mask


def causal_mask(length):
    return torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)


def ragged(lengths, width):
    """Sequences of several lengths, padded, with the mask of the padding and the indexes of what is none."""
    x = randn(len(lengths), max(lengths), width)
    padding = torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]
    return x, padding, ~padding


def masks_of(kind, length):
    """Causal or not; the mask that PyTorch gets; the one that the C test gives besides the causal flag."""
    if kind == "causal":
        return True, causal_mask(length), None
    if kind == "mask":
        mask = float_mask(length)
        return False, mask, mask
    if kind == "causal mask":
        mask = float_mask(length)
        return True, mask + causal_mask(length), mask
    return False, None, None


def multihead_cases(out, cases):
    """nn.MultiheadAttention: one sequence, with and without masks; then several lengths with key padding."""
    shapes = [(1, 1, 1, ""), (7, 1, 1, "causal"), (12, 3, 5, ""), (12, 3, 17, "causal"), (21, 3, 20, "mask"),
              (25, 25, 9, "causal mask"), (8, 2, 40, "mask"), (4, 2, 270, "causal")]
    for width, heads, length, kind in shapes:
        attention = shaken(nn.MultiheadAttention(width, heads, batch_first=True), 2)
        causal, mask, given = masks_of(kind, length)
        x = randn(1, length, width) * 1.5
        y = attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        put_multihead(out, cases, attention, causal, [length], x[0], y[0], given)
    for width, heads, lengths, kind in [(15, 3, [4, 1, 30], ""), (10, 5, [1, 140, 1, 7], "causal")]:
        attention = shaken(nn.MultiheadAttention(width, heads, batch_first=True), 2)
        causal, mask, _ = masks_of(kind, max(lengths))
        x, padding, real = ragged(lengths, width)
        mask = mask.isinf() if causal else None  # of the padding's type
        y = attention(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]
        put_multihead(out, cases, attention, causal, lengths, x[real], y[real])
    # Padding as a mask: the same columns of -infinity for every row, the padding's own included.
    attention = shaken(nn.MultiheadAttention(9, 3, batch_first=True, bias=False), 2)
    x, padding, _ = ragged([20], 9)
    padding[0, 13:] = True
    y = attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    mask = torch.zeros(20, 20).masked_fill(padding, -math.inf)
    put_multihead(out, cases, attention, False, [20], x[0], y[0], mask)


def put_multihead(out, cases, attention, causal, lengths, x, y, mask=None):
    name = "attention.%d" % len(cases)
    cases.append(name)
    heads = attention.num_heads
    put_attention(out, name, heads, heads, attention.head_dim, causal, lengths, x, y, mask)
    put_linear(out, name + ".qkv", attention.in_proj_weight, attention.in_proj_bias)
    put_linear(out, name + ".out", attention.out_proj.weight, attention.out_proj.bias)


def grouped(qkv, out, x, heads, kv_heads, head_dim, causal):
    """Attention with heads in groups, by PyTorch's scaled_dot_product_attention. x [tokens, d_model]."""
    q, k, v = qkv(x).split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(0, 1)[None] for part in (q, k, v))
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out(y[0].transpose(0, 1).flatten(1))


def grouped_cases(out, cases):
    shapes = [(4, 2, 5, 11, [13], True), (6, 1, 3, 10, [9, 2], False), (6, 3, 8, 16, [1, 40], True),
              (5, 5, 7, 12, [6], True), (50, 1, 1, 10, [1, 3], True), (4, 1, 6, 5, [135], True)]
    for heads, kv_heads, head_dim, width, lengths, causal in shapes:
        qkv = shaken(nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False), 3)
        projection = shaken(nn.Linear(heads * head_dim, width))
        x = [randn(length, width) for length in lengths]
        y = [grouped(qkv, projection, part, heads, kv_heads, head_dim, causal) for part in x]
        name = "attention.%d" % len(cases)
        cases.append(name)
        put_attention(out, name, heads, kv_heads, head_dim, causal, lengths, torch.cat(x), torch.cat(y))
        put_linear(out, name + ".qkv", qkv.weight, None)
        put_linear(out, name + ".out", projection.weight, projection.bias)


def llama_mlp(width, hidden, activation, bias):
    config = types.SimpleNamespace(hidden_size=width, intermediate_size=hidden, hidden_act=activation, mlp_bias=bias)
    return shaken(transformers.models.llama.modeling_llama.LlamaMLP(config), 2)


def put_gated(out, name, mlp):
    bias = mlp.gate_proj.bias
    put_linear(out, name + ".up", torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
               None if bias is None else torch.cat([bias, mlp.up_proj.bias]))
    put_linear(out, name + ".down", mlp.down_proj.weight, mlp.down_proj.bias)


def ffn_cases(out):
    cases = []
    for gated, width, hidden, rows, activation, bias in [
            (False, 7, 29, 5, "relu", True), (False, 16, 33, 1, "gelu", False), (False, 3, 50, 260, "gelu_tanh", True),
            (True, 10, 23, 6, "silu", False), (True, 17, 50, 3, "gelu_tanh", True), (True, 1, 1, 2, "silu", True)]:
        name = "ffn.%d" % len(cases)
        cases.append(name)
        x = randn(rows, width)
        if gated:
            mlp = llama_mlp(width, hidden, {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation), bias)
            put_gated(out, name, mlp)
            y = mlp(x)
        else:
            up = shaken(nn.Linear(width, hidden, bias=bias), 2)
            down = shaken(nn.Linear(hidden, width, bias=bias))
            put_linear(out, name + ".up", up.weight, up.bias)
            put_linear(out, name + ".down", down.weight, down.bias)
            y = down(ACTIVATIONS[activation](up(x)))
        out.ints(name, [gated, width, hidden, rows, ACTIVATION_CODES[activation]])
        out.floats(name + ".x", x)
        out.floats(name + ".y", y)
    out.ints("ffn", [len(cases)])


def encoder_cases(out, cases):
    """nn.TransformerEncoderLayer."""
    torch.backends.mha.set_fastpath_enabled(False)  # its fused form has no float64
    shapes = [(12, 3, 19, "relu", False, True, [11], ""), (12, 3, 19, "relu", True, True, [11], ""),
              (20, 5, 33, "gelu", False, True, [7, 1, 12], ""), (20, 5, 33, "gelu", True, True, [7, 1, 12], "causal"),
              (9, 1, 40, "gelu", True, False, [30], "mask"), (15, 3, 15, "relu", False, False, [18], "causal")]
    for width, heads, hidden, activation, norm_first, bias, lengths, kind in shapes:
        layer = shaken(nn.TransformerEncoderLayer(width, heads, hidden, activation=activation, batch_first=True,
                                                  norm_first=norm_first, bias=bias), 1.5)
        causal, mask, given = masks_of(kind, max(lengths))
        x, padding, real = ragged(lengths, width)
        if len(lengths) == 1:
            y = layer(x, src_mask=mask)
        else:
            y = layer(x, src_mask=mask.isinf() if causal else None, src_key_padding_mask=padding)
        name = "block.%d" % len(cases)
        cases.append(name)
        put_attention(out, name, heads, heads, width // heads, causal, lengths, x[real], y[real], given)
        out.ints(name + ".block", [not norm_first, 0, 0, hidden, ACTIVATION_CODES[activation]])
        out.floats(name + ".eps", torch.tensor([layer.norm1.eps]))
        put_linear(out, name + ".qkv", layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
        put_linear(out, name + ".out", layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias)
        put_linear(out, name + ".attention_norm", layer.norm1.weight, layer.norm1.bias)
        put_linear(out, name + ".ffn_norm", layer.norm2.weight, layer.norm2.bias)
        put_linear(out, name + ".up", layer.linear1.weight, layer.linear1.bias)
        put_linear(out, name + ".down", layer.linear2.weight, layer.linear2.bias)


def modern_case(out, cases):
    """A block of the newer parts: pre-norm, RMS norm, grouped KV heads, gated FFN."""
    heads, kv_heads, head_dim, width, hidden, lengths = 6, 2, 4, 21, 37, [1, 9, 5]
    norms = [shaken(nn.RMSNorm(width, eps=1e-5)) for _ in range(2)]
    qkv = shaken(nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False), 2)
    projection = shaken(nn.Linear(heads * head_dim, width, bias=False))
    mlp = llama_mlp(width, hidden, "silu", False)
    xs, ys = [randn(length, width) for length in lengths], []
    for x in xs:
        x = x + grouped(qkv, projection, norms[0](x), heads, kv_heads, head_dim, True)
        ys.append(x + mlp(norms[1](x)))
    name = "block.%d" % len(cases)
    cases.append(name)
    put_attention(out, name, heads, kv_heads, head_dim, True, lengths, torch.cat(xs), torch.cat(ys))
    out.ints(name + ".block", [0, 1, 1, hidden, ACTIVATION_CODES["silu"]])
    out.floats(name + ".eps", torch.tensor([norms[0].eps]))
    put_linear(out, name + ".qkv", qkv.weight, None)
    put_linear(out, name + ".out", projection.weight, None)
    put_linear(out, name + ".attention_norm", norms[0].weight, None)
    put_linear(out, name + ".ffn_norm", norms[1].weight, None)
    put_gated(out, name, mlp)


def write_layers(directory):
    out = Arrays()
    torch.manual_seed(1)
    with torch.inference_mode():
        norm_cases(out)
        activation_cases(out)
        linear_cases(out)
        ffn_cases(out)
        attentions, blocks = [], []
        multihead_cases(out, attentions)
        grouped_cases(out, attentions)
        out.ints("attention", [len(attentions)])
        encoder_cases(out, blocks)
        modern_case(out, blocks)
        out.ints("block", [len(blocks)])
    out.write(os.path.join(directory, "layers.tfm"))


# ---------------------------------------------------------------------------------------------------------------------
# What attention and blocks can have besides: positions, windows, caps, norms in other places, cross-attention
# ---------------------------------------------------------------------------------------------------------------------

def rotate(q, k, frequencies, scale, interleaved):
    """Queries and keys [heads, tokens, head_dim], turned by transformers' own functions: LLaMA's or GPT-J's."""
    angles = torch.arange(q.shape[1])[:, None] * frequencies[None]
    n = 2 * len(frequencies)
    if interleaved:
        turn = transformers.models.gptj.modeling_gptj.apply_rotary_pos_emb
        parts = [turn(part[None, ..., :n].transpose(1, 2), angles.sin()[None] * scale, angles.cos()[None] * scale)
                 .transpose(1, 2)[0] for part in (q, k)]
    else:
        angles = torch.cat([angles, angles], -1)
        parts = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(
            q[..., :n], k[..., :n], angles.cos() * scale, angles.sin() * scale, unsqueeze_dim=0)
    return [torch.cat([part, whole[..., n:]], -1) for part, whole in zip(parts, (q, k))]


class OptionAttention(nn.Module):
    """Attention with all options, as tfm_attention describes it."""

    def __init__(self, width, heads, kv_heads, head_dim, causal=True, window=0, softcap=0.0, pairs=0, interleaved=False,
                 rotary_scale=1.0, buckets=0, max_distance=0, head_norms=False, scale=None):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.causal, self.window = heads, kv_heads, head_dim, causal, window
        self.softcap, self.interleaved, self.rotary_scale, self.max_distance = softcap, interleaved, rotary_scale, max_distance
        self.scale = scale or head_dim ** -0.5
        self.qkv = shaken(nn.Linear(width, (heads + 2 * kv_heads) * head_dim), 2.5)
        self.out = shaken(nn.Linear(heads * head_dim, width))
        self.frequencies = (100.0 ** -(torch.arange(pairs) / max(pairs, 1))).float().double()
        self.table = randn(buckets, heads) if buckets else None
        self.q_norm = shaken(nn.RMSNorm(head_dim, eps=1e-5)) if head_norms else None
        self.k_norm = shaken(nn.RMSNorm(head_dim, eps=1e-5)) if head_norms else None

    def relative(self, n):
        distance = torch.arange(n)[None] - torch.arange(n)[:, None]  # key - query
        bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
            distance, bidirectional=not self.causal, num_buckets=len(self.table), max_distance=self.max_distance)
        return self.table[bucket].permute(2, 0, 1)

    def forward(self, x):
        heads, kv_heads, n = self.heads, self.kv_heads, len(x)
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(0, 1).split([heads, kv_heads, kv_heads])
        if self.q_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if len(self.frequencies):
            q, k = rotate(q, k, self.frequencies, self.rotary_scale, self.interleaved)
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
        scores = q @ k.transpose(1, 2) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.table is not None:
            scores = scores + self.relative(n)
        distance = torch.arange(n)[:, None] - torch.arange(n)[None]  # query - key
        if self.causal:
            scores = scores.masked_fill(distance < 0, -math.inf)
        if self.window:
            scores = scores.masked_fill(distance >= self.window, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def put(self, out, name):
        put_linear(out, name + ".qkv", self.qkv.weight, self.qkv.bias)
        put_linear(out, name + ".out", self.out.weight, self.out.bias)
        buckets = 0 if self.table is None else len(self.table)
        out.ints(name + ".attention", [len(self.frequencies), self.interleaved, buckets, self.max_distance, self.window])
        out.floats(name + ".numbers", torch.tensor([self.scale, self.softcap, self.rotary_scale]))
        if len(self.frequencies):
            out.floats(name + ".frequencies", self.frequencies)
        if buckets:
            out.floats(name + ".table", self.table)
        if self.q_norm:
            put_linear(out, name + ".q_norm", self.q_norm.weight, None)
            put_linear(out, name + ".k_norm", self.k_norm.weight, None)


def put_option(out, names, attention, lengths, xs, ys):
    name = "option.%d" % len(names)
    names.append(name)
    put_attention(out, name, attention.heads, attention.kv_heads, attention.head_dim, attention.causal, lengths,
                  torch.cat(xs), torch.cat(ys))
    out.floats(name + ".eps", torch.tensor([1e-5]))
    attention.put(out, name)
    return name


OPTION_ATTENTIONS = [  # (lengths, what OptionAttention takes)
    ([9, 140], dict(width=12, heads=2, kv_heads=2, head_dim=10, pairs=5)),
    ([21], dict(width=11, heads=4, kv_heads=2, head_dim=10, pairs=3, rotary_scale=1.25)),  # partial, grouped
    ([135, 2], dict(width=12, heads=3, kv_heads=3, head_dim=8, pairs=4, interleaved=True)),
    ([17], dict(width=9, heads=2, kv_heads=1, head_dim=9, pairs=2, interleaved=True, rotary_scale=0.75, causal=False)),
    ([150, 1], dict(width=12, heads=3, kv_heads=3, head_dim=5, buckets=8, max_distance=20, scale=1.0)),
    ([33, 70], dict(width=8, heads=2, kv_heads=2, head_dim=5, buckets=12, max_distance=30, causal=False)),
    ([5, 200], dict(width=10, heads=2, kv_heads=1, head_dim=7, window=6)),
    ([260], dict(width=6, heads=1, kv_heads=1, head_dim=6, window=130)),
    ([40], dict(width=12, heads=3, kv_heads=3, head_dim=6, softcap=1.5)),
    ([12, 30], dict(width=12, heads=4, kv_heads=2, head_dim=7, head_norms=True)),
    ([150], dict(width=12, heads=4, kv_heads=2, head_dim=8, head_norms=True, pairs=4, window=50, softcap=2.0)),
]


def option_blocks(out, names):
    """Pre-norm with all of it for the attention, the norms of Gemma 2, and the parallel forms of GPT-NeoX and Phi-2."""
    for place, parallel, n_norms in ((0, 0, 2), (2, 0, 4), (0, 1, 2), (0, 1, 1)):
        width, hidden, lengths = 14, 31, [11, 40]
        attention = OptionAttention(width, 4, 2, 6, pairs=3, window=9, softcap=3.0)
        norms = [shaken(nn.RMSNorm(width, eps=1e-5)) for _ in range(n_norms)]
        mlp = llama_mlp(width, hidden, "gelu_pytorch_tanh", False)
        xs, ys = [randn(length, width) for length in lengths], []
        for x in xs:
            if place == 2:
                x = x + norms[2](attention(norms[0](x)))
                ys.append(x + norms[3](mlp(norms[1](x))))
            elif parallel:
                ys.append(x + attention(norms[0](x)) + mlp(norms[-1](x)))
            else:
                x = x + attention(norms[0](x))
                ys.append(x + mlp(norms[1](x)))
        name = put_option(out, names, attention, lengths, xs, ys)
        out.ints(name + ".block", [place, 1, 1, hidden, ACTIVATION_CODES["gelu_tanh"], parallel])
        for norm, part in zip(norms, ("attention_norm", "ffn_norm", "attention_post_norm", "ffn_post_norm")):
            put_linear(out, "%s.%s" % (name, part), norm.weight, None)
        put_gated(out, name, mlp)


def cross_cases(out):
    """nn.TransformerDecoderLayer, pre- and post-norm: one text after another, each with its encoder's results."""
    for i, (norm_first, lengths, sources) in enumerate(((True, [5, 140], [150, 3]), (False, [9, 1, 20], [1, 30, 12]))):
        width, heads, hidden = 12, 3, 21
        layer = shaken(nn.TransformerDecoderLayer(width, heads, hidden, batch_first=True, norm_first=norm_first), 1.7)
        xs, memories = ([randn(n, width) for n in sizes] for sizes in (lengths, sources))
        ys = [layer(x[None], memory[None], tgt_mask=causal_mask(len(x)))[0] for x, memory in zip(xs, memories)]
        name = "cross.%d" % i
        put_attention(out, name, heads, heads, width // heads, True, lengths, torch.cat(xs), torch.cat(ys))
        out.ints(name + ".sources", sources)
        out.floats(name + ".memory", torch.cat(memories))
        out.ints(name + ".block", [not norm_first, 0, 0, hidden, ACTIVATION_CODES["relu"], 0])
        out.floats(name + ".eps", torch.tensor([layer.norm1.eps]))
        put_linear(out, name + ".qkv", layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
        put_linear(out, name + ".out", layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias)
        cross = layer.multihead_attn
        put_linear(out, name + ".cross_q", cross.in_proj_weight[:width], cross.in_proj_bias[:width])
        put_linear(out, name + ".cross_kv", cross.in_proj_weight[width:], cross.in_proj_bias[width:])
        put_linear(out, name + ".cross_out", cross.out_proj.weight, cross.out_proj.bias)
        for norm, part in ((layer.norm1, "attention_norm"), (layer.norm2, "cross_norm"), (layer.norm3, "ffn_norm")):
            put_linear(out, "%s.%s" % (name, part), norm.weight, norm.bias)
        put_linear(out, name + ".up", layer.linear1.weight, layer.linear1.bias)
        put_linear(out, name + ".down", layer.linear2.weight, layer.linear2.bias)
    out.ints("cross", [2])


def write_options(directory):
    out, names = Arrays(), []
    torch.manual_seed(6)
    with torch.inference_mode():
        for lengths, options in OPTION_ATTENTIONS:
            attention = OptionAttention(**options)
            xs = [randn(length, options["width"]) for length in lengths]
            put_option(out, names, attention, lengths, xs, [attention(x) for x in xs])
        option_blocks(out, names)
        cross_cases(out)
    out.ints("option", [len(names)])
    out.write(os.path.join(directory, "options.tfm"))


# ---------------------------------------------------------------------------------------------------------------------
# Models. live.py makes its own with the same functions.
# ---------------------------------------------------------------------------------------------------------------------

def random_gpt2(seed, dtype=torch.float32, scale=2.0, **config):
    """A GPT-2 with random weights, large enough for attention to look somewhere and the text not to repeat itself. Its
    numbers are exact in `dtype`."""
    torch.manual_seed(seed)
    config = dict(dict(bos_token_id=0, eos_token_id=0), **config)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(scale / (0.02 * math.sqrt(config["n_embd"])))
        model.transformer.wte.weight.mul_(0.5)
    return model.to(dtype).eval()


def convert(checkpoint, path, *options):
    subprocess.run([sys.executable, os.path.join(ROOT, "tools", "convert.py"), checkpoint, path, *options], check=True,
                   stderr=subprocess.PIPE)


def run_model(model, ids):
    """Logits and hidden states (after the final norm) of every position."""
    with torch.inference_mode():
        hidden = model.transformer(torch.tensor([ids])).last_hidden_state
        return model.lm_head(hidden)[0], hidden[0]


def greedy(model, prompt, n):
    with torch.inference_mode():
        ids = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                             max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return ids[0, len(prompt):].tolist()


def greedy_margin(model, prompt, generated):
    """How far the chosen token's logit is above the next at least, in parts of the largest logit: where two are equal
    but for rounding, either is right, and there would be nothing to compare."""
    logits, _ = run_model(model, prompt + generated[:-1])
    best = logits[len(prompt) - 1:].topk(2).values
    return ((best[:, 0] - best[:, 1]).min() / logits.abs().max()).item()


def clear_greedy(model, generator, length, n, margin):
    """A prompt, and its greedy continuation, in which no two tokens are nearly equally likely."""
    while True:
        prompt = [generator.randrange(model.config.vocab_size) for _ in range(length)]
        generated = greedy(model, prompt, n)
        if greedy_margin(model, prompt, generated) > margin:
            return prompt, generated


def rounded(model, dtype):
    """What tfm_load_options.dtype makes of a model: its matrices in `dtype`."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.to(dtype))
    return model


GOLDEN_MODELS = {
    # Past two pages of the KV cache and the rows of one tile; one head.
    "one_head": dict(n_embd=7, n_head=1, n_layer=2, n_positions=270, vocab_size=23, seed=11, load=True),
    "many_heads": dict(n_embd=50, n_head=25, n_layer=1, n_positions=30, vocab_size=61, n_inner=33, seed=12,
                       activation_function="relu", dtype=torch.float16),
    "three_heads": dict(n_embd=33, n_head=3, n_layer=2, n_positions=50, vocab_size=50, n_inner=17, seed=13,
                        activation_function="gelu", scale_attn_by_inverse_layer_idx=True, dtype=torch.bfloat16,
                        tie_word_embeddings=False),
    "one_token": dict(n_embd=16, n_head=2, n_layer=1, n_positions=1, vocab_size=16, n_inner=8,
                      activation_function="quick_gelu", seed=14),
    "unscaled": dict(n_embd=15, n_head=5, n_layer=2, n_positions=33, vocab_size=81, n_inner=27, seed=15, load=True,
                     activation_function="silu", scale_attn_weights=False, tie_word_embeddings=False,
                     layer_norm_epsilon=1e-3),
}


def write_model(out, directory, name, seed, dtype=torch.float32, load=False, **config):
    model = random_gpt2(seed, dtype, **config)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = os.path.join(temporary, name)
        model.save_pretrained(checkpoint)
        convert(checkpoint, os.path.join(directory, "model_%s.tfm" % name))
    model = model.double()
    generator = random.Random(seed)
    context = config["n_positions"]
    ids = [generator.randrange(config["vocab_size"]) for _ in range(context)]
    logits, hidden = run_model(model, ids)
    out.ints(name + ".ids", ids)
    out.floats(name + ".logits", logits)
    out.floats(name + ".hidden", hidden)
    n = min(context - 1, 200)
    prompt, generated = clear_greedy(model, generator, min(5, context - n), n, 1e-4) if n else ([], [])
    out.ints(name + ".prompt", prompt)
    out.ints(name + ".greedy", generated)
    if load:
        few = ids[:9]
        for suffix, to in (("f16", torch.float16), ("bf16", torch.bfloat16)):
            again = rounded(random_gpt2(seed, dtype, **config), to).double()
            out.floats("%s.%s" % (name, suffix), run_model(again, few)[0])


def write_models(directory):
    out = Arrays()
    for name, parameters in GOLDEN_MODELS.items():
        write_model(out, directory, name, **parameters)
    out.write(os.path.join(directory, "models.tfm"))


# ---------------------------------------------------------------------------------------------------------------------
# Encoders: a BERT with a masked-LM head and a pooler, two with classifiers and one that embeds sentences; small, with
# a tokenizer, so that the programs can be tested on them
# ---------------------------------------------------------------------------------------------------------------------

ENCODER_WORDS = """the a of and to in is was he she it they cat dog bird fish capital france paris london rome city big
    small red blue green river runs sleeps eats play walk over under good bad very not film love hate house tree""".split()


def encoder_vocabulary():
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,!?'-", *letters, *("##" + c for c in letters), *"0123456789",
            *ENCODER_WORDS, "##ing", "##ed"]


def random_bert(kind, seed, **config):
    """A BERT whose tokens differ: with weights as small as BERT's own at the start, all vectors would be alike."""
    torch.manual_seed(seed)
    vocabulary = list(dict.fromkeys(encoder_vocabulary()))
    model = kind(transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=33, num_attention_heads=3, intermediate_size=50,
        max_position_embeddings=40, **dict(dict(num_hidden_layers=2), **config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(1.2 / (0.02 * math.sqrt(33)))
    return model.half().eval(), vocabulary


def save_bert(model, vocabulary, folder):
    model.save_pretrained(folder)
    with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as file:
        file.write("".join(token + "\n" for token in vocabulary))
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump({"tokenizer_class": "BertTokenizer", "do_lower_case": True}, file)


def save_pooling(folder):
    """What sentence-transformers has beside the model: mean pooling of at most 24 tokens, normalized."""
    prefix = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    os.makedirs(os.path.join(folder, "1_Pooling"))
    files = {"modules.json": [{"idx": i, "name": str(i), "path": path, "type": prefix + kind}
                              for i, (path, kind) in enumerate(modules)],
             "1_Pooling/config.json": {"word_embedding_dimension": 33, "pooling_mode_mean_tokens": True},
             "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": False}}
    for name, value in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(value, file)


def encoder_texts(vocab_size, seed):
    """Ids, token types and masks: of all lengths, types that change within a text, masks with holes."""
    generator = random.Random(seed)
    for length in (1, 2, 17, 40, 7, 16):
        ids = [generator.randrange(vocab_size) for _ in range(length)]
        types = [int(i >= length // 2 and length % 2) for i in range(length)]
        mask = [int(i == 0 or generator.random() > 0.3) for i in range(length)] if length == 17 else [1] * length
        yield ids, types, mask


def put_encoder(out, name, model, texts):
    """All that the model gives for each of the texts alone."""
    hidden, pooled, means, largest, logits, classes = [], [], [], [], [], []
    for ids, types, mask in texts:
        inputs = dict(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]),
                      attention_mask=torch.tensor([mask]))
        base = getattr(model, "bert", model)(**inputs)
        rows = base.last_hidden_state[0]
        hidden.append(rows)
        if base.pooler_output is not None:
            pooled.append(base.pooler_output)
        means.append(rows[torch.tensor(mask) > 0].mean(0))
        largest.append(rows[torch.tensor(mask) > 0].max(0).values)
        if hasattr(model, "cls"):
            logits.append(model.cls.predictions(rows))
        if hasattr(model, "classifier"):
            classes.append(model(**inputs).logits.reshape(-1, model.config.num_labels))
    out.ints(name + ".lengths", [len(ids) for ids, _, _ in texts])
    for key, index in (("ids", 0), ("types", 1), ("mask", 2)):
        out.ints("%s.%s" % (name, key), itertools.chain(*(text[index] for text in texts)))
    for key, parts in (("hidden", [] if classes else hidden), ("pooled", pooled), ("logits", logits), ("classes", classes)):
        if parts:
            out.floats("%s.%s" % (name, key), torch.cat(parts))
    out.floats(name + ".mean", torch.stack(means))
    out.floats(name + ".max", torch.stack(largest))


def encoder_models():
    """(name, model, vocabulary) triples."""
    yield "mlm", *random_bert(transformers.BertForPreTraining, 21)
    yield "sequence", *random_bert(transformers.BertForSequenceClassification, 22, num_hidden_layers=1,
                                   id2label={0: "bad", 1: "so so", 2: "good"})
    yield "token", *random_bert(transformers.BertForTokenClassification, 23, num_hidden_layers=1, id2label={0: "O", 1: "NAME"})
    yield "sentence", *random_bert(transformers.BertModel, 24)


class ProgramOutputs:
    """What the programs print for a few texts: tests/test_programs.sh compares it with their output, numbers to 1e-4."""
    MASKED = "The capital of [MASK] is Paris."
    TEXTS = ["The cat sleeps.", "a big red house under the tree, a big red house under the tree, a big red house",
             "", "She runs over the river"]
    PAIR = ("the film was good", "they love it!")

    def __init__(self, folder):
        self.tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
        self.lines = []

    def encoded(self, *text):
        return self.tokenizer(*text, return_tensors="pt", truncation=True, max_length=24)

    def mlm(self, model):
        inputs = self.encoded(self.MASKED)
        probabilities = model(**inputs).prediction_logits[0].softmax(-1)
        at = inputs["input_ids"][0].tolist().index(self.tokenizer.mask_token_id)
        best = probabilities[at].topk(3)
        self.lines += ["fill-mask %.6f %s" % (p, self.tokenizer.convert_ids_to_tokens(i).replace("##", ""))
                       for p, i in zip(best.values.tolist(), best.indices.tolist())]

    def sequence(self, model):
        for name, text in (("one", self.TEXTS[:1]), ("pair", self.PAIR)):
            probabilities = model(**self.encoded(*text)).logits[0].softmax(-1)
            for i in probabilities.argsort(descending=True).tolist():
                self.lines.append("classify-%s %.6f %s" % (name, probabilities[i], model.config.id2label[i]))

    def token(self, model):
        inputs = self.encoded(self.TEXTS[3])
        for token, row in list(zip(inputs.tokens(), model(**inputs).logits[0].softmax(-1)))[1:-1]:
            self.lines.append("tokens %.6f %s %s" % (row.max(), model.config.id2label[row.argmax().item()], token))

    def sentence(self, model):
        vectors = [nn.functional.normalize(model(**self.encoded(text)).last_hidden_state[0].mean(0), dim=0)
                   for text in self.TEXTS]
        self.lines += ["embed " + " ".join("%.6f" % x for x in vector) for vector in vectors]
        order = sorted(range(len(vectors)), key=lambda i: -(vectors[i] @ vectors[0]))
        self.lines += ["similar %.6f %s" % (vectors[i] @ vectors[0], self.TEXTS[i]) for i in order]


def write_encoders(directory):
    out, lines = Arrays(), []
    with torch.inference_mode():
        for name, model, vocabulary in encoder_models():
            with tempfile.TemporaryDirectory() as temporary:
                folder = os.path.join(temporary, name)
                save_bert(model, vocabulary, folder)
                if name == "sentence":
                    save_pooling(folder)
                convert(folder, os.path.join(directory, "encoder_%s.tfm" % name))
                outputs = ProgramOutputs(folder)
            model = model.double()
            put_encoder(out, name, model, list(encoder_texts(len(vocabulary), 31)))
            getattr(outputs, name)(model)
            lines += outputs.lines
    out.write(os.path.join(directory, "encoders.tfm"))
    with open(os.path.join(directory, "encoder_programs.txt"), "w", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------

NASTY_PARTS = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \t ", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680",
    "\u180e", "\u2003", "\u2028", "\u202f", "\u200b", "\u2060", "\u3000", "\ufeff", "\0", "\x7f", "'", "''", "'s", "'S",
    "'t", "'re", "'RE", "'ve", "'m", "'ll", "'LL", "'d", "'D", "\u2019s", "'\u017f", " 's", "'sss", "don't", "I'll",
    "they've", "x's'", "a", "b", "Z", "the", " the", "and", "once upon a time", "0", "7", "42", "1234567890", "3.14",
    "1,000", "\u0663\u0664", "\u00b2", "\u00bd", "\u2167", "\u3007", "\U0001d7d8", "!", "?!", "...", "---", "()[]{}",
    "<|", "|>", "<|endoftext|>", "<|endoftext", "|endoftext|>", "<|endoftext|><|endoftext|>", "<|EndOfText|>",
    "\u00e9", "e\u0301", "\u00df", "\u01c5", "\u00aa", "\u02b0", "\u0301", "\u093f", "\u4e2d", "\u4e2d\u6587", "\u3042",
    "\uac00", "\u1100\u1161", "\u05d0", "\u0627\u0644", "\u0e01\u0e33", "\u0915\u094d\u0937", "\U00010400",
    "\U00020000", "\U0001d400", "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd",
    "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\u20ac", "\u00a9", "\ufffd", "\ufffe", "\uffff", "\u0378", "\ue000",
    "\U0010ffff", "\U000e0041", "_", "$", "\\", "\"", "`", "~", "@", "#", "\u2014", "\u201c", "\u2026",
]

LONG_TEXTS = [
    "a" * 2000, " " * 2000, "\n" * 500, "!" * 1000, "7" * 1000, "ab" * 400, "\u4e2d" * 300, " x" * 200, "x " * 200,
    "'s" * 150, "\u0301" * 200, "\U0001f600" * 100, " " * 300 + "end", "the " * 150, "\t \n" * 100, "thethethe" * 60,
    "<|endoftext|>" * 30, "once upon a time there was a little girl " * 12,
]


def random_characters(generator, n):
    """Characters from everywhere in Unicode, and more often from where the letters are."""
    text = []
    while len(text) < n:
        code = generator.randrange(generator.choice([0x80, 0x800, 0x3000, 0x10000, 0x20000, 0x110000]))
        if not 0xd800 <= code < 0xe000:
            text.append(chr(code))
    return "".join(text)


def nasty_texts(seed, n):
    generator = random.Random(seed)
    texts = list(NASTY_PARTS)
    while len(texts) < n * 2 // 3:
        texts.append("".join(generator.choice(NASTY_PARTS) for _ in range(generator.randrange(2, 12))))
    while len(texts) < n:
        texts.append(random_characters(generator, generator.randrange(1, 40)))
    return texts + LONG_TEXTS


def token_ids(tokenizer, text, special):
    """Special tokens that stand in the text become their ids, or are text like any other."""
    tokenizer.backend_tokenizer.encode_special_tokens = not special
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def write_tokenizer(directory, demo):
    out = Arrays()
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(demo)
    texts = nasty_texts(3, 360)
    for name, special in (("plain", False), ("special", True)):
        chosen = [text for text in texts if not special or "<|" in text]
        ids = [token_ids(tokenizer, text, special) for text in chosen]
        out.bytes(name + ".text", b"".join(text.encode() for text in chosen))
        out.ints(name + ".sizes", [len(text.encode()) for text in chosen])
        out.bytes(name + ".ids", b"".join(struct.pack("<%dH" % len(part), *part) for part in ids))
        out.ints(name + ".counts", map(len, ids))
    out.floats("version", torch.tensor([1.0]))  # a .tfm file has at least one tensor
    out.write(os.path.join(directory, "tokenizer.tfm"))


# ---------------------------------------------------------------------------------------------------------------------
# WordPiece
# ---------------------------------------------------------------------------------------------------------------------

SCRIPTS = ["ABCDEFGabcdefgxyz", "ÀÉÎÕÜßåéîõüçñİıŁø", "ẠỆỘặữợḉṩÅK", "ΑΣΩάςσώΐὈᾳ", "ЖЙЁжйё", "אָבּשׁ", "عَرَبِيّ", "हिन्दीक़", "বাংলাৌ", "தமிழ்ொ",
           "ไทยน้ำ", "ქართᲐᲑ", "ԱԲաբ", "አማርኛ", "한국어각", "ㅎㅏᄒ", "かがパポゞ", "中文漢字", "\uf900\ufa30\u3400\u9fff", "\U00020000\U0002b81f\U0002b820\U0002f800",
           "𝐀𝕏𐐀𞤀", "ᏣᎳꭰꮳ", "ŒĲǅǆﬁ", "ⅣⓐⒶ①²", "\u1b05\u1b06\u1b44\u1b35", "\U0001d15e\U0001d165\U0001d16d\U0001d164"]  # fmt: skip
BETWEEN = list(".,!?-'\"()[]#_@$+<~ \u3000\u00a0\u2028") + ["  ", "\t", "\0", "\u200b", "\u00ad", "\ufeff", "\ufffd",
           "\u0300", "\u0301\u0327", "\u302e\u302f\ua953\u08d4", "\u0334\ufe0f\u16ff0", "\U0001f600", "\ue000", "。", "—", "[MASK]", "[SEP]",
           "zwei Wörter", "NEU"]  # fmt: skip


def wordpiece_texts(rng, n):
    words = ["".join(rng.choices(script, k=rng.randrange(1, 7))) for script in SCRIPTS for _ in range(6)]
    words += ["playing", "played", "unplayable", "PLAY"] * 4
    texts = ["", " ", "[MASK]", "x" * 100, "x" * 101, "é" * 100, "play" * 26, "\u0301" * 40, "don't, do not. I 'm"]
    while len(texts) < n:
        texts.append("".join(rng.choice(words) + rng.choice(BETWEEN + [" "] * 20) for _ in range(rng.randrange(1, 9))))
    return words, texts


def make_wordpiece(words, rng, **normalizer):
    """A small BERT tokenizer, with a token that is looked for in normalized text and one that isn't."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Not trained: of pieces that are equally frequent, training takes others each time.
    pieces = ["##x", "##é", *"xé.,!?-'", "\ua953", "\u302e", "\u08d4"]
    for word in words:
        for part in tokenizer.normalizer.normalize_str(word).split():
            start = rng.randrange(len(part))
            pieces += ["##" + c for c in part if rng.random() < 0.4] + [part[0], part[:rng.randrange(1, 4)]]
            pieces.append(("##" if start else "") + part[start:start + rng.randrange(1, 5)])
    vocab = special + list(dict.fromkeys(pieces))[:700]
    tokenizer.model = tokenizers.models.WordPiece({text: i for i, text in enumerate(vocab)}, unk_token="[UNK]")
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([tokenizers.AddedToken("Zwei Wörter", normalized=True, single_word=True),
                          tokenizers.AddedToken("NEU", normalized=False, lstrip=True)])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer, vocab + ["Zwei Wörter", "NEU"]


def put_texts(out, name, texts):
    out.bytes(name + ".text", b"".join(text.encode() for text in texts))
    out.ints(name + ".sizes", [len(text.encode()) for text in texts])


def put_ids(out, name, ids):
    out.bytes(name + ".ids", b"".join(struct.pack("<%dH" % len(part), *part) for part in ids))
    out.ints(name + ".counts", map(len, ids))


def write_wordpiece(directory):
    rng = random.Random(11)
    out = Arrays()
    words, texts = wordpiece_texts(rng, 170)
    put_texts(out, "texts", texts)
    for name, options in (("uncased", dict(lowercase=True)), ("cased", dict(lowercase=False)),
                          ("accents", dict(lowercase=True, strip_accents=False)),
                          ("raw", dict(lowercase=False, strip_accents=True, clean_text=False,
                                       handle_chinese_chars=False))):
        tokenizer, tokens = make_wordpiece(words, rng, **options)
        put_texts(out, name + ".tokens", tokens)
        flags = [(i, 1) for i in range(5)] + [(len(tokens) - 2, 8 + 16 + 32), (len(tokens) - 1, 2 + 32)]
        out.ints(name + ".added", itertools.chain(*flags))
        lowercase, strip = options["lowercase"], options.get("strip_accents")
        out.ints(name + ".options", [lowercase, lowercase if strip is None else strip, options.get("clean_text", True),
                                     options.get("handle_chinese_chars", True)])
        for group, special in (("plain", False), ("special", True)):
            tokenizer.encode_special_tokens = not special
            ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
            put_ids(out, "%s.%s" % (name, group), ids)
        put_texts(out, name + ".decoded", [tokenizer.decode(part, skip_special_tokens=False) for part in ids])
        pairs = [tokenizer.encode(a, b) for a, b in zip(texts[::2], texts[1::2])]
        put_ids(out, name + ".pairs", [encoding.ids for encoding in pairs])
        put_ids(out, name + ".types", [encoding.type_ids for encoding in pairs])
    out.floats("version", torch.tensor([1.0]))  # a .tfm file has at least one tensor
    out.write(os.path.join(directory, "wordpiece.tfm"))


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece: small models, as small .tfm files, and the ids of texts
# ---------------------------------------------------------------------------------------------------------------------

# What sentencepiece's rule nmt_nfkc does to a few characters; its whole table is larger than all of these files.
COMPATIBLE = "\u00a0\u00aa\u00bd\u0132\u017f\u2026\u2102\u2460\u2167\u3000\u3042\u3304\uf900\ufb01\ufdfa\uff21\uff41\uff76"
COMPOSED = ("e\u0301", "e\u0323", "e\u0323\u0302", "\uff76\uff9e", "\u1112\u1161", "\u1112\u1161\u11ab")


def charsmap_rules(path):
    rules = [(char, unicodedata.normalize("NFKC", char)) for char in itertools.chain(COMPATIBLE, COMPOSED)]
    rules += [(char, " ") for char in "\t\n\r"] + [("\r\n", " ")] + [(chr(code), "") for code in (1, 2, 0xad, 0x200b)]
    with open(path, "w", encoding="utf-8") as file:
        for before, after in ((before, after) for before, after in rules if before != after):
            file.write(" ".join("%X" % ord(c) for c in before) + "\t" + " ".join("%X" % ord(c) for c in after) + "\n")


def training_lines():
    """Lines of small words in a few scripts, the same everywhere."""
    generator = random.Random(5)
    alphabets = ["abcdeilnorstu", "abcdeilnorstu", "\u03b1\u03b2\u03b3\u03b4", "\u0430\u0431\u0432\u0433", "\u4e2d\u6587\u5b57", "0123"]
    words = ["".join(generator.choices(alphabet, k=generator.randrange(1, 6))) for alphabet in alphabets for _ in range(40)]
    return [" ".join(generator.choices(words, k=12)) + generator.choice(".,!?") for _ in range(1500)]


def train_pieces(folder, **options):
    model = io.BytesIO()
    rules = os.path.join(folder, "rules.tsv")
    charsmap_rules(rules)
    if options.pop("rules", False):
        options["normalization_rule_tsv"] = rules
    else:
        options["normalization_rule_name"] = "identity"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_lines()), model_writer=model, minloglevel=2, num_threads=1,
        hard_vocab_limit=False, **options)
    return sentencepiece_model.ModelProto.FromString(model.getvalue())


def golden_pieces(folder):
    """(name, ModelProto) pairs."""
    unigram = train_pieces(folder, model_type="unigram", vocab_size=300, rules=True, user_defined_symbols=["<user>", "\ufb01"])
    yield "unigram", unigram
    yield "unigram_bytes", train_pieces(folder, model_type="unigram", vocab_size=420, byte_fallback=True,
                                        remove_extra_whitespaces=False, split_by_whitespace=False)
    bpe = train_pieces(folder, model_type="bpe", vocab_size=300, rules=True)
    for piece in [piece for piece in bpe.pieces if piece.type == 1 and len(piece.piece) == 3][::4]:
        piece.type = 5  # unused
    yield "bpe", bpe
    yield "bpe_bytes", train_pieces(folder, model_type="bpe", vocab_size=420, byte_fallback=True,
                                    remove_extra_whitespaces=False, user_defined_symbols=["\u2581\u2581", "<user>"])


def golden_jsons(models):
    """(name, tokenizers.Tokenizer) pairs, in the forms of T5 and of LLaMA."""
    unigram, bpe = models["unigram"], models["bpe_bytes"]
    t5 = tokenizers.Tokenizer(tokenizers.models.Unigram([(p.piece, p.score) for p in unigram.pieces], unk_id=0))
    t5.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Precompiled(unigram.normalizer_spec.precompiled_charsmap),
        tokenizers.normalizers.Strip(left=False, right=True),
        tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), "\u2581")])
    t5.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    t5.decoder = tokenizers.decoders.Metaspace()
    yield "t5", t5
    vocab = {piece.piece: i for i, piece in enumerate(bpe.pieces)}
    merges = [(text[:i], text[i:]) for text in sorted(vocab, key=lambda text: -bpe.pieces[vocab[text]].score)
              for i in range(1, len(text)) if bpe.pieces[vocab[text]].type == 1 and text[:i] in vocab and text[i:] in vocab]
    llama = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    llama.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("\u2581"),
                                                        tokenizers.normalizers.Replace(" ", "\u2581")])
    llama.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(content=" ", left=1)])
    yield "llama", llama


def pieces_texts():
    generator = random.Random(6)
    lines = training_lines()
    parts = [*COMPATIBLE, *COMPOSED, *"\t\r\x01\xad\u200b\u2581\u0301\u0302", "\u2581\u2581", " ", "  ", "   ", "<user>", "<s>",
             "</s>", "<unk>", "<0x41>", "\ufb01\u0301", "\uff41\u0302", "\u1112\u1161\u11ab", "\r\n", "\U0001f600", "\u0915\u094d\u0915"]
    texts = ["", " ", "  ", "a", " a", "a ", " a  b ", "\u2581", "\u3000", "\u200b"] + nasty_texts(7, 60)[:60]
    texts += ["a" * 2000, " " * 500, "\u2581a" * 300, "\u4e2d" * 300, "\U0001f600" * 100, "in " * 300]
    for i in range(100):
        words = generator.choice(lines).split()[: generator.randrange(1, 9)]
        texts.append("".join(word + generator.choice(["", " ", " ", "  "]) + (generator.choice(parts) if i % 2 else "")
                             for word in words))
    return texts


def small_checkpoint(folder, vocab_size, name, content):
    """The smallest GPT-2 with so many tokens, with a tokenizer's file beside it."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).half().save_pretrained(folder)
    with open(os.path.join(folder, name), "wb") as file:
        file.write(content)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
        file.write('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}')


def put_pieces(out, name, ids, decoded):
    """The ids of the texts, and what they decode to; None where that is not the same everywhere."""
    put_ids(out, name, ids)
    put_texts(out, name + ".decoded", ["" if text is None else text for text in decoded])
    out.ints(name + ".decodes", [text is not None for text in decoded])


def definite(text):
    """The decoded text, or None if it has what stands for something else, or is too long to be kept."""
    return None if "\ufffd" in text or len(text) > 100 else text


def write_sentencepiece(directory):
    out = Arrays()
    texts = pieces_texts()
    put_texts(out, "texts", texts)
    with tempfile.TemporaryDirectory() as folder:
        models = dict(golden_pieces(folder))
        for name, model in models.items():
            processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
            ids = processor.encode(texts)
            put_pieces(out, name, ids, [definite(processor.decode(part)) for part in ids])
            checkpoint = os.path.join(folder, name)
            small_checkpoint(checkpoint, len(model.pieces), "tokenizer.model", model.SerializeToString())
            convert(checkpoint, os.path.join(directory, "pieces_%s.tfm" % name))
        for name, tokenizer in golden_jsons(models):
            ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
            put_pieces(out, name, ids, [definite(tokenizer.decode(part, skip_special_tokens=False)) for part in ids])
            checkpoint = os.path.join(folder, name)
            small_checkpoint(checkpoint, tokenizer.get_vocab_size(), "tokenizer.json", tokenizer.to_str().encode())
            convert(checkpoint, os.path.join(directory, "pieces_%s.tfm" % name))
    out.floats("version", torch.tensor([1.0]))
    out.write(os.path.join(directory, "sentencepiece.tfm"))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------

SAMPLING_OFF = dict(repetition_penalty=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=None, sequence_bias=None)
SAMPLING_CASES = [
    dict(), dict(temperature=0.6), dict(temperature=2.5), dict(top_k=1), dict(top_k=7), dict(top_k=1000),
    dict(top_p=0.5), dict(top_p=0.93), dict(top_p=0.01), dict(min_p=0.05), dict(min_p=0.4), dict(min_p=1.0),
    dict(repetition_penalty=1.3), dict(repetition_penalty=0.7), dict(repetition_penalty=4.0),
    dict(sequence_bias={(1,): 2.5, (4,): -3.0}), dict(sequence_bias={(0,): -math.inf, (2,): -math.inf}),
    dict(temperature=0.7, top_k=6), dict(temperature=1.6, top_p=0.8), dict(temperature=2.0, min_p=0.2),
    dict(top_k=9, top_p=0.7), dict(top_k=12, min_p=0.3), dict(top_p=0.85, min_p=0.15),
    dict(repetition_penalty=1.8, temperature=0.9, top_k=5),
    dict(repetition_penalty=1.2, temperature=1.4, top_k=10, top_p=0.9),
    dict(repetition_penalty=1.1, temperature=1.3, top_k=11, top_p=0.95, min_p=0.08),
    dict(sequence_bias={(3,): 1.5, (5,): -1.0}, repetition_penalty=1.5, temperature=0.8, top_k=8, top_p=0.9, min_p=0.1),
]


def transformers_probabilities(model, parameters, logits, history):
    """The distribution that model.generate draws from: transformers' own processors in its own order, in float64."""
    config = transformers.GenerationConfig(do_sample=True, **dict(SAMPLING_OFF, **parameters))
    processors = model._get_logits_processor(config, input_ids_seq_length=len(history))
    return processors(torch.tensor([history]), logits[None]).softmax(-1)[0]


def is_clear(model, parameters, logits, history, probabilities):
    """The set of tokens is the same for slightly different limits (rounding can't change it), and none of them is too
    rare to turn up in the test's draws."""
    kept = probabilities > 0
    if probabilities[kept].min() < 0.002:
        return False
    for name, by in itertools.product(("top_p", "min_p"), (0.999, 1.001)):
        if parameters.get(name) not in (None, 1.0):
            moved = dict(parameters, **{name: parameters[name] * by})
            if ((transformers_probabilities(model, moved, logits, history) > 0) != kept).any():
                return False
    return True


def sampling_logits(vocab_size, large):
    """A large vocabulary: 150 tokens are about equally likely, the others out of the question (with top-p)."""
    logits = torch.rand(vocab_size) * 3 - 1.5
    if large:
        logits[torch.randperm(vocab_size)[150:]] -= 9
    return logits.float().double()


def put_sampling(out, model, name, parameters, vocab_size, generator):
    while True:
        logits = sampling_logits(vocab_size, vocab_size > 100)
        history = [generator.randrange(vocab_size) for _ in range(generator.randrange(1, 12))]
        history += history[:3]  # a token is penalised once, however often it came
        probabilities = transformers_probabilities(model, parameters, logits, history)
        if is_clear(model, parameters, logits, history, probabilities):
            break
    used = dict(SAMPLING_OFF, **parameters)
    bias = used["sequence_bias"] or {}
    out.ints(name, [vocab_size, used["top_k"], len(bias)] + [token for token, in bias])
    out.ints(name + ".history", history)
    out.floats(name + ".options", torch.tensor([used["repetition_penalty"], used["temperature"], used["top_p"],
                                                used["min_p"] or 0.0] + list(bias.values())))
    out.floats(name + ".logits", logits)
    out.floats(name + ".probabilities", probabilities)


def put_ties(out, model):
    """Top-k keeps the tokens that are as likely as the k-th."""
    logits = torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0, 2.0, 0.0]).double()
    out.floats("ties.logits", logits)
    out.floats("ties.probabilities", transformers_probabilities(model, dict(top_k=3), logits, [0]))


def pcg32(seed, n):
    """PCG-XSH-RR (O'Neill 2014) in Python's integers: uniform numbers of 53 bits. As tfm_random_seed starts it, the
    state is the seed plus the increment, and the first number is thrown away."""
    state, mask, increment = (seed + 1442695040888963407) % 2 ** 64, 2 ** 64 - 1, 1442695040888963407
    numbers = []

    def step():
        nonlocal state
        old, state = state, (state * 6364136223846793005 + increment) & mask
        mixed, rotation = ((old >> 18) ^ old) >> 27 & 0xffffffff, old >> 59
        return (mixed >> rotation | mixed << (32 - rotation)) & 0xffffffff

    for _ in range(n + 1):
        high, low = step() >> 5, step() >> 6
        numbers.append((high << 26 | low) / 2 ** 53)
    return numbers[1:]


def write_sampling(directory):
    out = Arrays()
    torch.manual_seed(4)
    generator = random.Random(4)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=4, n_head=1, n_layer=1, n_positions=4, vocab_size=8, bos_token_id=None, eos_token_id=None))
    cases = [(parameters, vocab_size) for vocab_size, parameters in zip(itertools.cycle((13, 40)), SAMPLING_CASES)]
    cases += [(dict(top_p=0.9), 400), (dict(top_k=120, top_p=0.8, temperature=0.9), 300)]
    for i, (parameters, vocab_size) in enumerate(cases):
        put_sampling(out, model, "case.%d" % i, parameters, vocab_size, generator)
    out.ints("case", [len(cases)])
    put_ties(out, model)
    for seed in (0, 1, 123456789, 2 ** 64 - 1):
        out.bytes("random.%d" % seed, struct.pack("<16d", *pcg32(seed, 16)))
    out.write(os.path.join(directory, "sampling.tfm"))


# ---------------------------------------------------------------------------------------------------------------------
# Encoder-decoders and beam search. live_seq2seq.py makes its own with the same functions.
# ---------------------------------------------------------------------------------------------------------------------

def random_t5(seed, end_scale=1.0, kind=transformers.T5ForConditionalGeneration,
              config=transformers.T5Config, **shape):
    """A T5 with random weights that attend somewhere. end_scale: how far the logit of </s> swings, that is, how often a
    text ends."""
    torch.manual_seed(seed)
    model = kind(config(**dict(dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1), **shape)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + torch.randn_like(parameter) * 0.2)
            elif "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.3 / math.sqrt(parameter.shape[1])))
        for name in ("q", "EncDecAttention.k"):  # queries that tell keys apart
            for where, module in model.named_modules():
                if where.endswith("." + name):
                    module.weight.mul_(2.0)
        model.shared.weight.mul_(0.3 * math.sqrt(shape["d_model"]))  # small, or a tied head repeats the last token
        if model.config.tie_word_embeddings:
            model.shared.weight[1] *= end_scale
            model.decoder.final_layer_norm.weight.mul_(6)
        else:
            model.lm_head.weight.mul_(2)
            model.lm_head.weight[1] *= end_scale
    return model.eval()


def generate(model, ids, **options):
    """What transformers generates: (ids, score) for each of num_return_sequences, without the prompt or the start token,
    with the token that ended them; the score is None without beams."""
    options = dict(dict(num_beams=1, do_sample=False, return_dict_in_generate=True, output_scores=True), **options)
    before = 1 if model.config.is_encoder_decoder else len(ids)
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **options)
    scores = out.sequences_scores.tolist() if options["num_beams"] > 1 else [None]
    end, results = model.config.eos_token_id, []
    for row, score in zip(out.sequences[:, before:].tolist(), scores):
        results.append((row[:row.index(end) + 1] if end in row else row, score))
    return results


def shifted(model, seed, size):
    """The model with weights that are off by about `size` of themselves."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + size * torch.randn_like(parameter))
    return other


def is_clear_search(models, ids, **options):
    """What the first model generates, if the others, all but the same, generate the same ids; otherwise None: where two
    texts are equal but for rounding, either is right."""
    first, *others = [generate(model, ids, **options) for model in models]
    return first if all([ids for ids, _ in first] == [ids for ids, _ in other] for other in others) else None


BEAM_CASES = [  # what generate is given, and for how many new tokens
    (16, dict(num_beams=1)), (16, dict(num_beams=1, no_repeat_ngram_size=2)),
    (16, dict(num_beams=4)), (16, dict(num_beams=4, num_return_sequences=4)),
    (16, dict(num_beams=4, length_penalty=2.0)), (16, dict(num_beams=4, length_penalty=-1.0)),
    (16, dict(num_beams=4, length_penalty=0.0)), (16, dict(num_beams=4, early_stopping=True, num_return_sequences=2)),
    (16, dict(num_beams=4, early_stopping="never")), (16, dict(num_beams=4, early_stopping="never", length_penalty=0.5)),
    (16, dict(num_beams=4, no_repeat_ngram_size=2)), (16, dict(num_beams=3, no_repeat_ngram_size=1)),
    (12, dict(num_beams=4, min_new_tokens=12)), (150, dict(num_beams=4, min_new_tokens=149)), (9, dict(num_beams=7)),
    (1, dict(num_beams=4, num_return_sequences=3)),
]


def put_beams(out, name, model, inputs):
    """The cases' options as numbers, the ids and scores of their results. Which inputs are clear enough depends on the
    case."""
    model = model.double()
    models = [model, shifted(model, 1, 1e-6)]
    ends = []
    for i, (n, options) in enumerate(BEAM_CASES):
        early = {False: 0, True: 1, "never": 2}[options.get("early_stopping", False)]
        out.ints("%s.%d.options" % (name, i), [
            n, options["num_beams"], options.get("num_return_sequences", 1), options.get("min_new_tokens", 0), early,
            round(1000 * options.get("length_penalty", 1)), options.get("no_repeat_ngram_size", 0)])
        chosen = [(i + k) % len(inputs) for k in range(2 if n > 100 else 4)]
        clear = [(k, found) for k, found in
                 ((k, is_clear_search(models, inputs[k], max_new_tokens=n, **options)) for k in chosen) if found]
        assert clear, (name, i)
        out.ints("%s.%d.inputs" % (name, i), [k for k, _ in clear])
        out.ints("%s.%d.sizes" % (name, i), [len(ids) for _, found in clear for ids, _ in found])
        out.ints("%s.%d.ids" % (name, i), [token for _, found in clear for ids, _ in found for token in ids])
        if options["num_beams"] > 1:
            out.floats("%s.%d.scores" % (name, i), torch.tensor([score for _, found in clear for _, score in found]))
        ends += [len(ids) < n for _, found in clear for ids, _ in found]
    print("%s: %d of %d texts end by themselves" % (name, sum(ends), len(ends)))


def t5_pieces(folder):
    return train_pieces(folder, model_type="unigram", vocab_size=150, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, rules=True)


def put_t5(out, directory, folder):
    """A T5 with a tokenizer: its encoder's results, its decoder's logits, what it answers to texts."""
    pieces = t5_pieces(folder)
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces.SerializeToString())
    model = random_t5(4, end_scale=2.0, vocab_size=len(pieces.pieces) + 3, d_model=18, d_kv=7, d_ff=40,
                      num_heads=3, num_layers=2, num_decoder_layers=2, relative_attention_num_buckets=8,
                      relative_attention_max_distance=20)
    checkpoint = os.path.join(folder, "t5")
    model.save_pretrained(checkpoint)
    with open(os.path.join(checkpoint, "spiece.model"), "wb") as file:
        file.write(pieces.SerializeToString())
    with open(os.path.join(checkpoint, "tokenizer_config.json"), "w") as file:
        file.write('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    convert(checkpoint, os.path.join(directory, "beams_t5.tfm"))
    generator = random.Random(8)
    lines = training_lines()
    texts = [" ".join(generator.choice(lines).split()[:n]) for n in (1, 2, 3, 5, 8, 12, 4, 7, 30)]
    inputs = [processor.encode(text) + [1] for text in texts]
    put_texts(out, "t5.texts", texts)
    put_ids(out, "t5.inputs", inputs)
    model = model.double()
    generated = [generate(model, ids, max_new_tokens=30)[0][0] for ids in inputs]
    put_texts(out, "t5.answers", [processor.decode([token for token in ids if 2 < token < len(pieces.pieces)])
                                  for ids in generated])
    decoder_ids = [0] + [generator.randrange(len(pieces.pieces)) for _ in range(139)]
    out.ints("t5.decoder_ids", decoder_ids)
    with torch.inference_mode():
        found = model(torch.tensor([inputs[5]]), decoder_input_ids=torch.tensor([decoder_ids]))
    out.floats("t5.encoded", found.encoder_last_hidden_state[0])
    out.floats("t5.logits", found.logits[0, ::23])
    put_beams(out, "t5", model, inputs)


def put_gpt2(out, directory, folder):
    """A decoder: prompts that end before, at, and after the cache's page of 128 tokens."""
    model = random_gpt2(5, n_embd=15, n_head=3, n_layer=2, n_positions=290, vocab_size=41, scale=3.0)
    with torch.no_grad():
        model.transformer.wte.weight[0] *= 1.3
    checkpoint = os.path.join(folder, "gpt2")
    model.save_pretrained(checkpoint)
    convert(checkpoint, os.path.join(directory, "beams_gpt2.tfm"))
    generator = random.Random(9)
    inputs = [[generator.randrange(1, 41) for _ in range(n)] for n in (1, 2, 5, 9, 120, 127, 128, 129)]
    put_ids(out, "gpt2.inputs", inputs)
    model.generation_config.pad_token_id = 0
    put_beams(out, "gpt2", model, inputs)


def write_beams(directory):
    out = Arrays()
    with tempfile.TemporaryDirectory() as folder:
        put_t5(out, directory, folder)
        put_gpt2(out, directory, folder)
    out.write(os.path.join(directory, "beams.tfm"))


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's own modules, which take vectors
# ---------------------------------------------------------------------------------------------------------------------

def vector_modules():
    """(name, module, configuration) triples."""
    options = dict(dropout=0.0, norm_first=True, activation="gelu", bias=False, batch_first=True)
    yield ("Transformer", nn.Transformer(20, 5, 1, 2, 7, **options),
           {"nhead": 5, "norm_first": True, "activation": "gelu"})
    layer = nn.TransformerEncoderLayer(20, 5, 7, dropout=0.0)
    yield "TransformerEncoder", nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), {"nhead": 5}
    layer = nn.TransformerDecoderLayer(33, 11, 50, dropout=0.0, norm_first=True, layer_norm_eps=1e-3)
    norm = nn.LayerNorm(33, eps=1e-3)
    yield ("TransformerDecoder", nn.TransformerDecoder(layer, 2, norm),
           {"nhead": 11, "norm_first": True, "causal": False, "layer_norm_eps": 1e-3})


def put_padded(out, name, width, lengths):
    """Texts of several lengths: put without padding, returned with it, [texts][longest][width]."""
    rows = randn(len(lengths), max(lengths), width)
    out.ints(name + ".lengths", lengths)
    out.floats(name, torch.cat([text[:n] for text, n in zip(rows, lengths)]))
    return rows


def padding(lengths):
    return torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]


def put_vectors(out, name, module, config, sources, targets):
    """One batch with PyTorch's own padding and masks; the results without what is padding."""
    layers = list(module.modules())
    attention = next(layer for layer in layers if isinstance(layer, nn.MultiheadAttention))
    turned = (lambda x: x) if attention.batch_first else (lambda x: x.transpose(0, 1))
    source = put_padded(out, name + ".source", attention.embed_dim, sources)
    hidden = padding(sources) | (torch.rand(len(sources), max(sources)) < 0.3)
    hidden[:, 0] = False
    out.ints(name + ".seen", itertools.chain(*((~row[:n]).int().tolist() for row, n in zip(hidden, sources))))
    lengths, inputs = sources, (turned(source),)
    masks = {} if name == "TransformerDecoder" else {"src_key_padding_mask": hidden}
    if name != "TransformerEncoder":
        lengths, inputs = targets, (turned(put_padded(out, name + ".target", attention.embed_dim, targets)), turned(source))
        mask = (torch.rand(max(targets), max(targets)) < 0.4) & ~torch.eye(max(targets), dtype=torch.bool)
        if config.get("causal", True):
            mask |= causal_mask(max(targets)).isinf()
        out.ints(name + ".hidden", mask.int().flatten().tolist())
        masks.update(tgt_mask=mask, tgt_key_padding_mask=padding(targets), memory_key_padding_mask=hidden)
    found = turned(module(*(inputs[::-1] if name == "Transformer" else inputs), **masks))
    out.floats(name + ".expected", torch.cat([text[:n] for text, n in zip(found, lengths)]))


def write_vectors(directory):
    out = Arrays()
    torch.manual_seed(17)
    for name, module, config in vector_modules():
        module = shaken(module, 1.5)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, configuration = os.path.join(folder, "model.pt"), os.path.join(folder, "config.json")
            torch.save({key: tensor.half() for key, tensor in module.state_dict().items()}, checkpoint)
            with open(configuration, "w", encoding="utf-8") as file:
                json.dump(config, file)
            convert(checkpoint, os.path.join(directory, "vectors_%s.tfm" % name), "--arch", "nn." + name,
                    "--config", configuration)
        put_vectors(out, name, module, config, [18, 1, 5], [6, 13, 1])
    out.write(os.path.join(directory, "vectors.tfm"))


def check(writers, groups):
    """Whether the files are what would be written. Prints what differs."""
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        for group in groups:
            writers[group](directory)
        for name in sorted(os.listdir(directory)):
            path = os.path.join(GOLDEN, name)
            differ = differences(read_arrays(path), read_arrays(os.path.join(directory, name))) \
                if os.path.exists(path) else ["the file is not there"]
            wrong += bool(differ)
            print("%s: %s" % (name, "differs: " + ", ".join(differ[:10]) if differ else "as it should be"))
    return wrong == 0


def main():
    parser = argparse.ArgumentParser(description="Writes the golden files of the C tests.")
    parser.add_argument("groups", nargs="*", help="layers, options, models, encoders, tokenizer, wordpiece, "
                        "sentencepiece, sampling, beams, vectors; all of them by default")
    parser.add_argument("--check", action="store_true", help="compare with the files that are there; write nothing")
    parser.add_argument("--demo", default=os.path.join(ROOT, "..", "shared", "demo-gpt2"),
                        help="the demo model's checkpoint (default: %(default)s)")
    arguments = parser.parse_args()
    writers = {"layers": write_layers, "options": write_options, "models": write_models, "encoders": write_encoders,
               "tokenizer": lambda directory: write_tokenizer(directory, arguments.demo), "sampling": write_sampling,
               "wordpiece": write_wordpiece, "sentencepiece": write_sentencepiece, "beams": write_beams,
               "vectors": write_vectors}
    groups = arguments.groups or list(writers)
    for group in groups:
        if group not in writers:
            parser.error("there is no group %s" % group)
    quiet()
    if arguments.check:
        if "tokenizer" in groups and not os.path.isdir(arguments.demo):
            print("tokenizer.tfm: not checked, as %s is not there" % arguments.demo)
            groups.remove("tokenizer")
        sys.exit(not check(writers, groups))
    torch.set_num_threads(1)  # the models are too small to gain from more
    os.makedirs(GOLDEN, exist_ok=True)
    for group in groups:
        writers[group](GOLDEN)
        print("wrote", group)
    print("%d bytes in all" % sum(entry.stat().st_size for entry in os.scandir(GOLDEN)))


if __name__ == "__main__":
    main()
