#!/usr/bin/env python3
"""Seeds for the fuzzer: seeds.py DIRECTORY makes a subdirectory for each kind of tokenizer, with small models in it that
have one, each with a text behind it; model/ with models of every kind; models/ for the targets that use a model as it is;
generate/ with options. They come from the golden files, from the checkpoints with which tools/convert.py is fuzzed, and
from here."""
import contextlib
import io
import os
import struct
import sys
import tempfile
import zlib

import fuzz_convert

golden = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden")
TEXT = ("Hello, world! \u00e9t\u00e9 <mask> 12345 \u4f60\u597d [MASK]".encode() + b"\xff\xe2\x96",
        "don't I'LL a\u0323\u0301\u0327 \u1100\u1161\u11a8 \u0130\u01d5\u1ebf \u0344 \r\n\n  x [MASK] y<|end|>.".encode(),
        "\u200d\U0001F468\u200d\U0001F469 \U0001F1E9\U0001F1EA \u3042\u30ab\u30ab\u3099 123 a  b\tc ".encode())


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


def byte_bpe(pattern="gpt2", **flags):
    more = [b"he", b"ll", b"llo", b"hello", b" w", b"<|end|>"]
    tokens = [bytes([i]) for i in range(256)] + more
    merges = [(104, 101, 256), (108, 108, 257), (257, 111, 258), (256, 258, 259), (32, 119, 260)]
    return [("tokenizer.kind", 3, b"byte_bpe"), ("tokenizer.pattern", 3, pattern.encode()),
            ("tokenizer.tokens", 4, b"".join(tokens)), ("tokenizer.token_sizes", 5, ints([len(t) for t in tokens])),
            ("tokenizer.merges", 5, ints([i for merge in merges for i in merge])), ("tokenizer.added", 5, ints([261, 1])),
            ("tokenizer.byte_ids", 5, ints(list(range(256)))), ("generation.eos_ids", 5, ints([261])),
            *(("tokenizer." + flag, 1, struct.pack("<q", value)) for flag, value in flags.items())]


def wordpiece():
    tokens = [b"[PAD]", b"[UNK]", b"[CLS]", b"[SEP]", b"[MASK]", b"hello", b"world", b"##s", b"##ing", b"ete", b","]
    tokens += [bytes([c]) for c in range(33, 127) if bytes([c]) not in tokens]
    tokens += [b"##" + bytes([c]) for c in range(97, 123)]
    tokens = list(dict.fromkeys(tokens))
    special = [(i, flags) for i, flags in enumerate((1, 2, 4, 8, 16))]
    return [("tokenizer.kind", 3, b"wordpiece"), ("tokenizer.tokens", 4, b"".join(tokens)),
            ("tokenizer.token_sizes", 5, ints([len(t) for t in tokens])),
            ("tokenizer.added", 5, ints([i for pair in special for i in pair])),
            ("tokenizer.continuing_prefix", 3, b"##"), ("tokenizer.unk_id", 1, struct.pack("<q", 1)),
            ("tokenizer.prefix_ids", 5, ints([2])), ("tokenizer.suffix_ids", 5, ints([3])),
            ("tokenizer.pair_ids", 5, ints([3])), ("tokenizer.pair_type", 1, struct.pack("<q", 1)),
            ("tokenizer.mask_id", 1, struct.pack("<q", 4))]


def letters():
    """For a vocabulary of 41: the special tokens, those of all chat templates, letters at a word's beginning and within it."""
    tokens = [b"[PAD]", b"[UNK]", b"[CLS]", b"[SEP]", b"[MASK]", b"<|im_start|>", b"<|im_end|>", b"<s>", b"</s>", b"[INST]",
              b"[/INST]", b"<|begin_of_text|>", b"<|start_header_id|>", b"<|end_header_id|>", b"<|eot_id|>", b"<bos>",
              b"<start_of_turn>", b"<end_of_turn>"]
    special = [number for i in range(5, len(tokens)) for number in (i, 1)]
    tokens += [prefix + bytes([c]) for prefix in (b"", b"##") for c in range(97, 108)]
    return [("tokenizer.kind", 3, b"wordpiece"), ("tokenizer.tokens", 4, b"".join(tokens)),
            ("tokenizer.token_sizes", 5, ints([len(t) for t in tokens])),
            ("tokenizer.continuing_prefix", 3, b"##"), ("tokenizer.unk_id", 1, struct.pack("<q", 1)),
            ("tokenizer.added", 5, ints(special)), ("generation.eos_ids", 5, ints([3]))]


def golden_file(name):
    with open(os.path.join(golden, name + ".tfm"), "rb") as file:
        return file.read()


CONVERTED = {"model": ("gpt2", "llama", "bert_lm", "bert_sequence", "bert_token", "sentences", "t5", "torch", "torch_split",
                       "gguf_blocks"),
             "byte_bpe": ("byte_bpe", "merges"), "wordpiece": ("wordpiece", "vocab"), "unigram": ("unigram", "spiece"),
             "spm_bpe": ("sentencepiece",)}


def converted(name):
    """What convert.py makes of one of its own seeds."""
    files, arguments = fuzz_convert.seeds()[name]
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        fuzz_convert.write_case(directory, {key: fuzz_convert.ENCODERS[kind](tree) for key, (kind, tree) in files.items()})
        arguments = fuzz_convert.command(directory, files, arguments)
        if fuzz_convert.load_converter().main(arguments) != 0:
            sys.exit("seeds.py: convert.py refuses " + name)
        with open(arguments[1], "rb") as file:
            return file.read()


def main():
    base = golden_file("pieces_llama")
    bare = without_tokenizer(metadata(base))
    seeds = {"model": {name: golden_file("model_" + name) for name in ("one_head", "one_token", "three_heads")},
             "byte_bpe": {name: with_metadata(base, bare + byte_bpe(name, **flags)) for name, flags in (
                 ("gpt2", {"add_prefix_space": 1}), ("llama3", {"ignore_merges": 1}), ("qwen2", {"nfc": 1}), ("smollm", {}))},
             "wordpiece": {"lower": with_metadata(base, bare + wordpiece())},
             "unigram": {name: golden_file("pieces_" + name) for name in ("t5", "unigram", "unigram_bytes")},
             "spm_bpe": {name: golden_file("pieces_" + name) for name in ("llama", "bpe", "bpe_bytes")}}
    for kind, names in CONVERTED.items():
        seeds[kind].update(("converted_" + name, converted(name)) for name in names)
    decoder = golden_file("beams_gpt2")
    models = {"decoder": with_metadata(decoder, without_tokenizer(metadata(decoder)) + letters()),
              "encoder_decoder": golden_file("beams_t5")}
    options = {"zeros": bytes(64), "counting": bytes(range(128)), "sampling": bytes([1, 20, 0, 9, 5, 1, 0, 2, 2] * 9)}
    for kind, files in seeds.items():
        directory = os.path.join(sys.argv[1], kind)
        os.makedirs(directory, exist_ok=True)
        for i, (name, data) in enumerate(files.items()):
            with open(os.path.join(directory, name), "wb") as file:
                file.write(data + TEXT[i % len(TEXT)])
    for kind, files in (("models", models), ("generate", options), ("chat", {})):
        directory = os.path.join(sys.argv[1], kind)
        os.makedirs(directory, exist_ok=True)
        for name, data in files.items():
            with open(os.path.join(directory, name), "wb") as file:
                file.write(data)


if __name__ == "__main__":
    main()
