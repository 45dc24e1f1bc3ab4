#!/usr/bin/env python3
"""Converts a PyTorch checkpoint into a .tfm file. Needs Python 3.8 or newer and nothing else: no torch, no numpy.

usage: tools/convert.py CHECKPOINT OUT.tfm [--arch NAME] [--config FILE]

CHECKPOINT is one of
  - a Hugging Face directory: config.json; model.safetensors or pytorch_model.bin, whole or in shards with an index;
    tokenizer.json, or vocab.json and merges.txt (a model without a tokenizer is converted, too);
  - a bare state dict (.safetensors, or .pt, .pth, .bin written by torch.save, in the zip format of PyTorch 1.6 and
    later or in the older one), together with --arch and --config;
  - a nanoGPT checkpoint (ckpt.pt), which carries its own configuration.
For a file, a tokenizer is looked for beside it.

--arch NAME    gpt2 (Hugging Face), nanogpt or minGPT's mingpt; by default what the configuration says. The three
               share a shape and differ in what a configuration leaves unsaid: the activation function (nanoGPT: exact
               GELU; the others: its tanh approximation), whether the head is the token embedding (minGPT: no), and
               whether biases may be absent (nanoGPT: yes).
--config FILE  a JSON object such as config.json, or {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024,
               "vocab_size": 50304}. It overrides what the checkpoint itself says, key by key: nanoGPT checkpoints
               from before May 2023 need {"activation_function": "gelu_new"}.

Tensors keep the checkpoint's type (f32, f16, bf16; f64 becomes f32) and their bytes are copied, never held in memory.
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

class InputFile:
    """A regular file, read by position."""

    def __init__(self, path):
        self.path = path
        self.file = open(path, "rb", buffering=0)
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


def parse_json(text, where):
    try:
        values = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ConvertError("%s: is not valid JSON: %s" % (where, error))
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
        size = self.count * self.itemsize
        start = self.storage.offset + self.offset * self.itemsize
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


class Quantized(Opaque):
    """Stands for a tensor of a kind that can't be converted."""


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
}
GLOBALS.update({"torch " + name: StorageType(dtype) for name, dtype in TORCH_DTYPES.items()})
GLOBALS.update({module + " " + name: StorageType(dtype) for name, dtype in STORAGE_CLASSES.items()
                for module in ("torch", "torch.cuda", "torch.storage")})
GLOBALS.update(dict.fromkeys((
    "_codecs encode", "argparse Namespace", "collections Counter", "collections defaultdict", "pathlib Path",
    "pathlib PosixPath", "pathlib WindowsPath", "pathlib._local PosixPath", "pathlib._local WindowsPath",
    "torch Tensor", "torch device", "torch per_channel_affine", "torch per_tensor_affine",
    "torch.nn.parameter Parameter", "torch.serialization _get_layout", "torch.torch_version TorchVersion",
    "numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct", "numpy.core.multiarray scalar",
    "numpy._core.multiarray _reconstruct", "numpy._core.multiarray scalar"), Opaque))
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
        arguments = {key: value for key, value in arguments.items() if isinstance(value, (bool, int, float, str))}
    return {name: tensor.named(name) for name, tensor in tensors.items()}, arguments


def describe_kind(value):
    if isinstance(value, Quantized):
        return "a quantized or sparse tensor"
    return "an object" if isinstance(value, Opaque) else "a value of type " + type(value).__name__


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


def read_checkpoint(source):
    path = find_weights(source) if source.is_directory else source.path
    if path.endswith(".index.json"):
        return read_shards(source, path)
    tensors, arguments = read_weights(source.open(path))
    return Checkpoint(tensors, arguments, os.path.basename(path))


