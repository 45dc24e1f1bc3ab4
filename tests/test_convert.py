#!/usr/bin/env python3
"""Tests tools/convert.py against PyTorch: every form of checkpoint is made by torch, converted, and read back.

usage: tests/test_convert.py [--seed N] [--python FILE] [--checkpoint DIR] [--tfm build/tfm]

Needs torch, transformers, safetensors and tokenizers; convert.py itself is run without them.
--python FILE     the interpreter that runs convert.py (default: this one, without its site-packages)
--checkpoint DIR  also converts this Hugging Face directory of a GPT-2 and compares it with what transformers loads
--tfm PROGRAM     also runs `PROGRAM dump` on the results and compares logits with PyTorch's

Prints a line for each failed check and ends with `N passed, N failed`; the exit status is 1 if any failed.
"""

import argparse
import base64
import contextlib
import importlib.util
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib

import numpy
import safetensors.torch
import sentencepiece
import tokenizers
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_pb2
from torch import nn
from torch.nn import functional

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONVERT = os.path.join(ROOT, "tools", "convert.py")

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------

class Results:
    passed = 0
    failed = 0


def check(condition, what):
    if condition:
        Results.passed += 1
    else:
        Results.failed += 1
        print("FAILED: " + what, flush=True)
    return bool(condition)


def check_equal(found, expected, what):
    if isinstance(found, list) and isinstance(expected, list) and found != expected:
        first = next((i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]),
                     min(len(found), len(expected)))
        return check(False, "%s: from item %d on %.200r where %.200r is expected"
                     % (what, first, found[first:], expected[first:]))
    return check(found == expected, "%s: %.200r where %.200r is expected" % (what, found, expected))


# ---------------------------------------------------------------------------------------------------------------------
# A reader of .tfm files, written from the format's description alone
# ---------------------------------------------------------------------------------------------------------------------

class TfmFile:
    """Reads everything and complains (ValueError) about whatever the format doesn't allow."""

    # Name, elements and bytes of a block; from 16 on GGUF's.
    DTYPES = {1: ("f32", 1, 4), 2: ("f16", 1, 2), 3: ("bf16", 1, 2), 18: ("Q4_0", 32, 18), 19: ("Q4_1", 32, 20),
              22: ("Q5_0", 32, 22), 23: ("Q5_1", 32, 24), 24: ("Q8_0", 32, 34), 28: ("Q4_K", 256, 144),
              29: ("Q5_K", 256, 176), 30: ("Q6_K", 256, 210)}

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = file.read()
        self.metadata, self.tensors = {}, {}
        if self.data[:8] != bytes([0x54, 0x46, 0x4D, 0x48, 0x0D, 0x0A, 0x1A, 0x0A]):
            raise ValueError("magic")
        version, features, size, meta_at, meta_size, dir_at, dir_size, count, crc = struct.unpack_from(
            "<IIQQQQQII", self.data, 8)
        if (version, features, size, meta_at) != (1, 0, len(self.data), 64):
            raise ValueError("header")
        if meta_size % 8 or dir_size % 8 or dir_at != 64 + meta_size:
            raise ValueError("sections")
        if zlib.crc32(self.data[:60] + self.data[64:dir_at + dir_size]) != crc:
            raise ValueError("header checksum")
        self.read_metadata(64, dir_at)
        end = self.read_directory(dir_at, dir_at + dir_size, count)
        if end != len(self.data):
            raise ValueError("bytes after the last tensor")

    def padded_at(self, at, size):
        """The bytes at `at`, and where the next thing is."""
        end = at + size
        after = (end + 7) // 8 * 8
        if any(self.data[end:after]):
            raise ValueError("padding")
        return self.data[at:end], after

    def read_metadata(self, at, end):
        while at < end:
            key_size, kind, size = struct.unpack_from("<IIQ", self.data, at)
            key, at = self.padded_at(at + 16, key_size)
            value, at = self.padded_at(at, size)
            key = key.decode("ascii")
            if key in self.metadata:
                raise ValueError("key twice: " + key)
            layout = {1: "q", 2: "d", 5: "i", 6: "f"}.get(kind)
            if kind == 3:
                value = value.decode("utf-8")
            elif layout:
                value = list(struct.unpack("<%d%s" % (size // struct.calcsize(layout), layout), value))
            elif kind != 4:
                raise ValueError("metadata type %d" % kind)
            self.metadata[key] = value
        if at != end:
            raise ValueError("metadata size")

    def read_directory(self, at, end, count):
        previous = end
        for _ in range(count):
            name_size, dtype, layout, n_dims, *rest = struct.unpack_from("<4I4QQQII", self.data, at)
            shape, (offset, size, crc, zero) = rest[:4], rest[4:]
            name, at = self.padded_at(at + 72, name_size)
            name = name.decode("ascii")
            if not 1 <= n_dims <= 4 or any(extent != 1 for extent in shape[n_dims:]) or zero:
                raise ValueError("directory entry of " + name)
            if offset % 64 or offset < previous or offset - previous >= 64 or any(self.data[previous:offset]):
                raise ValueError("place of " + name)
            kind, elements, block = self.DTYPES[dtype]
            if size != math.prod(shape) // elements * block or shape[n_dims - 1] % elements:
                raise ValueError("size of " + name)
            if offset + size > len(self.data):
                raise ValueError("end of " + name)
            data = self.data[offset:offset + size]
            if zlib.crc32(data) != crc:
                raise ValueError("checksum of " + name)
            if name in self.tensors:
                raise ValueError("tensor twice: " + name)
            self.tensors[name] = (kind, ("rows", "cols")[layout], tuple(shape[:n_dims]), data)
            previous = offset + size
        if at != end:
            raise ValueError("directory size")
        return previous

    def __getitem__(self, key):
        value = self.metadata[key]
        return value[0] if isinstance(value, list) and len(value) == 1 else value


# ---------------------------------------------------------------------------------------------------------------------
# What is expected
# ---------------------------------------------------------------------------------------------------------------------

BLOCK = (("ln_1", "attention_norm", False), ("attn.c_attn", "attention.qkv", True),
         ("attn.c_proj", "attention.out", True), ("ln_2", "ffn_norm", False), ("mlp.c_fc", "ffn.up", True),
         ("mlp.c_proj", "ffn.down", True))


def canonical_names(n_layers):
    """(source, target, is a matrix) in the order of a forward pass."""
    yield "wte", "token_embedding", False
    yield "wpe", "decoder.position_embedding", False
    for layer in range(n_layers):
        for source, target, is_matrix in BLOCK:
            yield "h.%d.%s" % (layer, source), "decoder.blocks.%d.%s" % (layer, target), is_matrix
    yield "ln_f", "decoder.final_norm", False
    yield "lm_head", "head", False


def expected_tensors(state, n_layers, layout):
    """The entries of the .tfm file for plain names, in order."""
    entries = []
    for source, target, is_matrix in canonical_names(n_layers):
        for part in ("weight", "bias"):
            tensor = state.get("%s.%s" % (source, part))
            if tensor is None:
                continue
            how = layout if is_matrix and part == "weight" else "rows"
            shape = tuple(tensor.shape) if how == "rows" else tuple(tensor.shape)[::-1]
            if tensor.dtype == torch.float64:
                tensor = tensor.float()
            dtype = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[tensor.dtype]
            entries.append(("%s.%s" % (target, part), (dtype, how, shape, raw_bytes(tensor))))
    return entries


def raw_bytes(tensor):
    width = torch.int32 if tensor.element_size() == 4 else torch.int16
    return tensor.detach().contiguous().view(width).numpy().tobytes()


def plain(state, keep_head):
    """A state dict by the names that canonical_names uses."""
    names = {}
    for name, tensor in state.items():
        for part in ("_orig_mod.", "module.", "transformer."):
            name = name.replace(part, "")
        if not name.endswith((".attn.bias", ".attn.masked_bias")) and (keep_head or name != "lm_head.weight"):
            names[name] = tensor
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Running convert.py
# ---------------------------------------------------------------------------------------------------------------------

class Converter:
    def __init__(self, folder, python):
        self.folder = folder
        self.command = [python or sys.executable, "-I", "-S", CONVERT]
        self.counter = 0
        spec = importlib.util.spec_from_file_location("convert", CONVERT)
        self.module = importlib.util.module_from_spec(spec)
        sys.dont_write_bytecode = True
        spec.loader.exec_module(self.module)

    def path(self, name=""):
        """A new path in a folder of its own."""
        self.counter += 1
        folder = os.path.join(self.folder, str(self.counter))
        os.mkdir(folder)
        return os.path.join(folder, name) if name else folder

    def run(self, checkpoint, *options):
        """(exit status, stderr, path of the output)"""
        out = self.path("out.tfm")
        result = subprocess.run([*self.command, checkpoint, out, *options], capture_output=True, text=True)
        check_equal(result.stdout, "", "nothing on stdout for " + checkpoint)
        left = sorted(set(os.listdir(os.path.dirname(out))) - {"out.tfm"})
        check_equal(left, [], "nothing left beside the output of " + checkpoint)
        return result.returncode, result.stderr, out

    def convert(self, what, checkpoint, *options, says=()):
        """The converted file, or None where that failed."""
        status, stderr, out = self.run(checkpoint, *options)
        if not check(status == 0, "%s: exit status %d: %s" % (what, status, stderr)):
            return None
        for text in says:
            check(text in stderr, "%s: stderr says %r: %s" % (what, text, stderr))
        lines = stderr.splitlines()
        check(lines and lines[-1].startswith("convert.py: ") and " parameters, " in lines[-1]
              and " bytes, " in lines[-1] and lines[-1].endswith(" seconds"), "%s: closing line: %s" % (what, stderr))
        try:
            file = TfmFile(out)
        except (ValueError, LookupError, struct.error) as error:
            check(False, "%s: the file breaks the format: %s" % (what, error))
            return None
        file.path = out
        check(("%d bytes" % len(file.data)) in lines[-1], "%s: size in the closing line" % what)
        return file

    def refuse(self, what, checkpoint, *options, says=(), status=1):
        """Bad input: one sentence, no output."""
        found, stderr, out = self.run(checkpoint, *options)
        check_equal(found, status, "%s: exit status (%s)" % (what, stderr.strip()))
        check_sentence(stderr, what)
        for text in says:
            check(text in stderr, "%s: the error names %r: %s" % (what, text, stderr.strip()))
        check(not os.path.exists(out), "%s: no output" % what)

    def run_inside(self, checkpoint, *options):
        """As run, in this process: faster, for the hundreds of runs of the fuzz tests."""
        out = self.path("out.tfm")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                status = self.module.main([checkpoint, out, *options])
        except Exception as error:  # a traceback, had it been a run of its own
            status = repr(error)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        left = os.listdir(os.path.dirname(out))
        shutil.rmtree(os.path.dirname(out))
        return status, stderr.getvalue(), left


def check_sentence(stderr, what):
    check(stderr.startswith("convert.py: ") and stderr.count("\n") == 1 and stderr.endswith("\n")
          and "Traceback" not in stderr, "%s: one sentence: %s" % (what, stderr.strip()))


def compare(what, file, state, n_layers, layout):
    if file is None:
        return
    expected = expected_tensors(state, n_layers, layout)
    check_equal(list(file.tensors), [name for name, _ in expected], what + ": names and their order")
    for name, entry in expected:
        found = file.tensors.get(name, (None,) * 4)
        check_equal(found[:3], entry[:3], "%s: type, layout and shape of %s" % (what, name))
        check(found[3] == entry[3], "%s: data of %s" % (what, name))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

SMALL = dict(n_layer=2, n_head=3, n_embd=24, n_positions=20, vocab_size=97, bos_token_id=0, eos_token_id=0)


def hf_model(**changes):
    kind = changes.pop("kind", transformers.GPT2LMHeadModel)
    model = kind(transformers.GPT2Config(**dict(SMALL, **changes)))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too, in place of ones and zeros
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def save_config(model, folder, **changes):
    config = dict(model.config.to_dict(), architectures=[type(model).__name__])
    config.update(changes)
    write_json(os.path.join(folder, "config.json"), {key: value for key, value in config.items() if value != "drop"})


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)
    return path


def hf_directory(converter, model, state=None, **config):
    """A directory with pytorch_model.bin."""
    folder = converter.path()
    save_config(model, folder, **config)
    torch.save(model.state_dict() if state is None else state, os.path.join(folder, "pytorch_model.bin"))
    return folder


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config["n_embd"]
        self.c_attn = nn.Linear(width, 3 * width, bias=config["bias"])
        self.c_proj = nn.Linear(width, width, bias=config["bias"])
        self.n_head = config["n_head"]
        if config["buffers"]:
            mask = torch.tril(torch.ones(config["block_size"], config["block_size"]))
            self.register_buffer("bias", mask.view(1, 1, *mask.shape))

    def forward(self, x):
        batch, time_, width = x.shape
        q, k, v = (part.view(batch, time_, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(width, 2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, time_, width))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config["n_embd"]
        self.ln_1 = nn.LayerNorm(width, bias=config["bias"])
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(width, bias=config["bias"])
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, 4 * width, bias=config["bias"]),
                                      c_proj=nn.Linear(4 * width, width, bias=config["bias"])))
        self.approximate = config["approximate"]

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        hidden = functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate=self.approximate)
        return x + self.mlp["c_proj"](hidden)


class LinearGpt(nn.Module):
    """nanoGPT and minGPT: GPT-2 with nn.Linear under the names of Conv1D."""

    def __init__(self, n_layer=2, n_head=3, n_embd=24, block_size=20, vocab_size=97, bias=True, tied=True,
                 approximate="none", buffers=False):
        super().__init__()
        config = dict(n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, approximate=approximate,
                      buffers=buffers)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(vocab_size, n_embd), wpe=nn.Embedding(block_size, n_embd),
            h=nn.ModuleList([Block(config) for _ in range(n_layer)]), ln_f=nn.LayerNorm(n_embd, bias=bias)))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight
        self.model_args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias,
                               vocab_size=vocab_size, dropout=0.0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def nanogpt_checkpoint(model, state=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    return {"model": state or model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": model.model_args,
            "iter_num": 2000, "best_val_loss": torch.tensor(1.47), "config": {"out_dir": "out", "bias": False,
                                                                              "betas": (0.9, 0.95), "none": None}}


# ---------------------------------------------------------------------------------------------------------------------
# Logits through the C program
# ---------------------------------------------------------------------------------------------------------------------

class Logits:
    """Compares `tfm dump` with a model, where a program was given."""

    def __init__(self, program):
        self.program = program and os.path.abspath(program)

    def check(self, what, file, model):
        if self.program is None or file is None:
            return
        ids = [random.randrange(file["vocab_size"]) for _ in range(min(file["decoder.n_positions"], 16))]
        out = file.path + ".npy"
        result = subprocess.run([self.program, "dump", file.path, "--ids", ",".join(map(str, ids)), "-o", out],
                                capture_output=True, text=True)
        if not check(result.returncode == 0, "%s: tfm dump: %s" % (what, result.stderr.strip())):
            return
        found = torch.from_numpy(numpy.load(out))
        with torch.no_grad():
            expected = model(torch.tensor([ids]))
        expected = getattr(expected, "logits", expected)[0].float()
        if check_equal(tuple(found.shape), tuple(expected.shape), what + ": shape of the logits"):
            error = ((found - expected).abs().max() / expected.abs().max()).item()
            check(error <= 1e-4, "%s: logits differ by %g of the largest" % (what, error))


# ---------------------------------------------------------------------------------------------------------------------
# Tests: Hugging Face checkpoints
# ---------------------------------------------------------------------------------------------------------------------

def test_description(converter, logits):
    model = hf_model()
    folder = converter.path("my-gpt")
    model.save_pretrained(folder)
    file = converter.convert("safetensors", folder, says=("without a tokenizer",))
    compare("safetensors", file, plain(model.state_dict(), False), 2, "cols")
    if file is None:
        return
    logits.check("safetensors", file, model)
    expected = {
        "model.name": "my-gpt", "model.family": "gpt2", "model.kind": "decoder", "vocab_size": [97], "d_model": [24],
        "model.source": "model.safetensors, converted by convert.py",
        "head": "tied", "decoder.n_layers": [2], "decoder.n_heads": [3], "decoder.n_kv_heads": [3],
        "decoder.head_dim": [8], "decoder.d_ff": [96], "decoder.n_positions": [20], "decoder.causal": [1],
        "decoder.cross": [0], "decoder.norm": "layer", "decoder.norm_place": "pre", "decoder.norm_eps": [1e-5],
        "decoder.final_norm": [1], "decoder.positions": "learned", "decoder.attention_scale": [8 ** -0.5],
        "decoder.ffn": "plain", "decoder.activation": "gelu_tanh", "generation.eos_ids": [0]}
    check_equal(file.metadata, expected, "metadata")


def test_settings(converter, logits):
    """Everything in a configuration that changes what is computed."""
    cases = [
        (dict(n_inner=40, layer_norm_epsilon=1e-3), {"decoder.d_ff": 40, "decoder.norm_eps": 1e-3}),
        (dict(scale_attn_weights=False), {"decoder.attention_scale": 1.0}),
        (dict(scale_attn_by_inverse_layer_idx=True), {"decoder.attention_scale": [8 ** -0.5, 8 ** -0.5 / 2]}),
        (dict(n_head=1, n_layer=1), {"decoder.head_dim": 24, "decoder.n_layers": 1}),
        (dict(n_embd=25, n_head=25), {"decoder.head_dim": 1}),
        (dict(n_positions=1), {"decoder.n_positions": 1}),
        (dict(n_inner=24), {"decoder.d_ff": 24}),  # all matrices square but c_attn
    ]
    names = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
             "gelu_python": "gelu", "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu",
             "silu": "silu", "swish": "silu", "quick_gelu": "quick_gelu", "tanh": "tanh"}
    cases += [(dict(activation_function=name), {"decoder.activation": value}) for name, value in names.items()]
    for changes, expected in cases:
        what = "settings %s" % changes
        model = hf_model(**changes)
        folder = converter.path()
        model.save_pretrained(folder)
        file = converter.convert(what, folder)
        if file is not None:
            compare(what, file, plain(model.state_dict(), False), model.config.n_layer, "cols")
            for key, value in expected.items():
                check_equal(file[key], value, "%s: %s" % (what, key))
            logits.check(what, file, model)
    tensor = torch.linspace(-9, 9, 1001)
    tanh = functional.gelu(tensor, approximate="tanh")
    for name, value in names.items():
        same = (transformers.activations.get_activation(name)(tensor) - tanh).abs().max() < 1e-6
        check_equal(bool(same), value == "gelu_tanh", "transformers' %s is the tanh approximation" % name)


