#!/usr/bin/env python3
"""Compares the token ids of `tfm tokenize`, and the text of `tfm tokenize --decode`, with those of sentencepiece, and of
Hugging Face's tokenizers for the tokenizer.json that transformers makes of such models.

    compare_sentencepiece.py [--lines N] [--seed S]

Trains unigram and BPE models on text in many scripts, and changes them in ways that a model may have: other options,
pieces that are user-defined or unused, scores that are equal. Needs the Python packages sentencepiece, protobuf,
tokenizers and transformers. The last line is `N passed, N failed`.
"""
import argparse
import importlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import types

import compare_tokenizer as base
import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2 as protobuf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

slow = importlib.import_module("transformers.convert_slow_tokenizer")

# (first, last) code points of letters, with what else belongs to the script.
SCRIPTS = {
    "Latin": (0x61, 0x7A), "Latin with marks": (0xE0, 0x17F), "Vietnamese": (0x1EA0, 0x1EF9), "Greek": (0x3B1, 0x3C9),
    "Cyrillic": (0x430, 0x45F), "Armenian": (0x561, 0x586), "Hebrew": (0x5D0, 0x5EA), "Arabic": (0x621, 0x652),
    "Syriac": (0x710, 0x74A), "Devanagari": (0x904, 0x963), "Bengali": (0x985, 0x9CD), "Gurmukhi": (0xA05, 0xA4D),
    "Gujarati": (0xA85, 0xACD), "Tamil": (0xB85, 0xBCD), "Telugu": (0xC05, 0xC4D), "Kannada": (0xC85, 0xCCD),
    "Malayalam": (0xD05, 0xD4D), "Sinhala": (0xD85, 0xDDF), "Thai": (0xE01, 0xE4D), "Lao": (0xE81, 0xEC6),
    "Tibetan": (0xF40, 0xF84), "Myanmar": (0x1000, 0x103E), "Georgian": (0x10D0, 0x10F0), "Hangul": (0xAC00, 0xB0FF),
    "Jamo": (0x1100, 0x11C2), "Ethiopic": (0x1200, 0x1357), "Khmer": (0x1780, 0x17D3), "Hiragana": (0x3041, 0x3096),
    "Katakana": (0x30A1, 0x30FC), "half-width": (0xFF66, 0xFF9F), "full-width": (0xFF01, 0xFF5E), "Han": (0x4E00, 0x56FF),
    "rare Han": (0x20000, 0x200FF), "compatible": (0xF900, 0xFAD9), "Arabic forms": (0xFB50, 0xFDFB),
    "letter-like": (0x2100, 0x218B), "circled": (0x2460, 0x24EA), "squared": (0x3300, 0x33FF), "Gothic": (0x10330, 0x1034A),
    "mathematical": (0x1D400, 0x1D7FF), "emoji": (0x1F300, 0x1F64F),
}  # fmt: skip
MARKS = ["\u0300", "\u0301", "\u0302", "\u0308", "\u0323", "\u0327", "\u3099", "\u309a", "\uff9e", "\u200d", "\ufe0f"]
NASTY = ["\u2581", "\u2581\u2581", " ", "  ", "   ", "\t", "\r", "\u3000", "\xa0", "\x00", "\x01", "\x7f", "\xad", "\u200b",
         "\ufeff", "\ufffd", "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<extra_id_0>", "<extra_id_99>", "<mask>", "\u0301"]


def script_word(rng, letters):
    word = "".join(chr(rng.randint(*letters)) for _ in range(min(rng.randrange(1, 9), rng.randrange(1, 9))))
    if rng.random() < 0.1:
        word += "".join(rng.choices(MARKS, k=rng.randrange(1, 4)))
    return word


def script_words(rng):
    """A few hundred words for each script, of which texts repeat some, as languages do."""
    return {name: [script_word(rng, letters) for _ in range(300)] for name, letters in SCRIPTS.items()}