def find_weights(source):
    for name in WEIGHT_FILES:
        if source.has(name):
            return source.beside(name)
    others = sorted(name for name in os.listdir(source.path) if name.endswith(".safetensors"))
    if len(others) == 1:
        return source.beside(others[0])
    raise ConvertError("%s: has none of %s" % (source.path, ", ".join(WEIGHT_FILES)))


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
    raise ConvertError("%s: is neither a .safetensors file nor one that torch.save wrote" % file.path)


def read_shards(source, path):
    index = source.json(path)
    shards: Dict[str, List[str]] = {}
    for name, shard in index.object("weight_map").values.items():
        # A name with a directory in it could lead anywhere.
        if not isinstance(shard, str) or re.search(r"[/\\:\0]", shard) or shard in ("", ".", ".."):
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
# Descriptions: what a .tfm file says about a model. Field names are its metadata keys.
# ---------------------------------------------------------------------------------------------------------------------

MAX_LAYERS = 1 << 16


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
    norm_place: str  # pre, post
    norm_eps: float
    final_norm: bool
    positions: str  # learned, sinusoidal, rotary, relative, none
    attention_scale: List[float]  # one for all layers, or one for each
    ffn: str  # plain, gated
    activation: str

    @property
    def qkv_dim(self):
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    @property
    def attention_dim(self):
        return self.n_heads * self.head_dim


@dataclasses.dataclass
class Model:
    kind: str  # decoder, encoder, encoder-decoder
    vocab_size: int
    d_model: int
    stacks: Dict[str, Stack]
    tied: bool  # what the configuration says about the head; the tensors have the last word
    needs_head: bool
    biases: Optional[bool]  # None: as found
    head: str = ""  # tied, own, none


ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh",
}


def activation(config, keys, default):
    name = config.text(keys, default)
    if name not in ACTIVATIONS:
        raise ConvertError("%s: the activation function %s is not supported (supported: %s)"
                           % (config.where, quote(name), ", ".join(sorted(ACTIVATIONS))))
    return ACTIVATIONS[name]


def head_size(config, d_model, n_heads):
    if d_model % n_heads:
        raise ConvertError("%s: the model's width, %d, should be a multiple of its number of heads, %d"
                           % (config.where, d_model, n_heads))
    return d_model // n_heads


# ---------------------------------------------------------------------------------------------------------------------
# Families: which tensors of a checkpoint become which of a .tfm file, and how a configuration becomes a description.
# A new family is a list of rules, a function from configuration to Model, and a row in FAMILIES.
# ---------------------------------------------------------------------------------------------------------------------

class Rule(NamedTuple):
    """A module: its canonical name, its name in the checkpoint ({} is the layer), the sizes of its weight by name."""
    target: str
    source: str
    shape: Tuple[str, ...]
    is_matrix: bool = False
    has_bias: bool = False


def embedding(target, source, rows):
    return Rule(target, source, (rows, "d_model"))


def norm(target, source):
    return Rule(target, source, ("d_model",), has_bias=True)


def linear(target, source, outputs, inputs):
    return Rule(target, source, (outputs, inputs), is_matrix=True, has_bias=True)


class Family(NamedTuple):
    title: str
    rules: Tuple[Rule, ...]  # in the order in which a forward pass reads them
    describe: Callable[[Fields, Any], Model]
    defaults: Dict[str, Any]  # what `describe` assumes where the configuration is silent
    model_types: Tuple[str, ...]  # config.json's; () for a family that has none
    architectures: Dict[str, bool]  # config.json's, and whether there is a head for language modelling
    probe: str  # the rule whose shape tells whether matrices are [out, in] or [in, out]; "" for always [out, in]
    prefix: str  # that names may have or lack
    ignored: str  # pattern of buffers that hold no parameters
    left_out: str  # pattern of parameters that a language model doesn't use
    embedding: str  # the sources of the two tensors that may be tied
    head: str
    tokenizer_class: str  # and what it makes special by default
    special_token: str