def test_torch_files(converter, logits):
    """pytorch_model.bin in its forms."""
    model = hf_model()
    state = model.state_dict()
    expected = plain(state, False)
    tied_config = dict(tie_word_embeddings="drop")  # true by default
    for what, options in (("zip", {}), ("legacy", dict(_use_new_zipfile_serialization=False)),
                          ("zip, pickle protocol 4", dict(pickle_protocol=4)),
                          ("zip, pickle protocol 5", dict(pickle_protocol=5)),
                          ("legacy, pickle protocol 4", dict(pickle_protocol=4, _use_new_zipfile_serialization=False))):
        folder = converter.path()
        save_config(model, folder, **tied_config)
        torch.save(state, os.path.join(folder, "pytorch_model.bin"), **options)
        file = converter.convert(what, folder)
        compare(what, file, expected, 2, "cols")
        logits.check(what, file, model)
        file and check_equal(file["head"], "tied", what + ": the head shares its storage with the embedding")
        bare = os.path.join(folder, "weights.pt")
        shutil.move(os.path.join(folder, "pytorch_model.bin"), bare)
        os.rename(os.path.join(folder, "config.json"), os.path.join(folder, "other.json"))
        file = converter.convert(what + ", bare", bare, "--arch", "gpt2", "--config",
                                 os.path.join(folder, "other.json"))
        compare(what + ", bare", file, expected, 2, "cols")
        file and check_equal(file["model.name"], "weights", what + ", bare: name")
    parameters = {name: nn.Parameter(tensor) for name, tensor in state.items()}
    parameters["transformer.wte.weight"].note = "an attribute"  # saved by another function of torch
    compare("parameters", converter.convert("parameters", hf_directory(converter, model, parameters)), expected, 2,
            "cols")
    for key in ("model", "state_dict", "model_state_dict"):
        folder = hf_directory(converter, model, {key: state, "epoch": 3, "args": argparse.Namespace(lr=0.1, x={1, 2}),
                                                 "loss": numpy.float64(2.5), "device": torch.device("cpu")})
        compare("wrapped as " + key, converter.convert("wrapped as " + key, folder), expected, 2, "cols")


def test_shards(converter, _):
    model = hf_model()
    expected = plain(model.state_dict(), False)
    folder = converter.path()
    model.save_pretrained(folder, max_shard_size="20KB")
    check(os.path.exists(os.path.join(folder, "model.safetensors.index.json")), "transformers wrote shards")
    file = converter.convert("safetensors shards", folder)
    compare("safetensors shards", file, expected, 2, "cols")
    for legacy in (False, True):
        folder = converter.path()
        save_config(model, folder)
        names = sorted(model.state_dict())
        weight_map = {}
        for i, part in enumerate((names[:7], names[7:20], names[20:])):
            shard = "pytorch_model-%05d-of-00003.bin" % (i + 1)
            torch.save({name: model.state_dict()[name].clone() for name in part}, os.path.join(folder, shard),
                       _use_new_zipfile_serialization=not legacy)
            weight_map.update(dict.fromkeys(part, shard))
        write_json(os.path.join(folder, "pytorch_model.bin.index.json"), {"metadata": {}, "weight_map": weight_map})
        file = converter.convert("bin shards", folder)  # the head is a copy of the embedding in another shard
        compare("bin shards", file, expected, 2, "cols")
        file and check_equal(file["head"], "tied", "bin shards: head")


