#!/usr/bin/env python3
"""Converts a PyTorch checkpoint into a .tfm file. Needs Python 3.8 or newer and nothing else: no torch, no numpy.

usage: tools/convert.py CHECKPOINT OUT.tfm [--arch NAME] [--config FILE]

CHECKPOINT is one of
  - a Hugging Face directory: config.json; model.safetensors or pytorch_model.bin, whole or in shards with an index;
    tokenizer files (a model without a tokenizer is converted, too);
  - a directory of sentence-transformers: the same with modules.json (Transformer, Pooling, Normalize);
  - a bare state dict (.safetensors, or .pt, .pth, .bin written by torch.save, in the zip format of PyTorch 1.6 and
    later or in the older one), together with --arch and --config;
  - a nanoGPT checkpoint (ckpt.pt), which carries its own configuration;
  - a .gguf file of llama.cpp: llama (Mistral's, too), qwen2, qwen3, gemma, gemma2, phi2, gptneox, gpt2. F32, F16 and
    BF16 stay what they are; blocks of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K are copied as they are.
For a file, a tokenizer is looked for beside it (or, in a .gguf file, within it). One that is not supported is an
error; in a .gguf file it is left out with a warning. A directory or a .gguf file with a tokenizer and no weights
becomes a file that tokenizes. A chat template is noted if it is of a known kind: ChatML, LLaMA 2 and 3, Mistral,
Gemma, Zephyr, Phi-3, plain.

Families: GPT-2; BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA (with their heads for masked words, for
classifying texts and tokens); T5, T5 v1.1, Flan-T5, mT5; LLaMA, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Phi, Phi-3,
GPT-NeoX; PyTorch's own nn.Transformer, nn.TransformerEncoder and nn.TransformerDecoder.

--arch NAME    a family, by default what the configuration says: gpt2, nanogpt, mingpt, bert, roberta (XLM-RoBERTa
               and CamemBERT, too), distilbert, electra, t5, mt5, llama, mistral, qwen2, qwen3, gemma, gemma2, phi,
               phi3, gpt_neox, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
               nn.TransformerEncoderLayer or nn.TransformerDecoderLayer. The first three share a shape and differ in
               what a configuration leaves unsaid: the activation function (nanoGPT: exact GELU; the others: its tanh
               approximation), whether the head is the token embedding (minGPT: no), and whether biases may be absent
               (nanoGPT: yes).
--config FILE  a JSON object such as config.json, or {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024,
               "vocab_size": 50304}. It overrides what the checkpoint itself says, key by key: nanoGPT checkpoints
               from before May 2023 need {"activation_function": "gelu_new"}.
               For PyTorch's modules: {"nhead": 8} and, where they are not PyTorch's defaults, "norm_first" (false),
               "activation" ("relu"), "layer_norm_eps" (1e-5, of all norms); "causal" (true: whether a decoder's tokens
               see only what is before them), "n_positions" (4096: the longest sequence), "prefix" (what the module's
               names begin with, if several modules would fit). Sizes and numbers of layers are the tensors';
               "d_model", "dim_feedforward", "num_layers", "num_encoder_layers" and "num_decoder_layers" confirm them.

Tensors keep the checkpoint's type (f32, f16, bf16; f64 becomes f32; of several that become one the wider type), and
their bytes are copied, never held in memory.
Pickles are read by a machine of our own: it imports nothing, and calls nothing but a few functions of this file.
OUT.tfm appears whole or not at all.

Exit status: 0 converted, 1 the input can't be converted (one sentence on stderr says why), 2 wrong usage,
128 + N ended by signal N.
"""

import argparse
import array
import base64
import contextlib
import dataclasses
import itertools
import json
import math
import mmap
import operator
import os
import pickle
import re
import signal
import stat
import struct
import sys
import time
import zipfile
import zlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

CHUNK = 1 << 20  # bytes that are in memory at a time


# ---------------------------------------------------------------------------------------------------------------------
# Errors and notes
# ---------------------------------------------------------------------------------------------------------------------

class ConvertError(Exception):
    """The input can't be converted: one sentence that names the file, tensor or key and what was expected."""


class UsageError(ConvertError):
    """The command line is wrong."""


class Interrupted(BaseException):
    """A signal asked the program to end."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def quote(value, limit=100):
    """A name from a file, fit for an error message: on one line and not too long."""
    try:
        text = repr(value)
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= limit else text[:limit] + "…"


def listing(names, limit=3):
    """The first few of many names."""
    shown = ", ".join(quote(name) for name in names[:limit])
    return shown if len(names) <= limit else "%s and %d more" % (shown, len(names) - limit)


# ---------------------------------------------------------------------------------------------------------------------
# Input: files, and JSON objects whose values are asked for by key and type
# ---------------------------------------------------------------------------------------------------------------------

def open_at_once(path, flags):
    """So that a pipe is refused, and not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class InputFile:
    """A regular file, read by position."""

    def __init__(self, path):
        self.path = path
        self.file = open(path, "rb", buffering=0, opener=open_at_once)
        status = os.fstat(self.file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConvertError("%s: is not a regular file" % path)
        self.size = status.st_size
        self._map = None

    def read_into(self, offset, view):
        """Fills `view` with the bytes from `offset` on."""
        done = 0
        while done < len(view):
            try:
                self.file.seek(offset + done)
                count = self.file.readinto(view[done:])
            except OSError as error:
                raise ConvertError("%s: can't be read: %s" % (self.path, error.strerror))
            if not count:
                raise ConvertError("%s: ends at byte %d, in the middle of its data" % (self.path, offset + done))
            done += count

    def read(self, offset, size):
        if offset < 0 or offset + size > self.size:
            raise ConvertError("%s: is truncated: it has %d bytes where at least %d are needed"
                               % (self.path, self.size, offset + size))
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def map(self):
        """The whole file as bytes in address space, for access that jumps about."""
        if self._map is None:
            try:
                self._map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise ConvertError("%s: can't be mapped into memory: %s" % (self.path, error.strerror))
        return self._map

    def unload(self):
        """Lets go of the mapped pages, which would count as ours though they are the system's cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map().madvise(mmap.MADV_DONTNEED)


class Source:
    """What the command line calls CHECKPOINT: where its files are, and which were read."""

    def __init__(self, path):
        self.path = path
        self.is_directory = os.path.isdir(path)
        self.directory = path if self.is_directory else os.path.dirname(path)
        self.inputs = []
        self.notes = []

    def name(self):
        """What to call the model."""
        name = os.path.basename(os.path.abspath(self.path))
        return name if self.is_directory else os.path.splitext(name)[0]

    def beside(self, name):
        return os.path.join(self.directory, name)

    def has(self, name):
        return os.path.exists(self.beside(name))

    def open(self, path):
        file = InputFile(path)
        self.inputs.append(path)
        return file

    def text(self, path):
        file = self.open(path)
        try:
            return file.read(0, file.size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConvertError("%s: is not UTF-8 text (byte %d)" % (path, error.start))

    def json(self, path):
        return parse_json(self.text(path), path)

    def optional_json(self, name):
        """The JSON object in a file of the directory; an empty one where there is no such file."""
        return self.json(self.beside(name)) if self.has(name) else Fields({}, name)


class Fields:
    """A JSON object. `where` begins every complaint; null counts as absent; `default` is for absent keys."""

    REQUIRED = object()

    def __init__(self, values, where):
        self.values = values
        self.where = where

    def get(self, keys, types, expected, default):
        """The value under a key, or under the first of several spellings that is there."""
        keys = (keys,) if isinstance(keys, str) else keys
        value = next((self.values[key] for key in keys if self.values.get(key) is not None), None)
        if value is None:
            if default is self.REQUIRED:
                raise ConvertError("%s: there is no %s" % (self.where, " or ".join(map(quote, keys))))
            return default
        # A bool is an int to Python, and neither is a stand-in for the other here.
        if not isinstance(value, types) or isinstance(value, bool) != (types is bool):
            raise ConvertError("%s: %s should be %s, not %s"
                               % (self.where, self.spelling(keys), expected, quote(value)))
        return value

    def spelling(self, keys):
        """The one of several spellings of a key that is there, for an error message."""
        keys = (keys,) if isinstance(keys, str) else keys
        return quote(next(key for key in keys if self.values.get(key) is not None))

    def size(self, keys, default=REQUIRED, limit=(1 << 31) - 1):
        value = self.get(keys, int, "an integer", default)
        if value is not None and not 0 < value <= limit:
            raise ConvertError("%s: %s should be an integer from 1 to %d, not %s"
                               % (self.where, self.spelling(keys), limit, quote(value)))
        return value

    def integer(self, keys, default=REQUIRED):
        return self.get(keys, int, "an integer", default)

    def number(self, keys, default=REQUIRED):
        value = self.get(keys, (int, float), "a number", default)
        if not -1e300 < value < 1e300:
            raise ConvertError("%s: %s should be a finite number, not %s"
                               % (self.where, self.spelling(keys), quote(value)))
        return float(value)

    def epsilon(self, keys, default=REQUIRED):
        """What a norm adds to the variance."""
        value = self.number(keys, default)
        if not 0 <= value < 1e30:
            raise ConvertError("%s: %s should be a small number that is not negative, not %g"
                               % (self.where, self.spelling(keys), value))
        return value

    def flag(self, keys, default=REQUIRED):
        return self.get(keys, bool, "true or false", default)

    def text(self, keys, default=REQUIRED):
        return self.get(keys, str, "a string", default)

    def list(self, keys, default=REQUIRED):
        return self.get(keys, list, "a list", default)

    def object(self, keys, default=REQUIRED):
        value = self.get(keys, dict, "an object", default)
        return value if value is None else Fields(value, "%s: %s" % (self.where, quote(keys)))

    def texts(self, keys):
        values = self.list(keys, [])
        if not all(isinstance(value, str) for value in values):
            raise ConvertError("%s: %s should be a list of strings, not %s"
                               % (self.where, self.spelling(keys), quote(values)))
        return values

    def ids(self, keys):
        """Token ids, of which the files write one as a number and several as a list."""
        value = self.get(keys, (int, list), "a token id or a list of them", [])
        ids = value if isinstance(value, list) else [value]
        if not all(type(number) is int for number in ids):
            raise ConvertError("%s: %s should be a token id or a list of them, not %s"
                               % (self.where, self.spelling(keys), quote(value)))
        return ids


def unique_keys(pairs):
    """What JSON leaves open: with the same key twice, readers differ in which one they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError("the key %s is there twice" % quote(twice))
    return values


def parse_json_value(text, where):
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ConvertError("%s: is not valid JSON: %s" % (where, error))


def parse_json(text, where):
    values = parse_json_value(text, where)
    if not isinstance(values, dict):
        raise ConvertError("%s: should hold a JSON object" % where)
    return Fields(values, where)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of a checkpoint, none of them read yet
# ---------------------------------------------------------------------------------------------------------------------

# Types are called what safetensors calls them. Sizes in bytes.
MAX_DIMS = 8  # more are no sign of a model but of a damaged file
DTYPE_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "C128": 16,
}
# GGUF's quantized types: elements and bytes of a block. A row is a whole number of blocks.
BLOCK_TYPES = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210),
}


def stored_size(dtype, count):
    """Bytes of that many elements."""
    elements, size = BLOCK_TYPES.get(dtype) or (1, DTYPE_SIZES[dtype])
    return count // elements * size


def stored_dtype(dtype):
    """The type under which a .tfm file has it."""
    return "F32" if dtype == "F64" else dtype


class Storage:
    """A run of bytes of a file that tensors are views of. (In legacy files the offset is learnt last.)"""

    def __init__(self, file, offset, size):
        self.file = file
        self.offset = offset
        self.size = size


class Tensor:
    """A view of a storage. `strides` and `offset` count elements."""

    def __init__(self, name, dtype, shape, strides, storage, offset):
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.strides = strides
        self.storage = storage
        self.offset = offset

    def __str__(self):
        return "%s: the tensor %s" % (self.storage.file.path, quote(self.name))

    @property
    def itemsize(self):
        return DTYPE_SIZES[self.dtype]

    @property
    def count(self):
        return math.prod(self.shape)

    def rows(self, first, count):
        """A run of its rows."""
        return Tensor(self.name, self.dtype, (count,) + self.shape[1:], self.strides, self.storage,
                      self.offset + first * self.strides[0])

    def named(self, name):
        """The tensor under this name, its view of the storage checked."""
        tensor = Tensor(name, self.dtype, self.shape, self.strides, self.storage, self.offset)
        tensor.check_bounds()
        return tensor

    def check_bounds(self):
        if self.storage.offset is None:
            raise ConvertError("%s has no data" % self)
        if self.count:
            last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
            if (last + 1) * self.itemsize > self.storage.size:
                raise ConvertError("%s reaches outside of its storage" % self)

    def view(self):
        """What tells two names for the same elements from two tensors."""
        return self.dtype, self.shape, self.strides, self.offset, self.storage.file.path, self.storage.offset

    def is_contiguous(self):
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def chunks(self):
        """The bytes in row-major order, in pieces of CHUNK bytes (the last one of fewer). A piece is good until the
        next one is asked for."""
        return self._copy() if self.is_contiguous() else self._gather()

    def _copy(self):
        size = stored_size(self.dtype, self.count)
        start = self.storage.offset + stored_size(self.dtype, self.offset)
        buffer = memoryview(bytearray(min(size, CHUNK)))
        for done in range(0, size, CHUNK):
            piece = buffer[:min(CHUNK, size - done)]
            self.storage.file.read_into(start + done, piece)
            yield piece

    def _gather(self):
        pending = bytearray()
        for run in self._runs():
            pending += run
            if len(pending) >= CHUNK:
                yield pending[:CHUNK]
                del pending[:CHUNK]
        if pending:
            yield pending
        self.storage.file.unload()

    def _runs(self):
        """The elements of a transposed or otherwise strided view, along the last dimension."""
        whole = memoryview(self.storage.file.map())
        usable = self.storage.size // self.itemsize * self.itemsize
        items = whole[self.storage.offset:self.storage.offset + usable].cast({2: "H", 4: "I", 8: "Q"}[self.itemsize])
        step = CHUNK // self.itemsize
        count, stride = self.shape[-1], self.strides[-1]
        for index in itertools.product(*map(range, self.shape[:-1])):
            row = self.offset + sum(i * size for i, size in zip(index, self.strides))
            for first in range(0, count, step):
                length = min(step, count - first)
                start = row + first * stride
                if stride:
                    yield items[start:start + (length - 1) * stride + 1:stride].tobytes()
                else:
                    yield items[start:start + 1].tobytes() * length


def are_sizes(numbers):
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def same_elements(a, b):
    """Whether two tensors are one, or equal in every bit."""
    if a.view() == b.view():
        return True
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(bytes(piece) == bytes(other) for piece, other in zip(a.chunks(), b.chunks()))


# ---------------------------------------------------------------------------------------------------------------------
# Reading .safetensors: u64 header size, JSON header, data
# ---------------------------------------------------------------------------------------------------------------------

SAFETENSORS_HEADER_LIMIT = 100_000_000  # the format's own


def read_safetensors(file):
    """The file's tensors by name."""
    header_size = int.from_bytes(file.read(0, 8), "little")
    if header_size > min(file.size - 8, SAFETENSORS_HEADER_LIMIT):
        raise ConvertError("%s: is not a whole .safetensors file: it claims a header of %d bytes and has %d bytes"
                           % (file.path, header_size, file.size))
    try:
        text = file.read(8, header_size).decode("utf-8")
    except UnicodeDecodeError:
        raise ConvertError("%s: the header is not UTF-8 text" % file.path)
    header = parse_json(text, file.path + ": the header")
    header.values.pop("__metadata__", None)
    data = 8 + header_size
    tensors = {name: safetensors_entry(file, data, name, header) for name in header.values}
    check_no_overlap(file, data, tensors.values())
    return tensors


def safetensors_entry(file, data, name, header):
    entry = header.values[name]
    where = "%s: the tensor %s" % (file.path, quote(name))
    if not isinstance(entry, dict):
        raise ConvertError("%s: its header entry should be an object" % where)
    entry = Fields(entry, where)
    dtype, shape, span = entry.text("dtype"), entry.list("shape"), entry.list("data_offsets")
    if dtype not in DTYPE_SIZES:
        raise ConvertError("%s has the unknown type %s" % (where, quote(dtype)))
    if len(span) != 2 or len(shape) > MAX_DIMS or not are_sizes(shape + span):
        raise ConvertError("%s: 'shape' should be a list of at most %d sizes, and 'data_offsets' of 2"
                           % (where, MAX_DIMS))
    begin, end = span
    if begin > end or end > file.size - data:
        raise ConvertError("%s lies at bytes %d to %d of the data, outside of its %d bytes"
                           % (where, begin, end, file.size - data))
    if math.prod(shape) * DTYPE_SIZES[dtype] != end - begin:
        raise ConvertError("%s: its %d bytes don't fit its shape %s and type %s"
                           % (where, end - begin, quote(shape), dtype))
    storage = Storage(file, data + begin, end - begin)
    return Tensor(name, dtype, tuple(shape), row_major(shape), storage, 0)


def row_major(shape):
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return tuple(strides)


def check_no_overlap(file, data, tensors):
    """The format allows neither overlaps nor holes, so either one shows that the file is damaged."""
    end, previous = data, None
    for tensor in sorted(tensors, key=lambda tensor: (tensor.storage.offset, tensor.storage.size)):
        if tensor.storage.offset < end:
            raise ConvertError("%s overlaps %s" % (tensor, quote(previous.name)))
        if tensor.storage.offset > end:
            raise ConvertError("%s: %d bytes before the tensor %s belong to none"
                               % (file.path, tensor.storage.offset - end, quote(tensor.name)))
        end, previous = tensor.storage.offset + tensor.storage.size, tensor
    if end != file.size:
        raise ConvertError("%s: has %d bytes after its last tensor" % (file.path, file.size - end))


# ---------------------------------------------------------------------------------------------------------------------
# Reading pickles: a machine for the instructions that torch.save writes. Python's own would import and call whatever
# the file names. This one can't import: a name stands for one of the functions below, or the file is refused.
# ---------------------------------------------------------------------------------------------------------------------

class StorageType(NamedTuple):
    dtype: str


class StorageView(NamedTuple):
    """What tensors are made from: elements of a storage, from the element `first` on."""
    storage: Storage
    dtype: str
    first: int


class Opaque:
    """Stands for an object that a checkpoint may carry and that a conversion doesn't need. Nothing is done with it."""

    def __init__(self, *_):
        pass

    def __repr__(self):
        return "an object"


class Quantized(Opaque):
    """Stands for a tensor of a kind that can't be converted."""


class NumpyType(Opaque):
    def __init__(self, name="", *_):
        self.name = name


def build_bytes(text, *_):
    """Bytes, which protocol 2 has as the text of those characters."""
    return text.encode("latin-1")


def build_number(kind, data):
    """A number of numpy's: its bytes are little-endian, as the file is."""
    layout = NUMPY_LAYOUTS.get(kind.name)
    if layout is None:
        return Opaque()
    return struct.unpack(layout, data.encode("latin-1") if isinstance(data, str) else data)[0]


NUMPY_LAYOUTS = {"b1": "<?", "i1": "<b", "i2": "<h", "i4": "<i", "i8": "<q", "u1": "<B", "u2": "<H", "u4": "<I",
                 "u8": "<Q", "f2": "<e", "f4": "<f", "f8": "<d"}


def build_dict(pairs=()):
    """An OrderedDict. (Python 2 pickled its items as an argument.)"""
    return {key: value for key, value in pairs if is_key(key)}


def is_key(key):
    """Entries under any other key can be neither a tensor nor a setting, and are dropped."""
    return key is None or isinstance(key, (str, int, float))


def build_tensor(view, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    if not isinstance(view, StorageView):
        raise ValueError("a tensor without a storage")
    if metadata:
        raise ValueError("a conjugated or negated view")
    offset += view.first
    numbers = (offset, *size, *stride)
    if not len(size) == len(stride) <= MAX_DIMS or not are_sizes(numbers):
        raise ValueError("a tensor with an impossible shape")
    return Tensor("", view.dtype, tuple(size), tuple(stride), view.storage, offset)


def build_typed_tensor(view, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    """As build_tensor, for the types that have no storage class of their own: the storage is of bytes."""
    return build_tensor(view._replace(dtype=dtype.dtype), offset, size, stride, requires_grad, hooks, metadata)


def build_parameter(tensor, *_):
    return tensor


def build_subclass(function, _, arguments, *__):
    """A tensor of a subclass, or with attributes: the plain tensor in it."""
    if function not in (build_tensor, build_typed_tensor):
        raise ValueError("a tensor of an unknown subclass")
    return function(*arguments)


TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64",
    "complex128": "C128",
}
STORAGE_CLASSES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "UntypedStorage": "U8",
    "QInt8Storage": "I8", "QUInt8Storage": "U8", "QInt32Storage": "I32",
}
# Every name that a pickle may use, and what stands for it here.
GLOBALS = {
    "collections OrderedDict": build_dict,
    "torch Size": tuple,
    "torch._utils _rebuild_tensor": build_tensor,
    "torch._utils _rebuild_tensor_v2": build_tensor,
    "torch._utils _rebuild_tensor_v3": build_typed_tensor,
    "torch._utils _rebuild_parameter": build_parameter,
    "torch._utils _rebuild_parameter_with_state": build_parameter,
    "torch._tensor _rebuild_from_type_v2": build_subclass,
    "torch._utils _rebuild_qtensor": Quantized,
    "torch._utils _rebuild_sparse_tensor": Quantized,
    "_codecs encode": build_bytes,
    "numpy dtype": NumpyType,
    "numpy.core.multiarray scalar": build_number,
    "numpy._core.multiarray scalar": build_number,
}
GLOBALS.update({"torch " + name: StorageType(dtype) for name, dtype in TORCH_DTYPES.items()})
GLOBALS.update({module + " " + name: StorageType(dtype) for name, dtype in STORAGE_CLASSES.items()
                for module in ("torch", "torch.cuda", "torch.storage")})
GLOBALS.update(dict.fromkeys((
    "argparse Namespace", "collections Counter", "collections defaultdict", "pathlib Path",
    "pathlib PosixPath", "pathlib WindowsPath", "pathlib._local PosixPath", "pathlib._local WindowsPath",
    "torch Tensor", "torch device", "torch per_channel_affine", "torch per_tensor_affine",
    "torch.nn.parameter Parameter", "torch.serialization _get_layout", "torch.torch_version TorchVersion",
    "numpy ndarray", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct",
    "numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"), Opaque))
GLOBALS.update({module + " " + name: Opaque for module in ("builtins", "__builtin__")
                for name in ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list",
                             "object", "set", "slice", "str", "tuple")})


class PickleMachine:
    """Runs one pickle after another in `data`; `find_storage` turns a persistent id into a StorageView."""

    def __init__(self, data, where, find_storage):
        self.data = data
        self.position = 0
        self.where = where
        self.find_storage = find_storage

    def run(self):
        """The object that the pickle at the current position describes."""
        self.stack, self.marks, self.memo = [], [], {}
        start = self.position
        try:
            while True:
                start = self.position
                opcode = self.take(1)
                if opcode == pickle.STOP:
                    return self.stack.pop()
                if opcode not in INSTRUCTIONS:
                    raise ValueError("the instruction %r is not supported" % opcode)
                INSTRUCTIONS[opcode](self)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
            raise ConvertError("%s: the pickle is damaged, or is not one of torch.save's, at byte %d (%s)"
                               % (self.where, start, quote(str(error) or type(error).__name__)))

    def take(self, size):
        end = self.position + size
        if end > len(self.data):
            raise ConvertError("%s: is truncated: the pickle goes on past its end" % self.where)
        data = self.data[self.position:end]
        self.position = end
        return data

    def number(self, layout):
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def sized(self, layout):
        """A run of bytes with its size before it."""
        size = self.number(layout)
        if size < 0:
            raise ValueError("a negative size")
        return self.take(size)

    def line(self):
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise ConvertError("%s: is truncated: the pickle goes on past its end" % self.where)
        return self.take(end + 1 - self.position)[:-1].decode("utf-8")

    def push(self, value):
        self.stack.append(value)

    def pop(self, count):
        """The last `count` values of the stack."""
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        first = len(self.stack) - count
        values = self.stack[first:]
        del self.stack[first:]
        return values

    def pop_to_mark(self):
        return self.pop(len(self.stack) - self.marks.pop())

    def push_global(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is no string")
        meaning = GLOBALS.get("%s %s" % (module, name))
        if meaning is None:
            raise ConvertError("%s: the pickle asks for %s, which no checkpoint of tensors needs; nothing of it was "
                               "run (what is needed is torch.save(model.state_dict(), …))"
                               % (self.where, quote("%s.%s" % (module, name))))
        self.push(meaning)

    def call(self):
        function, arguments = self.pop(2)
        if not callable(function) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        self.push(function(*arguments))

    def call_with_keywords(self):
        self.pop(1)
        self.call()

    def store(self, values):
        """Keys and values in turn, into the dict below them."""
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(build_dict(zip(values[::2], values[1::2])))
        elif not isinstance(target, Opaque):
            raise ValueError("an item for something that is no dict")

    def extend(self, values):
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Opaque):
            raise ValueError("an item for something that is no list")