GPT2_RULES = (
    embedding("token_embedding", "wte", "vocab_size"),
    embedding("decoder.position_embedding", "wpe", "n_positions"),
    norm("decoder.blocks.{}.attention_norm", "h.{}.ln_1"),
    linear("decoder.blocks.{}.attention.qkv", "h.{}.attn.c_attn", "qkv_dim", "d_model"),
    linear("decoder.blocks.{}.attention.out", "h.{}.attn.c_proj", "d_model", "attention_dim"),
    norm("decoder.blocks.{}.ffn_norm", "h.{}.ln_2"),
    linear("decoder.blocks.{}.ffn.up", "h.{}.mlp.c_fc", "d_ff", "d_model"),
    linear("decoder.blocks.{}.ffn.down", "h.{}.mlp.c_proj", "d_model", "d_ff"),
    norm("decoder.final_norm", "ln_f"),
    embedding("head", "lm_head", "vocab_size"),
)


def describe_gpt2(config, family):
    """GPT-2 and its children: the keys of Hugging Face's config.json, then those of nanoGPT and minGPT."""
    if config.flag("add_cross_attention", False):
        raise ConvertError("%s: 'add_cross_attention' is true; GPT-2 with cross-attention is not supported"
                           % config.where)
    d_model = config.size(("n_embd", "hidden_size"))
    n_heads = config.size(("n_head", "num_attention_heads"))
    n_layers = config.size(("n_layer", "num_hidden_layers"), limit=MAX_LAYERS)
    head_dim = head_size(config, d_model, n_heads)
    scale = head_dim ** -0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", False)
    kinds = config.texts("architectures")
    stack = Stack(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, head_dim=head_dim,
        d_ff=config.size("n_inner", None) or 4 * d_model,
        n_positions=config.size(("n_positions", "max_position_embeddings", "block_size")),
        causal=True, cross=False, norm="layer", norm_place="pre", final_norm=True,
        norm_eps=config.number("layer_norm_epsilon", 1e-5), positions="learned",
        attention_scale=[scale / (layer + 1) for layer in range(n_layers)] if by_layer else [scale],
        ffn="plain", activation=activation(config, "activation_function", family.defaults["activation_function"]))
    return Model(
        kind="decoder", vocab_size=config.size("vocab_size"), d_model=d_model, stacks={"decoder": stack},
        tied=config.flag("tie_word_embeddings", family.defaults["tie_word_embeddings"]),
        needs_head=not kinds or any(family.architectures.get(kind, True) for kind in kinds),
        biases=config.flag("bias", family.defaults["bias"]))


GPT2 = Family(
    title="GPT-2",
    rules=GPT2_RULES,
    describe=describe_gpt2,
    defaults={"activation_function": "gelu_new", "tie_word_embeddings": True, "bias": True},
    model_types=("gpt2",),
    architectures={"GPT2LMHeadModel": True, "GPT2DoubleHeadsModel": True, "GPT2Model": False},
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
FAMILIES = {
    "gpt2": GPT2,
    "nanogpt": GPT2._replace(
        title="nanoGPT", model_types=(), architectures={},
        defaults={"activation_function": "gelu", "tie_word_embeddings": True, "bias": None}),
    "mingpt": GPT2._replace(
        title="minGPT", model_types=(), architectures={},
        defaults={"activation_function": "gelu_new", "tie_word_embeddings": False, "bias": True}),
}


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
        "the model type " + quote(model_type), " by --arch " + arch if arch else " yet",
        ", ".join(model_type for family in FAMILIES.values() for model_type in family.model_types)))


def check_architectures(config, kinds, family):
    for kind in kinds:
        if kind not in family.architectures:
            raise ConvertError("%s: %s is not supported, only a language model is (%s)"
                               % (config.where, quote(kind), ", ".join(family.architectures)))


# ---------------------------------------------------------------------------------------------------------------------
# Matching the tensors of a checkpoint with a family's rules
# ---------------------------------------------------------------------------------------------------------------------