def test_names(converter, _):
    """Prefixes, buffers, models without a head."""
    model = hf_model()
    state, expected = model.state_dict(), plain(model.state_dict(), False)
    mask = torch.ones(20, 20, dtype=torch.uint8).tril().view(1, 1, 20, 20)
    old = {name[len("transformer."):]: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    for layer in range(2):
        old["h.%d.attn.bias" % layer] = mask
        old["h.%d.attn.masked_bias" % layer] = torch.tensor(-1e4)
    cases = [("no prefix, old buffers", old)]
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."):
        cases.append((prefix, {prefix + name: tensor for name, tensor in state.items()}))
    cases.append(("blocks compiled one by one", {name.replace(".attn.", "._orig_mod.attn.")
                                                 .replace(".mlp.", "._fsdp_wrapped_module.mlp."): tensor
                                                 for name, tensor in state.items()}))
    for what, renamed in cases:
        for config in ({}, dict(architectures="drop"), dict(model_type="drop")):
            file = converter.convert(what, hf_directory(converter, model, renamed, **config))
            compare(what, file, expected, 2, "cols")
    body = hf_model(kind=transformers.GPT2Model)
    folder = converter.path()
    body.save_pretrained(folder)
    file = converter.convert("GPT2Model", folder)
    compare("GPT2Model", file, body.state_dict(), 2, "cols")
    file and check_equal(file["head"], "tied", "GPT2Model: head")
    file = converter.convert("GPT2Model, untied", hf_directory(converter, body, tie_word_embeddings=False))
    compare("GPT2Model, untied", file, body.state_dict(), 2, "cols")
    file and check_equal(file["head"], "none", "GPT2Model, untied: head")
    double = hf_model(kind=transformers.GPT2DoubleHeadsModel, num_labels=1)
    file = converter.convert("double heads", hf_directory(converter, double), says=("multiple_choice_head",))
    compare("double heads", file, {name: tensor for name, tensor in plain(double.state_dict(), False).items()
                                   if "multiple" not in name}, 2, "cols")


def test_heads(converter, logits):
    """Tied or not: what the configuration says against what the tensors say."""
    def convert(what, state, tie, head, keep_head, says=()):
        folder = hf_directory(converter, model, state, tie_word_embeddings=tie)
        file = converter.convert(what, folder, says=says)
        if file is not None:
            compare(what, file, plain(dict(state, **{"transformer.wte.weight": table}), keep_head), 2, "cols")
            check_equal(file["head"], head, what + ": head")
        loaded = transformers.GPT2LMHeadModel.from_pretrained(folder)
        same = loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
        if tie:  # transformers keeps equal tensors apart if the configuration says so; the result is the same
            check_equal(same, head == "tied", what + ": transformers agrees")
        logits.check(what, file, loaded.eval())

    model = hf_model(tie_word_embeddings=False)
    state = model.state_dict()
    table = state["transformer.wte.weight"]
    tied_copy = dict(state, **{"lm_head.weight": table.clone()})
    headless = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    tableless = {name: tensor for name, tensor in tied_copy.items() if name != "transformer.wte.weight"}
    convert("own head", state, False, "own", True)
    convert("a copy as head, tied", tied_copy, True, "tied", False)
    convert("a copy as head, untied", tied_copy, False, "tied", False)
    convert("own head though tied", state, True, "own", True, says=("warning", "lm_head.weight", "differ"))
    convert("no head", headless, True, "tied", False)
    convert("only the head", tableless, True, "tied", False)
    folder = converter.path()
    model.save_pretrained(folder)
    file = converter.convert("own head in safetensors", folder)
    compare("own head in safetensors", file, plain(state, True), 2, "cols")
    converter.refuse("no head though untied", hf_directory(converter, model, headless, tie_word_embeddings=False),
                     says=("lm_head.weight",))
    converter.refuse("no embedding though untied", hf_directory(converter, model, tableless,
                                                                tie_word_embeddings=False), says=("wte.weight",))


def test_types(converter, logits):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = hf_model().to(dtype)
        expected = plain(model.state_dict(), False)
        folder = converter.path()
        model.save_pretrained(folder)
        file = converter.convert("safetensors %s" % dtype, folder)
        compare("safetensors %s" % dtype, file, expected, 2, "cols")
        for legacy in (False, True):
            what = "torch file %s" % dtype
            folder = converter.path()
            save_config(model, folder)
            torch.save(model.state_dict(), os.path.join(folder, "pytorch_model.bin"),
                       _use_new_zipfile_serialization=not legacy)
            file = converter.convert(what, folder)
            compare(what, file, expected, 2, "cols")
        logits.check("%s" % dtype, file, model.float())
    model = hf_model()
    state = {name: tensor.to([torch.float16, torch.bfloat16, torch.float64, torch.float32][i % 4])
             for i, (name, tensor) in enumerate(model.state_dict().items()) if name != "lm_head.weight"}
    state["transformer.ln_f.weight"] = torch.tensor([1e300, -1e300, 1e-300, float("nan"), float("inf"), 0.1, -0.0,
                                                     1 / 3] * 3, dtype=torch.float64)
    for name in ("safetensors", "bin"):
        folder = converter.path()
        save_config(model, folder)
        if name == "bin":
            torch.save(state, os.path.join(folder, "pytorch_model.bin"))
        else:
            safetensors.torch.save_file(state, os.path.join(folder, "model.safetensors"))
        compare("mixed types", converter.convert("mixed types", folder), plain(state, False), 2, "cols")
    for dtype in (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        for name in ("pytorch_model.bin", "model.safetensors"):
            wrong = dict(model.state_dict())
            del wrong["lm_head.weight"]
            wrong["transformer.h.1.mlp.c_fc.weight"] = wrong["transformer.h.1.mlp.c_fc.weight"].to(dtype)
            folder = converter.path()
            save_config(model, folder)
            path = os.path.join(folder, name)
            torch.save(wrong, path) if name.endswith("bin") else safetensors.torch.save_file(wrong, path)
            converter.refuse("type %s" % dtype, folder, says=("h.1.mlp.c_fc.weight", "quantized"))
    quantized = dict(model.state_dict(), x=torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    converter.refuse("quantized tensor", hf_directory(converter, model, quantized), says=("'x'", "quantized"))
    sparse = dict(model.state_dict(), x=torch.eye(3).to_sparse())
    converter.refuse("sparse tensor", hf_directory(converter, model, sparse), says=("'x'", "sparse"))


def test_strides(converter, _):
    """Views: transposed, cut out of larger storages, expanded, all in one storage."""
    model = hf_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    pieces, at = {}, 0
    for name, tensor in state.items():
        pieces[name] = flat[at:at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    forms = {
        "transposed": {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
                       for name, tensor in state.items()},
        "every other element": {name: tensor.repeat_interleave(2, -1)[..., ::2] for name, tensor in state.items()},
        "cut out": {name: torch.cat([tensor, tensor + 1], -1)[..., :tensor.shape[-1]]
                    for name, tensor in state.items()},
        "one storage": pieces,
        "one storage of f16": {name: tensor.half()[..., ::1].t().contiguous().t() if tensor.dim() == 2
                               else tensor.half() for name, tensor in pieces.items()},
        "transposed f64": {name: tensor.double().t().contiguous().t() if tensor.dim() == 2 else tensor.double()
                           for name, tensor in state.items()},
        "expanded": {name: tensor.reshape(-1)[:1].expand(tensor.shape) if tensor.dim() == 1
                     else tensor[:1].expand(tensor.shape) if "wpe" in name
                     else tensor[:, :1].expand(tensor.shape) for name, tensor in state.items()},
    }
    for what, views in forms.items():
        for legacy in (False, True):
            folder = converter.path()
            save_config(model, folder)
            torch.save(views, os.path.join(folder, "pytorch_model.bin"), _use_new_zipfile_serialization=not legacy)
            compare(what, converter.convert(what, folder), plain(views, False), 2, "cols")
    # Runs that are longer than what is in memory at a time, both ways round.
    for shape in ((3, 300000), (300000, 3)):
        wide = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape[::-1]).t()
        path = converter.path("wide.bin")
        torch.save({"x": wide, "y": wide.contiguous(), "z": torch.ones(1, 1).expand(shape)}, path)
        module = converter.module
        tensors, _ = module.read_weights(module.InputFile(path))
        for name in "xyz":
            data = b"".join(bytes(chunk) for chunk in tensors[name].chunks())
            check(data == (raw_bytes(wide) if name != "z" else raw_bytes(torch.ones(shape))),
                  "%s of shape %s in pieces" % (name, shape))
        check(module.same_elements(tensors["x"], tensors["y"]), "a tensor and its copy are the same")
        check(not module.same_elements(tensors["x"], tensors["z"]), "two different tensors are not the same")


# ---------------------------------------------------------------------------------------------------------------------
# Tests: nanoGPT and minGPT
# ---------------------------------------------------------------------------------------------------------------------

def test_nanogpt(converter, logits):
    for bias in (True, False):
        for buffers in (False, True):
            model = LinearGpt(bias=bias, buffers=buffers)
            checkpoint = nanogpt_checkpoint(model)
            expected = plain(model.state_dict(), False)
            compiled = dict(checkpoint, model={"_orig_mod." + name: tensor
                                               for name, tensor in checkpoint["model"].items()})
            for what, saved, legacy in (("nanoGPT", checkpoint, False), ("compiled nanoGPT", compiled, False),
                                        ("legacy nanoGPT", compiled, True)):
                path = converter.path("ckpt.pt")
                torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
                file = converter.convert(what, path)
                compare(what, file, expected, 2, "rows")
                if file is not None:
                    check_equal((file["model.family"], file["decoder.activation"], file["head"], file["model.name"]),
                                ("nanogpt", "gelu", "tied", "ckpt"), what + ": description")
                    check_equal(any(name.endswith(".bias") for name in file.tensors), bias, what + ": biases")
                    logits.check(what, file, model)
            path, config = converter.path("bare.pth"), converter.path("config.json")
            torch.save(model.state_dict(), path)
            write_json(config, {key: value for key, value in model.model_args.items() if key != "bias"})
            file = converter.convert("bare nanoGPT", path, "--arch", "nanogpt", "--config", config)
            compare("bare nanoGPT", file, expected, 2, "rows")
    model = LinearGpt(approximate="tanh")  # nanoGPT before May 2023
    path, config = converter.path("ckpt.pt"), converter.path("config.json")
    torch.save(nanogpt_checkpoint(model), path)
    write_json(config, {"activation_function": "gelu_new"})
    file = converter.convert("old nanoGPT", path, "--config", config)
    compare("old nanoGPT", file, plain(model.state_dict(), False), 2, "rows")
    file and check_equal(file["decoder.activation"], "gelu_tanh", "old nanoGPT: activation")
    logits.check("old nanoGPT", file, model)
    checkpoint = nanogpt_checkpoint(LinearGpt(bias=False))
    checkpoint["model_args"].update(vocab_size=numpy.int64(97), n_layer=numpy.uint8(2), bias=numpy.bool_(False),
                                    dropout=numpy.float32(0.5))
    checkpoint.update(best_val_loss=numpy.float64(1.5), more=[numpy.ones(2), numpy.str_("x"), b"\xff", b"\xff"])
    for protocol in (2, 3, 4, 5):
        path = converter.path("ckpt.pt")
        torch.save(checkpoint, path, pickle_protocol=protocol)
        file = converter.convert("nanoGPT with numbers of numpy's", path)
        compare("nanoGPT with numbers of numpy's", file, plain(checkpoint["model"], False), 2, "rows")
    path = converter.path("model.safetensors")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(state, path)
    write_json(config, model.model_args)
    file = converter.convert("nanoGPT in safetensors", path, "--arch", "nanogpt", "--config", config)
    compare("nanoGPT in safetensors", file, plain(state, False), 2, "rows")


def test_mingpt(converter, logits):
    for tied in (False, True):
        model = LinearGpt(tied=tied, approximate="tanh", buffers=True)
        path, config = converter.path("model.pt"), converter.path("config.json")
        torch.save(model.state_dict(), path)
        write_json(config, dict(model_type="gpt-nano", n_layer=2, n_head=3, n_embd=24, block_size=20, vocab_size=97,
                                embd_pdrop=0.1))
        file = converter.convert("minGPT", path, "--arch", "mingpt", "--config", config)
        compare("minGPT", file, plain(model.state_dict(), not tied), 2, "rows")
        if file is not None:
            check_equal((file["model.family"], file["decoder.activation"], file["head"]),
                        ("mingpt", "gelu_tanh", "tied" if tied else "own"), "minGPT: description")
        logits.check("minGPT", file, model)


def test_orientation(converter, _):
    """The same names with matrices either way round, and shapes that don't tell."""
    for n_inner in (24, 72, 8):  # d_ff = d_model; c_fc as large as c_attn; c_fc as thin
        model = hf_model(n_inner=n_inner)
        state = model.state_dict()
        turned = {name: tensor.t().contiguous() if tensor.dim() == 2 and ".h." in name else tensor
                  for name, tensor in state.items()}
        for what, form, layout in (("Conv1D", state, "cols"), ("Linear", turned, "rows")):
            what = "%s with d_ff %d" % (what, n_inner)
            compare(what, converter.convert(what, hf_directory(converter, model, form)), plain(form, False), 2, layout)
    mixed = dict(state)
    mixed["transformer.h.1.attn.c_attn.weight"] = state["transformer.h.1.attn.c_attn.weight"].t().contiguous()
    converter.refuse("both orientations", hf_directory(converter, model, mixed), says=("h.1.attn.c_attn.weight",))


# ---------------------------------------------------------------------------------------------------------------------
# Tests: tokenizers
# ---------------------------------------------------------------------------------------------------------------------

TEXTS = ("Once upon a time, there was a bear.", " the  forest\n\n\tis DARK and it's deep",
         "naïve café – 東京 🐻‍❄️ Ωmega",
         "x" * 40 + " 12345 67,89 !!??", "we'll they've I'm don't 'S", "", " ", "zzz qzéz aqzb",
         "a\u2028b\x85c \u00a0 d", "# #version # #")


def train_tokenizer(add_prefix_space=False, special=("<|endoftext|>",), vocab_size=420, merges=None):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(list(TEXTS) * 4 + ["the bear and the girl went into the forest " * 5,
                                                     "## #### #version ##"] * 3, trainer)
    return tokenizer


def tokenizer_folder(converter, model):
    folder = converter.path()
    model.save_pretrained(folder)
    return folder


class TfmTokenizer:
    """Slow byte-level BPE from a .tfm file alone, but for the pattern, which is the tokenizers library's."""

    def __init__(self, file):
        sizes, data, at = file.metadata["tokenizer.token_sizes"], file.metadata["tokenizer.tokens"], 0
        self.tokens = []
        for size in sizes:
            self.tokens.append(data[at:at + size])
            at += size
        if at != len(data):
            raise ValueError("token sizes")
        flat = file.metadata["tokenizer.merges"]
        self.merges = {tuple(flat[i:i + 2]): (i // 3, flat[i + 2]) for i in range(0, len(flat), 3)}
        flat = file.metadata["tokenizer.added"]
        self.added = dict(zip(flat[::2], flat[1::2]))
        self.byte_ids = file.metadata["tokenizer.byte_ids"]
        self.ignore_merges = file["tokenizer.ignore_merges"]
        self.unk_id = file.metadata.get("tokenizer.unk_id", [None])[0]
        self.fuse_unk = file.metadata.get("tokenizer.fuse_unk", [0])[0]
        self.prefix = file.metadata.get("tokenizer.prefix_ids", [])
        self.suffix = file.metadata.get("tokenizer.suffix_ids", [])
        self.splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=bool(file["tokenizer.add_prefix_space"]))
        self.alphabet = alphabet()
        self.whole = {token: i for i, token in enumerate(self.tokens) if i not in self.added}

    def encode(self, text):
        ids = []
        for piece, _ in self.splitter.pre_tokenize_str(text):
            data = bytes(self.alphabet[character] for character in piece)
            if self.ignore_merges and data in self.whole:
                ids.append(self.whole[data])
            else:
                ids += self.merge(self.start(data))
        return self.prefix + ids + self.suffix

    def start(self, data):
        """The ids of single bytes, before any merge."""
        ids, was_unknown = [], False
        for number in map(self.byte_ids.__getitem__, data):
            if number >= 0:
                ids.append(number)
            elif self.unk_id is not None and not (was_unknown and self.fuse_unk):
                ids.append(self.unk_id)
            was_unknown = number < 0
        return ids

    def merge(self, ids):
        while len(ids) > 1:
            rank, i, merged = min((*self.merges[pair][:1], i, self.merges[pair][1]) if pair in self.merges
                                  else (math.inf, 0, 0) for i, pair in enumerate(zip(ids, ids[1:])))
            if rank == math.inf:
                break
            ids[i:i + 2] = [merged]
        return ids


def alphabet():
    """GPT-2's characters for bytes, as in OpenAI's encoder.py."""
    bs = list(range(ord("!"), ord("~") + 1)) + list(range(ord("¡"), ord("¬") + 1)) + list(range(ord("®"), ord("ÿ") + 1))
    cs = bs[:]
    n = 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    return {chr(c): b for b, c in zip(bs, cs)}


def compare_tokenizer(what, file, reference, named=None, texts=TEXTS):
    """With a tokenizers.Tokenizer, and with the ids of the roles."""
    if file is None:
        return
    if not check("tokenizer.tokens" in file.metadata, what + ": has a tokenizer"):
        return
    check_equal((file["tokenizer.kind"], file["tokenizer.pattern"]), ("byte_bpe", "gpt2"), what + ": kind")
    found = TfmTokenizer(file)
    characters = alphabet()
    added = {number: token for number, token in reference.get_added_tokens_decoder().items()}
    expected = [b""] * (max(reference.get_vocab(True).values(), default=-1) + 1)
    for text, number in reference.get_vocab(True).items():
        is_plain = number not in added and all(character in characters for character in text)
        expected[number] = bytes(characters[c] for c in text) if is_plain else text.encode()
    check_equal(found.tokens, expected, what + ": tokens")
    flags = {number: token.special + 2 * token.lstrip + 4 * token.rstrip + 8 * token.single_word
             + 16 * token.normalized for number, token in added.items()}
    check_equal(found.added, flags, what + ": added tokens and their flags")
    for text in texts:
        check_equal(found.encode(text), reference.encode(text).ids, "%s: ids of %r" % (what, text))
    for role, number in (named or {}).items():
        check_equal(file.metadata.get("tokenizer.%s_id" % role, [None])[0], number, "%s: %s" % (what, role))


def test_tokenizer_json(converter, _):
    model = hf_model(vocab_size=512)

    def convert(what, tokenizer, change=None, named=None, texts=TEXTS, **files):
        folder = tokenizer_folder(converter, model)
        value = json.loads(tokenizer.to_str())
        if change:
            change(value)
        write_json(os.path.join(folder, "tokenizer.json"), value)
        for name, content in files.items():
            write_json(os.path.join(folder, name + ".json"), content)
        reference = tokenizers.Tokenizer.from_str(json.dumps(value))
        compare_tokenizer(what, converter.convert(what, folder), reference, named, texts)

    end = dict(bos=0, eos=0, pad=None, unk=None)
    convert("tokenizer.json", train_tokenizer(), named=end)
    convert("add_prefix_space", train_tokenizer(add_prefix_space=True), named=end)

    def old_merges(value):
        value["model"]["merges"] = [" ".join(merge) for merge in value["model"]["merges"]]
        del value["model"]["type"]
        value["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    convert("merges as strings, no type", train_tokenizer(), old_merges)

    def ignore_merges(value):
        value["model"]["ignore_merges"] = True
        value["model"]["merges"] = value["model"]["merges"][:20]
    convert("ignore_merges", train_tokenizer(), ignore_merges)

    def merge_twice(value):
        value["model"]["merges"] += value["model"]["merges"][:3]
    convert("a merge that is there twice", train_tokenizer(), merge_twice)

    def lack_bytes(value):
        for character in "zqé":
            del value["model"]["vocab"][{"é": "Ã"}.get(character, character)]
        value["model"]["merges"] = [merge for merge in value["model"]["merges"]
                                    if not set("".join(merge)) & set("zqÃ")]
    convert("bytes without tokens", train_tokenizer(), lack_bytes)

    def unknown(value):
        lack_bytes(value)
        value["model"]["unk_token"] = "<|endoftext|>"
    convert("bytes that become unk", train_tokenizer(), unknown, named=dict(unk=0))

    def fused(value):
        unknown(value)
        value["model"]["fuse_unk"] = True
    convert("runs of bytes that become one unk", train_tokenizer(), fused, named=dict(unk=0))

    tokenizer = train_tokenizer(special=("<|endoftext|>", "<s>", "</s>"))
    tokenizer.add_tokens([tokenizers.AddedToken("été", lstrip=True), tokenizers.AddedToken(" two words ", rstrip=True),
                          tokenizers.AddedToken("bear", single_word=True, normalized=False)])
    tokenizer.add_special_tokens([tokenizers.AddedToken("<pad>", special=True)])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    pad = tokenizer.token_to_id("<pad>")
    texts = [text for text in TEXTS if "bear" not in text]  # added tokens in a text are the C side's business
    roles = dict(bos=1, eos=2, pad=pad)
    convert("template and added tokens", tokenizer, named=roles, texts=texts, tokenizer_config=dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", pad_token="<pad>"))
    wrapped = json.loads(tokenizer.to_str())["post_processor"]
    convert("an added token that BPE can't make of the bytes that its characters stand for",
            train_tokenizer(special=("<|endoftext|>", "«bear»")), texts=texts)
    for what, text, change in (("a byte", "é", None), ("a space", "Ġ", None), ("a merge", "Ġthe", None),
                               ("a whole piece", "Ġbear", ignore_merges)):
        odd = train_tokenizer(special=("<|endoftext|>",) + ((text,) if change else ()))
        odd.add_tokens([text])
        folder = tokenizer_folder(converter, model)
        value = json.loads(odd.to_str())
        if change:
            change(value)
        write_json(os.path.join(folder, "tokenizer.json"), value)
        converter.refuse("an added token that is %s to BPE" % what, folder, says=(
            "tokenizer.json", repr(text), "the id %d" % odd.token_to_id(text)))

    def sequence(value):
        value["post_processor"] = {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, wrapped]}
        value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [value["pre_tokenizer"]]}
    convert("sequences of one", tokenizer, sequence, texts=texts,
            tokenizer_config=dict(tokenizer_class="PreTrainedTokenizerFast"))

    unsupported = {
        "normalizer": ({"normalizer": {"type": "NFKD"}}, "NFKD"),
        "pre-tokenizer": ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, "Metaspace"),
        "no pre-tokenizer": ({"pre_tokenizer": None}, "pre_tokenizer"),
        "two pre-tokenizers": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}}, "Digits"),
        "another pattern": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[ab]+|x"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}, "[ab]+|x"),
        "no pattern": ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
                       "splits nothing"),
        "decoder": ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
        "post-processor": ({"post_processor": {"type": "BertProcessing"}}, "'sep'"),
        "another post-processor": ({"post_processor": {"type": "Other"}}, "Other"),
        "model": ({"model": {"type": "WordLevel"}}, "WordLevel"),
        "unigram without a vocabulary": ({"model": {"type": "Unigram"}}, "unk_id"),
        "added tokens": ({"added_tokens": [3]}, "added_tokens"),
        "added token's id": ({"added_tokens": [{"id": "x", "content": "y"}]}, "'id'"),
        "added token beyond the model": ({"added_tokens": [{"id": 512, "content": "y"}]}, "512"),
        "added token against the vocabulary": ({"added_tokens": [{"id": 5, "content": "!"}]}, "'!'"),
        "added token on another's id": ({"added_tokens": [{"id": 5, "content": "new"}]}, "same id"),
        "template without text": ({"post_processor": {"type": "TemplateProcessing", "single": [],
                                                      "special_tokens": {}}}, "template"),
    }
    for what, (change, word) in unsupported.items():
        folder = tokenizer_folder(converter, model)
        write_json(os.path.join(folder, "tokenizer.json"), dict(json.loads(train_tokenizer().to_str()), **change))
        converter.refuse("tokenizer.json: " + what, folder, says=("tokenizer.json", word))
    options = {"dropout": 0.1, "continuing_subword_prefix": "##", "end_of_word_suffix": "</w>", "vocab": {"a": "b"},
               "merges": [["a", "nothing"]], "type": 3, "ignore_merges": "no"}
    for key, option in options.items():
        folder = tokenizer_folder(converter, model)
        value = json.loads(train_tokenizer().to_str())
        value["model"][key] = option
        write_json(os.path.join(folder, "tokenizer.json"), value)
        converter.refuse("tokenizer.json: model.%s" % key, folder, says=("tokenizer.json",))
    folder = tokenizer_folder(converter, model)
    value = json.loads(train_tokenizer().to_str())
    lack_bytes(value)
    value["model"]["byte_fallback"] = True
    write_json(os.path.join(folder, "tokenizer.json"), value)
    converter.refuse("tokenizer.json: byte_fallback", folder, says=("tokenizer.json", "byte_fallback"))


BERT_VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "bear", "##s", "ü", "\u2028x", "a", "##\x85"]


def check_wordpiece(what, file, vocab, **options):
    """The tokenizer of a file: its tokens, and what differs from BERT's usual options."""
    data, at, tokens = file.metadata["tokenizer.tokens"], 0, []
    for size in file.metadata["tokenizer.token_sizes"]:
        tokens.append(data[at:at + size].decode())
        at += size
    check_equal(tokens, vocab, what + ": tokens")
    wanted = {"kind": "wordpiece", "continuing_prefix": "##", "max_word_chars": 100, "clean_text": 1, "chinese_chars": 1,
              "lowercase": 1, "strip_accents": 1, "cleanup": 1, "unk_id": 1, "mask_id": 4, "pair_type": 1, **options}
    found = {key: file["tokenizer." + key] for key in wanted}
    check_equal(found, wanted, what + ": options")
    around = [file.metadata["tokenizer.%s_ids" % key] for key in ("prefix", "pair", "suffix")]
    check_equal([list(ids) for ids in around], [[2], [3], [3]], what + ": what is put around texts")
    check_equal(list(file.metadata["tokenizer.added"])[:10], [0, 1, 1, 1, 2, 1, 3, 1, 4, 1], what + ": special tokens")


def test_wordpiece(converter, _):
    model = hf_model(vocab_size=512)

    def from_vocab(what, end="\n", **config):
        folder = tokenizer_folder(converter, model)
        write(os.path.join(folder, "vocab.txt"), "".join(text + end for text in BERT_VOCAB).encode())
        if config:
            write_json(os.path.join(folder, "tokenizer_config.json"), config)
        return converter.convert("vocab.txt: " + what, folder)

    def from_json(change=None, **config):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(
            {text: i for i, text in enumerate(BERT_VOCAB)}, unk_token="[UNK]"))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer.add_special_tokens(BERT_VOCAB[:5])
        tokenizer.add_tokens(["new word"])
        folder = tokenizer_folder(converter, model)
        value = json.loads(tokenizer.to_str())
        if change:
            change(value)
        write_json(os.path.join(folder, "tokenizer.json"), value)
        if config:
            write_json(os.path.join(folder, "tokenizer_config.json"), config)
        return folder

    check_wordpiece("vocab.txt", from_vocab("usual"), BERT_VOCAB)
    check_wordpiece("vocab.txt, cased", from_vocab("cased", do_lower_case=False), BERT_VOCAB, lowercase=0, strip_accents=0)
    check_wordpiece("vocab.txt, options", from_vocab("options", end="\r\n", strip_accents=False, tokenizer_class=
                    "BertTokenizerFast", tokenize_chinese_chars=False), BERT_VOCAB, strip_accents=0, chinese_chars=0)
    with_new = BERT_VOCAB + ["new word"]
    file = converter.convert("WordPiece in tokenizer.json", from_json())
    check_wordpiece("WordPiece in tokenizer.json", file, with_new, lowercase=0, strip_accents=0)
    check_equal(list(file.metadata["tokenizer.added"])[10:], [len(BERT_VOCAB), 16 + 32], "a token outside the vocabulary")
    file = converter.convert("tokenizer_config.json above it", from_json(do_lower_case=True))
    check_wordpiece("tokenizer_config.json above it", file, with_new)

    def template(value):
        value["post_processor"] = json.loads(tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)]).__getstate__())
        value["decoder"]["cleanup"] = False

    file = converter.convert("WordPiece with a template", from_json(template))
    check_wordpiece("WordPiece with a template", file, with_new, lowercase=0, strip_accents=0, cleanup=0)

    def odd_pair(value):
        template(value)
        value["post_processor"]["pair"].reverse()

    converter.convert("an odd template for pairs", from_json(odd_pair), says=("pairs of texts",))

    def huge_type(value):
        template(value)
        value["post_processor"]["pair"][3]["Sequence"]["type_id"] = 1 << 31
        value["post_processor"]["pair"][4]["SpecialToken"]["type_id"] = 1 << 31

    converter.convert("a huge type in a template for pairs", from_json(huge_type), says=("pairs of texts",))

    def refuse(what, word, **parts):
        def change(value):
            for key, part in parts.items():
                value[key] = dict(value[key], **part) if key == "model" else part
        converter.refuse("WordPiece: " + what, from_json(change), says=("tokenizer.json", word))

    refuse("another normalizer", "Lowercase", normalizer={"type": "Lowercase"})
    refuse("another pre-tokenizer", "Whitespace", pre_tokenizer={"type": "Whitespace"})
    refuse("no unknown token", "[NO]", model={"unk_token": "[NO]"})
    refuse("huge words", "max_input_chars_per_word", model={"max_input_chars_per_word": 100000})
    folder = tokenizer_folder(converter, model)
    write(os.path.join(folder, "vocab.txt"), b"a\nb\n")
    converter.refuse("vocab.txt without [UNK]", folder, says=("vocab.txt", "[UNK]"))
    write(os.path.join(folder, "vocab.txt"), "\n".join(BERT_VOCAB + ["x" * 1025]).encode())
    converter.refuse("vocab.txt with a huge token", folder, says=("vocab.txt", "1025 bytes"))