# The callables that GLOBALS holds are the only ones that can get onto the stack: classes and functions of this file,
# and tuple. None of them touches anything outside of its arguments.
INSTRUCTIONS: Dict[bytes, Callable[[PickleMachine], Any]] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.FRAME: lambda m: m.take(8),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: lambda m: m.push(int.from_bytes(m.sized("<B"), "little", signed=True)),
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.sized("<B").decode("utf-8", "surrogatepass")),
    pickle.BINUNICODE: lambda m: m.push(m.sized("<I").decode("utf-8", "surrogatepass")),
    pickle.BINUNICODE8: lambda m: m.push(m.sized("<Q").decode("utf-8", "surrogatepass")),
    pickle.SHORT_BINSTRING: lambda m: m.push(m.sized("<B").decode("latin-1")),
    pickle.BINSTRING: lambda m: m.push(m.sized("<i").decode("latin-1")),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.sized("<B")),
    pickle.BINBYTES: lambda m: m.push(m.sized("<I")),
    pickle.BINBYTES8: lambda m: m.push(m.sized("<Q")),
    pickle.BYTEARRAY8: lambda m: m.push(m.sized("<Q")),
    pickle.MARK: lambda m: m.marks.append(len(m.stack)),
    pickle.POP: lambda m: m.pop(1),
    pickle.POP_MARK: lambda m: m.pop_to_mark(),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE1: lambda m: m.push(tuple(m.pop(1))),
    pickle.TUPLE2: lambda m: m.push(tuple(m.pop(2))),
    pickle.TUPLE3: lambda m: m.push(tuple(m.pop(3))),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_to_mark())),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.APPEND: lambda m: m.extend(m.pop(1)),
    pickle.APPENDS: lambda m: m.extend(m.pop_to_mark()),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.SETITEM: lambda m: m.store(m.pop(2)),
    pickle.SETITEMS: lambda m: m.store(m.pop_to_mark()),
    pickle.EMPTY_SET: lambda m: m.push(Opaque()),
    pickle.ADDITEMS: lambda m: m.extend(m.pop_to_mark()),
    pickle.FROZENSET: lambda m: m.push(Opaque(m.pop_to_mark())),
    pickle.BINPUT: lambda m: m.memo.__setitem__(m.number("<B"), m.stack[-1]),
    pickle.LONG_BINPUT: lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),
    pickle.MEMOIZE: lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    pickle.BINGET: lambda m: m.push(m.memo[m.number("<B")]),
    pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number("<I")]),
    pickle.GLOBAL: lambda m: m.push_global(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.push_global(*m.pop(2)),
    pickle.REDUCE: lambda m: m.call(),
    pickle.NEWOBJ: lambda m: m.call(),
    pickle.NEWOBJ_EX: lambda m: m.call_with_keywords(),
    pickle.BUILD: lambda m: m.pop(1),  # an object's attributes, such as a state dict's _metadata
    pickle.BINPERSID: lambda m: m.push(m.find_storage(*m.pop(1))),
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading what torch.save wrote: the zip format, and the one from before PyTorch 1.6
# ---------------------------------------------------------------------------------------------------------------------

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001


def read_zip(file):
    """The object in an archive of data.pkl and one stored record for each storage, data/KEY."""
    records = zip_records(file)
    pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ConvertError("%s: is a zip archive but not a PyTorch checkpoint: it should have one data.pkl" % file.path)
    prefix = pickles[0][:-len("data.pkl")]
    if prefix + "constants.pkl" in records:
        raise ConvertError("%s: is a TorchScript archive; save the model's state_dict() with torch.save instead"
                           % file.path)
    if prefix + "byteorder" in records:
        check_little_endian(file, file.read(*record_span(file, records, prefix + "byteorder")) == b"little")
    storages: Dict[str, Storage] = {}

    def find_storage(reference):
        kind, storage_type, key, _, count = reference
        if kind != "storage" or not isinstance(key, str) or type(count) is not int:
            raise ValueError("a reference to something that is no storage")
        if key not in storages:
            storages[key] = Storage(file, *record_span(file, records, "%sdata/%s" % (prefix, key)))
        if count * DTYPE_SIZES[storage_type.dtype] > storages[key].size:
            raise ConvertError("%s: the storage %s has %d bytes, too few for %s elements of type %s"
                               % (file.path, quote(key), storages[key].size, quote(count), storage_type.dtype))
        return StorageView(storages[key], storage_type.dtype, 0)

    data = file.read(*record_span(file, records, pickles[0]))
    return PickleMachine(data, "%s: %s" % (file.path, pickles[0]), find_storage).run()


def zip_records(file):
    try:
        with zipfile.ZipFile(file.path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OverflowError,
            MemoryError, OSError) as error:
        raise ConvertError("%s: is a damaged or truncated zip archive: %s" % (file.path, error))
    records = {entry.filename: entry for entry in entries}
    if len(records) < len(entries):
        raise ConvertError("%s: has two records of the same name" % file.path)
    return records


def record_span(file, records, name):
    """Where a record's data is: offset and size."""
    entry = records.get(name)
    if entry is None:
        raise ConvertError("%s: the record %s is missing" % (file.path, quote(name)))
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise ConvertError("%s: the record %s is compressed or encrypted, which torch.save never does"
                           % (file.path, quote(name)))
    local = file.read(entry.header_offset, 30)
    name_size, extra_size = struct.unpack("<HH", local[26:])
    start = entry.header_offset + 30 + name_size + extra_size
    if local[:4] != b"PK\3\4" or start + entry.file_size > file.size:
        raise ConvertError("%s: the record %s is damaged or lies outside of the file" % (file.path, quote(name)))
    return start, entry.file_size


def read_legacy(file):
    """The object in a file of five pickles (magic number, version, system, object, storage keys) and the storages."""
    storages: Dict[str, Storage] = {}
    widths: Dict[str, int] = {}

    def find_storage(reference):
        kind, storage_type, key, _, count, view = reference
        if kind != "storage" or not isinstance(key, str) or type(count) is not int:
            raise ValueError("a reference to something that is no storage")
        width = DTYPE_SIZES[storage_type.dtype]
        storage = storages.setdefault(key, Storage(file, None, count * width))
        widths.setdefault(key, width)
        return StorageView(storage, storage_type.dtype, view[1] if view else 0)

    machine = PickleMachine(file.map(), file.path, find_storage)
    if machine.run() != LEGACY_MAGIC or machine.run() != LEGACY_VERSION:
        raise ConvertError("%s: is a pickle but not one that torch.save wrote" % file.path)
    system = machine.run()
    check_little_endian(file, isinstance(system, dict) and system.get("little_endian"))
    loaded = machine.run()
    keys = machine.run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ConvertError("%s: the list of storages is damaged" % file.path)
    position = machine.position
    for key in keys:
        count = int.from_bytes(file.read(position, 8), "little")
        storage = storages.get(key)
        if storage is None or storage.offset is not None or count * widths[key] != storage.size:
            raise ConvertError("%s: the storage %s is not the one that the tensors ask for" % (file.path, quote(key)))
        storage.offset = position + 8
        position = storage.offset + storage.size
        if position > file.size:
            raise ConvertError("%s: is truncated: the storage %s ends at byte %d, the file at %d"
                               % (file.path, quote(key), position, file.size))
    return loaded


def check_little_endian(file, is_little):
    if not is_little:
        raise ConvertError("%s: was saved on a big-endian machine, which is not supported" % file.path)


# A trainer keeps the state dict among other things, under one of these keys.
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")


def unwrap_state_dict(loaded, file):
    """The tensors by name, and the arguments of a nanoGPT model or None."""
    if not isinstance(loaded, dict):
        raise ConvertError("%s: holds %s, not a state dict" % (file.path, describe_kind(loaded)))
    inner = next((loaded[key] for key in STATE_DICT_KEYS if isinstance(loaded.get(key), dict)), None)
    tensors = loaded if inner is None else inner
    arguments = None if inner is None else loaded.get("model_args")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ConvertError("%s: %s is %s, where a state dict has a tensor"
                               % (file.path, quote(name), describe_kind(tensor)))
    if not tensors:
        raise ConvertError("%s: holds no tensors" % file.path)
    if arguments is not None and not isinstance(arguments, dict):
        raise ConvertError("%s: 'model_args' should be a dict" % file.path)
    if arguments is not None:
        arguments = {key: value if isinstance(value, (bool, int, float, str, type(None))) else Opaque()
                     for key, value in arguments.items()}
    return {name: tensor.named(name) for name, tensor in tensors.items()}, arguments


def describe_kind(value):
    if isinstance(value, Quantized):
        return "a quantized or sparse tensor"
    return "an object" if isinstance(value, Opaque) else "a value of type " + type(value).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Reading .gguf: metadata, directory of tensors, data
# ---------------------------------------------------------------------------------------------------------------------

GGUF_MAGIC = b"GGUF"
GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_DTYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K",
               14: "Q6_K", 28: "F64", 30: "BF16"}


class Gguf:
    """A file of llama.cpp's format, versions 2 and 3. Reads from front to end; nothing in it is trusted."""

    def __init__(self, file):
        self.file = file
        self.data = file.map()
        self.position = len(GGUF_MAGIC)
        version = self.number("I")
        if version not in (2, 3):
            raise ConvertError("%s: is a .gguf file of %s; versions 2 and 3 are supported" % (
                file.path, "a big-endian machine" if version > 0xFFFF else "version %d" % version))
        n_tensors, n_values = self.number("Q"), self.number("Q")
        self.values: Dict[str, Any] = {}
        for _ in range(n_values):
            key = self.string()
            if key in self.values:
                raise ConvertError("%s: the key %s is there twice" % (file.path, quote(key)))
            self.values[key] = self.value(self.number("I"))
        self.tensors: Dict[str, Tensor] = {}
        for _ in range(n_tensors):
            self.read_tensor()
        self.settle_data()
        file.unload()

    def checkpoint(self):
        return Checkpoint(self.tensors, None, os.path.basename(self.file.path), Fields(self.values, self.file.path))

    def take(self, size):
        if size > self.file.size - self.position:
            raise ConvertError("%s: is truncated or damaged: %d bytes are announced at byte %d, where there are %d"
                               % (self.file.path, size, self.position, self.file.size - self.position))
        self.position += size
        return self.data[self.position - size:self.position]

    def number(self, kind):
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def string(self):
        return self.take(self.number("Q")).decode("utf-8", "surrogateescape")

    def value(self, kind):
        if kind in GGUF_NUMBERS:
            return self.number(GGUF_NUMBERS[kind])
        if kind == GGUF_STRING:
            return self.string()
        if kind == GGUF_ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == GGUF_STRING:
                return [self.string() for _ in range(count)]
            if kind in GGUF_NUMBERS:
                code = GGUF_NUMBERS[kind]
                return list(struct.unpack("<%d%s" % (count, code), self.take(count * struct.calcsize("<" + code))))
        raise ConvertError("%s: the value before byte %d is of the unknown type %d"
                           % (self.file.path, self.position, kind))

    def read_tensor(self):
        name, n_dims = self.string(), self.number("I")
        where = "%s: the tensor %s" % (self.file.path, quote(name))
        if name in self.tensors:
            raise ConvertError("%s is there twice" % where)
        if not 1 <= n_dims <= 4:
            raise ConvertError("%s should have 1 to 4 dimensions, not %d" % (where, n_dims))
        shape = tuple(reversed([self.number("Q") for _ in range(n_dims)]))
        code, offset = self.number("I"), self.number("Q")
        if code not in GGUF_DTYPES:
            raise ConvertError("%s has the type %d of GGML, which is not supported (supported: %s)"
                               % (where, code, ", ".join(GGUF_DTYPES.values())))
        dtype = GGUF_DTYPES[code]
        if math.prod(shape) > 1 << 48 or shape[-1] % BLOCK_TYPES.get(dtype, (1, 0))[0]:
            raise ConvertError("%s has the shape %s, which its type %s can't have" % (where, quote(list(shape)), dtype))
        storage = Storage(self.file, offset, stored_size(dtype, math.prod(shape)))
        self.tensors[name] = Tensor(name, dtype, shape, row_major(shape), storage, 0)

    def settle_data(self):
        """Offsets are from the start of the data, which is known last."""
        fields = Fields(self.values, self.file.path)
        if fields.integer("split.count", 1) > 1:
            raise ConvertError("%s: is one of several files; llama-gguf-split --merge makes them one" % self.file.path)
        alignment = fields.size("general.alignment", 32, 1 << 20)
        start = self.position + -self.position % alignment
        for tensor in self.tensors.values():
            storage = tensor.storage
            if storage.offset % alignment or start + storage.offset + storage.size > self.file.size:
                raise ConvertError("%s should lie at a multiple of %d within the file's %d bytes; it has %d bytes at "
                                   "byte %d of the data" % (tensor, alignment, self.file.size, storage.size,
                                                            storage.offset))
            storage.offset += start


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file or many
# ---------------------------------------------------------------------------------------------------------------------

# In the order in which transformers looks for them.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")


class Checkpoint(NamedTuple):
    tensors: Dict[str, Tensor]
    arguments: Optional[Dict[str, Any]]  # nanoGPT's model_args
    label: str  # the file's name, for the record
    gguf: Optional[Fields] = None  # the metadata of a file of that format


def read_checkpoint(source):
    path = find_weights(source) if source.is_directory else source.path
    if path.endswith(".index.json"):
        return read_shards(source, path)
    file = source.open(path)
    if file.read(0, min(4, file.size)) == GGUF_MAGIC:
        return Gguf(file).checkpoint()
    tensors, arguments = read_weights(file)
    return Checkpoint(tensors, arguments, os.path.basename(path))


def find_weights(source):
    for name in WEIGHT_FILES:
        if source.has(name):
            return source.beside(name)
    others = sorted(name for name in os.listdir(source.directory) if name.endswith(".safetensors"))
    if len(others) == 1:
        return source.beside(others[0])
    raise ConvertError("%s: has none of %s" % (source.directory, ", ".join(WEIGHT_FILES)))


def read_weights(file):
    """The tensors of one file by name, and nanoGPT's arguments or None. The content tells what kind it is."""
    start = file.read(0, min(512, file.size))
    if start.startswith(b"version https://git-lfs"):
        raise ConvertError("%s: is a Git LFS pointer, not the file itself (git lfs pull fetches it)" % file.path)
    if start[8:9] == b"{" or file.path.endswith(".safetensors"):
        return read_safetensors(file), None
    if start.startswith(b"PK\3\4"):
        return unwrap_state_dict(read_zip(file), file)
    if start[:1] == pickle.PROTO:
        return unwrap_state_dict(read_legacy(file), file)
    if start[257:262] == b"ustar":
        raise ConvertError("%s: is in the tar format of PyTorch 0.1; load it with PyTorch and save it again"
                           % file.path)
    raise ConvertError("%s: is neither a .safetensors or .gguf file nor one that torch.save wrote" % file.path)


def is_plain_name(name):
    """Whether it names something in the same directory. With a directory in it, it could lead anywhere."""
    return isinstance(name, str) and not re.search(r"[/\\:\0]", name) and name not in ("", ".", "..")


def read_shards(source, path):
    index = source.json(path)
    shards: Dict[str, List[str]] = {}
    for name, shard in index.object("weight_map").values.items():
        if not is_plain_name(shard):
            raise ConvertError("%s: %s is in %s, which should be the name of a file in the same directory"
                               % (path, quote(name), quote(shard)))
        shards.setdefault(shard, []).append(name)
    tensors: Dict[str, Tensor] = {}
    for shard, names in sorted(shards.items()):
        part, _ = read_weights(source.open(source.beside(shard)))
        missing = [name for name in names if name not in part]
        twice = [name for name in part if name in tensors]
        if missing:
            raise ConvertError("%s: lacks tensors that the index promises: %s"
                               % (source.beside(shard), listing(missing)))
        if twice:
            raise ConvertError("%s: has tensors that another shard has, too: %s"
                               % (source.beside(shard), listing(twice)))
        tensors.update(part)
    return Checkpoint(tensors, None, "%s (%d shards)" % (os.path.basename(path), len(shards)))


# ---------------------------------------------------------------------------------------------------------------------
# Descriptions: what a .tfm file says about a model. Field names are its metadata keys; None is left out of the file.
# ---------------------------------------------------------------------------------------------------------------------

MAX_LAYERS = 1 << 16
MAX_HEADS = 1 << 16


@dataclasses.dataclass
class Stack:
    """The blocks of an encoder or a decoder."""
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    n_positions: int
    causal: bool
    cross: bool
    norm: str  # layer, rms
    norm_place: str  # pre, post, sandwich
    norm_eps: float
    final_norm: bool
    positions: str  # learned, sinusoidal, rotary, relative, none
    attention_scale: List[float]  # one for all layers, or one for each
    ffn: str  # plain, gated
    activation: str
    parallel: Optional[bool] = None  # attention and FFN side by side
    norm_weight_offset: Optional[float] = None
    embedding_norm: Optional[bool] = None
    position_offset: Optional[int] = None
    rotary_frequencies: Optional[array.array] = None
    rotary_scale: Optional[float] = None
    rotary_interleaved: Optional[bool] = None
    relative_buckets: Optional[int] = None
    relative_max_distance: Optional[int] = None
    attention_softcap: Optional[float] = None
    sliding_window: Optional[List[int]] = None  # of each layer; 0: none

    @property
    def attention_dim(self):
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self):
        return self.n_kv_heads * self.head_dim

    @property
    def qkv_dim(self):
        return self.attention_dim + 2 * self.kv_dim

    @property
    def gate_up_dim(self):
        return 2 * self.d_ff

    @property
    def table_size(self):
        """Rows of a table of learned positions."""
        return self.n_positions + (self.position_offset or 0)


@dataclasses.dataclass
class Model:
    kind: str  # decoder, encoder, encoder-decoder
    vocab_size: int
    d_model: int
    stacks: Dict[str, Stack]
    tied: bool  # what the configuration says about the head; the tensors have the last word
    needs_head: bool
    switches: Dict[str, Optional[bool]] = dataclasses.field(default_factory=dict)  # what rules depend on
    head: str = ""  # tied, own, none
    d_embedding: Optional[int] = None  # where it is not d_model
    n_token_types: Optional[int] = None
    embedding_scale: Optional[float] = None
    head_transform: Optional[str] = None  # its activation function, as in the following
    logit_scale: Optional[float] = None
    logit_softcap: Optional[float] = None
    pooler_activation: Optional[str] = None
    pooling: Optional[str] = None  # cls, mean, max
    pool_normalize: Optional[bool] = None
    pool_max_tokens: Optional[int] = None
    classifier: Optional[str] = None  # sequence, token
    classifier_activation: Optional[str] = None
    classifier_labels: Optional[str] = None
    classifier_problem: Optional[str] = None  # single, multi, regression
    n_labels: Optional[int] = None

    @property
    def embedding_dim(self):
        return self.d_embedding or self.d_model


MODEL_KEYS = ("vocab_size", "d_model", "head", "d_embedding", "n_token_types", "embedding_scale", "head_transform",
              "logit_scale", "logit_softcap", "pooler_activation", "pooling", "pool_normalize", "pool_max_tokens",
              "classifier", "classifier_activation", "classifier_labels", "classifier_problem")

ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh",
}


def activation(config, keys, default):
    return known_activation(config, config.text(keys, default))


def known_activation(config, name):
    if name not in ACTIVATIONS:
        raise ConvertError("%s: the activation function %s is not supported (supported: %s)"
                           % (config.where, quote(name), ", ".join(sorted(ACTIVATIONS))))
    return ACTIVATIONS[name]


def head_size(config, d_model, n_heads):
    if n_heads > MAX_HEADS:
        raise ConvertError("%s: %d heads are more than the %d that are supported" % (config.where, n_heads, MAX_HEADS))
    if d_model % n_heads:
        raise ConvertError("%s: the model's width, %d, should be a multiple of its number of heads, %d"
                           % (config.where, d_model, n_heads))
    return d_model // n_heads


def refuse_flags(config, *keys):
    """Refuses what would change results and has no place in a description."""
    for key in keys:
        if config.flag(key, False):
            raise ConvertError("%s: %s is true, which is not supported" % (config.where, quote(key)))


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions: the frequencies, with the scaling of transformers' modeling_rope_utils worked in
# ---------------------------------------------------------------------------------------------------------------------

MAX_HEAD_DIM = 1 << 16
F32_MAX = 3.4028234e38


class Rope(NamedTuple):
    frequencies: array.array
    scale: Optional[float]  # of cosines and sines


def read_rope(config, head_dim, n_positions, partial=1.0):
    """Rotary positions as configurations say it: 'rope_parameters' since version 5 of transformers, before that
    'rope_theta' and 'rope_scaling'. `partial` is the share of a head that is rotated where the configuration is silent;
    None: the family always rotates all of it."""
    options = config.object("rope_scaling", None) or config.object("rope_parameters", None)
    options = options or Fields({}, config.where)
    if any(isinstance(value, dict) for value in options.values.values()):
        raise ConvertError("%s: different rotary positions for different layers are not supported" % options.where)
    theta = options.number("rope_theta", config.number(("rope_theta", "rotary_emb_base"), 10000.0))
    if partial is not None:
        partial = options.number("partial_rotary_factor",
                                 config.number(("partial_rotary_factor", "rotary_pct"), partial))
    dim = int(head_dim * (1.0 if partial is None else partial))
    trained = config.size("original_max_position_embeddings", None) or options.size(
        "original_max_position_embeddings", n_positions)
    kind = options.text(("rope_type", "type"), "default")
    return make_rope(options, kind, head_dim, RopeShape(dim, theta, trained, n_positions))


class RopeShape(NamedTuple):
    dim: int  # elements of a head that are rotated
    theta: float
    trained: int  # positions before scaling
    n_positions: int


def make_rope(options, kind, head_dim, shape):
    if not 0 < shape.dim + shape.dim % 2 <= min(head_dim, MAX_HEAD_DIM) or not shape.theta > 0:
        raise ConvertError("%s: can't rotate %d of a head's %d elements with the base %g"
                           % (options.where, shape.dim, head_dim, shape.theta))
    if kind not in ROPE_SCALINGS:
        raise ConvertError("%s: rotary positions of the type %s are not supported (supported: %s)"
                           % (options.where, quote(kind), ", ".join(ROPE_SCALINGS)))
    plain = [shape.theta ** (-i / shape.dim) for i in range(0, shape.dim, 2)]
    scaled, scale = ROPE_SCALINGS[kind](options, plain, shape)
    if not all(0 <= frequency < F32_MAX for frequency in scaled):
        raise ConvertError("%s: the frequencies of the rotary positions are not finite numbers" % options.where)
    return Rope(array.array("f", scaled), scale)


def rope_factor(options, default=Fields.REQUIRED):
    factor = options.number("factor", default)
    if not factor > 0:
        raise ConvertError("%s: 'factor' should be positive, not %g" % (options.where, factor))
    return factor


def rope_default(options, plain, shape):
    return plain, None


def rope_linear(options, plain, shape):
    factor = rope_factor(options)
    return [frequency / factor for frequency in plain], None


def rope_llama3(options, plain, shape):
    """Low frequencies are divided by the factor, high ones kept, those between them blended."""
    factor = rope_factor(options)
    low, high = options.number("low_freq_factor"), options.number("high_freq_factor")
    if not 0 < low < high:
        raise ConvertError("%s: 'low_freq_factor' should be positive and less than 'high_freq_factor'" % options.where)

    def scaled(frequency):
        turns = shape.trained * frequency / (2 * math.pi)  # within the context of the training
        if turns < low:
            return frequency / factor
        if turns > high:
            return frequency
        share = (turns - low) / (high - low)
        return (1 - share) * frequency / factor + share * frequency

    return [scaled(frequency) for frequency in plain], None