# Parts of names that come from torch.compile, FSDP and activation checkpointing, not from the model.
WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
SOURCE_DTYPES = ("F32", "F16", "BF16", "F64")


class Entry(NamedTuple):
    """A tensor of the .tfm file. The shape is [out, in] whatever the layout."""
    name: str
    tensor: Tensor
    shape: Tuple[int, ...]
    layout: str


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
        if short in plain:
            raise ConvertError("%s is there twice, also as %s" % (tensor, quote(plain[short].name)))
        plain[short] = tensor
    return plain


def drop_unused(tensors, family, notes):
    left_out = [name for name in tensors if re.fullmatch(family.left_out, name)]
    if left_out:
        notes.append("left out, as a language model doesn't use it: " + listing(left_out))
    return {name: tensor for name, tensor in tensors.items()
            if name not in left_out and not re.fullmatch(family.ignored, name)}


def settle_head(tensors, model, family, notes):
    """Says in `model` whether the output head is the token embedding, and removes what is there twice."""
    head, table = tensors.get(family.head), tensors.get(family.embedding)
    model.head = "tied" if model.tied else "own" if model.needs_head or head else "none"
    if head is None:
        return
    if table is None and model.tied:  # a tied pair may be saved under either name
        tensors[family.embedding] = tensors.pop(family.head)
    elif (table is not None and head.shape == (model.vocab_size, model.d_model) and head.dtype in SOURCE_DTYPES
          and same_elements(head, table)):
        model.head = "tied"
        del tensors[family.head]
    elif model.head == "tied":  # as transformers does since version 5; before, it dropped the head
        model.head = "own"
        notes.append("warning: the configuration ties %s to %s, but the checkpoint has both and they differ: "
                     "both are kept" % (family.head, family.embedding))


def expand(rules, model):
    """The rules with every layer spelt out: rule, canonical name, source name, the stack that it belongs to."""
    def group(rule):
        return rule.target.split(".")[0], "{}" in rule.target

    for (prefix, is_block), members in itertools.groupby(rules, group):
        stack = model.stacks.get(prefix)
        members = list(members)
        for layer in range(stack.n_layers if is_block else 1):
            for rule in members:
                if rule.target != "head" or model.head == "own":
                    yield rule, rule.target.format(layer), rule.source.format(layer), stack


def rule_shape(rule, model, stack):
    return tuple(getattr(stack if hasattr(stack, size) else model, size) for size in rule.shape)


def find_layout(tensors, model, family):
    """How the checkpoint keeps its matrices: see the family's probe."""
    for rule, _, source, stack in expand(family.rules, model):
        if rule.source == family.probe:
            probe = tensors.get(source + ".weight")
            transposed = probe is not None and probe.shape == rule_shape(rule, model, stack)[::-1]
            return "cols" if transposed else "rows"
    return "rows"


def match_tensors(tensors, model, family, label):
    """The entries of the .tfm file, in its order. Every tensor is used once, and none is missing."""
    layout = find_layout(tensors, model, family)
    biases = model.biases
    if biases is None:
        biases = any(source + ".bias" in tensors for rule, _, source, _ in expand(family.rules, model)
                     if rule.has_bias)
    entries, missing, unused = [], [], dict(tensors)
    for rule, target, source, stack in expand(family.rules, model):
        shape = rule_shape(rule, model, stack)
        parts = [("weight", shape, layout if rule.is_matrix else "rows")]
        if rule.has_bias and biases:
            parts.append(("bias", shape[:1], "rows"))
        for part, shape, part_layout in parts:
            tensor = unused.pop("%s.%s" % (source, part), None)
            if tensor is None:
                missing.append("%s.%s" % (source, part))
            else:
                entries.append(Entry("%s.%s" % (target, part), tensor, shape, part_layout))
    if missing:
        raise ConvertError("%s: lacks tensors that the configuration asks for: %s" % (label, listing(missing)))
    if unused:
        raise ConvertError("%s: has tensors that are no part of the %s that the configuration describes: %s"
                           % (label, family.title, listing([tensor.name for tensor in unused.values()])))
    for entry in entries:
        check_entry(entry)
    return entries