def save_vocab_and_merges(tokenizer, folder):
    tokenizer.model.save(folder)


def test_vocab_and_merges(converter, _):
    model = hf_model(vocab_size=512)

    def convert(what, tokenizer, crlf=False, transform=None, **files):
        """Compares with what transformers makes of the same directory."""
        folder = tokenizer_folder(converter, model)
        save_vocab_and_merges(tokenizer, folder)
        merges = os.path.join(folder, "merges.txt")
        with open(merges, "rb") as file:
            data = file.read()
        if crlf:
            data = data.replace(b"\n", b"\r\n")
        write(merges, transform(data) if transform else data)
        for name, content in files.items():
            write_json(os.path.join(folder, name + ".json"), content)
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        reference = loaded.backend_tokenizer
        reference.encode_special_tokens = True  # special tokens in a text are the C side's business
        file = converter.convert(what, folder)
        named = dict(bos=loaded.bos_token_id, eos=loaded.eos_token_id, pad=loaded.pad_token_id, unk=None)
        compare_tokenizer(what, file, reference, named)
        return file

    tokenizer = train_tokenizer()
    size = tokenizer.get_vocab_size()
    convert("vocab.json and merges.txt", tokenizer)
    convert("merges.txt with CRLF", tokenizer, crlf=True)
    convert("merges.txt without a version", tokenizer, transform=lambda data: data.partition(b"\n")[2])
    convert("merges.txt without a last line feed", tokenizer, transform=lambda data: data.rstrip(b"\n"))
    convert("vocabulary without <|endoftext|>", train_tokenizer(special=()))
    convert("tokenizer_config.json", tokenizer, tokenizer_config=dict(
        tokenizer_class="GPT2Tokenizer", add_prefix_space=True, pad_token="<|endoftext|>", unk_token=None))
    convert("special_tokens_map.json", tokenizer, special_tokens_map=dict(
        eos_token=dict(content="</end>", lstrip=False, normalized=True, rstrip=True, single_word=False),
        pad_token="<pad>", additional_special_tokens=["<one>", "<two words>"]))
    convert("added_tokens.json", tokenizer, added_tokens={"<pad>": size, "plain one": size + 1},
            special_tokens_map=dict(pad_token="<pad>"))

    def added(content, *flags):
        return dict({flag: flag in flags for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")},
                    content=content)
    convert("added_tokens_decoder", tokenizer, tokenizer_config=dict(
        tokenizer_class="GPT2Tokenizer", eos_token="<end>", added_tokens_decoder={
            "0": added("<|endoftext|>", "normalized", "special"), str(size): added("<end>", "lstrip", "special"),
            str(size + 1): added("word", "normalized", "single_word")}))
    convert("add_bos_token", tokenizer, tokenizer_config=dict(tokenizer_class="GPT2Tokenizer", add_bos_token=True))
    convert("merges that begin with a number sign", tokenizer)
    check(any(line.startswith(b"#") for line in merges_of(converter, tokenizer)[1:]),
          "the trained merges have lines that begin with a number sign")

    full = hf_model(vocab_size=256)  # the default special token would be id 256, which the model hasn't
    folder = converter.path()
    full.save_pretrained(folder)
    save_vocab_and_merges(train_tokenizer(special=(), vocab_size=256), folder)
    file = converter.convert("no room for <|endoftext|>", folder)
    if file is not None:
        check_equal((len(file.metadata["tokenizer.token_sizes"]), file.metadata["tokenizer.added"],
                     "tokenizer.eos_id" in file.metadata), (256, [], False), "no room for <|endoftext|>")

    bad = [
        ("vocab.json", b'{"a": "b"}', "'a'"), ("vocab.json", b'["a"]', "vocab.json"),
        ("vocab.json", b'{"a": 0, "b": 0}', "same id"), ("vocab.json", b'{"a": 512}', "512"),
        ("vocab.json", b'{"a": -1}', "-1"), ("vocab.json", b'{"a": 0, "a": 1}', "'a'"),
        ("vocab.json", b'{"\\ud800": 0}', "Unicode"), ("vocab.json", b"\xff", "UTF-8"),
        ("vocab.json", b'{"a": 1.5}', "'a'"), ("vocab.json", b'{"a": true}', "'a'"),
        ("merges.txt", b"#version: 0.2\na b c\n", "line 2"), ("merges.txt", b"#version: 0.2\n\na b\n", "line 2"),
        ("merges.txt", "#version: 0.2\nĠ 東京\n".encode(), "not in the vocabulary"),
        ("merges.txt", b"\xff\xfe", "UTF-8"),
        ("merges.txt", b"a  b\n", "line 1"), ("added_tokens.json", b'{"x": "y"}', "'x'"),
        ("added_tokens.json", b'{"x": 512}', "512"), ("tokenizer_config.json", b'{"eos_token": {"content": 3}}', "3"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}', "'x'"),
        ("special_tokens_map.json", b'{"additional_special_tokens": [3]}', "3"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id"),
    ]
    for name, data, word in bad:
        folder = tokenizer_folder(converter, model)
        save_vocab_and_merges(train_tokenizer(), folder)
        write(os.path.join(folder, name), data)
        converter.refuse("%s: %r" % (name, data), folder, says=(word,))
    os.remove(os.path.join(folder, "merges.txt"))
    converter.refuse("vocab.json alone", folder, says=("merges.txt",))
    folder = tokenizer_folder(converter, model)
    write(os.path.join(folder, "tekken.json"), b"x")
    converter.convert("another tokenizer", folder, says=("tekken.json", "not supported"))


def merges_of(converter, tokenizer):
    folder = converter.path()
    save_vocab_and_merges(tokenizer, folder)
    with open(os.path.join(folder, "merges.txt"), "rb") as file:
        return file.read().split(b"\n")


def sentencepiece_model(kind="unigram", pieces=(), **options):
    """A model of a few pieces, (text, score, type), as sentencepiece writes it."""
    model = sentencepiece_pb2.ModelProto()
    model.trainer_spec.model_type = dict(unigram=1, bpe=2, word=3)[kind]
    model.trainer_spec.byte_fallback = any(piece[2] == 6 for piece in pieces)
    model.normalizer_spec.precompiled_charsmap = b""
    for key, value in options.items():
        setattr(model.trainer_spec if hasattr(model.trainer_spec, key) else model.normalizer_spec, key, value)
    for text, score, piece_type in pieces:
        model.pieces.add(piece=text, score=score, type=piece_type)
    return model


T5_PIECES = [("<pad>", 0, 3), ("</s>", 0, 3), ("<unk>", 0, 2), ("\u2581", -2, 1), ("a", -3, 1), ("b", -3, 1), ("ab", -4, 1)]
LLAMA_PIECES = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), *(("<0x%02X>" % i, 0, 6) for i in range(256)),
                ("ab", -1, 1), ("\u2581", -2, 1), ("a", -3, 1), ("b", -4, 1), ("<user>", 0, 4)]
XLMR_PIECES = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("\u2581", -2, 1), ("a", -3, 1), ("b", -3, 1)]


def pieces_of(file):
    data, at, found = file.metadata["tokenizer.tokens"], 0, []
    for size in file.metadata["tokenizer.token_sizes"]:
        found.append(data[at:at + size].decode())
        at += size
    return found


def sentencepiece_folder(converter, name, model, **config):
    folder = tokenizer_folder(converter, hf_model(vocab_size=512))
    data = model if isinstance(model, bytes) else model.SerializeToString()
    write(os.path.join(folder, name), data)
    if config:
        write_json(os.path.join(folder, "tokenizer_config.json"), config)
    return folder


def test_sentencepiece(converter, _):
    file = converter.convert("T5", sentencepiece_folder(converter, "spiece.model", sentencepiece_model(pieces=T5_PIECES,
                                                        eos_id=1, bos_id=-1, unk_id=2)))
    if file:
        texts = [text for text, _, _ in T5_PIECES]
        check_equal(pieces_of(file), texts + ["<extra_id_%d>" % i for i in range(99, -1, -1)], "T5: tokens")
        check_equal(file["tokenizer.kind"], "unigram", "T5: kind")
        check_equal(file.metadata["tokenizer.suffix_ids"], [1], "T5: end")
        check("tokenizer.prefix_ids" not in file.metadata, "T5: nothing in front")
        check_equal(file.metadata["tokenizer.types"], [3, 3, 2, 1, 1, 1, 1] + [0] * 100, "T5: types")
        check_equal(file.metadata["tokenizer.sorted"], [4, 6, 5, 3], "T5: sorted")
        check_equal(dict(zip(*[iter(file.metadata["tokenizer.added"])] * 2))[106], 1, "T5: <extra_id_0>")
    for what, options, surface in (("usual", {}, " \u2047 "), ("its own", dict(unk_surface=" <?>"), " <?>"),
                                   ("nothing", dict(unk_surface=""), "")):
        file = converter.convert("unknown: " + what, sentencepiece_folder(
            converter, "spiece.model", sentencepiece_model(pieces=T5_PIECES, unk_id=2, **options)))
        file and check_equal(file.metadata["tokenizer.unk_surface"], surface.encode(), "unknown: " + what)
    llama = sentencepiece_model("bpe", LLAMA_PIECES, remove_extra_whitespaces=False, unk_id=0)
    for name, config, prefix in (("LLaMA", {}, [1]), ("Gemma", dict(tokenizer_class="GemmaTokenizer"), [1]),
                                 ("no <s>", dict(tokenizer_class="LlamaTokenizer", add_bos_token=False), [])):
        file = converter.convert(name, sentencepiece_folder(converter, "tokenizer.model", llama, **config))
        if file:
            check_equal(file.metadata.get("tokenizer.prefix_ids", []), prefix, name + ": in front")
            check_equal(file["tokenizer.kind"], "spm_bpe", name + ": kind")
            check_equal([file[key] for key in ("tokenizer.byte_fallback", "tokenizer.add_dummy_prefix",
                                               "tokenizer.remove_extra_whitespaces", "tokenizer.decode_lead")],
                        [1, 1, 0, 1], name + ": rules")
    xlmr = sentencepiece_model(pieces=XLMR_PIECES)
    file = converter.convert("XLM-R", sentencepiece_folder(converter, "sentencepiece.bpe.model", xlmr))
    if file:
        check_equal(pieces_of(file), ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "a", "b", "<mask>"], "XLM-R: tokens")
        check_equal((file.metadata["tokenizer.prefix_ids"], file.metadata["tokenizer.suffix_ids"], file["tokenizer.mask_id"],
                     file["tokenizer.unk_id"]), ([0], [2], 7, 3), "XLM-R: special tokens")
        check_equal(dict(zip(*[iter(file.metadata["tokenizer.added"])] * 2))[7], 3, "XLM-R: <mask>")
    for what, model, says in (
            ("a piece twice", sentencepiece_model(pieces=T5_PIECES + [("a", 0, 1)]), ("'a'", "twice")),
            ("no unknown piece", sentencepiece_model(pieces=T5_PIECES[:2]), ("unknown",)),
            ("a word model", sentencepiece_model("word", T5_PIECES), ("type 3",)),
            ("NaN", sentencepiece_model(pieces=T5_PIECES + [("x", math.nan, 1)]), ("piece 7", "nan")),
            ("missing bytes", sentencepiece_model("bpe", LLAMA_PIECES[:100] + LLAMA_PIECES[101:]), ("<0x61>",)),
            ("a control character", sentencepiece_model(pieces=T5_PIECES + [("x", 0, 3)]), ("'x'", "single character"))):
        converter.refuse(what, sentencepiece_folder(converter, "spiece.model", model), says=says)
    converter.refuse("ALBERT", sentencepiece_folder(converter, "spiece.model", sentencepiece_model(pieces=T5_PIECES),
                                                    tokenizer_class="AlbertTokenizer"), says=("AlbertTokenizer",))


def test_damaged_sentencepiece(converter, _):
    """Whatever the bytes are: converted, or one sentence."""
    data = sentencepiece_model(pieces=T5_PIECES, eos_id=1, bos_id=-1, unk_id=2).SerializeToString()
    folder = sentencepiece_folder(converter, "spiece.model", data)
    path = os.path.join(folder, "spiece.model")
    for i in range(0, len(data), 7):
        write(path, data[:i])
        check_damaged(converter, folder, "spiece.model of %d bytes" % i, may_pass=True)
    for i in range(40):
        damaged = bytearray(data)
        for _ in range(random.randrange(1, 4)):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        write(path, bytes(damaged))
        check_damaged(converter, folder, "spiece.model, damage %d: %s" % (i, damaged.hex()), may_pass=True)