def script_line(rng, words):
    name = rng.choice(list(words))
    parts = []
    for _ in range(rng.randrange(1, 25)):
        kind = rng.random()
        if kind < 0.03:
            parts.append(rng.choice(NASTY))
        elif kind < 0.1:
            parts.append(script_word(rng, SCRIPTS[rng.choice(list(words))]))
        else:
            parts.append(words[name][min(rng.randrange(300), rng.randrange(300))])
        parts.append(rng.choice(["", " ", " ", " ", " ", "  ", ", ", ". "]))
    return "".join(parts)


RUN_LETTERS = "qxz"


def run_line(rng):
    """The same letter again and again behind a character that no model knows: ways whose sums differ by their rounding."""
    return "".join(rng.choice(["", "\u2603", "\U0001f9ff"]) + rng.choice(RUN_LETTERS) * rng.randrange(1, 70) for _ in range(3))


def corpus(rng, files, n, common=False):
    """Lines without line ends: in scripts, of text, of nasty parts, and of runs; `common`: of characters worth learning."""
    text = [line.rstrip("\r\n") for line in base.training_text(files, rng)]
    text = [line for line in text if line.isascii()] if common else text
    words = script_words(rng)
    plain = [w for line in text[:20000] for w in line.split()] or ["word"]
    lines = []
    for i in range(n):
        line = rng.choice(text) if i % 3 == 0 else script_line(rng, words)
        if i % 10 == 9 and not common:
            line = base.random_string(rng, plain, NASTY)
        elif i % 10 == 8 and not common:
            line = run_line(rng)
        lines.append(line.replace("\n", " ").rstrip("\r"))
    return lines


# ---- Models ----------------------------------------------------------------------------------------------------------


def train(lines, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, num_threads=1, shuffle_input_sentence=False,
        max_sentence_length=100000, hard_vocab_limit=False, **options)  # fmt: skip
    return protobuf.ModelProto.FromString(model.getvalue())


def changed(model, change, **normalizer):
    copy = protobuf.ModelProto()
    copy.CopyFrom(model)
    if change:
        change(copy)
    for key, value in normalizer.items():
        setattr(copy.normalizer_spec, key, value)
    return copy


def normal_pieces(model, rng, n, longest=100):
    found = [p for p in model.pieces if p.type == 1 and 1 < len(p.piece) <= longest]
    return rng.sample(found, min(n, len(found)))


def with_unused(rng, n):
    def change(model):
        for piece in normal_pieces(model, rng, n):
            piece.type = 5
    return change


def with_user_defined(rng, n):
    def change(model):
        for piece in normal_pieces(model, rng, n):
            piece.type, piece.score = 4, 0
        for text in ("\u2581\u2581", "\u2581\u2581\u2581", "<a b>", "<user>", "\ufb01", "e\u0301"):
            if not any(piece.piece == text for piece in model.pieces):
                model.pieces.add(piece=text, score=0, type=4)
    return change


def with_equal_scores(step):
    def change(model):
        for piece in model.pieces:
            if piece.type == 1:
                piece.score = round(piece.score / step) * step
    return change


def with_runs(model):
    scores = {piece.piece: piece.score for piece in model.pieces}
    for i, letter in enumerate(RUN_LETTERS):
        if letter * 15 not in scores:
            model.pieces.add(piece=letter * 15, score=scores.get(letter, -9.0) + 4e-4 * i, type=1)


def as_suffix(model):
    model.trainer_spec.treat_whitespace_as_suffix = True