def check_entry(entry):
    tensor = entry.tensor
    expected = entry.shape if entry.layout == "rows" else entry.shape[::-1]
    if tensor.shape != expected:
        raise ConvertError("%s has the shape %s where the configuration asks for %s"
                           % (tensor, quote(list(tensor.shape)), list(expected)))
    if tensor.dtype not in SOURCE_DTYPES:
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
    normalizer = root.object("normalizer", None)
    if normalizer is not None and normalizer.values.get("normalizers") != []:
        raise ConvertError("%s: a normalizer (%s) is not supported yet" % (path, quote(normalizer.text("type"))))
    splitter = only_step(root, "pre_tokenizer", "pretokenizers")
    if not splitter.flag("use_regex", True):
        raise ConvertError("%s: the pre-tokenizer doesn't split by GPT-2's pattern, which is not supported yet" % path)
    only_step(root, "decoder", "decoders")
    model = root.object("model")
    if model.text("type", "BPE") != "BPE":
        raise ConvertError("%s: the tokenizer is of the type %s; only BPE, WordPiece and Unigram are supported"
                           % (path, quote(model.text("type"))))
    merges = [parse_merge(merge, "%s: merge %d" % (path, i)) for i, merge in enumerate(model.list("merges"))]
    bpe = Bpe(path, parse_vocab(model.object("vocab")), merges)
    bpe.add_prefix_space = splitter.flag("add_prefix_space")
    bpe.ignore_merges = model.flag("ignore_merges", False)
    bpe.unk_token = model.text("unk_token", None)
    bpe.fuse_unk = model.flag("fuse_unk", False)
    check_bpe_options(model, bpe)
    read_added_tokens(root, bpe)
    read_post_processor(source, root, bpe)
    return bpe


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
        if first | single_types == {0} and len(second) == 1 and min(second) >= 0:
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
    unk_id: int = 0


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
                  41: ("bos_id", VARINT), 42: ("eos_id", VARINT), 43: ("pad_id", VARINT)}
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
    texts = [text for text, _, _ in parsed]
    if len(set(texts)) != len(texts):
        twice = next(text for i, text in enumerate(texts) if text in texts[:i])
        raise ConvertError("%s: the piece %s is there twice" % (path, quote(twice)))
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
    unknown = model.text("unk_token")
    if unknown not in pieces.vocab or not pieces.merges:
        raise ConvertError("%s: there is no unknown token %s in the vocabulary, or there are no merges"
                           % (model.where, quote(unknown)))
    pieces.unk_id = pieces.vocab[unknown]
    pieces.fuse_unk = model.flag("fuse_unk", False)
    use_byte_fallback(model, pieces)


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
    if kind and kind == family.tokenizer_class:
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


# ---------------------------------------------------------------------------------------------------------------------
# Writing .tfm: header, metadata, tensor directory, tensors. All numbers are little-endian.
# ---------------------------------------------------------------------------------------------------------------------

MAGIC = b"TFMH\r\n\x1a\n"
VERSION = 1
HEADER_SIZE = 64
ALIGNMENT = 64  # of every tensor
TARGET_DTYPES = {"F32": 1, "F16": 2, "BF16": 3, "F64": 1}  # checkpoint's type: code of the type that is written
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

    def i64(self, key, value):
        self.put(key, self.I64, struct.pack("<q", value))

    def f64(self, key, values):
        self.put(key, self.F64, struct.pack("<%dd" % len(values), *values))

    def i32(self, key, values):
        self.put(key, self.I32, struct.pack("<%di" % len(values), *values))

    def f32(self, key, values):
        self.put(key, self.F32, struct.pack("<%df" % len(values), *values))

    def pack(self):
        return b"".join(self.entries)