def test_sentencepiece_json(converter, _):
    """Forms of tokenizer.json that are supported, and the part that is not."""
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([(text, float(score)) for text, score, _ in T5_PIECES], unk_id=2))
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    unigram.decoder = tokenizers.decoders.Metaspace()

    def folder(change, with_model=False):
        value = json.loads(unigram.to_str())
        change(value)
        path = tokenizer_folder(converter, hf_model(vocab_size=512))
        write_json(os.path.join(path, "tokenizer.json"), value)
        if with_model:
            model = sentencepiece_model(pieces=T5_PIECES, eos_id=1, bos_id=-1, unk_id=2)
            write(os.path.join(path, "spiece.model"), model.SerializeToString())
        return path

    file = converter.convert("unigram's tokenizer.json", folder(lambda value: None))
    if file:
        check_equal([file[key] for key in ("tokenizer.kind", "tokenizer.rules", "tokenizer.metaspace",
                                           "tokenizer.split_words", "tokenizer.unk_id")],
                    ["unigram", "tokenizers", 3, 1, 2], "unigram's tokenizer.json")

    def lowercase(value):
        value["normalizer"] = {"type": "Lowercase"}
    converter.refuse("Lowercase", folder(lowercase), says=("Lowercase",))
    file = converter.convert("spiece.model instead", folder(lowercase, with_model=True), says=("Lowercase", "spiece.model"))
    file and check_equal(file["tokenizer.rules"], "sentencepiece", "spiece.model instead")

    def digits(value):
        value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, value["pre_tokenizer"]]}
    converter.refuse("Digits", folder(digits), says=("Digits",))

    def charsmap(value):
        value["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "?"}
    converter.refuse("charsmap", folder(charsmap), says=("base64",))
    for what, says, data in (("short", "is not a trie of 0", b"\x08\0\0\0"), ("without an end", "is not a trie", b"\4\0\0\0abcdx"),
                             ("too large", "is not a trie of 8", b"\x08\0\0\0abcd\0"),
                             ("that leads nowhere", "node 0 leads to no text", b"\4\0\0\0\0\1\0\0x\0"),
                             ("with a long text", "more than 256", b"\4\0\0\0\0\0\0\0" + b"x" * 257 + b"\0")):
        def bad_charsmap(value):
            encoded = base64.b64encode(data).decode()
            value["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": encoded}
        converter.refuse("a charsmap " + what, folder(bad_charsmap), says=(says,))

    def score(value):
        value["model"]["vocab"][4][1] = "high"
    converter.refuse("a score", folder(score), says=("piece 4",))

    def unknown(value):
        value["model"]["unk_id"] = 70
    converter.refuse("unk_id", folder(unknown), says=("unk_id",))

    def bpe(texts, **more):
        def change(value):
            vocab = {text: i for i, text in enumerate(["<s>", *texts, "\u2581", "a", "\u2581a"])}
            value["model"] = dict(type="BPE", vocab=vocab, merges=[["\u2581", "a"]], unk_token=None, **more)
        return change
    all_bytes = ["<0x%02X>" % i for i in range(256)]
    file = converter.convert("no unknown token", folder(bpe(all_bytes, byte_fallback=True)))
    file and check_equal((file.metadata["tokenizer.types"][:3], file["tokenizer.byte_fallback"]), ([1, 6, 6], 1),
                         "no unknown token")
    for what, change in (("no bytes", bpe([], byte_fallback=True)), ("no fallback", bpe(all_bytes))):
        converter.refuse("no unknown token and " + what, folder(change), says=("unk_token", "byte_fallback"))
    converter.refuse("an unknown token that is no piece", folder(lambda value: (bpe(all_bytes, byte_fallback=True)(
        value), value["model"].update(unk_token="<unk>"))), says=("unk_token", "<unk>"))


def test_tokenizer_beside_file(converter, _):
    """A bare state dict finds its tokenizer, and the ids that end a text, in its directory."""
    model = LinearGpt(vocab_size=512)
    folder = converter.path()
    path = os.path.join(folder, "ckpt.pt")
    torch.save(nanogpt_checkpoint(model), path)
    tokenizer = train_tokenizer()
    save_vocab_and_merges(tokenizer, folder)
    file = converter.convert("tokenizer beside ckpt.pt", path, says=("vocab.json",))
    compare_tokenizer("tokenizer beside ckpt.pt", file, transformers.GPT2Tokenizer.from_pretrained(
        folder).backend_tokenizer, dict(eos=0))
    file and check_equal(file["generation.eos_ids"], 0, "tokenizer beside ckpt.pt: end of text")
    here = os.getcwd()
    try:
        os.chdir(folder)  # no directory in the path at all
        file = converter.convert("relative path", "ckpt.pt", says=("vocab.json",))
    finally:
        os.chdir(here)
    file and check_equal(file["model.name"], "ckpt", "relative path: name")


def test_end_ids(converter, _):
    model = hf_model(vocab_size=512)
    for what, config, generation, with_tokenizer, expected, says in (
            ("generation_config.json", dict(eos_token_id=3), dict(eos_token_id=[5, 6]), True, [5, 6], ()),
            ("config.json", dict(eos_token_id=3), {}, True, [3], ()),
            ("config.json, list", dict(eos_token_id=[3, 4]), None, True, [3, 4], ()),
            ("tokenizer", dict(eos_token_id=None), None, True, [0], ()),
            ("none", dict(eos_token_id=None), None, False, None, ()),
            ("out of range", dict(eos_token_id=50256), None, False, None, ("50256",))):
        folder = hf_directory(converter, model, **config)
        if generation is not None:
            write_json(os.path.join(folder, "generation_config.json"), generation)
        if with_tokenizer:
            save_vocab_and_merges(train_tokenizer(), folder)
        file = converter.convert("end of text from " + what, folder, says=says)
        file and check_equal(file.metadata.get("generation.eos_ids"), expected, "end of text from " + what)


def test_start_ids(converter, _):
    """What generate() begins an encoder-decoder's texts with. (Where it would refuse the model, any id will do.)"""
    model = small_t5()
    for what, config, generation, expected in (
            ("config.json", dict(decoder_start_token_id=5), None, 5),
            ("generation_config.json", dict(decoder_start_token_id=5), dict(decoder_start_token_id=7), 7),
            ("generation_config.json alone", {}, dict(decoder_start_token_id=7), 7),
            ("generation_config.json's bos_token_id", dict(decoder_start_token_id=5), dict(bos_token_id=8), 8),
            ("config.json, as the other is silent", dict(decoder_start_token_id=5), dict(eos_token_id=1), 5),
            ("config.json's bos_token_id", dict(bos_token_id=6, pad_token_id=3), None, 6),
            ("config.json's pad_token_id", dict(pad_token_id=3), None, 3), ("nothing", {}, None, 0)):
        folder = directory_of(converter, model, **dict(dict.fromkeys((
            "decoder_start_token_id", "bos_token_id", "pad_token_id"), "drop"), **config))
        if generation is not None:
            write_json(os.path.join(folder, "generation_config.json"), generation)
        file = converter.convert("start of text from " + what, folder)
        file and check_equal(file["generation.start_id"], expected, "start of text from " + what)
        if generation is not None and "eos_token_id" not in generation:
            loaded = type(model).from_pretrained(folder)
            check_equal(loaded.generate(torch.tensor([[5, 6, 1]]), max_new_tokens=1)[0, 0].item(), expected,
                        "start of text from %s, by transformers" % what)
    folder = directory_of(converter, model)
    for start, says in ((30, "0 to 29"), ("x", "integer"), ([0, 1], "integer")):
        write_json(os.path.join(folder, "generation_config.json"), dict(decoder_start_token_id=start))
        converter.refuse("generation_config.json with the start %s" % start, folder, says=(
            "generation_config.json", "decoder_start_token_id", says))


# ---------------------------------------------------------------------------------------------------------------------
# Tests: bad input
# ---------------------------------------------------------------------------------------------------------------------

def test_usage(converter, _):
    model = LinearGpt()
    path, config = converter.path("x.pt"), converter.path("config.json")
    torch.save(model.state_dict(), path)
    write_json(config, model.model_args)
    for what, arguments in (("nothing", []), ("one argument", [path]), ("three arguments", [path, "a", "b"]),
                            ("unknown option", [path, "a", "--what"]), ("no value", [path, "a", "--arch"]),
                            ("unknown arch", [path, "a", "--arch", "bloom"])):
        result = subprocess.run([*converter.command, *arguments], capture_output=True, text=True)
        check_equal(result.returncode, 2, "usage: %s: exit status" % what)
        check_sentence(result.stderr, "usage: " + what)
    converter.refuse("neither --arch nor --config", path, says=("--arch", "--config"), status=2)
    converter.refuse("--arch without --config", path, "--arch", "nanogpt", says=("--config",), status=2)
    converter.refuse("--config without --arch", path, "--config", config, says=("--arch",), status=2)
    result = subprocess.run([*converter.command, "--help"], capture_output=True, text=True)
    check(result.returncode == 0 and "CHECKPOINT" in result.stdout, "--help")


def test_configurations(converter, _):
    model = hf_model()
    cases = [
        (dict(model_type="bloom"), ("'bloom'", "gpt2")), (dict(model_type=3), ("model_type",)),
        (dict(architectures=["GPT2ForSequenceClassification"]), ("GPT2ForSequenceClassification",)),
        (dict(model_type="drop", architectures=["BloomModel"]), ("BloomModel",)),
        (dict(model_type="bert"), ("GPT2LMHeadModel", "BertModel")),
        (dict(architectures=[["x"]]), ("x",)), (dict(architectures="GPT2Model"), ("architectures",)),
        (dict(n_embd="drop", hidden_size="drop"), ("n_embd",)), (dict(n_embd="24"), ("n_embd",)),
        (dict(n_embd=0), ("n_embd",)), (dict(n_embd=-24), ("n_embd",)), (dict(n_embd=24.0), ("n_embd",)),
        (dict(n_embd=True), ("n_embd",)), (dict(n_embd=1 << 40), ("n_embd",)), (dict(n_embd=[24]), ("n_embd",)),
        (dict(n_head=5), ("multiple",)), (dict(n_head=None), ("n_head",)), (dict(n_layer=3), ("h.2.ln_1.weight",)),
        (dict(n_layer=1 << 30), ("n_layer",)), (dict(n_layer=50000), ("h.2.ln_1.weight",)),
        (dict(n_layer=1), ("h.1.",)), (dict(vocab_size=98), ("wte.weight", "[98, 24]")),
        (dict(vocab_size=1 << 30), ("wte.weight",)), (dict(n_positions=21), ("wpe.weight", "[21, 24]")),
        (dict(n_inner=95), ("mlp.c_fc",)), (dict(n_inner="x"), ("n_inner",)),
        (dict(activation_function="mish"), ("mish", "gelu_new")), (dict(activation_function=1), ("activation",)),
        (dict(layer_norm_epsilon="1e-5"), ("layer_norm_epsilon",)),
        (dict(layer_norm_epsilon=-1e-5), ("layer_norm_epsilon", "negative")),
        (dict(layer_norm_epsilon=1e299), ("layer_norm_epsilon",)),
        (dict(layer_norm_epsilon=math.nan), ("layer_norm_epsilon",)), (dict(add_cross_attention=True), ("cross",)),
        (dict(scale_attn_weights="yes"), ("scale_attn_weights",)), (dict(scale_attn_weights=1), ("scale_attn",)),
        (dict(tie_word_embeddings=0), ("tie_word_embeddings",)), (dict(eos_token_id={}), ("eos_token_id",)),
    ]
    for changes, says in cases:
        converter.refuse("config %s" % changes, hf_directory(converter, model, **changes), says=says)
    converter.refuse("config without a family", hf_directory(converter, model, model_type="drop",
                                                             architectures="drop"), says=("--arch",), status=2)
    bare, config = converter.path("x.pt"), converter.path("config.json")
    torch.save(LinearGpt().state_dict(), bare)
    write_json(config, dict(LinearGpt().model_args, architectures=[["x"]]))
    converter.refuse("architectures for nanoGPT", bare, "--arch", "nanogpt", "--config", config,
                     says=("architectures",))
    for text in (b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100000, b"9" * 5000,
                 b'{"model_type": "gpt2", "n_embd": ' + b"[" * 900 + b"]" * 900 + b"}",
                 b'{"model_type": "gpt2", "n_embd": ' + b"9" * 4000 + b"}"):
        folder = hf_directory(converter, model)
        write(os.path.join(folder, "config.json"), text)
        converter.refuse("config.json %.20r" % text, folder, says=("config.json",))
    os.remove(os.path.join(folder, "config.json"))
    converter.refuse("no config.json", folder, says=("config.json", "No such file"))
    nano = nanogpt_checkpoint(LinearGpt())
    for name, value, kind in (("vocab_size", numpy.array(97), "integer"), ("bias", [True], "true or false"),
                              ("n_head", numpy.complex64(3), "integer"), ("block_size", torch.ones(1), "integer")):
        path = converter.path("ckpt.pt")
        torch.save(dict(nano, model_args=dict(nano["model_args"], **{name: value})), path)
        converter.refuse("model_args with %.40r" % value, path, says=("ckpt.pt", "model_args", name, kind, "an object"))
    for arguments in ("x", {}, {"n_layer": torch.ones(1)}, dict(nano["model_args"], n_head="3"),
                      dict(nano["model_args"], bias=False)):
        path = converter.path("ckpt.pt")
        torch.save(dict(nano, model_args=arguments), path)
        converter.refuse("model_args %.40r" % (arguments,), path, says=("ckpt.pt",))


def directory_of(converter, model, state=None, **changes):
    """A directory of any family with model.safetensors."""
    folder = converter.path()
    save_config(model, folder, **changes)
    state = {name: tensor.clone() for name, tensor in (state or model.state_dict()).items()}
    safetensors.torch.save_file(state, os.path.join(folder, "model.safetensors"))
    return folder


def small_bert(kind=transformers.BertForSequenceClassification, **more):
    return kind(transformers.BertConfig(vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=3,
                                        intermediate_size=17, max_position_embeddings=20, **more))


def small_llama(kind=transformers.LlamaForCausalLM, config=transformers.LlamaConfig, **more):
    return kind(config(vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                       num_key_value_heads=1, intermediate_size=17, max_position_embeddings=20, head_dim=8, **more))


def small_t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=30, d_model=12, d_kv=5, d_ff=17, num_layers=1, num_heads=3))


def test_encoder_configurations(converter, _):
    model = small_bert(num_labels=3)
    for changes, says in (
            (dict(is_decoder=True), ("is_decoder",)), (dict(add_cross_attention=True), ("add_cross_attention",)),
            (dict(position_embedding_type="relative_key"), ("position_embedding_type", "absolute")),
            (dict(hidden_size=13), ("multiple",)), (dict(hidden_size=1 << 30, num_attention_heads=1),
             ("[30, 1073741824]",)),
            (dict(num_attention_heads=1 << 20, hidden_size=1 << 20), ("65536",)),
            (dict(num_hidden_layers=2), ("encoder.layer.1",)), (dict(type_vocab_size=3), ("token_type", "[3, 12]")),
            (dict(hidden_act="mish"), ("mish",)), (dict(id2label={"0": "a", "1": "b"}), ("id2label", "0 to 2")),
            (dict(id2label={"0": "a", "1": "b", "3": "c"}), ("id2label",)),
            (dict(id2label={"0": "a", "1": "b", "2": 3}), ("id2label",)),
            (dict(problem_type="many"), ("problem_type", "regression")),
            (dict(architectures=["BertForQuestionAnswering"]), ("BertForQuestionAnswering", "BertForMaskedLM")),
            (dict(architectures=["BertModel"]), ("classifier.weight",)),
            (dict(architectures=["BertForMaskedLM"]), ("cls.predictions",)), (dict(model_type="albert"), ("albert",)),
            (dict(model_type="roberta"), ("BertForSequenceClassification", "RobertaModel"))):
        converter.refuse("BERT with %s" % changes, directory_of(converter, model, **changes), says=says)
    state = model.state_dict()
    wide = dict(state, **{"bert.encoder.layer.0.attention.self.key.weight": torch.ones(13, 12)})
    converter.refuse("a key of another shape", directory_of(converter, model, wide),
                     says=("self.key.weight", "[13, 12]", "[12, 12]"))
    lacking = {name: tensor for name, tensor in state.items() if "self.value.bias" not in name}
    converter.refuse("no bias of values", directory_of(converter, model, lacking), says=("self.value.bias",))
    whole = dict(state, **{"bert.encoder.layer.0.attention.self.key.bias": torch.ones(12, dtype=torch.int32)})
    converter.refuse("an integer bias", directory_of(converter, model, whole), says=("self.key.bias", "I32"))
    twice = dict(small_bert(transformers.BertForMaskedLM).state_dict())
    twice["cls.predictions.decoder.bias"] = torch.ones(30)
    converter.refuse("two biases of a head", directory_of(converter, small_bert(transformers.BertForMaskedLM), twice),
                     says=("cls.predictions.bias",))