def variants(lines, rng):
    """(name, ModelProto) pairs."""
    base_options = {"character_coverage": 0.98}
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    unigram = train(lines, model_type="unigram", vocab_size=8000, **base_options, **special)
    yield "unigram", unigram
    yield "unigram, no dummy prefix", changed(unigram, None, add_dummy_prefix=False)
    yield "unigram, all white space", changed(unigram, None, remove_extra_whitespaces=False)
    yield "unigram, nothing of white space", changed(
        unigram, None, remove_extra_whitespaces=False, add_dummy_prefix=False, escape_whitespaces=False)  # fmt: skip
    yield "unigram, suffix", changed(unigram, as_suffix)
    yield "unigram, equal scores", changed(unigram, with_equal_scores(1.0))
    yield "unigram, runs", changed(unigram, with_runs)
    yield "unigram, unused", changed(unigram, with_unused(rng, 2000))
    yield "unigram, user-defined", changed(unigram, with_user_defined(rng, 50))
    yield "unigram, user-defined, all white space", changed(
        unigram, with_user_defined(rng, 50), remove_extra_whitespaces=False)  # fmt: skip
    bytes_too = train(lines, model_type="unigram", vocab_size=7000, byte_fallback=True, split_by_whitespace=False,
                      normalization_rule_name="identity", split_digits=True, character_coverage=0.98)  # fmt: skip
    yield "unigram, byte fallback, identity", bytes_too
    yield "unigram, byte fallback, all white space", changed(bytes_too, None, remove_extra_whitespaces=False)
    bpe = train(lines, model_type="bpe", vocab_size=8000, normalization_rule_name="nmt_nfkc_cf", **base_options)
    yield "BPE", bpe
    yield "BPE, equal scores", changed(bpe, with_equal_scores(100.0))
    yield "BPE, unused", changed(bpe, with_unused(rng, 2000))
    llama = train(lines, model_type="bpe", vocab_size=8000, byte_fallback=True, normalization_rule_name="identity",
                  remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.98,
                  user_defined_symbols=["<user>", "\u2581\u2581", "\u2581\u2581\u2581\u2581"])  # fmt: skip
    yield "BPE like LLaMA's", llama
    yield "BPE like LLaMA's, unused and user-defined", changed(
        changed(llama, with_unused(rng, 1500)), with_user_defined(rng, 100))  # fmt: skip
    yield "BPE like Gemma's", changed(llama, None, add_dummy_prefix=False)