def rope_yarn(options, plain, shape):
    """YaRN: by a pair's number of turns within the context of the training, from kept to divided by the factor."""
    factor = rope_factor(options, shape.n_positions / shape.trained)

    def pair_that_turns(turns):
        return shape.dim * math.log(shape.trained / (turns * 2 * math.pi)) / (2 * math.log(shape.theta))

    turns = [options.number(key, default) or default for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))]
    if min(turns) <= 0 or shape.theta == 1:
        raise ConvertError("%s: 'beta_fast' and 'beta_slow' should be positive" % options.where)
    low, high = map(pair_that_turns, turns)
    if options.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.dim - 1)
    width = high - low if high != low else 0.001
    scaled = []
    for i, frequency in enumerate(plain):
        share = min(max((i - low) / width, 0.0), 1.0)
        scaled.append(share * frequency / factor + (1 - share) * frequency)
    return scaled, yarn_scale(options, factor)


def yarn_scale(options, factor):
    given = options.number("attention_factor", 0.0)
    mscale, mscale_all = options.number("mscale", 0.0), options.number("mscale_all_dim", 0.0)

    def scale(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return given or (scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0))


ROPE_SCALINGS = {"default": rope_default, "linear": rope_linear, "llama3": rope_llama3, "yarn": rope_yarn}


# ---------------------------------------------------------------------------------------------------------------------
# Families: which tensors of a checkpoint become which of a .tfm file, and how a configuration becomes a description.
# A new family is a list of rules, a function from configuration to Model, and a row in FAMILIES.
# ---------------------------------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """Rows that a tensor of a file takes from one tensor of a checkpoint. In the checkpoint's, every one of `groups`
    groups has `of` runs of rows, and the part is the run `index` of each. As a rule there is one run: the tensor."""
    source: str  # a module; {} is the layer
    rows: str  # how many the part has: the name of a size
    index: int = 0
    of: int = 1
    groups: str = ""  # the name of a size; "": 1


class Rule(NamedTuple):
    """A module of a file, its weight and its bias, by parts."""
    target: str
    parts: Tuple[Part, ...]
    columns: Tuple[str, ...] = ()  # sizes of the weight's other dimensions
    is_matrix: bool = False
    bias: str = ""  # a switch of the model: true, false, or None: as the checkpoint has it; "": there is none
    bias_parts: Tuple[Part, ...] = ()  # where they are not the weight's
    when: str = ""  # a switch; "": always


def one_part(source, rows):
    return (Part(source, rows),)


def embedding(target, source, rows, columns="d_model", **more):
    return Rule(target, one_part(source, rows), (columns,), **more)


def norm(target, source, size="d_model", bias="norm_bias", **more):
    return Rule(target, one_part(source, size), bias=bias, **more)


def linear(target, source, outputs, inputs, bias="bias", **more):
    return Rule(target, one_part(source, outputs), (inputs,), is_matrix=True, bias=bias, **more)


def joined(target, parts, inputs, bias="bias", **more):
    """A matrix of several matrices' outputs: (source, outputs) of each."""
    return Rule(target, tuple(Part(*part) for part in parts), (inputs,), is_matrix=True, bias=bias, **more)


def qkv(target, attention, query, key, value, **more):
    return joined(target, ((attention + query, "attention_dim"), (attention + key, "kv_dim"),
                           (attention + value, "kv_dim")), "d_model", **more)


class Family(NamedTuple):
    title: str
    rules: Tuple[Rule, ...]  # in the order in which a forward pass reads them
    describe: Callable[[Fields, Any, Dict[str, Tensor]], Model]
    defaults: Dict[str, Any] = {}  # what `describe` assumes where the configuration is silent
    model_types: Tuple[str, ...] = ()  # config.json's; () for a family that has none
    architectures: Dict[str, str] = {}  # config.json's, and the head that each has: see HEADS
    prepare: Optional[Callable] = None  # from (tensors, configuration, notes) to tensors, before anything else
    probe: str = ""  # the source whose shape tells whether matrices are [out, in] or [in, out]; "" for always [out, in]
    prefix: str = ""  # that names may have or lack
    renames: Tuple[Tuple[str, str], ...] = ()  # patterns of names' endings, and what to write instead
    aliases: Tuple[Tuple[str, str], ...] = ()  # (name, another that a checkpoint may give the same tensor)
    ignored: str = ""  # pattern of buffers that hold no parameters
    left_out: str = ""  # pattern of parameters that no result needs
    left_out_untied: str = ""  # and of those that none needs where the head has a table, and a bias, of its own
    embedding: str = ""  # the sources of the two tensors that may be tied
    head: str = ""
    tokenizer_class: str = ""  # and what it makes special by default
    special_token: str = ""


# What an architecture has on top of its blocks.
HEADS = ("none", "lm", "sequence", "token", "discriminator")


def head_kind(config, family, tensors):
    """What the configuration's architecture has on top; where it names none, what the tensors look like."""
    for kind in config.texts("architectures"):
        if kind in family.architectures:
            return family.architectures[kind]
    return "lm" if family.head in tensors else "none"


# --- GPT-2 and its children ---

GPT2_RULES = (
    embedding("token_embedding", "wte", "vocab_size"),
    embedding("decoder.position_embedding", "wpe", "table_size"),
    norm("decoder.blocks.{}.attention_norm", "h.{}.ln_1", bias="bias"),
    linear("decoder.blocks.{}.attention.qkv", "h.{}.attn.c_attn", "qkv_dim", "d_model"),
    linear("decoder.blocks.{}.attention.out", "h.{}.attn.c_proj", "d_model", "attention_dim"),
    norm("decoder.blocks.{}.ffn_norm", "h.{}.ln_2", bias="bias"),
    linear("decoder.blocks.{}.ffn.up", "h.{}.mlp.c_fc", "d_ff", "d_model"),
    linear("decoder.blocks.{}.ffn.down", "h.{}.mlp.c_proj", "d_model", "d_ff"),
    norm("decoder.final_norm", "ln_f", bias="bias"),
    embedding("head", "lm_head", "vocab_size"),
)


def describe_gpt2(config, family, tensors):
    """GPT-2 and its children: the keys of Hugging Face's config.json, then those of nanoGPT and minGPT."""
    refuse_flags(config, "add_cross_attention")
    d_model = config.size(("n_embd", "hidden_size"))
    n_heads = config.size(("n_head", "num_attention_heads"))
    n_layers = config.size(("n_layer", "num_hidden_layers"), limit=MAX_LAYERS)
    head_dim = head_size(config, d_model, n_heads)
    scale = head_dim ** -0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", False)
    biases = config.flag("bias", family.defaults["bias"])
    if biases is None:  # all or none
        biases = any(name.endswith(".bias") for name in tensors)
    stack = Stack(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, head_dim=head_dim,
        d_ff=config.size("n_inner", None) or 4 * d_model,
        n_positions=config.size(("n_positions", "max_position_embeddings", "block_size")),
        causal=True, cross=False, norm="layer", norm_place="pre", final_norm=True,
        norm_eps=config.epsilon("layer_norm_epsilon", 1e-5), positions="learned",
        attention_scale=[scale / (layer + 1) for layer in range(n_layers)] if by_layer else [scale],
        ffn="plain", activation=activation(config, "activation_function", family.defaults["activation_function"]))
    return Model(
        kind="decoder", vocab_size=config.size("vocab_size"), d_model=d_model, stacks={"decoder": stack},
        tied=config.flag("tie_word_embeddings", family.defaults["tie_word_embeddings"]),
        needs_head=not config.texts("architectures") or head_kind(config, family, tensors) == "lm",
        switches={"bias": biases})


GPT2 = Family(
    title="GPT-2",
    rules=GPT2_RULES,
    describe=describe_gpt2,
    defaults={"activation_function": "gelu_new", "tie_word_embeddings": True, "bias": True},
    model_types=("gpt2",),
    architectures={"GPT2LMHeadModel": "lm", "GPT2DoubleHeadsModel": "lm", "GPT2Model": "none"},
    # GPT-2's Conv1D keeps a matrix as [in, out], the Linear of its children as [out, in], under the same names. Most
    # shapes don't tell: attention's c_proj is square, and so are the FFN's where d_ff = d_model. But c_attn is
    # [d, 3d] or [3d, d], never both, and decides for all.
    probe="h.{}.attn.c_attn",
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask, and the number that it puts into the scores
    left_out=r"multiple_choice_head\..*",
    embedding="wte.weight",
    head="lm_head.weight",
    tokenizer_class="GPT2Tokenizer",
    special_token="<|endoftext|>",
)


# --- BERT and its relatives ---

def bert_rules(block, attention, out, attention_norm, up, down, ffn_norm, heads):
    """Encoders of one shape with many names: `attention` is a pattern for query, key and value."""
    query, key, value = (attention % name for name in (("query", "key", "value") if "self" in attention else "qkv"))
    return (
        embedding("token_embedding", "embeddings.word_embeddings", "vocab_size", "embedding_dim"),
        embedding("token_type_embedding", "embeddings.token_type_embeddings", "n_token_types", "embedding_dim",
                  when="token_types"),
        embedding("encoder.position_embedding", "embeddings.position_embeddings", "table_size", "embedding_dim"),
        norm("encoder.embedding_norm", "embeddings.LayerNorm", "embedding_dim"),
        linear("embedding_projection", "embeddings_project", "d_model", "embedding_dim", when="projection"),
        qkv("encoder.blocks.{}.attention.qkv", block, query, key, value),
        linear("encoder.blocks.{}.attention.out", block + out, "d_model", "attention_dim"),
        norm("encoder.blocks.{}.attention_norm", block + attention_norm),
        linear("encoder.blocks.{}.ffn.up", block + up, "d_ff", "d_model"),
        linear("encoder.blocks.{}.ffn.down", block + down, "d_model", "d_ff"),
        norm("encoder.blocks.{}.ffn_norm", block + ffn_norm),
    ) + heads


def bert_heads(pooler, transform, transform_norm, decoder, dense, sequence, token):
    return (
        linear("pooler", pooler, "d_model", "d_model", when="pooler"),
        linear("head.transform", transform, "embedding_dim", "d_model", when="lm"),
        norm("head.norm", transform_norm, "embedding_dim", when="lm"),
        embedding("head", decoder, "vocab_size", "embedding_dim", bias="bias", when="lm"),
        linear("classifier.dense", dense, "d_model", "d_model", when="sequence"),
        linear("classifier", sequence, "n_labels", "d_model", when="sequence"),
        linear("classifier", token, "n_labels", "d_model", when="token"),
    )


BERT_BLOCK = ("encoder.layer.{}.", "attention.self.%s", "attention.output.dense", "attention.output.LayerNorm",
              "intermediate.dense", "output.dense", "output.LayerNorm")
BERT_RULES = bert_rules(*BERT_BLOCK, heads=bert_heads(
    "pooler.dense", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder", "pooler.dense", "classifier", "classifier"))
ROBERTA_RULES = bert_rules(*BERT_BLOCK, heads=bert_heads(
    "pooler.dense", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "classifier.dense",
    "classifier.out_proj", "classifier"))
DISTILBERT_RULES = bert_rules(
    "transformer.layer.{}.", "attention.%s_lin", "attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2",
    "output_layer_norm", heads=bert_heads(
        "pooler.dense", "vocab_transform", "vocab_layer_norm", "vocab_projector", "pre_classifier", "classifier",
        "classifier"))
ELECTRA_RULES = bert_rules(*BERT_BLOCK, heads=bert_heads(
    "pooler.dense", "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head",
    "classifier.dense", "classifier.out_proj", "classifier") + (
        linear("classifier.dense", "discriminator_predictions.dense", "d_model", "d_model", when="discriminator"),
        linear("classifier", "discriminator_predictions.dense_prediction", "n_labels", "d_model",
               when="discriminator")))


def describe_bert(config, family, tensors):
    """BERT, RoBERTa, XLM-RoBERTa, ELECTRA; with keys of its own, DistilBERT."""
    refuse_flags(config, "is_decoder", "add_cross_attention")
    kind = config.text("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ConvertError("%s: 'position_embedding_type' is %s; only 'absolute' is supported"
                           % (config.where, quote(kind)))
    d_model = config.size(("hidden_size", "dim"))
    n_heads = config.size(("num_attention_heads", "n_heads"))
    head_dim = head_size(config, d_model, n_heads)
    offset = family.defaults["position_offset"]
    if offset:  # RoBERTa counts on from the id of padding
        offset = config.integer("pad_token_id", 1) + 1
    rows = config.size("max_position_embeddings", family.defaults["positions"])
    if not 0 <= offset < rows:
        raise ConvertError("%s: 'pad_token_id' should be from 0 to %d" % (config.where, rows - 2))
    function = activation(config, ("hidden_act", "activation"), "gelu")
    stack = Stack(
        n_layers=config.size(("num_hidden_layers", "n_layers"), limit=MAX_LAYERS), n_heads=n_heads, n_kv_heads=n_heads,
        head_dim=head_dim, d_ff=config.size(("intermediate_size", "hidden_dim")), n_positions=rows - offset,
        causal=False, cross=False, norm="layer", norm_place="post", norm_eps=config.epsilon("layer_norm_eps", 1e-12),
        final_norm=False, positions="learned", attention_scale=[head_dim ** -0.5], ffn="plain", activation=function,
        embedding_norm=True, position_offset=offset or None)
    head = head_kind(config, family, tensors)
    has_types = "embeddings.token_type_embeddings.weight" in tensors
    model = Model(
        kind="encoder", vocab_size=config.size("vocab_size"), d_model=d_model, stacks={"encoder": stack},
        tied=head == "lm" and config.flag("tie_word_embeddings", True), needs_head=head == "lm",
        n_token_types=config.size("type_vocab_size", 2) if has_types else None)
    width = config.size("embedding_size", d_model) if family.defaults["projects"] else d_model
    model.d_embedding = width if width != d_model else None
    # BERT classifies sequences by its pooler, which then has no other use.
    pooled = head == "sequence" and family.defaults["dense"] == "pooler.dense"
    model.switches = {
        "bias": True, "norm_bias": True, "token_types": has_types, "projection": width != d_model,
        "pooler": "pooler.dense.weight" in tensors and not pooled, head: True}
    if model.switches["pooler"]:
        model.pooler_activation = "tanh"
    if head == "lm":
        model.head_transform = ACTIVATIONS[family.defaults["transform"]] if family.defaults["transform"] else function
    if head in ("sequence", "token", "discriminator"):
        describe_classifier(config, family, tensors, model, head, function)
    return model


def describe_classifier(config, family, tensors, model, head, function):
    """The labels of a classifier, and what the scores mean."""
    rule = next(rule for rule in reversed(family.rules) if rule.target == "classifier" and rule.when == head)
    weight = tensors.get(rule.parts[0].source + ".weight")
    model.n_labels = weight.shape[0] if weight is not None and weight.shape else 1
    model.classifier = "sequence" if head == "sequence" else "token"
    if head == "discriminator":  # one score: whether the token was replaced
        model.classifier_activation, model.classifier_problem = function, "multi"
        return
    if head == "sequence":
        model.classifier_activation = family.defaults["classifier_activation"]
    model.classifier_labels = labels(config, model.n_labels)
    problem = config.text("problem_type", None)
    if problem is None:  # as transformers guesses from the first batch of a training
        problem = "regression" if model.n_labels == 1 and head == "sequence" else "single_label_classification"
    if problem not in PROBLEMS:
        raise ConvertError("%s: 'problem_type' should be one of %s, not %s"
                           % (config.where, ", ".join(PROBLEMS), quote(problem)))
    model.classifier_problem = PROBLEMS[problem]


PROBLEMS = {"single_label_classification": "single", "multi_label_classification": "multi", "regression": "regression"}


def labels(config, n_labels):
    """The labels in the order of their ids, one a line, or None. Programs put tabs between labels: these and other
    control characters become spaces."""
    table = config.object("id2label", None)
    if table is None:
        return None
    if len(table.values) != n_labels or set(table.values) != set(map(str, range(n_labels))):
        raise ConvertError("%s: should have the labels 0 to %d, one for each row of the classifier"
                           % (table.where, n_labels - 1))
    return "\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", table.text(str(number))) for number in range(n_labels))


def bert_architectures(name, **more):
    """config.json's names for the models of one family."""
    return dict({name + "Model": "none", name + "ForMaskedLM": "lm", name + "ForSequenceClassification": "sequence",
                 name + "ForTokenClassification": "token"}, **more)


BERT = Family(
    title="BERT",
    rules=BERT_RULES,
    describe=describe_bert,
    defaults={"position_offset": False, "positions": 512, "projects": False, "transform": "", "dense": "pooler.dense",
              "classifier_activation": "tanh"},
    model_types=("bert",),
    architectures=bert_architectures("Bert", BertForPreTraining="lm"),
    prefix="bert.",
    renames=((r"\.gamma", ".weight"), (r"\.beta", ".bias")),  # TensorFlow's names, in checkpoints from before 2020
    aliases=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    ignored=r"embeddings\.(position_ids|token_type_ids)",
    left_out=r"cls\.seq_relationship\..*",
    left_out_untied=r"cls\.predictions\.bias",
    embedding="embeddings.word_embeddings.weight",
    head="cls.predictions.decoder.weight",
)
ROBERTA = BERT._replace(
    title="RoBERTa",
    rules=ROBERTA_RULES,
    defaults=dict(BERT.defaults, position_offset=True, positions=514, transform="gelu", dense="classifier.dense"),
    model_types=("roberta", "xlm-roberta", "camembert"),
    architectures=bert_architectures("Roberta", **bert_architectures("XLMRoberta", **bert_architectures("Camembert"))),
    prefix="roberta.",
    aliases=(("lm_head.decoder.bias", "lm_head.bias"),),
    left_out="",
    left_out_untied=r"lm_head\.bias",
    head="lm_head.decoder.weight",
)
DISTILBERT = BERT._replace(
    title="DistilBERT",
    rules=DISTILBERT_RULES,
    defaults=dict(BERT.defaults, dense="pre_classifier", classifier_activation="relu"),
    model_types=("distilbert",),
    architectures=bert_architectures("DistilBert"),
    prefix="distilbert.",
    aliases=(),
    left_out="",
    head="vocab_projector.weight",
)
ELECTRA = BERT._replace(
    title="ELECTRA",
    rules=ELECTRA_RULES,
    defaults=dict(BERT.defaults, projects=True, transform="gelu", dense="classifier.dense",
                  classifier_activation="gelu"),
    model_types=("electra",),
    architectures=bert_architectures("Electra", ElectraForPreTraining="discriminator"),
    prefix="electra.",
    aliases=(("generator_lm_head.bias", "generator_lm_bias"),),
    left_out="",
    head="generator_lm_head.weight",
)


# --- T5 ---

def t5_attention(target, source, **more):
    out = linear(target + ".out", source + "o", "d_model", "attention_dim", bias="", **more)
    return (qkv(target + ".qkv", source, "q", "k", "v", bias="", **more), out)


def t5_cross(target, source):
    return (
        linear(target + ".q", source + "q", "attention_dim", "d_model", bias=""),
        joined(target + ".kv", ((source + "k", "kv_dim"), (source + "v", "kv_dim")), "d_model", bias=""),
        linear(target + ".out", source + "o", "d_model", "attention_dim", bias=""),
    )


def t5_stack(stack, ffn):
    """The stack's rules; `ffn` is the number of the FFN's sublayer."""
    source, target = stack + ".block.{}.layer.", stack + ".blocks.{}."
    cross = (norm(target + "cross_norm", source + "1.layer_norm", bias=""),
             *t5_cross(target + "cross", source + "1.EncDecAttention.")) if stack == "decoder" else ()
    dense = source + "%d.DenseReluDense." % ffn
    return (
        embedding(stack + ".relative_bias", stack + ".block.0.layer.0.SelfAttention.relative_attention_bias",
                  "relative_buckets", "n_heads"),
        norm(target + "attention_norm", source + "0.layer_norm", bias=""),
        *t5_attention(target + "attention", source + "0.SelfAttention."),
        *cross,
        norm(target + "ffn_norm", source + "%d.layer_norm" % ffn, bias=""),
        linear(target + "ffn.up", dense + "wi", "d_ff", "d_model", bias="", when="plain"),
        joined(target + "ffn.up", ((dense + "wi_0", "d_ff"), (dense + "wi_1", "d_ff")), "d_model", bias="",
               when="gated"),
        linear(target + "ffn.down", dense + "wo", "d_model", "d_ff", bias=""),
        norm(stack + ".final_norm", stack + ".final_layer_norm", bias=""),
    )


T5_RULES = (
    embedding("token_embedding", "shared", "vocab_size"),
    *t5_stack("encoder", 1),
    *t5_stack("decoder", 2),
    embedding("head", "lm_head", "vocab_size"),
)


def describe_t5(config, family, tensors):
    """T5, T5 v1.1, Flan-T5, mT5; also their encoders alone."""
    d_model, n_heads = config.size("d_model"), config.size("num_heads")
    n_layers = config.size("num_layers", limit=MAX_LAYERS)
    name = config.text("feed_forward_proj", family.defaults["feed_forward_proj"])
    gate, _, function = name.rpartition("-")
    if gate not in ("", "gated"):
        raise ConvertError("%s: 'feed_forward_proj' should be a function or gated- and a function, not %s"
                           % (config.where, quote(name)))
    function = "gelu_new" if name == "gated-gelu" else function
    encoder = Stack(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, head_dim=config.size("d_kv"), d_ff=config.size("d_ff"),
        n_positions=config.size("n_positions", 512), causal=False, cross=False, norm="rms", norm_place="pre",
        norm_eps=config.epsilon("layer_norm_epsilon", 1e-6), final_norm=True, positions="relative",
        attention_scale=[1.0], ffn="gated" if gate else "plain", activation=known_activation(config, function),
        relative_buckets=config.size("relative_attention_num_buckets", 32),
        relative_max_distance=config.size("relative_attention_max_distance", 128))
    head = head_kind(config, family, tensors)
    if not config.texts("architectures") and "decoder.final_layer_norm.weight" not in tensors:
        head = "encoder"
    stacks = {"encoder": encoder}
    if head != "encoder":
        stacks["decoder"] = dataclasses.replace(
            encoder, n_layers=config.size("num_decoder_layers", n_layers, limit=MAX_LAYERS), causal=True, cross=True)
    for stack in stacks.values():  # near distances have buckets of their own, up to where the others begin to be wider
        least = stack.relative_buckets // (2 if stack.causal else 4)
        if not 0 < least < stack.relative_max_distance:
            raise ConvertError("%s: with %d 'relative_attention_num_buckets', 'relative_attention_max_distance' should be "
                               "more than %d, not %d" % (config.where, stack.relative_buckets, least,
                                                         stack.relative_max_distance)
                               if least else "%s: 'relative_attention_num_buckets' should be at least %d, not %d"
                               % (config.where, 2 if stack.causal else 4, stack.relative_buckets))
    tied = config.flag("tie_word_embeddings", True)
    model = Model(
        kind="encoder" if head == "encoder" else "encoder-decoder", vocab_size=config.size("vocab_size"),
        d_model=d_model, stacks=stacks, needs_head=head == "lm",
        # Transformers ties the head of any T5 whose checkpoint has none.
        tied=head == "lm" and (tied or family.head not in tensors),
        switches={"gated": bool(gate), "plain": not gate})
    if head == "lm" and config.flag("scale_decoder_outputs", family.defaults["scales"] and tied):
        model.logit_scale = d_model ** -0.5
    return model


T5 = Family(
    title="T5",
    rules=T5_RULES,
    describe=describe_t5,
    defaults={"feed_forward_proj": "relu", "scales": True},
    model_types=("t5",),
    architectures={"T5ForConditionalGeneration": "lm", "T5WithLMHeadModel": "lm", "T5Model": "none",
                   "T5EncoderModel": "encoder"},
    aliases=(("shared.weight", "encoder.embed_tokens.weight"), ("shared.weight", "decoder.embed_tokens.weight")),
    # Checkpoints from before 2021 have a bias that cross-attention never used.
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    embedding="shared.weight",
    head="lm_head.weight",
)


# --- LLaMA-style decoders ---