def test_sentence_transformers(converter, _):
    def folder(modules, pooling=None, **files):
        path = converter.path()
        small_bert(transformers.BertModel).save_pretrained(path)
        write_json(os.path.join(path, "modules.json"), modules)
        os.mkdir(os.path.join(path, "1_Pooling"))
        write_json(os.path.join(path, "1_Pooling", "config.json"), pooling or {"pooling_mode_mean_tokens": True})
        for name, value in files.items():
            write_json(os.path.join(path, name + ".json"), value)
        return path

    def module(kind, path=""):
        return {"type": "sentence_transformers.models." + kind, "path": path}

    usual = [module("Transformer"), module("Pooling", "1_Pooling")]
    file = converter.convert("modules", folder(usual, tokenizer_config={"model_max_length": 9}))
    check(file is not None and (file["pooling"], file["pool_normalize"], file["pool_max_tokens"]) == ("mean", 0, 9),
          "modules: pooling")
    newer = [{"type": "sentence_transformers.base.modules.transformer.Transformer", "path": ""},
             {"type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling", "path": "1_Pooling"}]
    file = converter.convert("newer modules", folder(newer, {"pooling_mode": "max"},
                                                     tokenizer_config={"model_max_length": 10 ** 30}))
    check(file is not None and file["pooling"] == "max" and "pool_max_tokens" not in file.metadata,
          "modules: pooling of version 6")
    converter.convert("lower case", folder(usual, sentence_bert_config={"do_lower_case": True}), says=("lower case",))
    converter.convert("a prompt", folder(usual, config_sentence_transformers={
        "prompts": {"query": "query: "}, "default_prompt_name": "query"}), says=("warning", "prompt", "query"))
    below = folder([module("Transformer", "0_Transformer"), usual[1]])  # all of the model's files are in there
    os.mkdir(os.path.join(below, "0_Transformer"))
    write_json(os.path.join(below, "0_Transformer", "sentence_bert_config.json"), {"max_seq_length": 7})
    for name in os.listdir(below):
        if name != "modules.json" and os.path.isfile(os.path.join(below, name)):
            os.rename(os.path.join(below, name), os.path.join(below, "0_Transformer", name))
    file = converter.convert("a model below", below)
    check(file is not None and file["pool_max_tokens"] == 7, "modules: the limit is beside the model")
    for what, modules, pooling, says in (
            ("dense", usual + [module("Dense", "2_Dense")], None, ("Dense",)), ("nothing", [], None, ("modules.json",)),
            ("no list", {"a": 1}, None, ("modules.json",)), ("a number", [3], None, ("modules.json",)),
            ("no type", [{"path": ""}], None, ("type",)), ("only pooling", usual[1:], None, ("Pooling",)),
            ("a way out", [module("Transformer", "../x"), usual[1]], None, ("path",)),
            ("another way out", [usual[0], module("Pooling", "..")], None, ("path",)),
            ("two ways", usual, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls",)),
            ("weighted", usual, {"pooling_mode_weightedmean_tokens": True}, ("weightedmean",)),
            ("no way", usual, {"pooling_mode_cls_token": False}, ("none",)),
            ("a strange way", usual, {"pooling_mode": 3}, ("pooling_mode",))):
        converter.refuse("modules: " + what, folder(modules, pooling), says=says)


def test_t5_configurations(converter, _):
    model = small_t5()
    for changes, says in (
            (dict(feed_forward_proj="gated-mish"), ("mish",)), (dict(feed_forward_proj="x-relu"),
             ("feed_forward_proj",)),
            (dict(feed_forward_proj="gated-gelu"), ("wi_0",)), (dict(num_decoder_layers=2), ("decoder.block.1",)),
            (dict(relative_attention_num_buckets=31), ("relative_attention_bias", "[31, 3]")),
            (dict(relative_attention_max_distance=16), ("relative_attention_max_distance", "more than 16, not 16")),
            (dict(relative_attention_num_buckets=3), ("relative_attention_num_buckets", "at least 4, not 3")),
            (dict(architectures=["T5EncoderModel"]), ("decoder.",)), (dict(model_type="umt5"), ("umt5",)),
            (dict(decoder_start_token_id="x"), ("decoder_start_token_id",)),
            (dict(decoder_start_token_id=-1), ("decoder_start_token_id", "0 to")),
            (dict(decoder_start_token_id=1 << 40), ("decoder_start_token_id", "0 to")), (dict(d_kv=6),
             ("SelfAttention.q", "[18, 12]"))):
        converter.refuse("T5 with %s" % changes, directory_of(converter, model, **changes), says=says)


def test_llama_configurations(converter, _):
    model = small_llama()
    state = model.state_dict()
    rope = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=10, rope_theta=100.0)
    for changes, says in (
            (dict(num_key_value_heads=2), ("multiple",)), (dict(head_dim=10), ("q_proj", "[30, 24]")),
            (dict(head_dim=7), ("rotate",)), (dict(head_dim=1 << 30), ("rotate",)),
            (dict(attention_bias=True), ("q_proj.bias",)), (dict(mlp_bias=True), ("gate_proj.bias",)),
            (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), ("dynamic", "yarn")),
            (dict(rope_parameters={"rope_type": "longrope"}), ("longrope",)),
            (dict(rope_parameters="drop", rope_scaling={"type": "linear"}), ("factor",)),
            (dict(rope_parameters={"rope_type": "linear", "factor": 0}), ("factor",)),
            (dict(rope_parameters={"rope_type": "linear", "factor": 1e-299}), ("finite",)),
            (dict(rope_parameters={"rope_theta": -3.0}), ("rotate",)), (dict(rope_parameters={"rope_theta": "x"}),
             ("rope_theta",)),
            (dict(rope_parameters=dict(rope, rope_type="llama3")), ("low_freq_factor",)),
            (dict(rope_parameters=dict(rope, rope_type="llama3", low_freq_factor=4, high_freq_factor=1)),
             ("low_freq",)),
            (dict(rope_parameters=dict(rope, beta_fast=-1.0)), ("beta_fast",)),
            (dict(rope_parameters=dict(rope, rope_theta=1.0)), ("beta_fast",)),
            (dict(rope_parameters={"full_attention": rope, "sliding_attention": rope}), ("different layers",)),
            (dict(architectures=["LlamaForSequenceClassification"]), ("LlamaForSequenceClassification",)),
            (dict(model_type="mamba"), ("mamba",)), (dict(tie_word_embeddings=1), ("tie_word_embeddings",))):
        converter.refuse("LLaMA with %s" % changes, directory_of(converter, model, **changes), says=says)
    narrow = dict(state, **{"model.layers.1.mlp.up_proj.weight": torch.ones(18, 24)})
    converter.refuse("an FFN of two widths", directory_of(converter, model, narrow), says=("up_proj", "[17, 24]"))
    qwen = small_llama(transformers.Qwen2ForCausalLM, transformers.Qwen2Config)
    for changes, says in ((dict(layer_types=["full_attention"]), ("layer_types",)),
                          (dict(layer_types=["chunked", "full_attention"]), ("layer_types", "chunked")),
                          (dict(layer_types=["sliding_attention"] * 2), ("sliding_window",)),
                          (dict(use_sliding_window=True, sliding_window=0), ("sliding_window",))):
        converter.refuse("Qwen2 with %s" % changes, directory_of(converter, qwen, **changes), says=says)
    gemma = small_llama(transformers.Gemma2ForCausalLM, transformers.Gemma2Config)
    for changes, says in ((dict(query_pre_attn_scalar=0), ("query_pre_attn_scalar",)),
                          (dict(attn_logit_softcapping=-1), ("attn_logit_softcapping",)),
                          (dict(use_bidirectional_attention=True), ("use_bidirectional_attention",))):
        converter.refuse("Gemma 2 with %s" % changes, directory_of(converter, gemma, **changes), says=says)


def test_strange_configurations(converter, _):
    """Whatever the values are: converted, or refused with a sentence; and soon."""
    models = [small_bert(), small_bert(transformers.BertForMaskedLM),
              small_llama(rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=50.0)),
              small_llama(transformers.Gemma2ForCausalLM, transformers.Gemma2Config),
              small_llama(transformers.Qwen2ForCausalLM, transformers.Qwen2Config, use_sliding_window=True)]
    values = [None, 0, -1, 1, 2, 3, 1 << 20, (1 << 31) - 1, 1 << 70, 0.5, -2.5, 1e300, 1e-300, math.inf, math.nan, "x", "",
              True, False, [], {}, [1], ["a"], {"a": 1}, ["full_attention"], ["sliding_attention", "sliding_attention"]]
    more = ["attention_bias", "head_dim", "rope_scaling", "tie_word_embeddings", "id2label", "problem_type"]
    folders = [directory_of(converter, model) for model in models]
    for i in range(300):
        model, folder = random.choice(list(zip(models, folders)))
        changes = {}
        for _ in range(random.randrange(1, 3)):
            changes[random.choice([*model.config.to_dict(), *more])] = random.choice(values)
        save_config(model, folder, **changes)
        start = time.monotonic()
        status, stderr, left = converter.run_inside(folder)
        check(status in (0, 1, 2) and stderr.startswith("convert.py: ") and time.monotonic() - start < 5,
              "strange configuration %s: %s: %s" % (changes, status, stderr[-300:]))
        check(status == 0 or left == [], "strange configuration %s: nothing left" % changes)


def test_torch_modules(converter, _):
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 17), 2, enable_nested_tensor=False)
    state = module.state_dict()

    def refuse(what, state, config, says, arch="nn.TransformerEncoder"):
        path = converter.path()
        torch.save(state, os.path.join(path, "m.pt"))
        write_json(os.path.join(path, "config.json"), config)
        converter.refuse("nn: " + what, os.path.join(path, "m.pt"), "--arch", arch, "--config",
                         os.path.join(path, "config.json"), says=says)

    usual = {"nhead": 3}
    refuse("no heads", state, {}, ("nhead",))
    refuse("five heads", state, {"nhead": 5}, ("multiple",))
    refuse("another width", state, {"nhead": 3, "d_model": 24}, ("[72, 24]",))
    refuse("another number of layers", state, {"nhead": 3, "num_layers": 3}, ("2 layers",))
    refuse("another module", state, usual, ("nn.Transformer", "encoder.layers.0."), "nn.Transformer")
    refuse("two of them", {**{"a." + name: tensor for name, tensor in state.items()},
                           **{"b." + name: tensor for name, tensor in state.items()}}, usual, ("2 tensors", "prefix"))
    refuse("no such prefix", state, dict(usual, prefix="x."), ("prefix", "x."))
    refuse("prefix of another type", state, dict(usual, prefix=3), ("prefix",))
    refuse("a hole", {name: tensor for name, tensor in state.items() if "layers.0.norm2" not in name}, usual,
           ("layers.0.norm2.weight",))
    refuse("no layer 0", {name.replace("layers.0", "layers.5"): tensor for name, tensor in state.items()}, usual,
           ("layers.0",))
    refuse("a bias for keys", dict(state, **{"layers.0.self_attn.bias_k": torch.ones(1, 1, 12)}), usual, ("bias_k",))
    refuse("an unknown function", state, dict(usual, activation="mish"), ("mish",))


def gguf_file(values, tensors, version=3, alignment=32, counts=None):
    """A .gguf file's bytes: values are (key, type, packed value), tensors (name, shape from the row on, type, data)."""
    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(values))))
    for key, kind, value in values:
        head += string(key) + struct.pack("<I", kind) + (string(value) if kind == 8 else value)
    offset = 0
    for name, shape, kind, data in tensors:
        head += string(name) + struct.pack("<I%dQIQ" % len(shape), len(shape), *shape, kind, offset)
        offset += len(data) + -len(data) % alignment
    head += bytes(-len(head) % alignment)
    return head + b"".join(data + bytes(-len(data) % alignment) for _, _, _, data in tensors)


def small_gguf(changes=(), more=(), tensors=(), **arguments):
    """A LLaMA of one layer, width 32; `changes` of integer metadata, more of it, and tensors in place of its own."""
    sizes = {"llama.embedding_length": 32, "llama.block_count": 1, "llama.context_length": 20,
             "llama.attention.head_count": 2, "llama.feed_forward_length": 32}
    sizes.update(changes)
    values = [("general.architecture", 8, "llama")] + [(key, 4, struct.pack("<I", size)) for key, size in sizes.items()
                                                       if size is not None]
    values += [("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)), *more]
    shapes = {"token_embd.weight": (32, 10), "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,),
              "output_norm.weight": (32,)}
    shapes.update(("blk.0.%s.weight" % name, (32, 32)) for name in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
    entries = {name: (name, shape, 0, bytes(4 * math.prod(shape))) for name, shape in shapes.items()}
    entries.update((entry[0], entry) for entry in tensors)
    return gguf_file(values, [entry for entry in entries.values() if entry[1] is not None], **arguments)


def gguf_list(kind, values):
    """An array for gguf_file's metadata, of texts or packed by a letter of struct."""
    if kind == 8:
        packed = b"".join(struct.pack("<Q", len(text.encode())) + text.encode() for text in values)
    else:
        packed = struct.pack("<%d%s" % (len(values), {5: "i", 6: "f"}[kind]), *values)
    return 9, struct.pack("<IQ", kind, len(values)) + packed


def gguf_vocabulary(kind, tokens, types, more=()):
    table = ("token_embd.weight", (32, len(tokens)), 0, bytes(128 * len(tokens)))
    return dict(tensors=[table], more=[("tokenizer.ggml.model", 8, kind),
                                       ("tokenizer.ggml.tokens", *gguf_list(8, tokens)),
                                       ("tokenizer.ggml.token_type", *gguf_list(5, types)), *more])


def tokenizer_of(file):
    return {} if file is None else {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}


def check_no_tokenizer(converter, what, arguments, says):
    """A tokenizer that can't be used: the model is converted without, with a warning; alone, it is refused."""
    file = converter.convert("GGUF: " + what, write(converter.path("model.gguf"), small_gguf(**arguments)),
                             says=("without a tokenizer", *says))
    check_equal(tokenizer_of(file), {}, "GGUF: %s: the tokenizer" % what)
    alone = gguf_file([("general.architecture", 8, "llama"), *arguments["more"]], [])
    converter.refuse("GGUF, a tokenizer alone: " + what, write(converter.path("model.gguf"), alone), says=says)


def test_gguf_bpe(converter, _):
    """Against the same vocabulary in vocab.json and merges.txt."""
    tokens = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + ["he", "ll", "hell", "Ġhe", "<|endoftext|>", "<tool>"]
    merges = ["h e", "l l", "he ll", "Ġ he"]
    end = len(tokens) - 2
    arguments = gguf_vocabulary("gpt2", tokens, [1] * end + [3, 4], [
        ("tokenizer.ggml.pre", 8, "gpt-2"), ("tokenizer.ggml.merges", *gguf_list(8, merges)),
        ("tokenizer.ggml.add_bos_token", 7, b"\1")] + [("tokenizer.ggml.%s_token_id" % role, 4, struct.pack("<I", end))
                                                       for role in ("bos", "eos")])
    file = converter.convert("GGUF with BPE", write(converter.path("model.gguf"), small_gguf(**arguments)))
    folder = hf_directory(converter, hf_model(vocab_size=len(tokens)))
    write_json(os.path.join(folder, "vocab.json"), {text: i for i, text in enumerate(tokens[:end + 1])})
    write(os.path.join(folder, "merges.txt"), "\n".join(["#version: 0.2", *merges, ""]).encode())
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "add_bos_token": True, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": None,
        "added_tokens_decoder": {str(end + 1): {"content": "<tool>", "normalized": False}}})
    expected = converter.convert("the same in files", folder)
    found, expected = tokenizer_of(file), tokenizer_of(expected)
    check_equal({key: found.get(key) for key in expected}, expected, "GGUF's BPE")
    if file is not None:
        check_equal(file["generation.eos_ids"], end, "GGUF's end of text")
    for what, more, says in (
            ("merges of nothing", [("tokenizer.ggml.merges", *gguf_list(8, ["q q"]))], ("merge",)),
            ("merges of numbers", [("tokenizer.ggml.merges", *gguf_list(5, [1]))], ("merges",))):
        bad = gguf_vocabulary("gpt2", tokens, [1] * len(tokens), more)
        check_no_tokenizer(converter, what, bad, says)
    other = gguf_vocabulary("gpt2", tokens, [1] * len(tokens), [("tokenizer.ggml.pre", 8, "strange")])
    converter.convert("GGUF with a strange pattern", write(converter.path("model.gguf"), small_gguf(**other)),
                      says=("without a tokenizer", "strange"))
    other = gguf_vocabulary("gpt2", tokens, [1] * (len(tokens) - 1))
    check_no_tokenizer(converter, "a type too few", other, ("token_type",))


def test_gguf_sentencepiece(converter, _):
    """Against the same vocabulary in a tokenizer.model."""
    folder = directory_of(converter, small_llama())
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        lines = file.read().split("\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", user_defined_symbols=["<tool>"],
        minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    write(os.path.join(folder, "tokenizer.model"), model.getvalue())
    config = json.load(open(os.path.join(folder, "config.json"), encoding="utf-8"))
    write_json(os.path.join(folder, "config.json"), dict(config, vocab_size=400))
    state = dict(small_llama().state_dict())
    state.update({name: torch.zeros(400, 24) for name in ("model.embed_tokens.weight", "lm_head.weight")})
    safetensors.torch.save_file(state, os.path.join(folder, "model.safetensors"))
    expected = tokenizer_of(converter.convert("tokenizer.model", folder))
    types = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i)
             else 4 if pieces.id_to_piece(i) == "<tool>" else 1 for i in range(400)]
    tokens, scores = [pieces.id_to_piece(i) for i in range(400)], [pieces.get_score(i) for i in range(400)]
    more = [("tokenizer.ggml.scores", *gguf_list(6, scores))] + [
        ("tokenizer.ggml.%s_token_id" % role, 4, struct.pack("<I", number))
        for role, number in (("bos", 1), ("eos", 2), ("unknown", 0))]
    path = write(converter.path("model.gguf"), small_gguf(**gguf_vocabulary("llama", tokens, types, more)))
    found = tokenizer_of(converter.convert("GGUF with SentencePiece", path))
    check("tokenizer.scores" in expected, "tokenizer.model: scores")
    # A GGUF file doesn't have what sentencepiece's decoder writes for the unknown token.
    check_equal(expected.pop("tokenizer.unk_surface"), " \u2047 ".encode(), "tokenizer.model: unk_surface")
    check_equal(found, expected, "GGUF's SentencePiece")
    for what, arguments, says in (
            ("no scores", gguf_vocabulary("llama", tokens, types), ("scores",)),
            ("a score too few", gguf_vocabulary("llama", tokens, types, [(more[0][0], *gguf_list(6, scores[1:]))]),
             ("scores",)),
            ("no unknown piece", gguf_vocabulary("llama", tokens, [1] * 3 + types[3:], more), ("unknown",)),
            ("a type of 7", gguf_vocabulary("llama", tokens, [7] + types[1:], more), ("SentencePiece",)),
            ("a piece twice", gguf_vocabulary("llama", tokens[:-1] + tokens[-2:-1], types, more), ("twice",))):
        check_no_tokenizer(converter, what, arguments, says)