def put_model(metadata, model):
    metadata.text("model.kind", model.kind)
    metadata.i64("vocab_size", model.vocab_size)
    metadata.i64("d_model", model.d_model)
    metadata.text("head", model.head)
    for prefix, stack in model.stacks.items():
        for field in dataclasses.fields(stack):
            key, value = "%s.%s" % (prefix, field.name), getattr(stack, field.name)
            if isinstance(value, str):
                metadata.text(key, value)
            elif isinstance(value, int):  # flags, too
                metadata.i64(key, value)
            else:
                metadata.f64(key, value if isinstance(value, list) else [value])


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
        metadata.bytes("tokenizer.charsmap", pieces.charsmap)
    for key, value in sorted(pieces.rules.items()):
        metadata.i64("tokenizer." + key, value)
    metadata.i64("tokenizer.unk_id", pieces.unk_id)
    put_around(metadata, pieces)


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
    tokens = token_bytes(bpe, alphabet)
    metadata.text("tokenizer.kind", "byte_bpe")
    metadata.text("tokenizer.pattern", "gpt2")
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
        size = entry.tensor.count * min(entry.tensor.itemsize, 4)  # f64 is written as f32
        pieces.append(Piece(entry, start, size))
        start += size
    return pieces


def pack_directory(pieces, checksums):
    packed = []
    for (entry, offset, size), checksum in zip(pieces, checksums):
        name = entry.name.encode()
        shape = list(entry.shape) + [1] * (4 - len(entry.shape))
        packed.append(struct.pack("<4I4QQQII", len(name), TARGET_DTYPES[entry.tensor.dtype], LAYOUTS[entry.layout],
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
    file_size = pieces[-1].offset + pieces[-1].size
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
    for chunk in piece.entry.tensor.chunks():
        if piece.entry.tensor.dtype == "F64":
            chunk = narrowed(chunk)
        file.write(chunk)
        checksum = zlib.crc32(chunk, checksum)
        progress.add(len(chunk))
    return checksum


def narrowed(chunk):
    """Little-endian f64 as f32, rounded to nearest."""
    wide = array.array("d", bytes(chunk))
    if sys.byteorder == "big":
        wide.byteswap()
    narrow = array.array("f", wide)
    if sys.byteorder == "big":
        narrow.byteswap()
    return memoryview(narrow).cast("B")


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


def convert(args):
    """Converts, and returns the notes and the closing line."""
    started = time.monotonic()
    source = Source(args.checkpoint)
    out = os.path.realpath(args.out)
    check_output(out, args.out)
    # A directory's configuration can refuse it before its weights are read; nanoGPT's comes with the weights.
    checkpoint = None if source.is_directory else read_checkpoint(source)
    config = read_config(source, args.config, checkpoint and checkpoint.arguments)
    name = choose_family(args.arch, config, checkpoint and checkpoint.arguments)
    family = FAMILIES[name]
    model = family.describe(config, family)
    checkpoint = checkpoint or read_checkpoint(source)

    tensors = drop_unused(plain_names(checkpoint.tensors, family), family, source.notes)
    settle_head(tensors, model, family, source.notes)
    entries = match_tensors(tensors, model, family, source.path)
    bpe = read_tokenizer(source, family, model.vocab_size)

    metadata = Metadata()
    metadata.text("model.name", source.name())
    metadata.text("model.family", name)
    metadata.text("model.source", checkpoint.label + ", converted by convert.py")
    put_model(metadata, model)
    if bpe is not None:
        put_tokenizer(metadata, bpe)
    ids = end_ids(source, config, bpe, model.vocab_size)
    if ids:
        metadata.i32("generation.eos_ids", ids)

    check_not_input(source, out, args.out)
    size = write_tfm(out, metadata.pack(), entries)
    return source.notes + ["%s: %d parameters, %d bytes, %.2f seconds" % (
        args.out, sum(entry.tensor.count for entry in entries), size, time.monotonic() - started)]


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