def llama_rules(more=(), ffn_norm="post_attention_layernorm"):
    """`more`: the block's norms that a family adds."""
    block, source = "decoder.blocks.{}.", "layers.{}."
    return (
        embedding("token_embedding", "embed_tokens", "vocab_size"),
        norm(block + "attention_norm", source + "input_layernorm", bias=""),
        qkv(block + "attention.qkv", source + "self_attn.", "q_proj", "k_proj", "v_proj", bias="qkv_bias"),
        linear(block + "attention.out", source + "self_attn.o_proj", "d_model", "attention_dim", bias="out_bias"),
        *(norm(block + target, source + name, size, bias="") for target, name, size in more),
        norm(block + "ffn_norm", source + ffn_norm, bias=""),
        joined(block + "ffn.up", ((source + "mlp.gate_proj", "d_ff"), (source + "mlp.up_proj", "d_ff")), "d_model",
               bias="ffn_bias"),
        linear(block + "ffn.down", source + "mlp.down_proj", "d_model", "d_ff", bias="ffn_bias"),
        norm("decoder.final_norm", "norm", bias=""),
        embedding("head", "lm_head", "vocab_size"),
    )


# Phi-3 keeps in one matrix what others have in several, in the same order.
PHI3_RULES = tuple(
    linear(rule.target, "layers.{}.self_attn.qkv_proj", "qkv_dim", "d_model", bias="")
    if rule.target.endswith(".qkv") else
    linear(rule.target, "layers.{}.mlp.gate_up_proj", "gate_up_dim", "d_model", bias="")
    if rule.target.endswith(".up") else rule for rule in llama_rules())
QWEN3_RULES = llama_rules((("attention.q_norm", "self_attn.q_norm", "head_dim"),
                           ("attention.k_norm", "self_attn.k_norm", "head_dim")))
GEMMA2_RULES = llama_rules((("attention_post_norm", "post_attention_layernorm", "d_model"),
                            ("ffn_post_norm", "post_feedforward_layernorm", "d_model")), "pre_feedforward_layernorm")


def describe_llama(config, family, tensors):
    """LLaMA and what differs from it by settings."""
    defaults = family.defaults
    d_model, n_heads = config.size("hidden_size"), config.size("num_attention_heads")
    n_layers = config.size("num_hidden_layers", limit=MAX_LAYERS)
    n_positions = config.size("max_position_embeddings", defaults.get("n_positions", 2048))
    head_dim = config.size("head_dim", defaults.get("head_dim")) or head_size(config, d_model, n_heads)
    rope = read_rope(config, head_dim, n_positions, defaults.get("partial"))
    attention_bias = config.flag("attention_bias", False) if "qkv_bias" not in defaults else defaults["qkv_bias"]
    stack = Stack(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=kv_heads(config, n_heads, defaults.get("n_kv_heads")),
        head_dim=head_dim, d_ff=config.size("intermediate_size"), n_positions=n_positions, causal=True, cross=False,
        norm="rms", norm_place=defaults.get("norm_place", "pre"), norm_eps=config.epsilon("rms_norm_eps", 1e-6),
        final_norm=True, positions="rotary", attention_scale=[head_dim ** -0.5], ffn="gated",
        activation=activation(config, defaults.get("activation_key", "hidden_act"), defaults.get("activation", "silu")),
        rotary_frequencies=rope.frequencies, rotary_scale=rope.scale, sliding_window=windows(config, family, n_layers))
    return Model(
        kind="decoder", vocab_size=config.size("vocab_size"), d_model=d_model, stacks={"decoder": stack},
        tied=config.flag("tie_word_embeddings", defaults.get("tied", False)),
        needs_head=head_kind(config, family, tensors) == "lm" or not config.texts("architectures"),
        switches={"qkv_bias": attention_bias, "out_bias": attention_bias and "qkv_bias" not in defaults,
                  "ffn_bias": config.flag("mlp_bias", False) if defaults.get("ffn_bias") else False})


def kv_heads(config, n_heads, default=None):
    n_kv_heads = config.size("num_key_value_heads", default) or n_heads
    if n_heads % n_kv_heads:
        raise ConvertError("%s: the number of heads, %d, should be a multiple of that of key and value heads, %d"
                           % (config.where, n_heads, n_kv_heads))
    return n_kv_heads


LAYER_TYPES = ("full_attention", "sliding_attention")


def windows(config, family, n_layers):
    """How many tokens each layer's queries see, itself included (0: all), or None where all see all."""
    rule = family.defaults.get("windows")
    if rule is None:
        return None
    # Where the key is not there at all, the default counts; null means none.
    window = config.size("sliding_window", None if "sliding_window" in config.values else family.defaults["window"])
    if rule == "qwen" and not config.flag("use_sliding_window", False):
        window = None
    types = config.texts("layer_types") if rule != "all" else []
    if not types:
        first = config.integer("max_window_layers", 28) if rule == "qwen" else 0
        step = 2 if rule == "alternate" else 1
        types = [LAYER_TYPES[window is not None and i >= first and i % step == 0] for i in range(n_layers)]
    unknown = [name for name in types if name not in LAYER_TYPES]
    if unknown or len(types) != n_layers:
        raise ConvertError("%s: 'layer_types' should be %d of %s, not %s"
                           % (config.where, n_layers, listing(LAYER_TYPES), quote(types)))
    if window is None and "sliding_attention" in types:
        raise ConvertError("%s: 'layer_types' has 'sliding_attention', but 'sliding_window' is not set" % config.where)
    found = [window if name == "sliding_attention" else 0 for name in types]
    return found if any(found) else None


def describe_gemma(config, family, tensors):
    """Gemma: LLaMA with norms around one and scaled embeddings; Gemma 2: also bounded scores."""
    refuse_flags(config, "use_bidirectional_attention")
    model = describe_llama(config, family, tensors)
    stack = model.stacks["decoder"]
    stack.norm_weight_offset = 1.0
    if family.defaults["activation_key"] != "hidden_activation" and stack.activation == "gelu":
        stack.activation = "gelu_tanh"  # the first configurations said gelu and meant this
    # transformers rounds it to the type it calculates in, whatever the checkpoint's is. tfm.h calculates in f32.
    model.embedding_scale = model.d_model ** 0.5
    if "softcaps" in family.defaults:
        stack.attention_scale = [positive(config, "query_pre_attn_scalar", 256) ** -0.5]
        for key, default, owner, field in family.defaults["softcaps"]:
            if key not in config.values or config.values[key] is not None:
                setattr(stack if owner == "stack" else model, field, positive(config, key, default))
    return model


def positive(config, key, default):
    value = config.number(key, default)
    if not value > 0:
        raise ConvertError("%s: %s should be positive, not %g" % (config.where, quote(key), value))
    return value


LLAMA = Family(
    title="LLaMA",
    rules=llama_rules(),
    describe=describe_llama,
    defaults={"ffn_bias": True},
    model_types=("llama",),
    architectures={"LlamaForCausalLM": "lm", "LlamaModel": "none"},
    prefix="model.",
    ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    embedding="embed_tokens.weight",
    head="lm_head.weight",
)
MISTRAL = LLAMA._replace(
    title="Mistral",
    defaults={"qkv_bias": False, "windows": "all", "window": 4096, "n_kv_heads": 8, "n_positions": 131072},
    model_types=("mistral",),
    architectures={"MistralForCausalLM": "lm", "MistralModel": "none"},
)
QWEN2 = LLAMA._replace(
    title="Qwen2",
    defaults={"qkv_bias": True, "windows": "qwen", "window": 4096, "n_positions": 32768},
    model_types=("qwen2",),
    architectures={"Qwen2ForCausalLM": "lm", "Qwen2Model": "none"},
)
QWEN3 = QWEN2._replace(
    title="Qwen3",
    rules=QWEN3_RULES,
    defaults={"windows": "qwen", "window": 4096, "n_positions": 32768, "head_dim": 128},
    model_types=("qwen3",),
    architectures={"Qwen3ForCausalLM": "lm", "Qwen3Model": "none"},
)
PHI3 = LLAMA._replace(
    title="Phi-3",
    rules=PHI3_RULES,
    defaults={"qkv_bias": False, "partial": 1.0, "windows": "all", "window": None, "n_positions": 4096},
    model_types=("phi3",),
    architectures={"Phi3ForCausalLM": "lm", "Phi3Model": "none"},
)
GEMMA = LLAMA._replace(
    title="Gemma",
    describe=describe_gemma,
    defaults={"tied": True, "head_dim": 256, "n_positions": 8192, "activation": "gelu_pytorch_tanh",
              "activation_key": ("hidden_activation", "hidden_act")},
    model_types=("gemma",),
    architectures={"GemmaForCausalLM": "lm", "GemmaModel": "none"},
)
GEMMA2 = GEMMA._replace(
    title="Gemma 2",
    rules=GEMMA2_RULES,
    defaults=dict(
        GEMMA.defaults, activation_key="hidden_activation", norm_place="sandwich", windows="alternate", window=4096,
        softcaps=(("attn_logit_softcapping", 50.0, "stack", "attention_softcap"),
                  ("final_logit_softcapping", 30.0, "model", "logit_softcap"))),
    model_types=("gemma2",),
    architectures={"Gemma2ForCausalLM": "lm", "Gemma2Model": "none"},
)


# --- Phi and GPT-NeoX: attention and FFN side by side ---

PHI_RULES = (
    embedding("token_embedding", "embed_tokens", "vocab_size"),
    norm("decoder.blocks.{}.attention_norm", "layers.{}.input_layernorm"),
    qkv("decoder.blocks.{}.attention.qkv", "layers.{}.self_attn.", "q_proj", "k_proj", "v_proj"),
    linear("decoder.blocks.{}.attention.out", "layers.{}.self_attn.dense", "d_model", "attention_dim"),
    linear("decoder.blocks.{}.ffn.up", "layers.{}.mlp.fc1", "d_ff", "d_model"),
    linear("decoder.blocks.{}.ffn.down", "layers.{}.mlp.fc2", "d_model", "d_ff"),
    norm("decoder.final_norm", "final_layernorm"),
    embedding("head", "lm_head", "vocab_size", bias="head_bias"),
)
GPT_NEOX_RULES = (
    embedding("token_embedding", "embed_in", "vocab_size"),
    norm("decoder.blocks.{}.attention_norm", "layers.{}.input_layernorm"),
    # A head's query, key and value stand together, head after head.
    joined("decoder.blocks.{}.attention.qkv",
           [("layers.{}.attention.query_key_value", "attention_dim", i, 3, "n_heads") for i in range(3)], "d_model",
           bias="attention_bias"),
    linear("decoder.blocks.{}.attention.out", "layers.{}.attention.dense", "d_model", "attention_dim",
           bias="attention_bias"),
    norm("decoder.blocks.{}.ffn_norm", "layers.{}.post_attention_layernorm"),
    linear("decoder.blocks.{}.ffn.up", "layers.{}.mlp.dense_h_to_4h", "d_ff", "d_model"),
    linear("decoder.blocks.{}.ffn.down", "layers.{}.mlp.dense_4h_to_h", "d_model", "d_ff"),
    norm("decoder.final_norm", "final_layer_norm"),
    embedding("head", "embed_out", "vocab_size"),
)


def describe_phi(config, family, tensors):
    """Phi 1, 1.5 and 2, and GPT-NeoX."""
    refuse_flags(config, "qk_layernorm", "is_decoder")
    defaults = family.defaults
    d_model, n_heads = config.size("hidden_size"), config.size("num_attention_heads")
    n_positions = config.size("max_position_embeddings", 2048)
    head_dim = head_size(config, d_model, n_heads)
    rope = read_rope(config, head_dim, n_positions, defaults["partial"])
    n_kv_heads = kv_heads(config, n_heads) if defaults["groups"] else n_heads
    stack = Stack(
        n_layers=config.size("num_hidden_layers", limit=MAX_LAYERS), n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=head_dim, d_ff=config.size("intermediate_size"), n_positions=n_positions, causal=True, cross=False,
        norm="layer", norm_place="pre", norm_eps=config.epsilon("layer_norm_eps", 1e-5), final_norm=True,
        positions="rotary", attention_scale=[head_dim ** -0.5], ffn="plain",
        activation=activation(config, "hidden_act", defaults["activation"]),
        parallel=config.flag("use_parallel_residual", True) or None,
        rotary_frequencies=rope.frequencies, rotary_scale=rope.scale)
    needs_head = head_kind(config, family, tensors) == "lm" or not config.texts("architectures")
    return Model(
        kind="decoder", vocab_size=config.size("vocab_size"), d_model=d_model, stacks={"decoder": stack},
        tied=config.flag("tie_word_embeddings", False), needs_head=needs_head,
        switches={"bias": True, "norm_bias": True, "head_bias": None,
                  "attention_bias": config.flag("attention_bias", True)})


PHI = LLAMA._replace(
    title="Phi",
    rules=PHI_RULES,
    describe=describe_phi,
    defaults={"partial": 0.5, "activation": "gelu_new", "groups": True},
    model_types=("phi",),
    architectures={"PhiForCausalLM": "lm", "PhiModel": "none"},
)
GPT_NEOX = PHI._replace(
    title="GPT-NeoX",
    rules=GPT_NEOX_RULES,
    defaults={"partial": 0.25, "activation": "gelu", "groups": False},
    model_types=("gpt_neox",),
    architectures={"GPTNeoXForCausalLM": "lm", "GPTNeoXModel": "none"},
    prefix="gpt_neox.",
    aliases=(("embed_out.weight", "lm_head.weight"),),
    ignored=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    embedding="embed_in.weight",
    head="embed_out.weight",
)


# --- PyTorch's own modules ---

def torch_attention(target, source, is_cross):
    """nn.MultiheadAttention: one matrix of queries, keys and values, or one of each; the bias is always one."""
    bias = tuple(Part(source + ".in_proj", "attention_dim", i, 3) for i in range(3))
    split = tuple(Part("%s.%s_proj" % (source, name), "attention_dim") for name in "qkv")
    runs = (("q", slice(0, 1)), ("kv", slice(1, 3))) if is_cross else (("qkv", slice(0, 3)),)
    for kind, parts in (("fused", bias), ("split", split)):
        for name, run in runs:
            yield Rule("%s.%s" % (target, name), parts[run], ("d_model",), is_matrix=True, bias="any_bias",
                       bias_parts=bias[run], when=kind)
    yield linear(target + ".out", source + ".out_proj", "d_model", "attention_dim", bias="any_bias")


def torch_stack(stack):
    target, source, is_decoder = stack + ".blocks.{}.", stack + ".layers.{}.", stack == "decoder"
    cross = (*torch_attention(target + "cross", source + "multihead_attn", True),
             norm(target + "cross_norm", source + "norm2", bias="any_bias")) if is_decoder else ()
    return (
        *torch_attention(target + "attention", source + "self_attn", False),
        norm(target + "attention_norm", source + "norm1", bias="any_bias"),
        *cross,
        linear(target + "ffn.up", source + "linear1", "d_ff", "d_model", bias="any_bias"),
        linear(target + "ffn.down", source + "linear2", "d_model", "d_ff", bias="any_bias"),
        norm(target + "ffn_norm", source + ("norm3" if is_decoder else "norm2"), bias="any_bias"),
        norm(stack + ".final_norm", stack + ".norm", bias="any_bias", when=stack + "_norm"),
    )


TORCH_RULES = torch_stack("encoder") + torch_stack("decoder")