def test_gguf(converter, _):
    def path(data):
        return write(converter.path("model.gguf"), data)

    q8 = ("blk.0.attn_q.weight", (32, 32), 8, bytes(range(34)) * 32)
    file = converter.convert("GGUF", path(small_gguf(tensors=[q8])))
    if file is not None:
        check_equal({name: entry[0] for name, entry in file.tensors.items() if "qkv" in name},
                    {"decoder.blocks.0.attention.qkv.weight#0": "Q8_0",
                     "decoder.blocks.0.attention.qkv.weight#1": "f32"},
                    "GGUF: a matrix of two types in parts")
        check(file.tensors["decoder.blocks.0.attention.qkv.weight#0"][3] == q8[3], "GGUF: blocks as they are")
        check_equal((file["model.family"], file["head"], file["decoder.rotary_interleaved"]), ("llama", "tied", 1),
                    "GGUF: description")
    converter.convert("GGUF, version 2", path(small_gguf(version=2)))
    converter.convert("GGUF, aligned to 64", path(small_gguf({"general.alignment": 64}, alignment=64)))
    whole = path(small_gguf())
    converter.refuse("GGUF with --arch", whole, "--arch", "llama", says=("--arch",), status=2)
    for what, data, says in (
            ("version 1", small_gguf(version=1), ("version 1",)), ("version 4", small_gguf(version=4), ("version 4",)),
            ("big-endian", small_gguf(version=3 << 24), ("big-endian",)),
            ("too many tensors", small_gguf(counts=(1 << 60, 8)), ("bytes",)),
            ("too much metadata", small_gguf(counts=(1, 1 << 60)), ()),
            ("no architecture", gguf_file([], [("x", (1,), 0, bytes(4))]), ("general.architecture",)),
            ("another architecture", gguf_file([("general.architecture", 8, "mamba")], [("x", (1,), 0, bytes(4))]), ("mamba", "qwen2")),
            ("a key twice", small_gguf(more=[("general.architecture", 8, "llama")]), ("twice",)),
            ("a type of value", small_gguf(more=[("x", 13, b"")]), ("13",)),
            ("a list of lists", small_gguf(more=[("x", 9, struct.pack("<IQ", 9, 1))]), ("9",)),
            ("a long list", small_gguf(more=[("x", 9, struct.pack("<IQ", 12, 1 << 61))]), ("bytes",)),
            ("a list of empty texts", small_gguf(more=[("x", 9, struct.pack("<IQ", 8, 1 << 61))]), ("bytes",)),
            ("experts", small_gguf({"llama.expert_count": 8}), ("experts",)),
            ("no heads", small_gguf({"llama.attention.head_count": None}), ("head_count",)),
            ("5 heads", small_gguf({"llama.attention.head_count": 5}), ("multiple",)),
            ("no embedding", small_gguf(tensors=[("token_embd.weight", None, 0, b"")]), ("token_embd",)),
            ("a missing tensor", small_gguf(tensors=[("blk.0.ffn_up.weight", None, 0, b"")]), ("blk.0.ffn_up.weight",)),
            ("one more", small_gguf(tensors=[("blk.0.x.weight", (32,), 0, bytes(128))]), ("blk.0.x.weight",)),
            ("another shape", small_gguf(tensors=[("blk.0.ffn_up.weight", (32, 31), 0, bytes(3968))]), ("[31, 32]",)),
            ("an unknown type", small_gguf(tensors=[("blk.0.ffn_up.weight", (32, 32), 16, bytes(4096))]),
             ("16", "Q4_K")),
            ("half a block", small_gguf(tensors=[("blk.0.ffn_up.weight", (33, 32), 8, bytes(4096))]), ("Q8_0",)),
            ("five dimensions", small_gguf(tensors=[("x", (1,) * 5, 0, bytes(4))]), ("dimensions",)),
            ("a huge tensor", small_gguf(tensors=[("blk.0.ffn_up.weight", (1 << 62, 1 << 62), 0, b"")]), ("ffn_up",)),
            ("an alignment of 3", small_gguf({"general.alignment": 3}), ("multiple of 3",)),
            ("one of several files", small_gguf({"split.count": 2}), ("merge",)),
            ("factors of another size", small_gguf(tensors=[("rope_freqs.weight", (7,), 0, bytes(28))]),
             ("rope_freqs", "8")),
            ("factors of zero", small_gguf(tensors=[("rope_freqs.weight", (8,), 0, bytes(32))]),
             ("rope_freqs", "positive")),
            ("an odd rotation", small_gguf({"llama.rope.dimension_count": 34}), ("rotate",)),
            ("unknown scaling", small_gguf(more=[("llama.rope.scaling.type", 8, "su")]), ("su", "yarn")),
            ("quantized norm", small_gguf(tensors=[("output_norm.weight", (32,), 8, bytes(34))]),
             ("output_norm", "Q8_0")),
            ("values of another size", small_gguf({"llama.attention.value_length": 8}), ("values",))):
        converter.refuse("GGUF: " + what, path(data), says=("model.gguf",) + says)
    data = small_gguf()
    for size in (0, 3, 4, 7, 23, 24, 60, 300, len(data) - 1):
        converter.refuse("GGUF cut to %d bytes" % size, path(data[:size]), says=("model.gguf",))
    for i in range(400):
        changed = bytearray(data[:random.choice([len(data), 1200])])
        for _ in range(random.randrange(1, 4)):
            changed[random.randrange(min(len(changed), 1200))] = random.choice([0, 1, 8, 9, 127, 255])
        name = path(bytes(changed))
        status, stderr, left = converter.run_inside(name)
        check(status in (0, 1) and "Traceback" not in stderr, "GGUF changed, %d: %s: %s" % (i, status, stderr[-300:]))
        check(status == 0 or left == [], "GGUF changed, %d: nothing left" % i)
        shutil.rmtree(os.path.dirname(name))


def test_tensors(converter, _):
    model = hf_model()
    state = model.state_dict()
    name = "transformer.h.1.attn.c_proj.bias"
    without = {key: tensor for key, tensor in state.items() if key != name}
    cases = [
        ("missing", without, ("h.1.attn.c_proj.bias",)),
        ("unexpected", dict(state, **{"transformer.h.1.attn.q_norm.weight": torch.ones(8)}), ("q_norm.weight",)),
        ("classifier", dict(state, **{"score.weight": torch.ones(2, 24)}), ("score.weight",)),
        ("cross-attention", dict(state, **{"transformer.h.0.crossattention.c_attn.weight": torch.ones(2, 24)}),
         ("crossattention",)),
        ("too small", dict(state, **{name: torch.ones(23)}), (name, "[23]", "[24]")),
        ("too many dimensions", dict(state, **{name: torch.ones(1, 24)}), (name, "[1, 24]")),
        ("a number", dict(state, **{name: torch.tensor(1.0)}), (name, "[]")),
        ("nothing in it", dict(state, **{name: torch.ones(0)}), (name, "[0]")),
        ("embedding transposed", dict(state, **{"transformer.wpe.weight": torch.ones(24, 20)}), ("wpe", "[24, 20]")),
        ("no tensor", dict(state, **{name: 3}), (name,)), ("None", dict(state, **{name: None}), (name,)),
        ("a list", dict(state, **{name: [1.0]}), (name,)), ("a number as name", {**state, 7: torch.ones(1)}, ("7",)),
        ("the same twice", dict(state, **{"h.1.attn.c_proj.bias": torch.ones(24)}), ("twice", "c_proj.bias")),
        ("no tensors", {}, ("no tensors",)), ("list", [torch.ones(1)], ("list",)),
        ("tensor", torch.ones(1), ("Tensor",)),
        ("newline in a name", dict(state, **{"a\nb": torch.ones(1)}), ("a\\nb",)),
        ("long name", dict(state, **{"x" * 5000: torch.ones(1)}), ("xxx",)),
    ]
    for what, changed, says in cases:
        converter.refuse("tensors: " + what, hf_directory(converter, model, changed), says=says)
    for what, tensor in (("head and embedding of bytes", torch.ones(24, 97, dtype=torch.uint8).t()),
                         ("head and embedding without end", torch.ones(1, 1).expand(1 << 40, 1 << 20))):
        folder = hf_directory(converter, model, dict(state, **{"lm_head.weight": tensor,
                                                               "transformer.wte.weight": tensor[:, :]}))
        converter.refuse("tensors: " + what, folder, says=("wte.weight",))
    bias_free = LinearGpt(bias=False).state_dict()
    converter.refuse("gpt2 without biases", hf_directory(converter, model, bias_free), says=(".bias",))
    some = LinearGpt(bias=True).state_dict()
    del some["transformer.ln_f.bias"]
    path, config = converter.path("x.pt"), converter.path("config.json")
    torch.save(some, path)
    write_json(config, {key: value for key, value in LinearGpt().model_args.items() if key != "bias"})
    converter.refuse("some biases", path, "--arch", "nanogpt", "--config", config, says=("ln_f.bias",))


def test_files(converter, _):
    pipe = converter.path("pipe.bin")
    os.mkfifo(pipe)
    converter.refuse("a pipe", pipe, says=("pipe.bin", "regular file"))
    model = hf_model()
    folder = converter.path()
    save_config(model, folder)
    converter.refuse("no weights", folder, says=("model.safetensors", "pytorch_model.bin"))
    converter.refuse("no such checkpoint", os.path.join(folder, "nothing"), "--arch", "gpt2", "--config",
                     os.path.join(folder, "config.json"), says=("No such file",))
    contents = [
        ("empty", b"", ()), ("text", b"hello world, this is no checkpoint\n" * 9, ()), ("zeros", bytes(4096), ()),
        ("Git LFS", b"version https://git-lfs\noid sha256:1\nsize 2\n", ("Git LFS",)),
        ("tar", b"x" * 257 + b"ustar\x0000" + bytes(900), ("tar format",)),
        ("plain pickle", pickle.dumps({"a": 1}, 2), ("not one that torch.save wrote",)),
        ("zip of something", zip_bytes({"a.txt": b"x"}), ("data.pkl",)),
        ("two checkpoints in a zip", zip_bytes({"a/data.pkl": b"x", "b/data.pkl": b"x"}), ("one data.pkl",)),
        ("compressed zip", zip_bytes({"a/data.pkl": b"x" * 100}, zipfile.ZIP_DEFLATED), ("compressed",)),
        ("TorchScript", zip_bytes({"a/data.pkl": b"x", "a/constants.pkl": b"x"}), ("TorchScript",)),
        ("big-endian", zip_bytes({"a/data.pkl": b"x", "a/byteorder": b"big"}), ("big-endian",)),
        ("storage missing", zip_bytes({"a/data.pkl": pickle_of(model.state_dict())}), ("data/0", "missing")),
    ]
    for what, data, says in contents:
        for name in ("pytorch_model.bin", "model.safetensors"):
            folder = converter.path()
            save_config(model, folder)
            write(os.path.join(folder, name), data)
            converter.refuse("%s in %s" % (what, name), folder, says=says if name.endswith("bin") and says else (name,))
    folder = converter.path()
    save_config(model, folder)
    os.mkdir(os.path.join(folder, "model.safetensors"))
    converter.refuse("directory as weights", folder, says=("model.safetensors",))
    module = converter.path("module.bin")
    torch.save(model.transformer.ln_f, module)
    torch.save(model.transformer.ln_f, module + ".legacy", _use_new_zipfile_serialization=False)
    for path in (module, module + ".legacy"):
        converter.refuse("whole module", path, "--arch", "gpt2", says=("LayerNorm", "state_dict"))
    legacy_big = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}):
        legacy_big.write(pickle.dumps(value, 2))
    converter.refuse("legacy big-endian", write(converter.path("x.pt"), legacy_big.getvalue()), says=("big-endian",))
    one = converter.path()
    save_config(model, one)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(state, os.path.join(one, "weights-of-mine.safetensors"))
    compare("one .safetensors of any name", converter.convert("one .safetensors of any name", one),
            plain(state, False), 2, "cols")


def zip_bytes(records, compression=zipfile.ZIP_STORED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return data.getvalue()


def pickle_of(value):
    """data.pkl of what torch.save writes."""
    data = io.BytesIO()
    torch.save(value, data)
    with zipfile.ZipFile(data) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def safetensors_bytes(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def test_safetensors_headers(converter, _):
    model = hf_model()

    def entry(dtype="F32", shape=(2,), span=(0, 8)):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}
    cases = [
        ("huge header", safetensors_bytes({}, size=1 << 62), ("header",)),
        ("header beyond the file", safetensors_bytes({"a": entry()}, bytes(8), size=1000), ("header",)),
        ("not JSON", safetensors_bytes(b"{]"), ("JSON",)), ("a list", safetensors_bytes(b"{}[]"), ("JSON",)),
        ("not UTF-8", safetensors_bytes(b"{\"\xff\": 1}"), ("UTF-8",)),
        ("deep", safetensors_bytes(b'{"a":' * 50000), ("JSON",)),
        ("a name twice", safetensors_bytes(b'{"a":{},"a":{}}'), ("'a'",)),
        ("no entry", safetensors_bytes({"a": 1}), ("'a'",)), ("empty entry", safetensors_bytes({"a": {}}), ("dtype",)),
        ("unknown type", safetensors_bytes({"a": entry("F31")}, bytes(8)), ("F31",)),
        ("negative shape", safetensors_bytes({"a": entry(shape=(-2,))}, bytes(8)), ("shape",)),
        ("text as shape", safetensors_bytes({"a": entry(shape=("2",))}, bytes(8)), ("shape",)),
        ("endless shape", safetensors_bytes({"a": entry(shape=[1 << 62] * 1000)}, bytes(8)), ("shape",)),
        ("three offsets", safetensors_bytes({"a": entry(span=(0, 8, 8))}, bytes(8)), ("data_offsets",)),
        ("backwards", safetensors_bytes({"a": entry(span=(8, 0))}, bytes(8)), ("'a'",)),
        ("out of range", safetensors_bytes({"a": entry(span=(4, 12))}, bytes(8)), ("outside",)),
        ("size against shape", safetensors_bytes({"a": entry(shape=(3,))}, bytes(8)), ("'a'", "shape")),
        ("overlap", safetensors_bytes({"a": entry(), "b": entry(span=(4, 12))}, bytes(12)), ("overlaps",)),
        ("the same bytes", safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)), ("overlaps",)),
        ("hole", safetensors_bytes({"a": entry(), "b": entry(span=(12, 20))}, bytes(20)), ("none",)),
        ("more at the end", safetensors_bytes({"a": entry()}, bytes(9)), ("after its last",)),
        ("another model", safetensors_bytes({"a": entry()}, bytes(8)), ("lacks",)),
    ]
    for what, data, says in cases:
        folder = converter.path()
        save_config(model, folder)
        write(os.path.join(folder, "model.safetensors"), data)
        converter.refuse("safetensors: " + what, folder, says=("model.safetensors",) + says if "lacks" not in says
                         else says)


def test_indexes(converter, _):
    model = hf_model()
    source = converter.path()
    model.save_pretrained(source, max_shard_size="20KB")
    index_name = "model.safetensors.index.json"
    with open(os.path.join(source, index_name), encoding="utf-8") as file:
        index = json.load(file)
    first = sorted(index["weight_map"])[0]
    shard = index["weight_map"][first]
    outside = converter.path("outside.safetensors")
    shutil.copy(os.path.join(source, shard), outside)
    cases = [
        ("parent directory", {first: "../%s/outside.safetensors" % os.path.basename(os.path.dirname(outside))},
         ("same directory",)),
        ("absolute path", {first: outside}, ("same directory",)), ("backslash", {first: "..\\x"}, ("same directory",)),
        ("drive", {first: "C:x"}, ("same directory",)), ("dot", {first: "."}, ("same directory",)),
        ("dots", {first: ".."}, ("same directory",)), ("empty", {first: ""}, ("same directory",)),
        ("NUL", {first: "a\0b"}, ("same directory",)), ("number", {first: 3}, ("same directory",)),
        ("no such shard", {first: "x.safetensors"}, ("x.safetensors", "No such file")),
        ("promise", {"nothing.weight": shard}, ("nothing.weight", shard)),
        ("fewer shards", None, ("lacks",)),
    ]
    for what, change, says in cases:
        folder = converter.path()
        shutil.copytree(source, folder, dirs_exist_ok=True)
        weight_map = dict(index["weight_map"], **change) if change else {
            name: value for name, value in index["weight_map"].items() if value != shard}
        write_json(os.path.join(folder, index_name), {"weight_map": weight_map})
        converter.refuse("index: " + what, folder, says=says)
    for text in (b"{}", b'{"weight_map": 3}', b"[]", b"x"):
        write(os.path.join(folder, index_name), text)
        converter.refuse("index %r" % text, folder, says=(index_name,))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    shutil.copy(os.path.join(folder, shard), os.path.join(folder, "copy.safetensors"))
    write_json(os.path.join(folder, index_name), {"weight_map": dict(index["weight_map"],
                                                                     **{first: "copy.safetensors"})})
    if list(index["weight_map"].values()).count(shard) > 1:
        converter.refuse("index: the same tensor in two shards", folder, says=("another shard",))