class Extractor:
    """In place of transformers' own extractors, which its version 5 has changed and its converters have not."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.pieces = protobuf.ModelProto.FromString(file.read()).pieces

    def extract(self, scores):
        vocab = {piece.piece: i for i, piece in enumerate(self.pieces)}
        return vocab, slow.generate_merges(vocab, scores)


def converted(converter, model, directory, **original):
    """tokenizer.json as a converter of transformers makes it."""
    path = os.path.join(directory, "original.model")
    with open(path, "wb") as file:
        file.write(model.SerializeToString())
    pieces = [piece.piece for piece in model.pieces]
    stand_in = types.SimpleNamespace(
        vocab_file=path, convert_ids_to_tokens=lambda i: pieces[i], convert_tokens_to_ids=pieces.index, **original)  # fmt: skip
    return type("Converter", (converter,), {"SpmExtractor": Extractor})(stand_in).converted()


def json_variants(found, directory):
    """(name, tokenizers.Tokenizer) pairs."""
    unigram, llama = found["unigram"], found["BPE like LLaMA's"]
    t5 = converted(slow.T5Converter, unigram, directory, _extra_ids=100)
    t5.add_special_tokens([f"<extra_id_{i}>" for i in range(100)])
    yield "T5's tokenizer.json", t5
    for prepend in ("first", "never"):
        copy = Tokenizer.from_str(t5.to_str())
        copy.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
        copy.decoder = decoders.Metaspace(prepend_scheme=prepend)
        yield f"T5's tokenizer.json, prepend_scheme {prepend}", copy
    old = Tokenizer.from_str(t5.to_str())  # as on the hub
    old.normalizer = normalizers.Precompiled(unigram.normalizer_spec.precompiled_charsmap)
    old.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    yield "T5's older tokenizer.json", old
    squeezed = Tokenizer.from_str(t5.to_str())
    squeezed.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])  # fmt: skip
    yield "no charsmap", squeezed
    shifted = converted(slow.XLMRobertaConverter, changed(unigram, fairseq_order), directory, **{})
    shifted.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    shifted.add_special_tokens([base.AddedToken("<mask>", lstrip=True, normalized=True)])
    shifted.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    yield "XLM-R's tokenizer.json", shifted
    llama_json = converted(slow.LlamaConverter, llama, directory, legacy=True, add_prefix_space=True)
    yield "LLaMA's tokenizer.json", llama_json
    yield "Mistral's tokenizer.json", converted(slow.LlamaConverter, llama, directory, legacy=False, add_prefix_space=True)
    gemma = converted(slow.GemmaConverter, llama, directory, pad_token="<unk>", eos_token="<s>", bos_token="</s>")
    yield "Gemma's tokenizer.json", gemma
    odd = converted(slow.LlamaConverter, llama, directory, legacy=True, add_prefix_space=True)
    odd.add_tokens([base.AddedToken(text, normalized=True, **{flag: True}) for text, flag in
                    (("\ufb01", "lstrip"), ("two words", "rstrip"), ("<pad>", "special"), ("<mask>", "lstrip"))])
    yield "LLaMA's tokenizer.json with normalized tokens", odd
    odd = Tokenizer.from_str(t5.to_str())
    odd.add_tokens([base.AddedToken(text, normalized=True, **{flag: True}) for text, flag in
                    (("\ufb01", "lstrip"), ("\uff41\uff42", "rstrip"), ("two words", "lstrip"), ("the", "single_word"))])
    yield "T5's tokenizer.json with normalized tokens", odd
    unknown = Tokenizer.from_str(converted(slow.LlamaConverter, found["BPE"], directory, legacy=True).to_str())
    model = unknown.model
    model.byte_fallback = False
    for model.fuse_unk in (True, False):
        unknown.model = model
        yield f"BPE without byte fallback, fuse_unk {model.fuse_unk}", Tokenizer.from_str(unknown.to_str())
    made = json.loads(llama_json.to_str())["model"]
    yield "LLaMA's tokenizer.json by transformers 5", transformers.LlamaTokenizer(
        vocab=made["vocab"], merges=[tuple(merge) for merge in made["merges"]]).backend_tokenizer  # fmt: skip
    unknown = Tokenizer.from_str(llama_json.to_str())
    unknown.model.unk_token = None
    yield "LLaMA's tokenizer.json without an unknown token", unknown
    fallback = found["unigram, byte fallback, identity"]
    vocab = [(piece.piece, piece.score) for piece in fallback.pieces]
    by_bytes = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    by_bytes.normalizer = normalizers.Replace(" ", "\u2581")
    by_bytes.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    yield "unigram's tokenizer.json with byte fallback", by_bytes


def fairseq_order(model):
    """The first pieces as XLM-R's model has them."""
    for piece, text, kind in zip(model.pieces, ("<unk>", "<s>", "</s>"), (2, 3, 3)):
        piece.piece, piece.type = text, kind


# ---- Comparing -------------------------------------------------------------------------------------------------------


def write_pieces(model, directory, name, tokenizer_class, extra=0):
    base.write_model(directory, len(model.pieces) + extra)
    with open(os.path.join(directory, name), "wb") as file:
        file.write(model.SerializeToString())
    with open(os.path.join(directory, "tokenizer_config.json"), "w") as file:
        file.write('{"tokenizer_class": "%s", "add_bos_token": false}' % tokenizer_class)


def lines_of(arguments, model, text, options):
    return base.run_tfm(arguments, model, text, options).split(b"\n")[:-1]


def compare_ids(arguments, model, name, lines, wanted, counts, options=()):
    got = lines_of(arguments, model, "".join(line + "\n" for line in lines).encode(), options)
    counts.add(len(got) == len(lines), name + ": number of lines", "", len(lines), len(got))
    for line, w, g in zip(lines, wanted, got):
        w = " ".join(map(str, w))
        counts.add(w == g.decode(), f"{name} {' '.join(options)}", line, w, g.decode())


