#!/usr/bin/env python3
"""Seeds for the fuzzer: seeds.py DIRECTORY makes a subdirectory for each kind of tokenizer, with small models in it that
have one, each with a text behind it; models/ for the targets that use a model as it is; generate/ with options. They come from the golden files; the two kinds that none of those has, byte-level
BPE and WordPiece, are written here."""
import os
import struct
import sys
import zlib

golden = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden")
TEXT = "Hello, world! \u00e9t\u00e9 <mask> 12345 \u4f60\u597d [MASK]".encode() + b"\xff\xe2\x96"


def up(n, to):
    return (n + to - 1) // to * to


def metadata(data):
    """[(key, type, value)]"""
    size, at, entries = struct.unpack_from("<Q", data, 32)[0], 64, []
    while at < 64 + size:
        key_size, kind, value_size = struct.unpack_from("<IIQ", data, at)
        key, value = at + 16, at + 16 + up(key_size, 8)
        entries.append((data[key:key + key_size].decode(), kind, data[value:value + value_size]))
        at = value + up(value_size, 8)
    return entries


def with_metadata(data, entries):
    """The same tensors behind other metadata."""
    meta_at, meta_size, at, size, count = struct.unpack_from("<QQQQI", data, 24)
    packed = b"".join(struct.pack("<IIQ", len(key), kind, len(value)) + key.encode().ljust(up(len(key), 8), b"\0") +
                      value.ljust(up(len(value), 8), b"\0") for key, kind, value in entries)
    directory, moved = bytearray(data[at:at + size]), up(64 + len(packed) + size, 64) - up(at + size, 64)
    i = 0
    while i < size:
        offset = struct.unpack_from("<Q", directory, i + 48)[0]
        struct.pack_into("<Q", directory, i + 48, offset + moved)
        i += 72 + up(struct.unpack_from("<I", directory, i)[0], 8)
    rest = bytes(data[up(at + size, 64):])
    head = up(64 + len(packed) + size, 64)
    header = data[:16] + struct.pack("<QQQQQI", head + len(rest), 64, len(packed), 64 + len(packed), size, count)
    body = packed + bytes(directory)
    header += struct.pack("<I", zlib.crc32(header + body))
    return (header + body).ljust(head, b"\0") + rest


def without_tokenizer(entries):
    return [entry for entry in entries if not entry[0].startswith(("tokenizer.", "generation."))]


def ints(values):
    return struct.pack("<%di" % len(values), *values)


def byte_bpe():
    more = [b"he", b"ll", b"llo", b"hello", b" w", b"<|end|>"]
    tokens = [bytes([i]) for i in range(256)] + more
    merges = [(104, 101, 256), (108, 108, 257), (257, 111, 258), (256, 258, 259), (32, 119, 260)]
    return [("tokenizer.kind", 3, b"byte_bpe"), ("tokenizer.pattern", 3, b"gpt2"),
            ("tokenizer.tokens", 4, b"".join(tokens)), ("tokenizer.token_sizes", 5, ints([len(t) for t in tokens])),
            ("tokenizer.merges", 5, ints([i for merge in merges for i in merge])), ("tokenizer.added", 5, ints([261, 1])),
            ("tokenizer.byte_ids", 5, ints(list(range(256)))), ("generation.eos_ids", 5, ints([261]))]


def wordpiece():
    tokens = [b"[PAD]", b"[UNK]", b"[CLS]", b"[SEP]", b"[MASK]", b"hello", b"world", b"##s", b"##ing", b"ete", b","]
    tokens += [bytes([c]) for c in range(33, 127) if bytes([c]) not in tokens]
    tokens += [b"##" + bytes([c]) for c in range(97, 123)]
    tokens = list(dict.fromkeys(tokens))
    special = [(i, 1) for i in range(5)]
    return [("tokenizer.kind", 3, b"wordpiece"), ("tokenizer.tokens", 4, b"".join(tokens)),
            ("tokenizer.token_sizes", 5, ints([len(t) for t in tokens])),
            ("tokenizer.added", 5, ints([i for pair in special for i in pair])),
            ("tokenizer.continuing_prefix", 3, b"##"), ("tokenizer.unk_id", 1, struct.pack("<q", 1)),
            ("tokenizer.prefix_ids", 5, ints([2])), ("tokenizer.suffix_ids", 5, ints([3])),
            ("tokenizer.pair_ids", 5, ints([3])), ("tokenizer.pair_type", 1, struct.pack("<q", 1)),
            ("tokenizer.mask_id", 1, struct.pack("<q", 4))]


def letters():
    """For a vocabulary of 41: the special tokens, letters at a word's beginning and within it."""
    tokens = [b"[PAD]", b"[UNK]", b"[CLS]", b"[SEP]", b"[MASK]"]
    tokens += [prefix + bytes([c]) for prefix in (b"", b"##") for c in range(97, 115)]
    return [("tokenizer.kind", 3, b"wordpiece"), ("tokenizer.tokens", 4, b"".join(tokens)),
            ("tokenizer.token_sizes", 5, ints([len(t) for t in tokens])),
            ("tokenizer.continuing_prefix", 3, b"##"), ("tokenizer.unk_id", 1, struct.pack("<q", 1)),
            ("generation.eos_ids", 5, ints([3]))]


def golden_file(name):
    with open(os.path.join(golden, name + ".tfm"), "rb") as file:
        return file.read()


def main():
    base = golden_file("pieces_llama")
    bare = without_tokenizer(metadata(base))
    seeds = {"model": {name: golden_file("model_" + name) for name in ("one_head", "one_token", "three_heads")},
             "byte_bpe": {"bytes": with_metadata(base, bare + byte_bpe())},
             "wordpiece": {"lower": with_metadata(base, bare + wordpiece())},
             "unigram": {name: golden_file("pieces_" + name) for name in ("t5", "unigram", "unigram_bytes")},
             "spm_bpe": {name: golden_file("pieces_" + name) for name in ("llama", "bpe", "bpe_bytes")}}
    decoder = golden_file("beams_gpt2")
    models = {"decoder": with_metadata(decoder, without_tokenizer(metadata(decoder)) + letters()),
              "encoder_decoder": golden_file("beams_t5")}
    options = {"zeros": bytes(64), "counting": bytes(range(128)), "sampling": bytes([1, 20, 0, 9, 5, 1, 0, 2, 2] * 9)}
    for kind, files in seeds.items():
        directory = os.path.join(sys.argv[1], kind)
        os.makedirs(directory, exist_ok=True)
        for name, data in files.items():
            with open(os.path.join(directory, name), "wb") as file:
                file.write(data + TEXT)
    for kind, files in (("models", models), ("generate", options), ("chat", {})):
        directory = os.path.join(sys.argv[1], kind)
        os.makedirs(directory, exist_ok=True)
        for name, data in files.items():
            with open(os.path.join(directory, name), "wb") as file:
                file.write(data)


if __name__ == "__main__":
    main()