# ---------------------------------------------------------------------------------------------------------------------
# Tests: hostile pickles
# ---------------------------------------------------------------------------------------------------------------------

class Payload:
    """Unpickling it in the ordinary way calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_hostile_pickles(converter, _):
    model = hf_model()
    folder = converter.path()
    save_config(model, folder)
    path = os.path.join(folder, "pytorch_model.bin")
    trace = os.path.join(folder, "trace")
    payloads = [
        (Payload(os.system, "touch " + trace), "system"), (Payload(open, trace, "w"), "open"),
        (Payload(exec, "open(%r, 'w')" % trace), "exec"), (Payload(eval, "open(%r, 'w')" % trace), "eval"),
        (Payload(subprocess.Popen, ["touch", trace]), "Popen"),
        (Payload(importlib.import_module, "this"), "import_module"), (Payload(os.mkdir, trace), "mkdir"),
    ]
    for payload, word in payloads:
        for protocol in (2, 4):
            for legacy in (False, True):
                for value in ({"model": model.state_dict(), "extra": payload}, payload):
                    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
                    converter.refuse("payload %s" % word, folder, says=(word, "nothing of it was run"))
                    check(not os.path.exists(trace), "payload %s was not run" % word)
    torch.load(path, weights_only=False)
    check(os.path.exists(trace), "the payload works where it is unpickled in the ordinary way")

    put, get = b"r", b"j"
    bombs = {
        "memo index": b"\x80\x02}" + put + struct.pack("<I", 0xFFFFFFFF) + b".",
        "string size": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        "bytes size": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        "negative size": b"\x80\x02T" + struct.pack("<i", -5) + b"x.",
        "nested tuples as a key": b"\x80\x02}(" + b")" + b"\x85" * 300000 + b"K\x01u.",
        "nested tuples as a global's name": b"\x80\x04)" + b"\x85" * 300000 + b"\x8c\x01x\x93.",
        "nested tuples as a storage": b"\x80\x02)" + b"\x85" * 300000 + b"Q.",
        "list in itself": b"\x80\x02]" + put + struct.pack("<I", 0) + get + struct.pack("<I", 0) + b"a.",
        "subclass in itself": b"\x80\x02](ctorch._tensor\n_rebuild_from_type_v2\nr\x01\0\0\0" + b"Nh\0"
                              + b"\x87e0h\1h\0R.",
        "empty stack": b"\x80\x02R.", "only a stop": b"\x80\x02.", "no stop": b"\x80\x02}",
        "only POP": b"\x80\x020000.",
        "a call of a dict": b"\x80\x02})R.", "a call of a list": b"\x80\x02]K\x01\x85R.",
        "a call without a tuple": b"\x80\x02ctorch\nSize\nK\x01R.", "a mark too few": b"\x80\x02}K\x01K\x02u.",
        "an item for a number": b"\x80\x02K\x01K\x02K\x03s.", "memo that isn't there": b"\x80\x02h\x05.",
        "tensor from nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\0)) N}tR.",
        "storage of no type": b"\x80\x02(X\x07\0\0\0storageK\x01X\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ.",
        "EXT": b"\x80\x02\x82\x01.", "INST": b"\x80\x02(ios\nsystem\n.", "OBJ": b"\x80\x02(cos\nsystem\no.",
        "global with a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0c_utils.x.y.z\x93.",
        "global that isn't UTF-8": b"\x80\x02c\xff\n\xff\n.", "global without an end": b"\x80\x02ctorch",
    }
    for what, data in bombs.items():
        write(path, zip_bytes({"a/data.pkl": data}))
        started = time.monotonic()
        converter.refuse("pickle: " + what, folder, says=("pytorch_model.bin",))
        check(time.monotonic() - started < 20, "pickle: %s: in time" % what)

    def tensor_pickle(storage="FloatStorage", key="0", count=4, offset=0, size=(2, 2), stride=(2, 1)):
        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                return ("storage", getattr(torch, storage), key, "cpu", count) if value is Ellipsis else None
        data = io.BytesIO()
        function = Payload(torch._utils._rebuild_tensor_v2, Ellipsis, offset, size, stride, False, {})
        Pickler(data, 2).dump({"a": function})
        return data.getvalue()
    views = [
        ("storage too small", tensor_pickle(count=5), ("too few",)), ("offset", tensor_pickle(offset=1), ("outside",)),
        ("stride", tensor_pickle(stride=(3, 1)), ("outside",)), ("size", tensor_pickle(size=(2, 3)), ("outside",)),
        ("negative stride", tensor_pickle(stride=(-1, 1)), ("impossible",)),
        ("negative offset", tensor_pickle(offset=-1), ("impossible",)),
        ("negative size", tensor_pickle(size=(-2, -2)), ("impossible",)),
        ("huge stride", tensor_pickle(stride=(1 << 70, 1)), ("impossible",)),
        ("huge size", tensor_pickle(size=(1 << 62, 1 << 62), stride=(0, 0), count=4), ("lacks",)),
        ("stride count", tensor_pickle(stride=(1,)), ("impossible",)),
        ("many dimensions", tensor_pickle(size=(1,) * 9, stride=(1,) * 9), ("impossible",)),
        ("text as size", tensor_pickle(size="ab"), ("pickle",)),
        ("no such record", tensor_pickle(key="1"), ("missing",)),
        ("path as key", tensor_pickle(key="../0"), ("missing",)),
        ("a number as key", tensor_pickle(key=0), ("storage",)),
        ("text as count", tensor_pickle(count="4"), ("storage",)),
        ("huge count", tensor_pickle(count=1 << 60), ("few",)),
        ("fine but another model", tensor_pickle(), ("lacks",)),
    ]
    for what, data, says in views:
        write(path, zip_bytes({"a/data.pkl": data, "a/data/0": bytes(16)}))
        converter.refuse("view: " + what, folder, says=says)


def test_python_2(converter, _):
    """What Python 2 pickled: byte strings, an OrderedDict with its items as an argument."""
    data = (b"\x80\x02ccollections\nOrderedDict\nq\x00]q\x01(]q\x02(U\x01aK\x05e]q\x03(U\x01bK\x06ee\x85q\x04Rq\x05"
            b"}q\x06U\x09_metadataq\x07K\x01sb.")
    machine = converter.module.PickleMachine(data, "test", None)
    check_equal(machine.run(), {"a": 5, "b": 6}, "an OrderedDict of Python 2")


# ---------------------------------------------------------------------------------------------------------------------
# Tests: damaged files
# ---------------------------------------------------------------------------------------------------------------------

def damaged_targets(converter):
    """(what, directory, file to damage, how many of its first bytes are worth flipping)"""
    model = hf_model(n_layer=1, vocab_size=512)
    folder = converter.path()
    model.save_pretrained(folder)
    write_json(os.path.join(folder, "tokenizer.json"), json.loads(train_tokenizer().to_str()))
    yield "safetensors", folder, "model.safetensors", 2000
    yield "config.json", folder, "config.json", None
    yield "tokenizer.json", folder, "tokenizer.json", 3000
    for legacy in (False, True):
        folder = converter.path()
        save_config(model, folder)
        torch.save(model.state_dict(), os.path.join(folder, "pytorch_model.bin"),
                   _use_new_zipfile_serialization=not legacy)
        save_vocab_and_merges(train_tokenizer(), folder)
        yield ("legacy" if legacy else "zip"), folder, "pytorch_model.bin", 4000
    yield "merges.txt", folder, "merges.txt", None
    yield "vocab.json", folder, "vocab.json", 1000
    folder = converter.path()
    model.save_pretrained(folder, max_shard_size="20KB")
    yield "index", folder, "model.safetensors.index.json", None


def test_damage(converter, _):
    """Truncated at many lengths and with bits flipped: converted or refused in one sentence, never a traceback."""
    for what, folder, name, head in damaged_targets(converter):
        path = os.path.join(folder, name)
        with open(path, "rb") as file:
            whole = file.read()
        status, stderr, _ = converter.run_inside(folder)
        if not check(status == 0, "%s: whole: %s" % (what, stderr)):
            continue
        lengths = {0, 1, 7, 8, 9, len(whole) - 1, len(whole) // 2, *range(0, len(whole), max(1, len(whole) // 60))}
        for length in sorted(lengths):
            write(path, whole[:length])
            check_damaged(converter, folder, "%s of %d bytes, the first %d" % (what, len(whole), length),
                          may_pass=name.endswith(".txt") or not whole[length:].strip())
        ends = [(0, min(head or len(whole), len(whole)))]
        if what == "zip":  # the directory at the end, too
            ends.append((len(whole) - 3000, len(whole)))
        for first, last in ends:
            for _ in range(150):
                data = bytearray(whole)
                places = [random.randrange(first, last) for _ in range(random.choice((1, 1, 3)))]
                for place in places:
                    data[place] ^= 1 << random.randrange(8)
                write(path, data)
                check_damaged(converter, folder, "%s with flipped bits in bytes %s" % (what, places), may_pass=True)
        write(path, whole)


def check_damaged(converter, folder, what, may_pass):
    status, stderr, left = converter.run_inside(folder)
    if status == 0:
        check(may_pass and left == ["out.tfm"], what + ": converted")
    elif check(status in (1, 2), "%s: %s" % (what, status)):
        check(left == [], "%s: nothing is left, but %s" % (what, left))
        check_sentence(stderr, what)


# ---------------------------------------------------------------------------------------------------------------------
# Tests: the output
# ---------------------------------------------------------------------------------------------------------------------

def test_output(converter, _):
    model = hf_model()
    folder = converter.path()
    model.save_pretrained(folder)

    def run(out, checkpoint=folder, *options):
        result = subprocess.run([*converter.command, checkpoint, out, *options], capture_output=True, text=True)
        if result.returncode:
            check_sentence(result.stderr, out)
        return result.returncode, result.stderr

    out = converter.path("out.tfm")
    write(out, b"old")
    check_equal(run(out)[0], 0, "an existing file is replaced")
    TfmFile(out)
    umask = os.umask(0o027)
    try:
        run(out)
    finally:
        os.umask(umask)
    check_equal(os.stat(out).st_mode & 0o777, 0o640, "permissions follow the umask")
    again = converter.path("out.tfm")
    run(again)
    with open(out, "rb") as one, open(again, "rb") as two:
        check(one.read() == two.read(), "the same input gives the same bytes")
    for name in ("model.safetensors", "config.json"):
        path = os.path.join(folder, name)
        before = os.stat(path)
        link = converter.path("link")
        os.symlink(path, link)
        for target in (path, os.path.join(folder, ".", name), link):
            status, stderr = run(target)
            check(status == 1 and "input" in stderr, "an input as the output: %s" % stderr)
        after = os.stat(path)
        check_equal((after.st_size, after.st_mtime_ns), (before.st_size, before.st_mtime_ns), "the input is untouched")
    bare, config = converter.path("x.pt"), converter.path("config.json")
    torch.save(LinearGpt().state_dict(), bare)
    write_json(config, LinearGpt().model_args)
    for target in (bare, config):
        status, stderr = run(target, bare, "--arch", "nanogpt", "--config", config)
        check(status == 1 and "input" in stderr, "an input as the output: %s" % stderr)
    target, link = converter.path("target.tfm"), converter.path("link.tfm")
    write(target, b"")
    os.symlink(target, link)
    run(link)
    check(os.path.islink(link) and TfmFile(target), "a symbolic link is written through")
    inside = os.path.join(folder, "model.tfm")
    check_equal([run(inside)[0], run(inside)[0]], [0, 0], "output beside the inputs, twice")
    for what, path in (("a directory", folder), ("a device", os.devnull),
                       ("no such directory", os.path.join(folder, "nothing", "x.tfm")), ("no name", "")):
        status, stderr = run(path)
        check_equal(status, 1, "output: %s (%s)" % (what, stderr.strip()))
    check(os.path.exists(os.devnull) and not os.path.isfile(os.devnull), "the device is still one")
    if os.path.exists("/dev/full"):
        check_equal(run("/dev/full")[0], 1, "output: a full device")


def test_full_disk(converter, _):
    """A limit on the size of files stands in for a full disk."""
    resource = importlib.import_module("resource")
    folder = converter.path()
    hf_model(vocab_size=5000).save_pretrained(folder)
    out = converter.path("out.tfm")
    result = subprocess.run([*converter.command, folder, out], capture_output=True, text=True, preexec_fn=lambda: (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))))
    check_equal(result.returncode, 1, "full disk: exit status")
    check_sentence(result.stderr, "full disk")
    check("out.tfm: can't be written" in result.stderr, "full disk: the error names the file: " + result.stderr)
    check_equal(os.listdir(os.path.dirname(out)), [], "full disk: nothing is left")
    with open(out, "wb") as file:
        file.write(b"what was there")
    for action in (signal.SIG_IGN, signal.SIG_DFL):  # Python ignores the signal, however it was called
        result = subprocess.run([*converter.command, folder, out], capture_output=True, text=True, preexec_fn=lambda action=action: (
            signal.signal(signal.SIGXFSZ, action), resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))))
        check_equal(result.returncode, 1, "full disk, over a file: exit status")
        with open(out, "rb") as file:
            check_equal(file.read(), b"what was there", "full disk: the file that was there")
        check_equal(os.listdir(os.path.dirname(out)), ["out.tfm"], "full disk: nothing else is left")


def test_signals(converter, _):
    """Ended in the middle of the copy: nothing is left."""
    width, words = 256, 600000
    folder = converter.path()
    model = hf_model(n_embd=width, n_head=1, n_layer=1)
    state = {name: tensor.double() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    state["transformer.wte.weight"] = torch.zeros(words, width, dtype=torch.float64)  # 1.2 GB: seconds of work
    safetensors.torch.save_file(state, os.path.join(folder, "model.safetensors"))
    save_config(model, folder, vocab_size=words)
    original = os.stat(os.path.join(folder, "model.safetensors"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        out = converter.path("out.tfm")
        process = subprocess.Popen([*converter.command, folder, out], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        while not os.listdir(os.path.dirname(out)) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        stderr = process.communicate()[1]
        check_equal(process.returncode, 128 + number, "signal %d: exit status" % number)
        check_sentence(stderr, "signal %d" % number)
        check_equal(os.listdir(os.path.dirname(out)), [], "signal %d: nothing is left" % number)
    for before in (None, b"what was there"):  # SIGKILL leaves the temporary file; the output is what it was
        out = converter.path("out.tfm")
        if before:
            with open(out, "wb") as file:
                file.write(before)
        process = subprocess.Popen([*converter.command, folder, out], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not set(os.listdir(os.path.dirname(out))) - {"out.tfm"} and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        check_equal(process.wait(), -signal.SIGKILL, "SIGKILL in the middle: exit status")
        check_equal(os.path.exists(out), before is not None, "SIGKILL: an output")
        if before:
            with open(out, "rb") as file:
                check_equal(file.read(), before, "SIGKILL: the file that was there")
    now = os.stat(os.path.join(folder, "model.safetensors"))
    check_equal((now.st_size, now.st_mtime_ns), (original.st_size, original.st_mtime_ns), "SIGKILL: the checkpoint")


def test_memory(converter, _):
    """A checkpoint that is much larger than the memory the program may have."""
    folder = converter.path()
    model = hf_model(n_embd=256, n_head=1, n_layer=1)
    save_config(model, folder, vocab_size=200000)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    state["transformer.wte.weight"] = torch.randn(200000, 256)
    safetensors.torch.save_file(state, os.path.join(folder, "model.safetensors"))
    resource = importlib.import_module("resource")
    out = converter.path("out.tfm")
    limit = 100 << 20
    result = subprocess.run([*converter.command, folder, out], capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    check(result.returncode == 0 and os.path.getsize(out) > 2 * limit - (10 << 20),
          "a 205 MB checkpoint in 100 MB of address space: %s" % result.stderr.strip())


# ---------------------------------------------------------------------------------------------------------------------

def test_checkpoint(converter, logits, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    file = converter.convert(folder, folder)
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    compare(folder, file, plain(model.state_dict(), not tied), model.config.n_layer, "cols")
    if os.path.exists(os.path.join(folder, "vocab.json")) or os.path.exists(os.path.join(folder, "tokenizer.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        compare_tokenizer(folder, file, tokenizer.backend_tokenizer, dict(eos=tokenizer.eos_token_id))
    logits.check(folder, file, model.float())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python")
    parser.add_argument("--checkpoint")
    parser.add_argument("--tfm")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored under nohup or in the background, and what we start would, too
        signal.signal(number, signal.SIG_DFL)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    logits = Logits(args.tfm)
    with tempfile.TemporaryDirectory() as folder:
        converter = Converter(folder, args.python)
        for name, test in list(globals().items()):
            if name.startswith("test_") and name != "test_checkpoint":
                test(converter, logits)
        if args.checkpoint:
            test_checkpoint(converter, logits, args.checkpoint)
    print("%d passed, %d failed" % (Results.passed, Results.failed))
    return 1 if Results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