def prepare_torch(family, tensors, config, notes):
    """The tensors of the module by the names that they have in an nn.Transformer."""
    stacks, is_layer = family.defaults["stacks"], family.defaults["layer"]
    # What the module's names begin with: in a whole nn.Transformer, with a single layer, or with a stack of layers.
    inner = "" if is_layer else "encoder.layers.0." if len(stacks) > 1 else "layers.0."
    anchor = inner + "linear1.weight"
    prefix = config.text("prefix", None)
    if prefix is None:
        found = sorted({name[:-len(anchor)] for name in tensors if ("." + name).endswith("." + anchor)}, key=len)
        if len(found) != 1:
            raise ConvertError("%s: has %s tensors %s; 'prefix' in the configuration should say what the names of the "
                               "%s begin with" % (config.where, len(found) or "no", quote("…" + anchor),
                                                  family.title))
        prefix = found[0]
    elif prefix + anchor not in tensors:
        raise ConvertError("%s: 'prefix' is %s, but there is no tensor %s"
                           % (config.where, quote(prefix), quote(prefix + anchor)))
    others = [name for name in tensors if not name.startswith(prefix)]
    if others:
        notes.append("left out, as it is not in the %s: %s" % (family.title, listing(others)))
    outer = "" if len(stacks) > 1 else stacks[0] + (".layers.0." if is_layer else ".")
    module = {outer + name[len(prefix):]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for stack in stacks:
        if (stack + ".norm.weight" in module and stack + ".norm.bias" not in module
                and stack + ".layers.0.norm1.bias" in module):
            notes.append("warning: %s.norm has no bias, unlike the norms of the layers: it is taken as a LayerNorm without "
                         "one; an RMSNorm has the same tensors" % stack)
    return module


def describe_torch(config, family, tensors):
    """nn.Transformer and its parts. Sizes are the tensors'; what they don't tell is in the configuration."""
    first = family.defaults["stacks"][0]
    weight = tensors.get(first + ".layers.0.linear1.weight")
    if weight is None or len(weight.shape) != 2 or not min(weight.shape):
        raise ConvertError("%s: there is no layer 0, or its linear1.weight is not a matrix" % config.where)
    d_model, n_heads = config.size("d_model", weight.shape[1]), config.size("nhead")
    head_dim = head_size(config, d_model, n_heads)
    stacks = {}
    for name in family.defaults["stacks"]:
        stacks[name] = Stack(
            n_layers=torch_layers(config, family, tensors, name), n_heads=n_heads, n_kv_heads=n_heads,
            head_dim=head_dim, d_ff=config.size("dim_feedforward", weight.shape[0]),
            n_positions=config.size("n_positions", 4096), causal=config.flag("causal", True) and name == "decoder",
            cross=name == "decoder", norm="layer", norm_place="pre" if config.flag("norm_first", False) else "post",
            norm_eps=config.epsilon("layer_norm_eps", 1e-5), final_norm=name + ".norm.weight" in tensors,
            positions="none", attention_scale=[head_dim ** -0.5], ffn="plain",
            activation=activation(config, "activation", "relu"))
    kind = "encoder-decoder" if len(stacks) > 1 else next(iter(stacks))
    switches = {name + "_norm": stack.final_norm for name, stack in stacks.items()}
    fused = any(name.endswith(".in_proj.weight") for name in tensors)
    return Model(kind=kind, vocab_size=0, d_model=d_model, stacks=stacks, tied=False, needs_head=False,
                 switches=dict(switches, any_bias=None, fused=fused, split=not fused))


def torch_layers(config, family, tensors, stack):
    """How many layers the tensors have, which the configuration may confirm."""
    numbers = [int(match.group(1)) for match in (
        re.match(re.escape(stack) + r"\.layers\.([0-9]{1,6})\.", name) for name in tensors) if match]
    found = max(numbers, default=-1) + 1
    keys = "num_%s_layers" % stack if len(family.defaults["stacks"]) > 1 else "num_layers"
    if not found or config.size(keys, found, limit=MAX_LAYERS) != found:
        raise ConvertError("%s: there are %d layers in the %s, not %s"
                           % (config.where, found, stack, quote(config.values.get(keys))))
    return found


def torch_family(title, *stacks, layer=False):
    return Family(
        title=title,
        rules=TORCH_RULES,
        describe=describe_torch,
        defaults={"stacks": stacks, "layer": layer},
        prepare=prepare_torch,
        renames=((r"\.in_proj_(weight|bias)", r".in_proj.\1"), (r"\.([qkv])_proj_weight", r".\1_proj.weight")),
    )


TORCH_MODULES = (
    torch_family("nn.Transformer", "encoder", "decoder"),
    torch_family("nn.TransformerEncoder", "encoder"), torch_family("nn.TransformerDecoder", "decoder"),
    torch_family("nn.TransformerEncoderLayer", "encoder", layer=True),
    torch_family("nn.TransformerDecoderLayer", "decoder", layer=True),
)


# --- GGUF: names are the same for all architectures, so the rules are, too ---

GGUF_RULES = (
    embedding("token_embedding", "token_embd", "vocab_size"),
    embedding("decoder.position_embedding", "position_embd", "table_size", when="learned"),
    norm("decoder.blocks.{}.attention_norm", "blk.{}.attn_norm", bias="found"),
    qkv("decoder.blocks.{}.attention.qkv", "blk.{}.", "attn_q", "attn_k", "attn_v", bias="found", when="split"),
    linear("decoder.blocks.{}.attention.qkv", "blk.{}.attn_qkv", "qkv_dim", "d_model", bias="found", when="fused"),
    linear("decoder.blocks.{}.attention.out", "blk.{}.attn_output", "d_model", "attention_dim", bias="found"),
    norm("decoder.blocks.{}.attention.q_norm", "blk.{}.attn_q_norm", "head_dim", bias="", when="qk_norm"),
    norm("decoder.blocks.{}.attention.k_norm", "blk.{}.attn_k_norm", "head_dim", bias="", when="qk_norm"),
    norm("decoder.blocks.{}.attention_post_norm", "blk.{}.post_attention_norm", bias="", when="sandwich"),
    norm("decoder.blocks.{}.ffn_norm", "blk.{}.ffn_norm", bias="found", when="ffn_norm"),
    joined("decoder.blocks.{}.ffn.up", (("blk.{}.ffn_gate", "d_ff"), ("blk.{}.ffn_up", "d_ff")), "d_model",
           bias="found", when="gated"),
    linear("decoder.blocks.{}.ffn.up", "blk.{}.ffn_up", "d_ff", "d_model", bias="found", when="plain"),
    linear("decoder.blocks.{}.ffn.down", "blk.{}.ffn_down", "d_model", "d_ff", bias="found"),
    norm("decoder.blocks.{}.ffn_post_norm", "blk.{}.post_ffw_norm", bias="", when="sandwich"),
    norm("decoder.final_norm", "output_norm", bias="found"),
    embedding("head", "output", "vocab_size", bias="found"),
)


def describe_gguf(config, family, tensors):
    """A model of llama.cpp's, by its metadata."""
    settings, arch = family.defaults, config.text("general.architecture")

    def key(name):
        return "%s.%s" % (arch, name)

    if config.integer(key("expert_count"), 0):
        raise ConvertError("%s: has a mixture of experts, which is not supported" % config.where)
    table = tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ConvertError("%s: there is no tensor 'token_embd.weight' of two dimensions" % config.where)
    d_model, n_heads = config.size(key("embedding_length")), config.size(key("attention.head_count"))
    n_layers = config.size(key("block_count"), limit=MAX_LAYERS)
    n_positions = config.size(key("context_length"))
    head_dim = config.size(key("attention.key_length"), None) or head_size(config, d_model, n_heads)
    if config.size(key("attention.value_length"), head_dim) != head_dim:
        raise ConvertError("%s: values of another size than keys are not supported" % config.where)
    n_kv_heads = config.size(key("attention.head_count_kv"), n_heads)
    if n_heads % n_kv_heads:
        raise ConvertError("%s: the number of heads, %d, should be a multiple of that of key and value heads, %d"
                           % (config.where, n_heads, n_kv_heads))
    is_rms, parallel = settings["norm"] == "rms", settings.get("parallel", False)
    stack = Stack(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        d_ff=config.size(key("feed_forward_length")), n_positions=n_positions, causal=True, cross=False,
        norm=settings["norm"], norm_place=settings.get("norm_place", "pre"), final_norm=True,
        norm_eps=config.epsilon(key("attention.layer_norm_rms_epsilon" if is_rms else "attention.layer_norm_epsilon")),
        positions=settings.get("positions", "rotary"), attention_scale=[head_dim ** -0.5],
        ffn="gated" if is_rms else "plain", activation=settings["activation"],
        parallel=config.flag(key("use_parallel_residual"), parallel) and parallel or None)
    if stack.positions == "rotary":
        rope = gguf_rope(config, key, tensors, head_dim, n_positions)
        stack.rotary_frequencies, stack.rotary_scale = rope
        stack.rotary_interleaved = settings.get("interleaved")
    model = Model(
        kind="decoder", vocab_size=table.shape[0], d_model=d_model, stacks={"decoder": stack},
        tied="output.weight" not in tensors, needs_head=True,
        switches={"found": None, "learned": stack.positions == "learned", "sandwich": stack.norm_place == "sandwich",
                  "fused": "blk.0.attn_qkv.weight" in tensors, "split": "blk.0.attn_qkv.weight" not in tensors,
                  "qk_norm": settings.get("qk_norm", False), "ffn_norm": not settings.get("one_norm", False),
                  "gated": is_rms, "plain": not is_rms})
    if settings.get("scaled_embeddings"):  # the norms' offset of 1 is in the weights already
        model.embedding_scale = d_model ** 0.5
    if settings.get("bounded"):
        describe_gguf_gemma2(config, key, model, stack)
    return model


def describe_gguf_gemma2(config, key, model, stack):
    stack.attention_softcap = positive(config, key("attn_logit_softcapping"), 50.0)
    model.logit_softcap = positive(config, key("final_logit_softcapping"), 30.0)
    window = config.size(key("attention.sliding_window"), 4096)
    stack.sliding_window = [0 if layer % 2 else window for layer in range(stack.n_layers)]
    if stack.n_layers == 46:  # the 27B model, which llama.cpp also tells by its layers
        stack.attention_scale = [(model.d_model // stack.n_heads) ** -0.5]


def gguf_rope(config, key, tensors, head_dim, n_positions):
    """Frequencies and their scale; LLaMA 3's factors are in a tensor of their own."""
    kind = config.text(key("rope.scaling.type"), "none")
    names = {"factor": "factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    options = Fields({name: config.values[key("rope.scaling." + given)] for given, name in names.items()
                      if key("rope.scaling." + given) in config.values}, config.where + ": rope.scaling")
    shape = RopeShape(config.size(key("rope.dimension_count"), head_dim), config.number(key("rope.freq_base"), 10000.0),
                      config.size(key("rope.scaling.original_context_length"), n_positions), n_positions)
    rope = make_rope(options, "default" if kind == "none" else kind, head_dim, shape)
    if kind == "yarn":
        more = config.number(key("rope.scaling.yarn_attn_factor"), config.number(key("rope.scaling.attn_factor"), 1.0))
        rope = rope._replace(scale=rope.scale * more)
    factors = tensors.pop("rope_freqs.weight", None)
    if factors is None:
        return rope
    if factors.dtype != "F32" or factors.shape != (len(rope.frequencies),):
        raise ConvertError("%s should have %d elements of the type F32" % (factors, len(rope.frequencies)))
    divisors = struct.unpack("<%df" % factors.count, b"".join(map(bytes, factors.chunks())))
    if not all(1e-9 < divisor < 1e9 for divisor in divisors):
        raise ConvertError("%s should hold positive numbers of a usual size" % factors)
    return rope._replace(frequencies=array.array("f", map(operator.truediv, rope.frequencies, divisors)))


GATED = {"norm": "rms", "activation": "silu"}
GEMMA_GGUF = {"norm": "rms", "activation": "gelu_tanh", "scaled_embeddings": True}
# By general.architecture; with LLaMA's name go all models of its shape, Mistral's among them.
GGUF_ARCHITECTURES = {
    "llama": dict(GATED, interleaved=True),
    "qwen2": GATED,
    "qwen3": dict(GATED, qk_norm=True),
    "gemma": GEMMA_GGUF,
    "gemma2": dict(GEMMA_GGUF, norm_place="sandwich", bounded=True),
    "phi2": {"norm": "layer", "activation": "gelu_tanh", "parallel": True, "one_norm": True},
    "gptneox": {"norm": "layer", "activation": "gelu", "parallel": True},
    "gpt2": {"norm": "layer", "activation": "gelu_tanh", "positions": "learned"},
}


def gguf_family(config):
    arch = config.text("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        raise ConvertError("%s: the architecture %s is not supported (supported: %s)"
                           % (config.where, quote(arch), ", ".join(GGUF_ARCHITECTURES)))
    return Family(title=arch, rules=GGUF_RULES, describe=describe_gguf, defaults=GGUF_ARCHITECTURES[arch],
                  ignored=r"blk\.\d+\.attn_rot_embd\.weight", embedding="token_embd.weight", head="output.weight")


# --- All of them ---

NO_FAMILY = Family(title="no model", rules=(), describe=None, defaults={})  # of a tokenizer alone
LARGEST_VOCABULARY = 1 << 24  # where no model says more; what a mistaken id could cost

FAMILIES = {
    "gpt2": GPT2,
    "nanogpt": GPT2._replace(
        title="nanoGPT", model_types=(), architectures={},
        defaults={"activation_function": "gelu", "tie_word_embeddings": True, "bias": None}),
    "mingpt": GPT2._replace(
        title="minGPT", model_types=(), architectures={},
        defaults={"activation_function": "gelu_new", "tie_word_embeddings": False, "bias": True}),
    "bert": BERT,
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "t5": T5,
    "mt5": T5._replace(
        title="mT5", defaults={"feed_forward_proj": "gated-gelu", "scales": False}, model_types=("mt5",),
        architectures={"MT5ForConditionalGeneration": "lm", "MT5Model": "none", "MT5EncoderModel": "encoder"}),
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "phi": PHI,
    "phi3": PHI3,
    "gpt_neox": GPT_NEOX,
}
FAMILIES.update((family.title, family) for family in TORCH_MODULES)


def choose_family(arch, config, arguments):
    """The name of the family: what --arch says, what config.json says, or nanoGPT by its model_args."""
    if arch is None and arguments is not None:
        return "nanogpt"
    if arch is not None and not FAMILIES[arch].model_types:
        return arch
    model_type = config.text("model_type", None)
    kinds = config.texts("architectures")
    if model_type is None and not kinds:
        if arch is None:
            raise UsageError("%s has neither 'model_type' nor 'architectures'; --arch (%s) should say what it is"
                             % (config.where, ", ".join(FAMILIES)))
        return arch
    for name in [arch] if arch else FAMILIES:
        family = FAMILIES[name]
        if model_type in family.model_types or model_type is None and kinds[0] in family.architectures:
            check_architectures(config, kinds, family)
            return name
    raise ConvertError("%s: %s is not supported%s (supported: %s)" % (
        config.where, "the architecture " + quote(kinds[0]) if model_type is None else
        "the model type " + quote(model_type), " by --arch " + arch if arch else "",
        ", ".join(model_type for family in FAMILIES.values() for model_type in family.model_types)))


def check_architectures(config, kinds, family):
    for kind in kinds:
        if kind not in family.architectures:
            raise ConvertError("%s: %s is not supported (supported: %s)"
                               % (config.where, quote(kind), ", ".join(family.architectures)))


# ---------------------------------------------------------------------------------------------------------------------
# Directories of sentence-transformers: modules.json lists what follows the model
# ---------------------------------------------------------------------------------------------------------------------

class Pooling(NamedTuple):
    kind: str  # cls, mean, max
    normalize: bool
    max_tokens: Optional[int]


POOLING_MODES = {"cls": "cls", "mean": "mean", "max": "max", "cls_token": "cls", "mean_tokens": "mean",
                 "max_tokens": "max"}


def read_modules(source):
    """What the modules after the model do with its hidden states, or None. The source becomes the model's directory."""
    if not source.is_directory or not source.has("modules.json"):
        return None
    path = source.beside("modules.json")
    modules = parse_json_value(source.text(path), path)
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise ConvertError("%s: should hold a list of modules" % path)
    modules = [Fields(module, "%s: module %d" % (path, i)) for i, module in enumerate(modules)]
    kinds = [module.text("type").rpartition(".")[2] for module in modules]
    known = [kind for kind in kinds if kind != "Dropout"]  # which does nothing here
    if known not in (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConvertError("%s: the modules %s are not supported, only Transformer, Pooling and Normalize in this order"
                           % (path, listing(kinds, 8)))
    for module in modules:
        if module.text("path") and not is_plain_name(module.text("path")):
            raise ConvertError("%s: 'path' should be the name of a directory beside modules.json, not %s"
                               % (module.where, quote(module.text("path"))))
    kind = None
    if "Pooling" in kinds:
        name = os.path.join(modules[kinds.index("Pooling")].text("path"), "config.json")
        kind = pooling_kind(source.json(source.beside(name)))
    prompt = source.optional_json("config_sentence_transformers.json").text("default_prompt_name", None)
    if prompt:
        source.notes.append("warning: config_sentence_transformers.json puts the prompt %s before every text, which is "
                            "left to the caller" % quote(prompt))
    source.directory = source.beside(modules[0].text("path"))
    settings = source.optional_json("sentence_bert_config.json")  # beside the model, wherever that is
    if settings.flag("do_lower_case", False):
        source.notes.append("warning: sentence_bert_config.json asks for lower case, which is left to the caller")
    max_tokens = settings.size("max_seq_length", None) or tokenizer_limit(source)
    return Pooling(kind, "Normalize" in kinds, max_tokens) if kind else None


def tokenizer_limit(source):
    """The most tokens that the tokenizer makes of a text, or None. (No limit is written as 10 to the 30th.)"""
    limit = source.optional_json("tokenizer_config.json").number("model_max_length", 0)
    return int(limit) if 1 <= limit < 1 << 31 else None


def pooling_kind(config):
    """The one way of pooling that the configuration turns on, in its older or its newer words."""
    found = [key[len("pooling_mode_"):] for key in config.values
             if key.startswith("pooling_mode_") and config.flag(key)]
    mode = config.get("pooling_mode", (str, list), "a string or a list", [])
    found += mode if isinstance(mode, list) else [mode]
    kinds = sorted({POOLING_MODES.get(name, "") for name in found if isinstance(name, str)})
    if len(kinds) != 1 or not kinds[0]:
        raise ConvertError("%s: the way of pooling should be one of cls, mean and max, not %s"
                           % (config.where, listing(found) or "none"))
    return kinds[0]


def put_pooling(model, pooling):
    if model.kind == "encoder":
        model.pooling, model.pool_max_tokens = pooling.kind, pooling.max_tokens
        model.pool_normalize = pooling.normalize


# ---------------------------------------------------------------------------------------------------------------------
# Matching the tensors of a checkpoint with a family's rules
# ---------------------------------------------------------------------------------------------------------------------

# Parts of names that come from torch.compile, FSDP and activation checkpointing, not from the model.
WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
SOURCE_DTYPES = ("F32", "F16", "BF16", "F64")


class Zeros:
    """Stands for rows that a checkpoint lacks."""

    def __init__(self, dtype, shape):
        self.dtype = dtype
        self.shape = shape

    def chunks(self):
        size = stored_size(self.dtype, math.prod(self.shape))
        for done in range(0, size, CHUNK):
            yield bytes(min(CHUNK, size - done))


class Entry(NamedTuple):
    """A tensor of the .tfm file: the rows of its parts, one part after another. The shape is [out, in] whatever the
    layout."""
    name: str
    parts: List[Any]  # Tensor or Zeros
    shape: Tuple[int, ...]
    layout: str
    dtype: str

    @property
    def count(self):
        return math.prod(self.shape)


def plain_names(tensors, family):
    """The tensors by the names that the family's rules use."""
    plain: Dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part not in WRAPPER_PARTS]
        while parts[:1] == ["module"]:  # DistributedDataParallel
            del parts[0]
        short = ".".join(parts)
        if short.startswith(family.prefix):
            short = short[len(family.prefix):]
        for pattern, ending in family.renames:
            short = re.sub(pattern + r"\Z", ending, short)
        if short in plain:
            raise ConvertError("%s is there twice, also as %s" % (tensor, quote(plain[short].name)))
        plain[short] = tensor
    settle_aliases(plain, family)
    return plain


def settle_aliases(tensors, family):
    """One name for what a checkpoint may have under two. Different tensors both stay, and one of them is refused."""
    for name, other in family.aliases:
        if other in tensors and name not in tensors:
            tensors[name] = tensors.pop(other)
        elif other in tensors and same_elements(tensors[name], tensors[other]):
            del tensors[other]


def leave_out(tensors, pattern, notes):
    left_out = [name for name in tensors if re.fullmatch(pattern, name)]
    if left_out:
        notes.append("left out, as no result needs it: " + listing(left_out))
    return left_out


def drop_unused(tensors, family, notes):
    left_out = leave_out(tensors, family.left_out, notes)
    return {name: tensor for name, tensor in tensors.items()
            if name not in left_out and not re.fullmatch(family.ignored, name)}


def settle_head(tensors, model, family, notes):
    """Says in `model` whether the output head is the token embedding, and removes what is there twice."""
    head, table = tensors.get(family.head), tensors.get(family.embedding)
    if not model.tied:
        for name in leave_out(tensors, family.left_out_untied, notes):
            del tensors[name]
    model.head = "tied" if model.tied else "own" if model.needs_head or head else "none"
    if head is None:
        return
    if table is None and model.tied:  # a tied pair may be saved under either name
        tensors[family.embedding] = tensors.pop(family.head)
    elif (table is not None and head.shape == (model.vocab_size, model.embedding_dim)
          and head.dtype in (*SOURCE_DTYPES, *BLOCK_TYPES) and same_elements(head, table)):
        model.head = "tied"
        del tensors[family.head]
    elif model.head == "tied":  # as transformers does since version 5; before, it dropped the head
        model.head = "own"
        notes.append("warning: the configuration ties %s to %s, but the checkpoint has both and they differ: "
                     "both are kept" % (family.head, family.embedding))


def expand(rules, model):
    """The rules that hold for the model, with every layer spelt out: rule, layer, the stack that it belongs to."""
    def group(rule):
        return rule.target.split(".")[0], "{}" in rule.target

    for (prefix, is_block), members in itertools.groupby(rules, group):
        if prefix in ("encoder", "decoder") and prefix not in model.stacks:
            continue
        stack = model.stacks.get(prefix)
        members = [rule for rule in members if not rule.when or model.switches.get(rule.when)]
        for layer in range(stack.n_layers if is_block else 1):
            for rule in members:
                yield rule, layer, stack


def size_of(name, model, stack):
    return getattr(stack if hasattr(stack, name) else model, name) if name else 1


def rule_shape(rule, model, stack):
    rows = sum(size_of(part.rows, model, stack) for part in rule.parts)
    return (rows,) + tuple(size_of(name, model, stack) for name in rule.columns)


def find_layout(tensors, model, family):
    """How the checkpoint keeps its matrices: see the family's probe."""
    for rule, layer, stack in expand(family.rules, model):
        if rule.parts[0].source == family.probe:
            probe = tensors.get(family.probe.format(layer) + ".weight")
            transposed = probe is not None and probe.shape == rule_shape(rule, model, stack)[::-1]
            return "cols" if transposed else "rows"
    return "rows"


class Match(NamedTuple):
    """A weight or bias of the file with the names of its parts in the checkpoint."""
    rule: Rule
    kind: str  # weight, bias
    layer: int
    stack: Optional[Stack]

    @property
    def parts(self):
        return self.rule.bias_parts or self.rule.parts if self.kind == "bias" else self.rule.parts

    def sources(self):
        return ["%s.%s" % (part.source.format(self.layer), self.kind) for part in self.parts]


def find_matches(tensors, model, family):
    """What the file should hold, in its order."""
    for rule, layer, stack in expand(family.rules, model):
        if rule.target != "head" or model.head == "own":
            yield Match(rule, "weight", layer, stack)
        if rule.bias:
            wanted = model.switches.get(rule.bias, False)
            match = Match(rule, "bias", layer, stack)
            if wanted or wanted is None and any(name in tensors for name in match.sources()):
                yield match


def match_tensors(tensors, model, family, label):
    """The entries of the .tfm file, in its order. Every tensor is used, and none is missing."""
    layout = find_layout(tensors, model, family)
    matches = list(find_matches(tensors, model, family))
    used, missing = set(), {}
    for match in matches:
        used.update(match.sources())
        if match.kind == "weight" or model.switches.get(match.rule.bias):
            missing.update((name, None) for name in match.sources() if name not in tensors)
    if missing:
        raise ConvertError("%s: lacks tensors that the configuration asks for: %s" % (label, listing(list(missing))))
    unused = [tensor.name for name, tensor in tensors.items() if name not in used]
    if unused:
        raise ConvertError("%s: has tensors that are no part of the %s that the configuration describes: %s"
                           % (label, family.title, listing(unused)))
    return [entry for match in matches for entry in make_entries(match, tensors, model, layout)]


def make_entries(match, tensors, model, layout):
    """The entry of a match, its sources checked; several where the checkpoint quantized its rows in different ways."""
    rule, stack = match.rule, match.stack
    name = "%s.%s" % (rule.target.format(match.layer), match.kind)
    layout = layout if rule.is_matrix and match.kind == "weight" else "rows"
    shape = rule_shape(rule, model, stack)
    columns = shape[1:] if match.kind == "weight" else ()
    pieces: List[Any] = []
    for part, source in zip(match.parts, match.sources()):
        rows = size_of(part.rows, model, stack)
        tensor = tensors.get(source)
        if tensor is None:
            pieces.append(Zeros(None, (rows,)))
        else:
            groups = size_of(part.groups, model, stack)
            check_source(tensor, (rows * part.of,) + columns, layout)
            pieces += [tensor] if part.of == 1 else part_rows(tensor, part, rows // groups, groups)
    runs = [list(run) for _, run in itertools.groupby(pieces, lambda piece: piece.dtype in BLOCK_TYPES and piece.dtype)]
    if len(runs) == 1:
        return [make_entry(name, runs[0], shape[:1] + columns, layout)]
    return [make_entry("%s#%d" % (name, i), run, (sum(piece.shape[0] for piece in run),) + columns, layout)
            for i, run in enumerate(runs)]


def make_entry(name, pieces, shape, layout):
    """The rows of the pieces under one name, in the narrowest type that holds them all."""
    dtypes = {stored_dtype(piece.dtype) for piece in pieces if piece.dtype}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    pieces = [Zeros(dtype, piece.shape) if piece.dtype is None else piece for piece in pieces]
    return Entry(name, pieces, shape, layout, dtype)


def part_rows(tensor, part, size, groups):
    return [tensor.rows((group * part.of + part.index) * size, size) for group in range(groups)]


def check_source(tensor, shape, layout):
    expected = shape if layout == "rows" else shape[::-1]
    if tensor.shape != expected:
        raise ConvertError("%s has the shape %s where the configuration asks for %s"
                           % (tensor, quote(list(tensor.shape)), list(expected)))
    if tensor.dtype not in SOURCE_DTYPES and (tensor.dtype not in BLOCK_TYPES or len(shape) < 2):
        raise ConvertError("%s has the type %s; integer and quantized checkpoints can't be converted, only %s"
                           % (tensor, tensor.dtype, ", ".join(SOURCE_DTYPES)))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: byte-level BPE from tokenizer.json, or from vocab.json and merges.txt
# ---------------------------------------------------------------------------------------------------------------------

ADDED_FLAGS = {"special": 1, "lstrip": 2, "rstrip": 4, "single_word": 8, "normalized": 16}
OUTSIDE = 32  # among those flags in the file: an added token that WordPiece's vocabulary has not
# Files of tokenizers that are not supported yet: better named than passed over in silence.
OTHER_TOKENIZERS = ("tiktoken.model", "tekken.json")


@dataclasses.dataclass
class Bpe:
    """A byte-level BPE tokenizer as its files describe it."""
    where: str  # the file that has the vocabulary
    vocab: Dict[str, int]
    merges: List[Tuple[str, str]]
    added: Dict[str, List[int]] = dataclasses.field(default_factory=dict)  # text: [id, flags]
    named: Dict[str, int] = dataclasses.field(default_factory=dict)  # "eos_token": id
    add_prefix_space: bool = False
    pattern: str = "gpt2"  # which cuts a text into pieces: see SPLIT_PATTERNS
    nfc: bool = False  # texts are put into Unicode's composed form first
    ignore_merges: bool = False
    unk_token: Optional[str] = None  # what a byte without a token becomes; None: nothing
    fuse_unk: bool = False  # one of them for a run of such bytes
    prefix_ids: List[int] = dataclasses.field(default_factory=list)  # what is put around a text by default
    suffix_ids: List[int] = dataclasses.field(default_factory=list)
    pair_ids: Optional[List[int]] = None  # what stands between two texts; None: not known
    pair_type: int = 0  # the token type of what comes after that

    def set_around(self, before, between, after, pair_type=0):
        self.prefix_ids, self.pair_ids, self.suffix_ids, self.pair_type = before, between, after, pair_type

    def id_of(self, text):
        return self.added[text][0] if text in self.added else self.vocab.get(text)

    def next_id(self):
        return max([len(self.vocab)] + [number + 1 for number, _ in self.added.values()])

    def add(self, text, flags, number=None):
        """An added token, found in a text before BPE sees it. Without a number it takes the next one."""
        known = self.id_of(text)
        if number is not None and known not in (None, number):
            raise ConvertError("%s: the added token %s has the id %d, but the vocabulary says %d"
                               % (self.where, quote(text), number, known))
        if number is None:
            number = self.next_id() if known is None else known
        if text:
            self.added[text] = [number, flags]

    def check_ids(self, vocab_size):
        owners: Dict[int, str] = {}
        for text, number in itertools.chain(self.vocab.items(), ((text, self.added[text][0]) for text in self.added)):
            if not 0 <= number < vocab_size:
                raise ConvertError("%s: the token %s has the id %s, but the model's vocabulary ends at %d"
                                   % (self.where, quote(text), quote(number), vocab_size - 1))
            if owners.setdefault(number, text) != text:
                raise ConvertError("%s: the tokens %s and %s have the same id, %d"
                                   % (self.where, quote(owners[number]), quote(text), number))
        for number in self.prefix_ids + self.suffix_ids + (self.pair_ids or []):
            if number not in owners:
                raise ConvertError("%s: the post-processor adds the id %s, which no token has"
                                   % (self.where, quote(number)))


def read_tokenizer(source, family, vocab_size):
    """The tokenizer of a checkpoint, or None."""
    pieces = read_sentencepiece(source)
    if pieces is not None:
        bpe = pieces
    elif source.has("tokenizer.json"):
        bpe = read_tokenizer_json(source)
        read_special_tokens(source, bpe, family, vocab_size)
    elif source.has("vocab.json") and source.has("merges.txt"):
        bpe = read_vocab_and_merges(source)
        if source.optional_json("tokenizer_config.json").text("tokenizer_class", "").startswith("Qwen2Tokenizer"):
            bpe.pattern, bpe.nfc = "qwen2", True
        read_special_tokens(source, bpe, family, vocab_size)
        read_affixes(source, bpe, family)
    elif source.has("vocab.json") or source.has("merges.txt"):
        raise ConvertError("%s: has only one of vocab.json and merges.txt, which belong together"
                           % (source.directory or "."))
    elif source.has("vocab.txt"):
        bpe = read_vocab_txt(source)
        read_special_tokens(source, bpe, family, vocab_size)
        read_affixes(source, bpe, family)
    else:
        others = [name for name in OTHER_TOKENIZERS if source.has(name)]
        source.notes.append("warning: converted without a tokenizer: there is %s" % (
            listing(others) + ", which is not supported yet" if others else "none beside the weights"))
        return None
    bpe.check_ids(vocab_size)
    if not source.is_directory:
        source.notes.append("took the tokenizer from %s" % bpe.where)
    return bpe


def byte_alphabet():
    """The characters that stand for bytes in the vocabulary's files: printable ones for themselves, then U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


# --- tokenizer.json ---

def read_tokenizer_json(source):
    path = source.beside("tokenizer.json")
    root = source.json(path)
    if root.object("model").text("type", "BPE") == "WordPiece":
        return read_wordpiece_json(source, root)
    normalizers = [step.text("type") for step in json_steps(root, "normalizer", "normalizers")]
    if any(kind != "NFC" for kind in normalizers):
        raise ConvertError("%s: a normalizer (%s) is not supported yet" % (path, listing(normalizers)))
    pattern, add_prefix_space = read_splitting(root)
    only_step(root, "decoder", "decoders")
    model = root.object("model")
    if model.text("type", "BPE") != "BPE":
        raise ConvertError("%s: the tokenizer is of the type %s; only BPE, WordPiece and Unigram are supported"
                           % (path, quote(model.text("type"))))
    merges = [parse_merge(merge, "%s: merge %d" % (path, i)) for i, merge in enumerate(model.list("merges"))]
    bpe = Bpe(path, parse_vocab(model.object("vocab")), merges)
    bpe.pattern, bpe.add_prefix_space, bpe.nfc = pattern, add_prefix_space, bool(normalizers)
    bpe.ignore_merges = model.flag("ignore_merges", False)
    bpe.unk_token = model.text("unk_token", None)
    bpe.fuse_unk = model.flag("fuse_unk", False)
    check_bpe_options(model, bpe)
    read_added_tokens(root, bpe)
    read_post_processor(source, root, bpe)
    return bpe


# The regular expressions that split a text, and what tfm.h calls them. Those of one name give the same pieces.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASED_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
                 r"\s+(?!\S)|\s+")
SPLIT_PATTERNS = {
    GPT2_PATTERN: "gpt2",
    CASED_PATTERN % r"\p{N}{1,3}": "llama3",
    CASED_PATTERN % r"\p{N}": "qwen2",
    # As OpenAI writes that of GPT-4.
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+":
        "llama3",
}


def read_splitting(root):
    """The name of the pattern that cuts a text into pieces, and whether a space is put before the text."""
    steps = json_steps(root, "pre_tokenizer", "pretokenizers")
    kinds = [step.text("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel":
        raise ConvertError("%s: 'pre_tokenizer' is %s; only ByteLevel is supported, alone or after Split or Digits"
                           % (root.where, listing(kinds) or "null"))
    add_prefix_space, use_regex = steps[-1].flag("add_prefix_space"), steps[-1].flag("use_regex", True)
    if kinds == ["ByteLevel"] and use_regex:
        return "gpt2", add_prefix_space
    if add_prefix_space:
        raise ConvertError("%s: 'add_prefix_space' is supported with GPT-2's pre-tokenizer only" % root.where)
    if kinds == ["Digits", "ByteLevel"] and use_regex and steps[0].flag("individual_digits", False):
        return "smollm", False
    if kinds == ["Split", "ByteLevel"] and not use_regex:
        return split_pattern(steps[0]), False
    raise ConvertError("%s: the pre-tokenizer %s, which splits %s, is not supported" % (
        root.where, listing(kinds), listing([pattern_of(step)[1] for step in steps if "pattern" in step.values])
        or ("by GPT-2's pattern" if use_regex else "nothing")))


def split_pattern(step):
    """The name of a Split's pattern. It matches all of a text: what lies between the matches doesn't matter."""
    kind, text = pattern_of(step)
    way = step.text("behavior").lower(), step.flag("invert", False)
    if kind != "Regex" or text not in SPLIT_PATTERNS or way not in (("isolated", False), ("removed", True)):
        raise ConvertError("%s: the pre-tokenizer's pattern %s (%s%s) is not one of those that are supported"
                           % (step.where, quote(text), way[0], ", inverted" if way[1] else ""))
    return SPLIT_PATTERNS[text]


def read_added_tokens(root, bpe):
    for token in root.list("added_tokens", []):
        if not isinstance(token, dict):
            raise ConvertError("%s: 'added_tokens' should be a list of objects" % root.where)
        fields = Fields(token, root.where + ": 'added_tokens'")
        bpe.add(fields.text("content"), added_flags(fields), fields.integer("id"))


def check_bpe_options(model, bpe):
    """Refuses what would give other ids than plain BPE."""
    if model.number("dropout", 0):
        raise ConvertError("%s: 'dropout' is not supported: its result is random" % model.where)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.text(key, ""):
            raise ConvertError("%s: %r is not supported yet" % (model.where, key))
    lacks_bytes = any(character not in bpe.vocab for character in byte_alphabet())
    if model.flag("byte_fallback", False) and lacks_bytes and not isinstance(bpe, SentencePiece):
        raise ConvertError("%s: 'byte_fallback' is not supported for a vocabulary that lacks bytes" % model.where)


def only_step(root, key, steps_key):
    """A part of the tokenizer that has to be ByteLevel, alone or as a sequence of one."""
    step = root.object(key, None)
    kinds = []
    if step is not None:
        steps = [Fields(item, step.where) for item in step.list(steps_key, []) if isinstance(item, dict)]
        steps = steps if step.text("type") == "Sequence" else [step]
        kinds = [item.text("type") for item in steps]
    if kinds != ["ByteLevel"]:
        raise ConvertError("%s: %r is %s; only ByteLevel is supported yet"
                           % (root.where, key, listing(kinds) or "null"))
    return steps[0]


def only_processor(root):
    """The post-processor that adds tokens, or None. (ByteLevel ones only move offsets.)"""
    step = root.object("post_processor", None)
    if step is None:
        return None
    steps = [step]
    if step.text("type") == "Sequence":
        steps = [Fields(item, step.where) for item in step.list("processors") if isinstance(item, dict)]
    steps = [item for item in steps if item.text("type") != "ByteLevel"]
    known = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
    if len(steps) > 1 or steps and steps[0].text("type") not in known:
        raise ConvertError("%s: the post-processor %s is not supported yet"
                           % (root.where, listing([item.text("type") for item in steps])))
    return steps[0] if steps else None


def read_post_processor(source, root, bpe):
    """What tokenizer.json puts around a text, and between two."""
    step = only_processor(root)
    if step is None:
        bpe.set_around([], [], [], 1)
    elif step.text("type") == "TemplateProcessing":
        read_template(source, step, bpe)
    else:
        ends = step.list("sep"), step.list("cls")
        if not all(len(end) == 2 and type(end[1]) is int for end in ends):
            raise ConvertError("%s: 'sep' and 'cls' should be a token and its id each" % step.where)
        sep, cls = [ends[0][1]], [ends[1][1]]
        is_bert = step.text("type") == "BertProcessing"
        bpe.set_around(cls, sep if is_bert else sep + sep, sep, 1 if is_bert else 0)


def template_pieces(template, key):
    """A template as parts before, between and after its texts: lists of (id, type); and the texts as (name, type)."""
    parts: List[List[Tuple[int, int]]] = [[]]
    texts = []
    for item in template.list(key):
        piece = Fields(item if isinstance(item, dict) else {}, "%s: %r" % (template.where, key))
        if "Sequence" in piece.values:
            sequence = piece.object("Sequence")
            texts.append((sequence.text("id", "A"), sequence.integer("type_id", 0)))
            parts.append([])
            continue
        special = piece.object("SpecialToken")
        token = template.object("special_tokens").object(special.text("id"))
        parts[-1] += [(number, special.integer("type_id", 0)) for number in token.ids("ids")]
    return parts, texts


def read_template(source, template, bpe):
    parts, texts = template_pieces(template, "single")
    if len(texts) != 1:
        raise ConvertError("%s: the template has the text %d times, not once" % (template.where, len(texts)))
    bpe.prefix_ids, bpe.suffix_ids = [[number for number, _ in part] for part in parts]
    single_types = {kind for _, kind in texts + parts[0] + parts[1]}
    parts, texts = template_pieces(template, "pair") if template.list("pair", []) else ([], [])
    ids = [[number for number, _ in part] for part in parts]
    if [name for name, _ in texts] == ["A", "B"] and (ids[0], ids[2]) == (bpe.prefix_ids, bpe.suffix_ids):
        first = {texts[0][1], *(kind for _, kind in parts[0] + parts[1])}
        second = {texts[1][1], *(kind for _, kind in parts[2])}
        if first | single_types == {0} and len(second) == 1 and 0 <= min(second) < 1 << 31:
            bpe.pair_ids, bpe.pair_type = ids[1], second.pop()
            return
    source.notes.append("warning: the tokenizer's template for pairs of texts is not supported; single texts are")


def parse_vocab(fields):
    for text, number in fields.values.items():
        if type(number) is not int:
            raise ConvertError("%s: the token %s should have an integer as its id, not %s"
                               % (fields.where, quote(text), quote(number)))
    return fields.values


def parse_merge(merge, where):
    """A merge is "left right" or, since some tokens hold spaces, ["left", "right"]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ConvertError("%s should be two tokens, not %s" % (where, quote(merge)))
    return parts[0], parts[1]


# --- vocab.json and merges.txt ---

def read_vocab_and_merges(source):
    vocab_path, merges_path = source.beside("vocab.json"), source.beside("merges.txt")
    vocab = parse_vocab(source.json(vocab_path))
    # Only a line feed ends a line: U+0085, U+2028 and their like are characters of tokens.
    lines = source.text(merges_path).split("\n")
    merges = []
    for i, line in enumerate(lines):
        line = line[:-1] if line.endswith("\r") else line
        # Of lines that begin with a number sign, only the first is a comment.
        if i == 0 and line.startswith("#version") or i == len(lines) - 1 and not line:
            continue
        merges.append(parse_merge(line, "%s: line %d" % (merges_path, i + 1)))
    return Bpe(vocab_path, vocab, merges)


def read_affixes(source, bpe, family):
    """What tokenizers put around a text that have no tokenizer.json with a post-processor."""
    config = source.optional_json("tokenizer_config.json")
    kind = config.text("tokenizer_class", "") or usual_class(source, bpe, family)
    cls, sep = bpe.named.get("cls_token"), bpe.named.get("sep_token")
    if isinstance(bpe, WordPiece):
        if cls is None or sep is None:
            raise ConvertError("%s: there is no [CLS] or no [SEP] to put around a text" % bpe.where)
        bpe.set_around([cls], [sep], [sep], 1)
    elif kind.startswith("RobertaTokenizer") and cls is not None and sep is not None:
        bpe.set_around([cls], [sep, sep], [sep])
    else:
        bpe.set_around([], [], [], 1)
    if config.flag("add_bos_token", False) and "bos_token" in bpe.named:
        bpe.prefix_ids, bpe.pair_ids = [bpe.named["bos_token"]], None
    if config.flag("add_eos_token", False) and "eos_token" in bpe.named:
        bpe.suffix_ids, bpe.pair_ids = [bpe.named["eos_token"]], None


# --- WordPiece: tokenizer.json, or vocab.txt ---

@dataclasses.dataclass
class WordPiece(Bpe):
    """BERT's tokenizer."""
    unk_token: Optional[str] = "[UNK]"
    continuing_prefix: str = "##"
    max_word_chars: int = 100
    clean_text: bool = True
    chinese_chars: bool = True
    lowercase: bool = True
    strip_accents: Optional[bool] = None  # None: as `lowercase`
    cleanup: bool = True  # decoding leaves out spaces before punctuation


MAX_WORD_CHARS = 1024  # tfm.h's limit
MAX_RULE_SIZE = 256  # tfm.h's limit, for texts of a SentencePiece model's charsmap
MAX_TOKEN_SIZE = 1024  # tfm.h's limit, in bytes; byte-level BPE has it for added tokens alone


def read_wordpiece_json(source, root):
    path, model = root.where, root.object("model")
    pieces = WordPiece(path, parse_vocab(model.object("vocab")), [])
    pieces.unk_token = model.text("unk_token", "[UNK]")
    pieces.continuing_prefix = model.text("continuing_subword_prefix", "##")
    pieces.max_word_chars = model.integer("max_input_chars_per_word", 100)
    steps = json_steps(root, "normalizer", "normalizers")
    splitters = [step.text("type") for step in json_steps(root, "pre_tokenizer", "pretokenizers")]
    if [step.text("type") for step in steps] not in ([], ["BertNormalizer"]) or splitters != ["BertPreTokenizer"]:
        raise ConvertError("%s: WordPiece is supported with BertNormalizer and BertPreTokenizer, not with %s"
                           % (path, listing([step.text("type") for step in steps] + splitters) or "null"))
    normalizer = steps[0] if steps else Fields({}, path)
    pieces.clean_text = normalizer.flag("clean_text", bool(steps))
    pieces.chinese_chars = normalizer.flag("handle_chinese_chars", bool(steps))
    pieces.lowercase = normalizer.flag("lowercase", bool(steps))
    pieces.strip_accents = normalizer.flag("strip_accents", None)
    decoders = json_steps(root, "decoder", "decoders")
    if [step.text("type") for step in decoders] != ["WordPiece"] or (
            decoders[0].text("prefix", "##") != pieces.continuing_prefix):
        source.notes.append("warning: the tokenizer's decoder is not WordPiece's; `tfm tokenize --decode` takes that")
    else:
        pieces.cleanup = decoders[0].flag("cleanup", True)
    read_added_tokens(root, pieces)
    read_post_processor(source, root, pieces)
    read_bert_options(source, pieces)
    return pieces


def read_vocab_txt(source):
    path = source.beside("vocab.txt")
    # Lines end as in Python's text files. U+0085, U+2028 and their like are characters of tokens.
    lines = source.text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    pieces = WordPiece(path, {text: number for number, text in enumerate(lines)}, [])
    unknown = special_tokens(source.optional_json("tokenizer_config.json"))
    pieces.unk_token = next((text for key, text, _ in unknown if key == "unk_token"), "[UNK]")
    read_bert_options(source, pieces)
    return pieces


def read_bert_options(source, pieces):
    """What tokenizer_config.json says of the normalizer, which transformers puts above tokenizer.json."""
    config = source.optional_json("tokenizer_config.json")
    pieces.lowercase = config.flag("do_lower_case", pieces.lowercase)
    pieces.chinese_chars = config.flag("tokenize_chinese_chars", pieces.chinese_chars)
    pieces.strip_accents = config.flag("strip_accents", pieces.strip_accents)
    if pieces.unk_token not in pieces.vocab:
        raise ConvertError("%s: the vocabulary lacks the token of what has no other, %s"
                           % (pieces.where, quote(pieces.unk_token)))
    if not 1 <= pieces.max_word_chars <= MAX_WORD_CHARS:
        raise ConvertError("%s: 'max_input_chars_per_word' is %d; 1 to %d are supported"
                           % (pieces.where, pieces.max_word_chars, MAX_WORD_CHARS))


# --- SentencePiece: tokenizer.json, or a model file of its own ---

SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
SPACE_PIECE = "\u2581"
# Types of pieces, as the model file has them; NONE is for tokens that aren't pieces of the model.
NONE, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)
UNKNOWN_SURFACE = " \u2047 ".encode()  # unless the model file has its own
METASPACE = ("", "never", "first", "always")
LEAD_KEPT, LEAD_DROPPED, LEADS_DROPPED, LEAD_TOKEN = range(4)  # what decoding drops at the beginning of a text


@dataclasses.dataclass
class SentencePiece(Bpe):
    """A SentencePiece tokenizer. `vocab` has every piece but those that `types` calls NONE."""
    kind: str = "unigram"
    library: str = "sentencepiece"  # whose rules it follows
    scores: List[float] = dataclasses.field(default_factory=list)  # by id
    types: List[int] = dataclasses.field(default_factory=list)
    rules: Dict[str, int] = dataclasses.field(default_factory=dict)  # what the metadata of these names say
    charsmap: bytes = b""
    unk_id: Optional[int] = None  # None: nothing is unknown, as all of the bytes have pieces
    # What unk_id is decoded to; None: its piece. Only sentencepiece's decoder puts a text of its own there; that of
    # tokenizers, whose rules a tokenizer.json follows, writes the piece.
    unk_surface: Optional[bytes] = None


def read_sentencepiece(source):
    """The SentencePiece tokenizer of a checkpoint, or None if it has none."""
    models = [name for name in SENTENCEPIECE_FILES if source.has(name)]
    pieces = None
    if source.has("tokenizer.json"):
        root = source.json(source.beside("tokenizer.json"))
        if not is_sentencepiece_json(root):
            return None
        try:
            pieces = read_sentencepiece_json(source, root)
        except ConvertError as error:
            if not models:
                raise
            source.notes.append("took the tokenizer from %s, as tokenizer.json can't be converted (%s)"
                                % (models[0], error))
    if pieces is None and models:
        pieces = read_sentencepiece_model(source, models[0])
    if pieces is not None:
        name_special_tokens(source, pieces)
    return pieces


# What the protocol buffers of a model file may have, by number: name, wire type, default.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MODEL_FIELDS = {1: ("pieces", BYTES), 2: ("trainer", BYTES), 3: ("normalizer", BYTES)}
PIECE_FIELDS = {1: ("piece", BYTES), 2: ("score", FIXED32), 3: ("type", VARINT)}
TRAINER_FIELDS = {3: ("model_type", VARINT), 24: ("treat_whitespace_as_suffix", VARINT), 35: ("byte_fallback", VARINT),
                  41: ("bos_id", VARINT), 42: ("eos_id", VARINT), 43: ("pad_id", VARINT), 44: ("unk_surface", BYTES)}
NORMALIZER_FIELDS = {2: ("precompiled_charsmap", BYTES), 3: ("add_dummy_prefix", VARINT),
                     4: ("remove_extra_whitespaces", VARINT), 5: ("escape_whitespaces", VARINT)}


def read_varint(data, at, end, where):
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise ConvertError("%s: is damaged: the number before byte %d doesn't end" % (where, at))
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            return value & (1 << 64) - 1, at


def parse_message(data, start, end, fields, where):
    """(name, value) of each known field in a protocol buffer; bytes are (start, end)."""
    at = start
    while at < end:
        key, at = read_varint(data, at, end, where)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = read_varint(data, at, end, where)
        elif wire in (BYTES, FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
            if wire == BYTES:
                size, at = read_varint(data, at, end, where)
            if size > end - at:
                raise ConvertError("%s: is damaged: %d bytes are announced at byte %d, where there are %d"
                                   % (where, size, at, end - at))
            value, at = (at, at + size), at + size
        else:
            raise ConvertError("%s: is no SentencePiece model: byte %d begins no known field" % (where, at))
        name, expected = fields.get(number, ("", wire))
        if wire != expected:
            raise ConvertError("%s: is no SentencePiece model: the field %r has the wire type %d, not %d"
                               % (where, name, wire, expected))
        if name:
            yield name, struct.unpack("<f", data[value[0]:at])[0] if wire == FIXED32 else value


def parse_pieces(data, spans, where):
    """(text, score, type) of every piece."""
    pieces = []
    for start, end in spans:
        piece = {"type": NORMAL, "score": 0.0, "piece": (start, start)}
        piece.update(parse_message(data, start, end, PIECE_FIELDS, where))
        try:
            text = data[slice(*piece["piece"])].decode("utf-8")
        except UnicodeDecodeError:
            raise ConvertError("%s: piece %d is not UTF-8 text" % (where, len(pieces)))
        if not text or not NORMAL <= piece["type"] <= BYTE or not math.isfinite(piece["score"]):
            raise ConvertError("%s: piece %d (%s, score %s, type %d) is not one of a SentencePiece model"
                               % (where, len(pieces), quote(text), piece["score"], piece["type"]))
        pieces.append((text, piece["score"], piece["type"]))
    return pieces


def read_sentencepiece_model(source, name):
    path = source.beside(name)
    file = source.open(path)
    data = file.read(0, file.size)
    found: Dict[str, List[Any]] = {"pieces": [], "trainer": [], "normalizer": []}
    for key, value in parse_message(data, 0, len(data), MODEL_FIELDS, path):
        found[key].append(value)
    trainer = {"model_type": 1, "byte_fallback": 0, "treat_whitespace_as_suffix": 0, "bos_id": 1, "eos_id": 2}
    normalizer = {"precompiled_charsmap": (0, 0), "add_dummy_prefix": 1, "remove_extra_whitespaces": 1,
                  "escape_whitespaces": 1}
    for start, end in found["trainer"]:
        trainer.update(parse_message(data, start, end, TRAINER_FIELDS, path))
    for start, end in found["normalizer"]:
        normalizer.update(parse_message(data, start, end, NORMALIZER_FIELDS, path))
    if trainer["model_type"] not in (1, 2):
        raise ConvertError("%s: the model is of the type %d; only unigram (1) and BPE (2) are supported"
                           % (path, trainer["model_type"]))
    parsed = parse_pieces(data, found["pieces"], path)
    check_pieces(parsed, trainer["byte_fallback"], path)
    pieces = SentencePiece(path, {text: i for i, (text, _, _) in enumerate(parsed)}, [])
    pieces.kind = "unigram" if trainer["model_type"] == 1 else "spm_bpe"
    pieces.scores = [score for _, score, _ in parsed]
    pieces.types = [kind for _, _, kind in parsed]
    pieces.unk_id = pieces.types.index(UNKNOWN)
    pieces.unk_surface = data[slice(*trainer["unk_surface"])] if "unk_surface" in trainer else UNKNOWN_SURFACE
    pieces.charsmap = data[slice(*normalizer["precompiled_charsmap"])]
    dummy, extra = bool(normalizer["add_dummy_prefix"]), bool(normalizer["remove_extra_whitespaces"])
    pieces.rules = {"byte_fallback": bool(trainer["byte_fallback"]),
                    "add_dummy_prefix": dummy * (2 if trainer["treat_whitespace_as_suffix"] else 1),
                    "remove_extra_whitespaces": extra, "escape_whitespaces": bool(normalizer["escape_whitespaces"]),
                    "decode_lead": LEADS_DROPPED if extra else LEAD_DROPPED if dummy else LEAD_KEPT}
    dress_pieces(source, pieces, trainer, name)
    return pieces


def check_pieces(parsed, byte_fallback, path):
    """What SentencePiece demands of a vocabulary, too."""
    seen = set()
    for text, _, _ in parsed:
        if text in seen:
            raise ConvertError("%s: the piece %s is there twice" % (path, quote(text)))
        seen.add(text)
    kinds = [kind for _, _, kind in parsed]
    if kinds.count(UNKNOWN) != 1:
        raise ConvertError("%s: has %d pieces for what is unknown, not one" % (path, kinds.count(UNKNOWN)))
    for text, _, kind in parsed:
        if kind in (UNKNOWN, CONTROL) and len(text) == 1:
            raise ConvertError("%s: the control piece %s is a single character, which is not supported"
                               % (path, quote(text)))
    check_byte_pieces([text for text, _, kind in parsed if kind == BYTE], byte_fallback, path)


def byte_piece(byte):
    return "<0x%02X>" % byte


def check_byte_pieces(found, byte_fallback, path):
    missing = sorted({byte_piece(byte) for byte in range(256)} - set(found))
    others = sorted(set(found) - {byte_piece(byte) for byte in range(256)})
    if others or byte_fallback and missing:
        raise ConvertError("%s: the pieces for bytes are not <0x00> to <0xFF>: %s"
                           % (path, "there is no " + missing[0] if missing else "there is " + quote(others[0])))


def dress_pieces(source, pieces, trainer, name):
    """What transformers' class for the tokenizer adds to the model file: ids, tokens, and what stands around a text."""
    kind = source.optional_json("tokenizer_config.json").text("tokenizer_class", "")
    kind = kind[:-4] if kind.endswith("Fast") else kind
    model_type = source.optional_json("config.json").text("model_type", "")
    if not kind:
        kind = {"spiece.model": "T5Tokenizer", "sentencepiece.bpe.model": "XLMRobertaTokenizer"}.get(
            name, "GemmaTokenizer" if model_type.startswith("gemma") else "LlamaTokenizer")
    controls = [text for text in pieces.vocab if pieces.types[pieces.vocab[text]] in (UNKNOWN, CONTROL)]
    by_id = {number: text for text, number in pieces.vocab.items()}
    roles = {"bos_token": by_id.get(trainer["bos_id"]), "eos_token": by_id.get(trainer["eos_id"]),
             "unk_token": by_id[pieces.unk_id]}
    roles = {role: text for role, text in roles.items() if text in controls}
    if kind in ("T5Tokenizer", "MT5Tokenizer"):
        roles.pop("bos_token", None)
    elif kind == "XLMRobertaTokenizer":
        shift_ids(pieces)
        controls += ["<pad>", "<mask>"]
        roles.update(pad_token="<pad>", mask_token="<mask>")
    elif kind not in ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer"):
        raise ConvertError("%s: the tokenizer is a %s, which is not supported; a tokenizer.json may be"
                           % (pieces.where, quote(kind)))
    flags = {"<mask>": ADDED_FLAGS["special"] | ADDED_FLAGS["lstrip"]}
    for text in controls:
        pieces.add(text, flags.get(text, ADDED_FLAGS["special"]))
    pieces.named = {role: pieces.id_of(text) for role, text in roles.items()}
    add_listed_tokens(source, pieces, kind)
    around_text(source, pieces, kind)


def shift_ids(pieces):
    """The ids of XLM-R, which fairseq gave it: those of the model file, one higher, but for the first ones."""
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    by_id = sorted(pieces.vocab, key=lambda text: pieces.vocab[text])
    if by_id[:3] != ["<unk>", "<s>", "</s>"]:
        raise ConvertError("%s: the first pieces of XLM-R should be <unk>, <s> and </s>, not %s"
                           % (pieces.where, listing(by_id[:3])))
    if "<pad>" in pieces.vocab or "<mask>" in pieces.vocab:
        raise ConvertError("%s: XLM-R's own <pad> and <mask> are pieces of the model" % pieces.where)
    pieces.types = [CONTROL, NONE, CONTROL, UNKNOWN] + pieces.types[3:] + [NONE]
    pieces.scores = [0.0] * 4 + pieces.scores[3:] + [0.0]
    pieces.vocab = {text: i for i, text in enumerate(first + by_id[3:] + ["<mask>"])}
    pieces.unk_id = 3


def add_listed_tokens(source, pieces, kind):
    """The tokens that the files beside the model have, and T5's <extra_id_N>."""
    config = source.optional_json("tokenizer_config.json")
    if kind in ("T5Tokenizer", "MT5Tokenizer"):
        n = config.integer("extra_ids", 100)
        if not 0 <= n <= 100000:
            raise ConvertError("%s: 'extra_ids' should be from 0 to 100000, not %d" % (config.where, n))
        first = len(pieces.types)
        for i in range(n):
            pieces.add("<extra_id_%d>" % i, ADDED_FLAGS["special"], pieces.id_of("<extra_id_%d>" % i) or first + n - 1 - i)
    decoder = config.object("added_tokens_decoder", None)
    if decoder is not None:
        for key in decoder.values:
            fields = decoder.object(key)
            pieces.add(fields.text("content"), added_flags(fields), parse_id(key, decoder.where))
    else:
        added = source.optional_json("added_tokens.json")
        for text in added.values:
            flags = pieces.added[text][1] if text in pieces.added else ADDED_FLAGS["normalized"]
            pieces.add(text, flags, added.integer(text))


def around_text(source, pieces, kind):
    """What the tokenizer's class puts around a text."""
    config = source.optional_json("tokenizer_config.json")
    bos, eos = pieces.named.get("bos_token"), pieces.named.get("eos_token")
    with_bos = kind != "T5Tokenizer" and kind != "MT5Tokenizer"
    with_eos = not kind.startswith(("Llama", "Gemma", "CodeLlama"))
    if kind.startswith(("Llama", "Gemma", "CodeLlama")):
        with_bos = config.flag("add_bos_token", True)
        with_eos = config.flag("add_eos_token", False)
    pieces.prefix_ids = [bos] if with_bos and bos is not None else []
    pieces.suffix_ids = [eos] if with_eos and eos is not None else []
    if with_eos and eos is not None and not kind.startswith(("Llama", "Gemma", "CodeLlama")):
        pieces.pair_ids = [eos, eos] if with_bos else [eos]


def name_special_tokens(source, pieces):
    """The roles that tokenizer_config.json and special_tokens_map.json give to tokens, and the tokens that they add."""
    config = source.optional_json("tokenizer_config.json")
    names = dict(source.optional_json("special_tokens_map.json").values)
    names.update(config.values)
    for key, text, flags in special_tokens(Fields(names, source.beside("tokenizer_config.json"))):
        if pieces.id_of(text) is None or text in pieces.added:
            if text in pieces.added:
                pieces.added[text][1] |= ADDED_FLAGS["special"]
            else:
                pieces.add(text, flags)
        else:
            pieces.add(text, flags, pieces.id_of(text))
        if key:
            pieces.named[key] = pieces.id_of(text)


# --- SentencePiece as tokenizer.json has it ---

def is_sentencepiece_json(root):
    model = root.object("model")
    if model.text("type", "BPE") == "Unigram":
        return True
    steps = json_steps(root, "pre_tokenizer", "pretokenizers") + json_steps(root, "decoder", "decoders")
    normalizers = json_steps(root, "normalizer", "normalizers")
    kinds = [step.text("type") for step in steps]
    return model.text("type", "BPE") == "BPE" and "ByteLevel" not in kinds and (
        "Metaspace" in kinds or any(SPACE_PIECE in step.values.values() for step in normalizers))


def json_steps(root, key, steps_key):
    """The steps of a part of tokenizer.json, those within sequences among them."""
    step = root.object(key, None)
    steps = [] if step is None else [step]
    while any(step.text("type") == "Sequence" for step in steps):
        inner = []
        for step in steps:
            items = step.list(steps_key) if step.text("type") == "Sequence" else [step.values]
            inner += [Fields(item if isinstance(item, dict) else {}, step.where) for item in items]
        steps = inner
    return steps


def pattern_of(step):
    """A step's pattern, as ("String" or "Regex", text)."""
    pattern = step.object("pattern")
    return next(((kind, pattern.text(kind)) for kind in ("String", "Regex") if kind in pattern.values), ("", ""))


def read_sentencepiece_json(source, root):
    path = root.where
    model = root.object("model")
    is_unigram = model.text("type", "BPE") == "Unigram"
    pieces = SentencePiece(path, {}, [], kind="unigram" if is_unigram else "spm_bpe", library="tokenizers")
    if is_unigram:
        parse_unigram(model, pieces)
    else:
        parse_sentencepiece_bpe(model, pieces)
    parse_normalizer(root, pieces)
    parse_pre_tokenizer(root, pieces)
    parse_decoder(root, pieces)
    for token in root.list("added_tokens", []):
        fields = Fields(token if isinstance(token, dict) else {}, path + ": 'added_tokens'")
        text, flags = fields.text("content"), added_flags(fields)
        pieces.add(text, flags, fields.integer("id"))
    read_post_processor(source, root, pieces)
    return pieces


def parse_unigram(model, pieces):
    if model.integer("unk_id", None) is None:
        raise ConvertError("%s: a Unigram model without 'unk_id' is not supported" % model.where)
    pieces.unk_id = model.integer("unk_id")
    for i, item in enumerate(model.list("vocab")):
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and item[0]
                and type(item[1]) in (int, float) and math.isfinite(item[1])):
            raise ConvertError("%s: piece %d should be a text and its score, not %s" % (model.where, i, quote(item)))
        pieces.vocab[item[0]] = i  # of those that are there twice, the last counts
        pieces.scores.append(float(item[1]))
    if not 0 <= pieces.unk_id < len(pieces.scores):
        raise ConvertError("%s: 'unk_id' is %d, which no piece has" % (model.where, pieces.unk_id))
    use_byte_fallback(model, pieces)


def parse_sentencepiece_bpe(model, pieces):
    check_bpe_options(model, pieces)
    if model.flag("ignore_merges", False):
        raise ConvertError("%s: 'ignore_merges' is not supported without ByteLevel" % model.where)
    pieces.vocab = dict(parse_vocab(model.object("vocab")))
    pieces.merges = [parse_merge(merge, "%s: merge %d" % (model.where, i))
                     for i, merge in enumerate(model.list("merges"))]
    if not pieces.merges:
        raise ConvertError("%s: there are no merges" % model.where)
    pieces.fuse_unk = model.flag("fuse_unk", False)
    unknown = model.text("unk_token", None)
    if unknown is not None and unknown not in pieces.vocab:
        raise ConvertError("%s: 'unk_token', %s, is not in the vocabulary" % (model.where, quote(unknown)))
    pieces.unk_id = pieces.vocab.get(unknown)
    use_byte_fallback(model, pieces)
    if unknown is None and not pieces.rules["byte_fallback"]:
        raise ConvertError("%s: without 'unk_token', 'byte_fallback' and a piece for every byte, characters that have "
                           "no piece would vanish, which is not supported" % model.where)


def use_byte_fallback(model, pieces):
    """Types for all, and byte fallback, which tokenizers falls back on only with all the pieces for bytes."""
    found = [text for text in map(byte_piece, range(256)) if text in pieces.vocab]
    fallback = model.flag("byte_fallback", False)
    if fallback and len(found) not in (0, 256):
        check_byte_pieces(found, True, model.where)
    pieces.rules["byte_fallback"] = fallback and len(found) == 256
    pieces.types = [NONE] * (1 + max(pieces.vocab.values()))
    for number in pieces.vocab.values():
        pieces.types[number] = NORMAL
    for text in found:
        if pieces.rules["byte_fallback"]:
            pieces.types[pieces.vocab[text]] = BYTE
    if pieces.unk_id is not None:
        pieces.types[pieces.unk_id] = UNKNOWN


def parse_normalizer(root, pieces):
    """The steps that SentencePiece's models have, in the order in which they have them."""
    order = ["Precompiled", "Strip", "squeeze", "Prepend", "spaces"]
    done = -1
    for step in json_steps(root, "normalizer", "normalizers"):
        kind = step.text("type")
        if kind == "Replace":
            what = (*pattern_of(step), step.text("content"))
            if what == ("String", " ", SPACE_PIECE):
                kind = "spaces"
            elif what[:2] == ("Regex", " {2,}") and what[2] in (" ", SPACE_PIECE):
                kind = "squeeze"
        if kind not in order or order.index(kind) <= done:
            raise ConvertError("%s: the normalizer %s is not supported %s"
                               % (root.where, quote(kind), "there" if kind in order else "for SentencePiece's models"))
        done = order.index(kind)
        if kind == "Precompiled":
            pieces.charsmap = decode_base64(step, "precompiled_charsmap")
        elif kind == "Strip":
            pieces.rules["strip"] = step.flag("strip_left") + 2 * step.flag("strip_right")
        elif kind == "squeeze":
            pieces.rules["squeeze_spaces"] = 1 if step.text("content") == " " else 2
        elif kind == "spaces":
            pieces.rules["replace_spaces"] = 1
        elif step.text("prepend") != SPACE_PIECE or "strip" in pieces.rules:
            raise ConvertError("%s: the normalizer 'Prepend' should put %s in front, and not after 'Strip'"
                               % (root.where, quote(SPACE_PIECE)))
        else:
            pieces.rules["prepend"] = 1


def decode_base64(step, key):
    try:
        return base64.b64decode(step.text(key, ""), validate=True)
    except ValueError:
        raise ConvertError("%s: %r is not base64" % (step.where, key))


def parse_pre_tokenizer(root, pieces):
    steps = json_steps(root, "pre_tokenizer", "pretokenizers")
    kinds = [step.text("type") for step in steps]
    if kinds == ["Split"] and pieces.rules.get("replace_spaces") and pattern_of(steps[0]) == ("String", " "):
        kinds = []  # there is no space left where it could split
    if kinds not in ([], ["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
        raise ConvertError("%s: the pre-tokenizer %s is not supported for SentencePiece's models"
                           % (root.where, listing(kinds)))
    if not kinds:
        return
    step = steps[-1]
    scheme = step.text("prepend_scheme", "always" if step.flag("add_prefix_space", True) else "never")
    if step.text("replacement") != SPACE_PIECE or scheme not in METASPACE[1:]:
        raise ConvertError("%s: the pre-tokenizer 'Metaspace' with %s and %s is not supported"
                           % (root.where, quote(step.text("replacement")), quote(scheme)))
    pieces.rules["metaspace"] = METASPACE.index(scheme)
    pieces.rules["split_words"] = step.flag("split", True)
    pieces.rules["split_whitespace"] = len(kinds) == 2


def parse_decoder(root, pieces):
    steps = json_steps(root, "decoder", "decoders")
    kinds = [step.text("type") for step in steps]
    if kinds == ["Metaspace"]:
        scheme = steps[0].text("prepend_scheme", "always" if steps[0].flag("add_prefix_space", True) else "never")
        pieces.rules["decode_lead"] = LEAD_KEPT if scheme == "never" else LEAD_TOKEN
    elif kinds and kinds[0] == "Replace" and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        pieces.rules["decode_lead"] = LEAD_DROPPED if "Strip" in kinds else LEAD_KEPT
    else:
        raise ConvertError("%s: the decoder %s is not supported for SentencePiece's models"
                           % (root.where, listing(kinds) or "null"))


# --- special tokens: tokenizer_config.json, special_tokens_map.json, added_tokens.json ---

def read_special_tokens(source, bpe, family, vocab_size):
    """Adds what the files beside the vocabulary say, as transformers does."""
    config = source.optional_json("tokenizer_config.json")
    if bpe.pattern == "gpt2":
        bpe.add_prefix_space = config.flag("add_prefix_space", bpe.add_prefix_space)
    decoder = config.object("added_tokens_decoder", None)
    names = dict(config.values)
    if decoder is None:
        names.update(source.optional_json("special_tokens_map.json").values)
    names = Fields(names, source.beside("tokenizer_config.json or special_tokens_map.json"))
    special = special_tokens(names)
    if decoder is not None:
        for key in decoder.values:
            fields = decoder.object(key)
            bpe.add(fields.text("content"), added_flags(fields), parse_id(key, decoder.where))
    else:
        texts = [text for _, text, _ in special]
        added = source.optional_json("added_tokens.json")
        for text in added.values:
            bpe.add(text, ADDED_FLAGS["special" if text in texts else "normalized"], added.integer(text))
    for key, text, flags in special + default_special_tokens(source, bpe, family, names, vocab_size):
        if text in bpe.added:
            bpe.added[text][1] |= ADDED_FLAGS["special"]
        else:
            bpe.add(text, flags)
        if key:
            bpe.named[key] = bpe.id_of(text)


def special_tokens(names):
    """(key, text, flags) of every token with a role ("eos_token") and of those with none (key "")."""
    found = [(key, value) for key, value in names.values.items()
             if key.endswith("_token") and isinstance(value, (str, dict))]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = names.get(key, (list, dict), "a list", [])
        found += [("", value) for value in (extra.values() if isinstance(extra, dict) else extra)]
    special = []
    for key, value in found:
        if not isinstance(value, (str, dict)):
            raise ConvertError("%s: a special token should be a string or an object, not %s"
                               % (names.where, quote(value)))
        fields = Fields({"content": value} if isinstance(value, str) else value, names.where)
        flags = added_flags(fields, is_special=True)
        if fields.text("content"):
            special.append((key, fields.text("content"), flags))
    return special


BERT_TOKENS = {key + "_token": "[%s]" % key.upper() for key in ("unk", "sep", "pad", "cls", "mask")}
ROBERTA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
                  "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
CLASS_TOKENS = {"BertTokenizer": BERT_TOKENS, "DistilBertTokenizer": BERT_TOKENS, "ElectraTokenizer": BERT_TOKENS,
                "RobertaTokenizer": ROBERTA_TOKENS}


def default_special_tokens(source, bpe, family, names, vocab_size):
    """The roles that the tokenizer's class gives to tokens where the files are silent."""
    kind = names.text("tokenizer_class", "") or usual_class(source, bpe, family)
    kind = kind[:-4] if kind.endswith("Fast") else kind
    roles = CLASS_TOKENS.get(kind, {})
    if family.special_token and kind == family.tokenizer_class:
        roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), family.special_token)
    # A vocabulary of its own, without such a token, would get it as an id that the model hasn't.
    return [(key, text, ADDED_FLAGS["special"] | (ADDED_FLAGS["lstrip"] if text == "<mask>" else 0))
            for key, text in roles.items()
            if key not in names.values and (bpe.id_of(text) is not None or bpe.next_id() < vocab_size)]


def usual_class(source, bpe, family):
    """The tokenizer's class where no file names it."""
    if isinstance(bpe, WordPiece):
        return "BertTokenizer"
    is_roberta = source.optional_json("config.json").text("model_type", "") == "roberta"
    return "RobertaTokenizer" if is_roberta else family.tokenizer_class


def added_flags(fields, is_special=False):
    is_special = is_special or fields.flag("special", False)
    flags = {key: fields.flag(key, False) for key in ("lstrip", "rstrip", "single_word")}
    flags.update(special=is_special, normalized=fields.flag("normalized", not is_special))
    return sum(ADDED_FLAGS[key] for key, value in flags.items() if value)


def parse_id(text, where):
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise ConvertError("%s: %s should be a token id" % (where, quote(text)))
    return int(text)


# --- the tokenizer of a .gguf file ---

# What llama.cpp calls pre-tokenizers, by the name that their patterns have here.
GGUF_NAMES = {
    "gpt2": ("gpt-2", "phi-2", "mpt", "olmo", "jais"),
    "llama3": ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "stablelm2"),
    "smollm": ("smollm", "starcoder", "refact", "command-r", "codeshell"),
}
GGUF_PATTERNS = {theirs: ours for ours, names in GGUF_NAMES.items() for theirs in names}


def read_gguf_tokenizer(config, notes, vocab_size):
    """The tokenizer in a .gguf file's metadata, or None."""
    kind = config.text("tokenizer.ggml.model", "no_vocab")
    pattern = config.text("tokenizer.ggml.pre", "gpt-2")
    lacking = ("there is none in the file" if kind == "no_vocab" else
               "its kind, %s, is not supported" % quote(kind) if kind not in ("gpt2", "llama") else
               "its pre-tokenizer, %s, is not supported" % quote(pattern)
               if kind == "gpt2" and pattern not in GGUF_PATTERNS else None)
    if lacking is not None:
        notes.append("warning: converted without a tokenizer: " + lacking)
        return None
    bpe = gguf_bpe(config) if kind == "gpt2" else gguf_pieces(config)
    bpe.check_ids(vocab_size)
    return bpe


def gguf_bpe(config):
    tokens, types = gguf_tokens(config)
    merges = [parse_merge(merge, "%s: merge %d" % (config.where, i))
              for i, merge in enumerate(config.texts("tokenizer.ggml.merges"))]
    own = (CONTROL, USER_DEFINED, UNUSED)
    bpe = Bpe(config.where, {text: i for i, text in enumerate(tokens) if types[i] not in own}, merges)
    name = config.text("tokenizer.ggml.pre", "gpt-2")
    bpe.pattern = GGUF_PATTERNS[name]
    bpe.nfc = name in ("qwen2", "mpt", "olmo")  # what the file doesn't say, but the tokenizer it was made of does
    bpe.ignore_merges = name in ("llama-bpe", "llama3", "llama-v3", "falcon3")
    for number, (text, kind) in enumerate(zip(tokens, types)):
        if kind in (CONTROL, USER_DEFINED):
            bpe.add(text, ADDED_FLAGS["special"] if kind == CONTROL else 0, number)
    add_gguf_roles(config, bpe, len(tokens), adds_bos=name in ("llama-bpe", "llama3", "llama-v3", "falcon3"))
    return bpe


def gguf_pieces(config):
    """A SentencePiece model of the kind BPE, as llama.cpp keeps it: types of tokens are those of pieces."""
    tokens, types = gguf_tokens(config)
    scores = config.list("tokenizer.ggml.scores")
    if len(scores) != len(tokens) or not all(type(score) is float and math.isfinite(score) for score in scores):
        raise ConvertError("%s: 'tokenizer.ggml.scores' should have a number for each of %d tokens"
                           % (config.where, len(tokens)))
    if not all(NORMAL <= kind <= BYTE for kind in types) or not all(tokens):
        raise ConvertError("%s: the tokens are not those of a SentencePiece model" % config.where)
    check_pieces(list(zip(tokens, scores, types)), BYTE in types, config.where)
    pieces = SentencePiece(config.where, {text: i for i, text in enumerate(tokens)}, [], kind="spm_bpe")
    pieces.scores, pieces.types, pieces.unk_id = scores, types, types.index(UNKNOWN)
    dummy = config.flag("tokenizer.ggml.add_space_prefix", True)
    extra = config.flag("tokenizer.ggml.remove_extra_whitespaces", False)
    pieces.rules = {"byte_fallback": BYTE in types, "add_dummy_prefix": int(dummy), "remove_extra_whitespaces": extra,
                    "escape_whitespaces": True,
                    "decode_lead": LEADS_DROPPED if extra else LEAD_DROPPED if dummy else LEAD_KEPT}
    for number, (text, kind) in enumerate(zip(tokens, types)):
        if kind in (UNKNOWN, CONTROL):
            pieces.add(text, ADDED_FLAGS["special"], number)
    add_gguf_roles(config, pieces, len(tokens), adds_bos=True)
    return pieces


def gguf_tokens(config):
    tokens = config.texts("tokenizer.ggml.tokens")
    types = config.list("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens) or not all(type(kind) is int for kind in types):
        raise ConvertError("%s: 'tokenizer.ggml.token_type' should have a type for each of %d tokens"
                           % (config.where, len(tokens)))
    return tokens, types


def add_gguf_roles(config, bpe, n_tokens, adds_bos):
    """Which tokens have a role, and what stands around a text."""
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("mask", "mask")):
        number = config.integer("tokenizer.ggml.%s_token_id" % key, -1)
        if 0 <= number < n_tokens:
            bpe.named[role + "_token"] = number
    for role, default, affix in (("bos", adds_bos, bpe.prefix_ids), ("eos", False, bpe.suffix_ids)):
        if config.flag("tokenizer.ggml.add_%s_token" % role, default) and role + "_token" in bpe.named:
            affix.append(bpe.named[role + "_token"])


# ---------------------------------------------------------------------------------------------------------------------
# Writing .tfm: header, metadata, tensor directory, tensors. All numbers are little-endian.
# ---------------------------------------------------------------------------------------------------------------------

MAGIC = b"TFMH\r\n\x1a\n"
VERSION = 1
HEADER_SIZE = 64
ALIGNMENT = 64  # of every tensor
TARGET_DTYPES = {"F32": 1, "F16": 2, "BF16": 3}
# Blocks are copied as they are; their code is 16 and GGUF's own.
TARGET_DTYPES.update({"Q4_0": 18, "Q4_1": 19, "Q5_0": 22, "Q5_1": 23, "Q8_0": 24, "Q4_K": 28, "Q5_K": 29, "Q6_K": 30})
LAYOUTS = {"rows": 0, "cols": 1}


def padded(data, alignment=8):
    return data + bytes(-len(data) % alignment)


class Metadata:
    """Typed values by key, in the order in which they are put."""
    I64, F64, TEXT, BYTES, I32, F32 = 1, 2, 3, 4, 5, 6

    def __init__(self):
        self.entries = []

    def put(self, key, kind, value):
        self.entries.append(struct.pack("<IIQ", len(key), kind, len(value)) + padded(key.encode()) + padded(value))

    def text(self, key, value):
        self.put(key, self.TEXT, value.encode("utf-8", "replace"))

    def bytes(self, key, value):
        self.put(key, self.BYTES, value)

    def i64(self, key, *values):
        self.put(key, self.I64, struct.pack("<%dq" % len(values), *values))

    def f64(self, key, values):
        self.put(key, self.F64, struct.pack("<%dd" % len(values), *values))

    def i32(self, key, values):
        self.put(key, self.I32, struct.pack("<%di" % len(values), *values))

    def f32(self, key, values):
        self.put(key, self.F32, struct.pack("<%df" % len(values), *values))

    def value(self, key, value):
        """By the type of the value; None is left out."""
        if isinstance(value, str):
            self.text(key, value)
        elif isinstance(value, int):  # flags, too
            self.i64(key, value)
        elif isinstance(value, float):
            self.f64(key, [value])
        elif isinstance(value, array.array):
            self.f32(key, value)
        elif value is not None:
            if isinstance(value[0], int):
                self.i64(key, *value)
            else:
                self.f64(key, value)

    def pack(self):
        return b"".join(self.entries)


def put_model(metadata, model):
    metadata.text("model.kind", model.kind)
    for key in MODEL_KEYS:
        metadata.value(key, getattr(model, key))
    for prefix, stack in model.stacks.items():
        for field in dataclasses.fields(stack):
            metadata.value("%s.%s" % (prefix, field.name), getattr(stack, field.name))


def put_sentencepiece(metadata, pieces):
    tokens = token_bytes(pieces, {})
    types = pieces.types + [NONE] * (len(tokens) - len(pieces.types))
    metadata.text("tokenizer.kind", pieces.kind)
    metadata.text("tokenizer.rules", pieces.library)
    metadata.bytes("tokenizer.tokens", b"".join(tokens))
    metadata.i32("tokenizer.token_sizes", [len(token) for token in tokens])
    metadata.i32("tokenizer.types", types)
    if pieces.library == "tokenizers" and pieces.kind == "unigram":
        metadata.f64("tokenizer.scores", pieces.scores + [0.0] * (len(tokens) - len(pieces.scores)))
    elif pieces.scores:
        metadata.f32("tokenizer.scores", pieces.scores + [0.0] * (len(tokens) - len(pieces.scores)))
    if pieces.kind == "unigram":
        used = (NORMAL, USER_DEFINED) if pieces.library == "sentencepiece" else range(NORMAL, BYTE + 1)
        metadata.i32("tokenizer.sorted", sorted((number for number in pieces.vocab.values() if types[number] in used),
                                                key=lambda number: tokens[number]))
    elif pieces.merges:
        metadata.i32("tokenizer.merges", merge_ids(pieces))
        metadata.i64("tokenizer.fuse_unk", pieces.fuse_unk)
    if pieces.charsmap:
        check_charsmap(pieces)
        metadata.bytes("tokenizer.charsmap", pieces.charsmap)
    for key, value in sorted(pieces.rules.items()):
        metadata.i64("tokenizer." + key, value)
    metadata.i64("tokenizer.unk_id", pieces.unk_id or 0)  # the file has one, even if it can't come up
    if pieces.unk_surface is not None:
        metadata.bytes("tokenizer.unk_surface", pieces.unk_surface)
    put_around(metadata, pieces)


def check_charsmap(pieces):
    """That it is what tfm.h reads: a trie, all of whose values lead to texts that end. See there."""
    data = pieces.charsmap
    size = struct.unpack_from("<I", data)[0] if len(data) > 4 else 0
    if size == 0 or size % 4 or size > len(data) - 5 or data[-1] != 0:
        raise ConvertError("%s: the charsmap of %d bytes is not a trie of %d and texts" % (pieces.where, len(data), size))
    units, texts = struct.unpack_from("<%dI" % (size // 4), data, 4), data[4 + size:]
    if max(map(len, texts.split(b"\0"))) > MAX_RULE_SIZE:
        raise ConvertError("%s: the charsmap has a text of more than %d bytes" % (pieces.where, MAX_RULE_SIZE))
    for node, unit in enumerate(units):
        if unit >> 31 == 0 and unit >> 8 & 1:
            leaf = node ^ unit >> 10 << (unit >> 6 & 8)
            value = units[leaf] if leaf < len(units) else 0
            if value >> 31 == 0 or value & 0x7FFFFFFF >= len(texts):
                raise ConvertError("%s: the charsmap's node %d leads to no text" % (pieces.where, node))


def put_wordpiece(metadata, pieces):
    tokens = token_bytes(pieces, {})
    metadata.text("tokenizer.kind", "wordpiece")
    metadata.bytes("tokenizer.tokens", b"".join(tokens))
    metadata.i32("tokenizer.token_sizes", [len(token) for token in tokens])
    metadata.text("tokenizer.continuing_prefix", pieces.continuing_prefix)
    metadata.i64("tokenizer.max_word_chars", pieces.max_word_chars)
    for key in ("clean_text", "chinese_chars", "lowercase", "cleanup"):
        metadata.i64("tokenizer." + key, getattr(pieces, key))
    metadata.i64("tokenizer.strip_accents",
                 pieces.lowercase if pieces.strip_accents is None else pieces.strip_accents)
    metadata.i64("tokenizer.unk_id", pieces.vocab[pieces.unk_token])
    for text in pieces.added:
        if text not in pieces.vocab:
            pieces.added[text][1] |= OUTSIDE
    put_around(metadata, pieces)


def put_around(metadata, bpe):
    """What every kind of tokenizer may have."""
    metadata.i32("tokenizer.added", list(itertools.chain(*sorted(bpe.added.values()))))
    if bpe.prefix_ids:
        metadata.i32("tokenizer.prefix_ids", bpe.prefix_ids)
    if bpe.suffix_ids:
        metadata.i32("tokenizer.suffix_ids", bpe.suffix_ids)
    if bpe.pair_ids is not None:
        metadata.i32("tokenizer.pair_ids", bpe.pair_ids)
        metadata.i64("tokenizer.pair_type", bpe.pair_type)
    for role in ("bos", "eos", "pad", "mask"):
        if role + "_token" in bpe.named:
            metadata.i64("tokenizer.%s_id" % role, bpe.named[role + "_token"])


def put_tokenizer(metadata, bpe):
    if isinstance(bpe, SentencePiece):
        put_sentencepiece(metadata, bpe)
        return
    if isinstance(bpe, WordPiece):
        put_wordpiece(metadata, bpe)
        return
    alphabet = byte_alphabet()
    check_added_texts(bpe, alphabet)
    tokens = token_bytes(bpe, alphabet)
    metadata.text("tokenizer.kind", "byte_bpe")
    metadata.text("tokenizer.pattern", bpe.pattern)
    if bpe.nfc:
        metadata.i64("tokenizer.nfc", 1)
    metadata.bytes("tokenizer.tokens", b"".join(tokens))
    metadata.i32("tokenizer.token_sizes", [len(token) for token in tokens])
    metadata.i32("tokenizer.merges", merge_ids(bpe))
    ids = {byte: bpe.vocab.get(character, -1) for character, byte in alphabet.items()}
    metadata.i32("tokenizer.byte_ids", [ids[byte] for byte in range(256)])
    metadata.i64("tokenizer.add_prefix_space", bpe.add_prefix_space)
    metadata.i64("tokenizer.ignore_merges", bpe.ignore_merges)
    put_around(metadata, bpe)
    # Not the unk_token that the Python classes name: BPE itself knows none unless its model says so.
    if bpe.vocab.get(bpe.unk_token) is not None:
        metadata.i64("tokenizer.unk_id", bpe.vocab[bpe.unk_token])
        metadata.i64("tokenizer.fuse_unk", bpe.fuse_unk)


def check_added_texts(bpe, alphabet):
    """Refuses an added token such as "é" that to BPE is the byte E9: tokenizers finds either, but in the file a token
    has one text."""
    made = set(alphabet).union(left + right for left, right in bpe.merges)
    for text, (number, _) in bpe.added.items():
        is_made = text in bpe.vocab and (text in made or bpe.ignore_merges)
        if is_made and not text.isascii() and all(character in alphabet for character in text):
            raise ConvertError("%s: the added token %s has the id %d of the vocabulary's token for other bytes, %s; "
                               "one id for two texts is not supported"
                               % (bpe.where, quote(text), number, " ".join("%02X" % alphabet[c] for c in text)))


def token_bytes(bpe, alphabet):
    """Every token's bytes in the order of ids."""
    tokens = [b""] * (1 + max([-1, *bpe.vocab.values(), *(number for number, _ in bpe.added.values())]))
    try:
        for text, number in bpe.vocab.items():
            in_alphabet = all(character in alphabet for character in text)
            tokens[number] = bytes(alphabet[c] for c in text) if in_alphabet else text.encode("utf-8")
        for text, (number, _) in bpe.added.items():
            tokens[number] = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConvertError("%s: the token %s is not valid Unicode" % (bpe.where, quote(text)))
    for number in [number for number, _ in bpe.added.values()] if alphabet else range(len(tokens)):
        if len(tokens[number]) > MAX_TOKEN_SIZE:
            raise ConvertError("%s: the token %d, %s, has %d bytes; at most %d are supported" % (
                bpe.where, number, quote(tokens[number].decode(), 40), len(tokens[number]), MAX_TOKEN_SIZE))
    return tokens


def merge_ids(bpe):
    """Left, right and merged id of every merge, by rank. (Of a pair that is there twice, the last rank counts.)"""
    ranked: Dict[Tuple[str, str], None] = {}
    for pair in bpe.merges:
        ranked.pop(pair, None)
        ranked[pair] = None
    ids = []
    for left, right in ranked:
        for text in (left, right, left + right):
            if text not in bpe.vocab:
                raise ConvertError("%s: the merge of %s and %s needs the token %s, which is not in the vocabulary"
                                   % (bpe.where, quote(left), quote(right), quote(text)))
            ids.append(bpe.vocab[text])
    return ids


# What only the templates of one kind of chat have in them, in the order in which they are tried.
CHAT_TEMPLATES = (
    ("chatml", (r"<\|im_start\|>", r"<\|im_end\|>")),
    ("llama3", (r"<\|start_header_id\|>", r"<\|eot_id\|>")),
    ("gemma", ("<start_of_turn>", "<end_of_turn>")),
    ("llama2", (r"\[INST\]", r"\[/INST\]", "<<SYS>>")),
    ("mistral", (r"\[INST\]", r"\[/INST\]")),
    ("zephyr", (r"<\|user\|>(\\n|\n)['\"] *\+ *message\S* *\+ *eos_token", r"<\|assistant\|>")),
    ("phi3", (r"<\|user\|>(\\n|\n)['\"] *\+ *message\S* *\+ *['\"]<\|end\|>", r"<\|assistant\|>")),
)
# What the templates of other kinds have, too.
OTHER_CHATS = ("<|channel|>", "[SYSTEM_PROMPT]")
# DialoGPT's, which does not say who speaks.
NAMELESS_CHAT = r"\{% for message in messages %\}\{\{ ?message\S+ ?\}\}\{\{ ?eos_token ?\}\}\{% endfor %\}"


def chat_text(source, config):
    """The chat template as its files or the .gguf file have it, or None."""
    if config is not None:
        return config.text("tokenizer.chat_template", None)
    if source.has("chat_template.jinja"):
        return source.text(source.beside("chat_template.jinja"))
    value = source.optional_json("tokenizer_config.json").get("chat_template", (str, list), "a string or a list", None)
    if isinstance(value, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def chat_kind(source, text):
    """What tfm.h calls a chat template; None if it is an unknown one."""
    if not any(word in text for word in OTHER_CHATS):
        for kind, patterns in CHAT_TEMPLATES:
            if all(re.search(pattern, text) for pattern in patterns):
                return kind
        named = "User:" in text and "Assistant:" in text and not re.search(r"<\||\|>|\[/?[A-Z_]+\]|</?[a-z_]+>", text)
        if named or re.fullmatch(NAMELESS_CHAT, text.strip()):
            return "plain"
    source.notes.append("warning: the chat template is of no known kind (%s)"
                        % listing([kind for kind, _ in CHAT_TEMPLATES] + ["plain"]))
    return None


def chat_literal(pattern, text):
    """The group `text` of the first match, as Jinja reads what stands between quotes; None: there is no match."""
    found = re.search(pattern, text)
    return found["text"].replace("\\n", "\n") if found else None


def chatml_values(text):
    """The system prompt of a conversation without one (Qwen2, Qwen2.5, SmolLM2)."""
    pattern = r"""(?P<quote>['"])<\|im_start\|>system(\\n|\n)(?P<text>((?!(?P=quote))[^{}<])+)<\|im_end\|>"""
    return {"chat.system": chat_literal(pattern, text)}


def llama3_values(text):
    """The dates that stand before every system prompt, and without one, too (Llama 3.1 to 3.3)."""
    parts = (chat_literal(r'"(?P<text>Cutting Knowledge Date: [^"]*)"', text),
             chat_literal(r'"(?P<text>Today Date: )" *\+ *date_string', text),
             chat_literal(r'date_string *= *"(?P<text>[^"]*)"', text))
    if None in parts:
        return {}
    head = "<|start_header_id|>system<|end_header_id|>\n\n"
    return {"chat.before_system": head + "".join(parts) + "\n\n", "chat.system_always": 1}


def mistral_values(text):
    """The spaces around what is said, and where the system prompt stands, which differ between versions."""
    before = chat_literal(r"""(?P<quote>['"])(?P<text> ?\[INST\] ?)(?P=quote)""", text)
    after = chat_literal(r"""(?P<quote>['"])(?P<text> ?\[/INST\])(?P=quote)""", text)
    if before is None or after is None:
        return {}
    lead = chat_literal(r"""(?P<quote>['"])(?P<text> )(?P=quote) *\+ *message""", text)
    last = 1 if re.search(r"loop\.last and system_message", text) else None
    return {"chat.before_user": before, "chat.after_user": after, "chat.before_answer": lead or "",
            "chat.system_last": last}


CHAT_VALUES = {"chatml": chatml_values, "llama3": llama3_values, "mistral": mistral_values}


def put_chat(metadata, source, config):
    """The kind of the chat template, and in what it differs from others of that kind."""
    text = chat_text(source, config)
    kind = chat_kind(source, text) if text is not None else None
    metadata.value("chat.template", kind)
    if kind in CHAT_VALUES:
        for key, value in CHAT_VALUES[kind](text).items():
            metadata.value(key, value)


def end_ids(source, config, bpe, vocab_size):
    """The ids that end a generated text: generation_config.json's, else the configuration's, else the tokenizer's."""
    ids = source.optional_json("generation_config.json").ids("eos_token_id") or config.ids("eos_token_id")
    if not ids and bpe is not None and "eos_token" in bpe.named:
        ids = [bpe.named["eos_token"]]
    # Small models often keep GPT-2's 50256 in their configuration. It can't come up.
    outside = [number for number in ids if not 0 <= number < vocab_size]
    if outside:
        source.notes.append("warning: left out the end-of-text id %s, as the model has only %d tokens"
                            % (listing(outside), vocab_size))
    return [number for number in ids if number not in outside]


def start_id(source, config, vocab_size):
    """The id that an encoder-decoder's texts begin with: generation_config.json's, else the configuration's."""
    generation = source.optional_json("generation_config.json")
    for part, key in ((generation, "decoder_start_token_id"), (generation, "bos_token_id"),
                      (config, "decoder_start_token_id"), (config, "bos_token_id"), (config, "pad_token_id")):
        number = part.integer(key, None)
        if number is not None:
            if not 0 <= number < vocab_size:
                raise ConvertError("%s: %r should be the id of a token, 0 to %d, not %s"
                                   % (part.where, key, vocab_size - 1, quote(number)))
            return number
    return 0


def gguf_end_ids(config, vocab_size):
    """The ids that a .gguf file's metadata calls the end: of a text, of a turn, of a message."""
    ids = [config.integer("tokenizer.ggml.%s_token_id" % name, -1) for name in ("eos", "eot", "eom")]
    return [number for number in dict.fromkeys(ids) if 0 <= number < vocab_size]


class Piece(NamedTuple):
    """An entry with its place in the file."""
    entry: Entry
    offset: int
    size: int


def place(entries, start):
    """The entries one after another from `start` on, aligned."""
    pieces = []
    for entry in entries:
        start += -start % ALIGNMENT
        size = stored_size(entry.dtype, entry.count)
        pieces.append(Piece(entry, start, size))
        start += size
    return pieces


def pack_directory(pieces, checksums):
    packed = []
    for (entry, offset, size), checksum in zip(pieces, checksums):
        name = entry.name.encode()
        shape = list(entry.shape) + [1] * (4 - len(entry.shape))
        packed.append(struct.pack("<4I4QQQII", len(name), TARGET_DTYPES[entry.dtype], LAYOUTS[entry.layout],
                                  len(entry.shape), *shape, offset, size, checksum, 0) + padded(name))
    return b"".join(packed)


def pack_header(metadata, directory, n_tensors, file_size):
    header = struct.pack("<8sIIQQQQQI", MAGIC, VERSION, 0, file_size, HEADER_SIZE, len(metadata),
                         HEADER_SIZE + len(metadata), len(directory), n_tensors)
    return header + struct.pack("<I", zlib.crc32(header + metadata + directory))


def write_tfm(out, metadata, entries):
    """Writes the file and returns its size. The checksums are in front of the data, so the front is written last."""
    directory_size = len(pack_directory(place(entries, 0), [0] * len(entries)))
    pieces = place(entries, HEADER_SIZE + len(metadata) + directory_size)
    file_size = pieces[-1].offset + pieces[-1].size if pieces else HEADER_SIZE + len(metadata)
    try:
        with replaced(out) as file, Progress(file_size) as progress:
            checksums = [write_tensor(file, piece, progress) for piece in pieces]
            directory = pack_directory(pieces, checksums)
            file.seek(0)
            file.write(pack_header(metadata, directory, len(pieces), file_size) + metadata + directory)
    except OSError as error:
        raise ConvertError("%s: can't be written: %s" % (out, error.strerror))
    return file_size


def write_tensor(file, piece, progress):
    """Copies a tensor's data and returns its checksum."""
    file.seek(piece.offset)
    checksum = 0
    for part in piece.entry.parts:
        for chunk in part.chunks():
            if part.dtype != piece.entry.dtype:
                chunk = TO_F32[part.dtype](chunk)
            file.write(chunk)
            checksum = zlib.crc32(chunk, checksum)
            progress.add(len(chunk))
    return checksum


def f32_of_f64(chunk):
    """Little-endian f64 as f32, rounded to nearest."""
    wide = array.array("d", bytes(chunk))
    if sys.byteorder == "big":
        wide.byteswap()
    narrow = array.array("f", wide)
    if sys.byteorder == "big":
        narrow.byteswap()
    return memoryview(narrow).cast("B")


def f32_of_f16(chunk):
    count = len(chunk) // 2
    return struct.pack("<%df" % count, *struct.unpack("<%de" % count, chunk))


def f32_of_bf16(chunk):
    """The upper half of an f32."""
    wide = bytearray(2 * len(chunk))
    wide[2::4], wide[3::4] = chunk[::2], chunk[1::2]
    return wide


TO_F32 = {"F64": f32_of_f64, "F16": f32_of_f16, "BF16": f32_of_bf16}


@contextlib.contextmanager
def replaced(path):
    """A file for writing that takes the place of `path` at the end, or vanishes on any failure."""
    temporary = os.path.join(os.path.dirname(path), ".convert-%s.tmp" % os.urandom(8).hex())
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


class Progress:
    """A line on a terminal that says how far the copy is."""

    def __init__(self, total):
        self.total = total
        self.done = 0
        self.shown = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.shown:
            sys.stderr.write("\r\33[K")

    def add(self, size):
        self.done += size
        if sys.stderr.isatty() and time.monotonic() - self.shown > 0.1:
            self.shown = time.monotonic()
            sys.stderr.write("\r%3d %% of %d MB" % (100 * self.done // self.total, self.total // 10 ** 6))
            sys.stderr.flush()


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------

def read_config(source, path, arguments):
    """The configuration: --config over what the checkpoint carries."""
    parts = []
    if arguments is not None:
        parts.append(Fields(arguments, source.path + ": model_args"))
    if source.is_directory and (source.has("config.json") or path is None):
        parts.append(source.json(source.beside("config.json")))
    if path is not None:
        parts.append(source.json(path))
    if not parts:
        raise UsageError("%s is a bare state dict, which needs --arch and --config" % source.path)
    values: Dict[str, Any] = {}
    for part in parts:
        values.update(part.values)
    return Fields(values, parts[-1].where)


def gguf_settings(checkpoint, args):
    """(configuration, family's name, family) of a .gguf file, which says everything itself."""
    if args.arch is not None or args.config is not None:
        raise UsageError("a .gguf file has its configuration in itself; --arch and --config are for others")
    family = gguf_family(checkpoint.gguf)
    return checkpoint.gguf, family.title, family


def put_own_tokenizer(metadata, source, checkpoint, family, model):
    """The model's tokenizer, or None. A .gguf file with one that can't be used is still a model."""
    found = Metadata()
    try:
        if checkpoint.gguf is not None:
            bpe = read_gguf_tokenizer(checkpoint.gguf, source.notes, model.vocab_size)
        else:
            bpe = read_tokenizer(source, family, model.vocab_size) if model.vocab_size else None
        if bpe is not None:
            put_tokenizer(found, bpe)
    except ConvertError as error:
        if checkpoint.gguf is None:
            raise
        source.notes.append("warning: converted without a tokenizer: %s" % error)
        return None
    metadata.entries.extend(found.entries)
    return bpe


def convert(args):
    """Converts, and returns the notes and the closing line."""
    started = time.monotonic()
    source = Source(args.checkpoint)
    out = os.path.realpath(args.out)
    check_output(out, args.out)
    if is_only_tokenizer(source):
        return convert_tokenizer(source, None, source.name(), args, started)
    pooling = read_modules(source)
    # A directory's configuration can refuse it before its weights are read; nanoGPT's comes with the weights.
    checkpoint = None if source.is_directory else read_checkpoint(source)
    if (checkpoint is not None and checkpoint.gguf is not None and not checkpoint.tensors
            and "tokenizer.ggml.model" in checkpoint.gguf.values):
        return convert_tokenizer(source, checkpoint.gguf, checkpoint.label, args, started)
    if checkpoint is not None and checkpoint.gguf is not None:
        config, name, family = gguf_settings(checkpoint, args)
    else:
        config = read_config(source, args.config, checkpoint and checkpoint.arguments)
        name = choose_family(args.arch, config, checkpoint and checkpoint.arguments)
        family = FAMILIES[name]
    checkpoint = checkpoint or read_checkpoint(source)

    tensors = drop_unused(plain_names(checkpoint.tensors, family), family, source.notes)
    if family.prepare is not None:
        tensors = family.prepare(family, tensors, config, source.notes)
    model = family.describe(config, family, tensors)
    if pooling is not None:
        put_pooling(model, pooling)
    settle_head(tensors, model, family, source.notes)
    entries = match_tensors(tensors, model, family, source.path)

    metadata = Metadata()
    metadata.text("model.name", source.name())
    metadata.text("model.family", name)
    metadata.text("model.source", checkpoint.label + ", converted by convert.py")
    put_model(metadata, model)
    bpe = put_own_tokenizer(metadata, source, checkpoint, family, model)
    if bpe is not None:
        put_chat(metadata, source, checkpoint.gguf)
    if checkpoint.gguf is not None:
        ids = gguf_end_ids(config, model.vocab_size)
    else:
        ids = end_ids(source, config, bpe, model.vocab_size)
    if ids:
        metadata.i32("generation.eos_ids", ids)
    if model.kind == "encoder-decoder" and model.vocab_size:
        metadata.i64("generation.start_id", start_id(source, config, model.vocab_size))

    check_not_input(source, out, args.out)
    size = write_tfm(out, metadata.pack(), entries)
    return source.notes + ["%s: %d parameters, %d bytes, %.2f seconds" % (
        args.out, sum(entry.count for entry in entries), size, time.monotonic() - started)]


TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model",
                   "sentencepiece.bpe.model")


def is_only_tokenizer(source):
    """Whether a directory holds a tokenizer and no weights."""
    if not source.is_directory or any(source.has(name) for name in WEIGHT_FILES):
        return False
    return (any(source.has(name) for name in TOKENIZER_FILES)
            and not any(name.endswith((".safetensors", ".bin")) for name in os.listdir(source.directory)))


def convert_tokenizer(source, gguf, label, args, started):
    """Converts a tokenizer that has no model with it."""
    if args.arch is not None or args.config is not None:
        raise UsageError("%s has a tokenizer and no weights; --arch and --config are for models" % source.path)
    if gguf is not None:
        bpe = read_gguf_tokenizer(gguf, source.notes, LARGEST_VOCABULARY)
    else:
        bpe = read_tokenizer(source, NO_FAMILY, LARGEST_VOCABULARY)
    if bpe is None:
        raise ConvertError("%s: has neither weights nor a tokenizer that is supported%s" % (
            source.path, "".join(" (%s)" % note for note in source.notes)))
    metadata = Metadata()
    metadata.text("model.name", source.name())
    metadata.text("model.source", label + ", converted by convert.py")
    put_tokenizer(metadata, bpe)
    vocab_size = len(token_bytes(bpe, byte_alphabet()))
    ids = gguf_end_ids(gguf, vocab_size) if gguf else end_ids(source, Fields({}, source.path), bpe, vocab_size)
    if ids:
        metadata.i32("generation.eos_ids", ids)
    put_chat(metadata, source, gguf)
    out = os.path.realpath(args.out)
    check_not_input(source, out, args.out)
    size = write_tfm(out, metadata.pack(), [])
    return source.notes + ["%s: a tokenizer of %d tokens without a model, %d bytes, %.2f seconds" % (
        args.out, vocab_size, size, time.monotonic() - started)]


def check_output(out, name):
    """What would only fail after a long copy fails here."""
    if os.path.exists(out) and not os.path.isfile(out):
        raise ConvertError("%s: is not a regular file, so it can't be replaced" % name)
    if not os.path.isdir(os.path.dirname(out)):
        raise ConvertError("%s: there is no such directory to write into" % name)


def check_not_input(source, out, name):
    for path in source.inputs:
        if os.path.exists(out) and os.path.samefile(path, out):
            raise ConvertError("%s: is also an input, %s, and would be lost" % (name, path))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message + " (--help says more)")


def parse_arguments(arguments):
    description, _, details = __doc__.partition("\n\n")
    parser = Parser(prog="convert.py", description=description, epilog=details.partition("\n\n")[2], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out", metavar="OUT.tfm")
    parser.add_argument("--arch", metavar="NAME", choices=list(FAMILIES))
    parser.add_argument("--config", metavar="FILE")
    return parser.parse_args(arguments)


def end_on_signals():
    """Signals that end the program become an exception, so that the unfinished file is removed."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]

    def interrupt(number, _):
        for other in numbers:  # one more must not disturb the cleaning up
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    for number in numbers:
        signal.signal(number, interrupt)


def say(text):
    print("convert.py: " + text, file=sys.stderr)


def main(arguments):
    end_on_signals()
    try:
        for line in convert(parse_arguments(arguments)):
            say(line)
        return 0
    except ConvertError as error:
        say(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        say("%s: %s" % (error.filename, error.strerror) if error.filename else str(error))
        return 1
    except MemoryError:
        say("out of memory")
        return 1
    except Interrupted as error:
        say("ended by signal %d" % error.number)
        return 128 + error.number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