def compare_text(arguments, model, name, ids, wanted, counts):
    text = "".join(" ".join(map(str, line)) + "\n" for line in ids).encode()
    got = lines_of(arguments, model, text, ["--decode"])
    if len(got) != len(ids):
        counts.add(False, name + ": decoded lines", "", len(ids), len(got))
    for line, w, g in zip(ids, wanted, got):
        # Bytes that are no UTF-8 are shown as they are, where the libraries put U+FFFD.
        counts.add(w == g.decode("utf-8", "replace"), name + ", decoded", str(line), w, g)


def decodable(ids, text):
    return "\n" not in text and "\ufffd" not in text


def compare_model(arguments, directory, name, model, lines, counts):
    """A model file, as the LLaMA class has it."""
    before = counts.failed
    checkpoint, out = os.path.join(directory, "checkpoint"), os.path.join(directory, "model.tfm")
    write_pieces(model, checkpoint, "tokenizer.model", "LlamaTokenizer")
    base.convert(arguments, checkpoint, out)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    wanted = processor.encode(lines)
    compare_ids(arguments, out, name, lines, wanted, counts, ["--plain"])
    sample = [(ids, text) for ids, text in ((ids, processor.decode(ids)) for ids in wanted[:3000]) if decodable(ids, text)]
    compare_text(arguments, out, name, [ids for ids, _ in sample], [text for _, text in sample], counts)
    subprocess.run(["rm", "-r", checkpoint], check=True)
    print(f"{name}: {len(lines)} lines, {counts.failed - before} failed", flush=True)


def compare_json(arguments, directory, name, tokenizer, lines, counts):
    before = counts.failed
    checkpoint, out = os.path.join(directory, "checkpoint"), os.path.join(directory, "model.tfm")
    base.write_checkpoint(tokenizer, checkpoint)
    base.convert(arguments, checkpoint, out)
    for special, plain in ((False, False), (True, True)):
        part = lines[: len(lines) // 2] if special else lines[len(lines) // 2 :]
        tokenizer.encode_special_tokens = not special
        wanted = [e.ids for e in tokenizer.encode_batch(part, add_special_tokens=not plain)]
        compare_ids(arguments, out, name, part, wanted, counts, base.options_of(special, plain))
    sample = [(ids, text) for ids, text in ((ids, tokenizer.decode(ids, skip_special_tokens=False))
                                            for ids in wanted[:2000]) if ids and decodable(ids, text)]  # fmt: skip
    if "normalized tokens" not in name:  # whose normalized text tokenizers decodes to, and tfm to their own
        compare_text(arguments, out, name, [ids for ids, _ in sample], [text for _, text in sample], counts)
    subprocess.run(["rm", "-r", checkpoint], check=True)
    print(f"{name}: {len(lines)} lines, {counts.failed - before} failed", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=100000, help="how many lines in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text", nargs="*", default=[], metavar="FILE", help="more text")
    parser.add_argument("--only", default="", help="only what has this in its name")
    parser.add_argument("--tfm", default="build/tfm", help="the program")
    parser.add_argument("--convert", default="tools/convert.py", help="the converter")
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    counts = base.Counts()
    found = dict(variants(corpus(rng, arguments.text, 12000, common=True), rng))
    with tempfile.TemporaryDirectory() as directory:
        jsons = dict(json_variants(found, directory))
        n = max(1, arguments.lines // (len(found) + len(jsons)))
        for name, model in found.items():
            if arguments.only in name:
                compare_model(arguments, directory, name, model, corpus(rng, arguments.text, n), counts)
        for name, tokenizer in jsons.items():
            if arguments.only in name:
                compare_json(arguments, directory, name, tokenizer, corpus(rng, arguments.text, n), counts)
    print(f"{counts.passed} passed, {counts.failed} failed")
    return 1 if counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
