#!/usr/bin/env python3
"""Compares the token ids of `tfm tokenize` with those of Hugging Face's tokenizers, over random strings made to be
hard: all of Unicode, white space, contractions, emoji, marks, digits, added tokens and parts of them.

    compare_tokenizer.py [--strings N] [--seed S] [--text FILE ...] [CHECKPOINT ...]

Compares the tokenizers of the checkpoints (Hugging Face directories), and of tokenizers that it trains itself and
changes in ways that a checkpoint may have: merges in an odd order, missing byte tokens, every kind of added token;
RoBERTa's; other patterns that cut a text, as LLaMA 3, Qwen 2 and SmolLM have them; and BERT's WordPiece with every kind of normalization. Pairs of texts, token types and decoding, too.
Needs the Python packages tokenizers and transformers. The last line is `N passed, N failed`.
"""
import argparse
import json
import os
import random
import struct
import subprocess
import sys
import sysconfig
import tempfile
import unicodedata

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RUST_BACKTRACE"] = "0"  # see wanted_ids()

from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPACES = (
    "\t\n\v\f\r \x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u200b\u200c\u200d\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
CONTRACTIONS += [c.upper() for c in CONTRACTIONS] + [c.replace("'", "\u2019") for c in CONTRACTIONS]
CONTRACTIONS += ["'", "''", "'r", "'v", "'l", "'R", "'x", " 's", "'\u017f", "don't", "we'll've", "'Sx", "\u02bcs"]
EMOJI = [
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f44d\U0001f3fd",
    "1\ufe0f\u20e3", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f600", "\u00a9\ufe0f", "\U000e0067\U000e007f",
]  # fmt: skip
ALL = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
DIGITS, MARKS, LETTERS = ([chr(c) for c in ALL if unicodedata.category(chr(c)).startswith(x)] for x in "NML")
# Marks that BERT keeps and sorts, and that it removes, to be mixed.
KEPT_MARKS = [c for c in MARKS if unicodedata.combining(c) and ord(c) > 0x1d00] + ["\u0334", "\u0345", "\u034f", "\ufe0f"]
# Hangul and its letters, and what is composed of parts or stands for something else.
COMPOSING = [c for c in ALL if unicodedata.normalize("NFD", chr(c)) != chr(c)] + list(range(0x1100, 0x1200)) * 9
PLANES = [(0, 0x7F), (0, 0x2FF), (0x300, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF)]
PLANES += [(0x20000, 0x323FF), (0xE0000, 0xE01FF), (0, 0xD7FF), (0x10000, 0x10FFFF)]


def run_tfm(arguments, model, text, options):
    """The one place that calls the program: `tfm tokenize MODEL` with text on standard input; its output."""
    command = [arguments.tfm, "tokenize", model, *options]
    return subprocess.run(command, input=text, stdout=subprocess.PIPE, check=True).stdout


def convert(arguments, checkpoint, model):
    """The one place that makes a model file of a checkpoint."""
    result = subprocess.run([sys.executable, arguments.convert, checkpoint, model], stderr=subprocess.PIPE)
    if result.returncode:
        sys.exit("compare_tokenizer.py: %s: %s" % (arguments.convert, result.stderr.decode(errors="replace")))


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


def write_checkpoint(tokenizer, directory):
    """The smallest GPT-2 with this tokenizer, as a Hugging Face directory."""
    write_model(directory, 1 + max(tokenizer.get_vocab().values()))
    tokenizer.save(os.path.join(directory, "tokenizer.json"))


def write_model(directory, vocab_size):
    """The smallest GPT-2 with so many tokens, as a Hugging Face directory without a tokenizer."""
    os.makedirs(directory)
    width, context = 16, 8
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": vocab_size, "n_embd": width}
    config.update({"n_layer": 1, "n_head": 1, "n_positions": context, "n_inner": width})
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump(config, file)
    shapes = {"wte.weight": [vocab_size, width], "wpe.weight": [context, width]}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes.update({f"{name}.weight": [width], f"{name}.bias": [width]})
    for name, n_out in (("attn.c_attn", 3 * width), ("attn.c_proj", width), ("mlp.c_fc", width), ("mlp.c_proj", width)):
        shapes.update({f"h.0.{name}.weight": [width, n_out], f"h.0.{name}.bias": [n_out]})
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header["transformer." + name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(header).encode()
    with open(os.path.join(directory, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + bytes(offset))


def load_checkpoint(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)._tokenizer


def new_tokenizer(model, add_prefix_space=False):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(text, vocab_size, **options):
    tokenizer = new_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    tokenizer.train_from_iterator(text, trainer)
    return json.loads(tokenizer.to_str())["model"]


CASED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def split_by(pattern, behavior="isolated", invert=False):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), byte_level])


def split_digits():
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


# Every pattern by which byte-level BPE cuts a text, and whether the text is normalized before.
SPLITTERS = [
    ("llama3", split_by(CASED % r"\p{N}{1,3}"), False),
    ("qwen2", split_by(CASED % r"\p{N}"), True),
    ("gpt4", split_by(GPT4), False),
    ("gpt4, inverted", split_by(CASED % r"\p{N}{1,3}", "removed", True), False),
    ("gpt2 as a regular expression", split_by(GPT2), True),
    ("smollm", split_digits(), False),
]


def by_patterns(text, rng):
    """Tokenizers of every pattern: one with all that LLaMA 3 has, and one with added tokens of every kind."""
    for name, splitter, composed in SPLITTERS:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = decoders.ByteLevel()
        if composed:
            tokenizer.normalizer = normalizers.NFC()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=6000, show_progress=False, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(text[:20000], trainer)
        odd = Tokenizer.from_str(tokenizer.to_str())
        add_random_tokens(odd, rng, 12)
        model = json.loads(tokenizer.to_str())["model"]
        some = [tuple(pair) for pair in model["merges"] if rng.random() < 0.9]
        tokenizer.model = models.BPE(model["vocab"], some, ignore_merges=True)
        tokenizer.add_special_tokens(["<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])
        first = tokenizer.token_to_id("<|begin_of_text|>")
        template = processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            pair="<|begin_of_text|> $A $B:1",
            special_tokens=[("<|begin_of_text|>", first)],
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        yield f"pattern {name}", tokenizer
        yield f"pattern {name}, added tokens", odd



ODD_TOKENS = [
    "<|endoftext|>", "<|end", "<|endoftext|>x", "|>", "<s>", "</s>", "<s></s>", "<mask>", "<a>", "<a><b>", "<", "<<",
    "a", "ab", "the", "ab cd", " x", "x ", "'s", "'", "n't", "_", "123", " ", "  ", "   ", "\t", "\r", "\u3000",
    "\u2028", "\xa0x", "\u203f", "é", "e\u0301", "\u0301", "\u4e2d\u6587", "\u4e2d", "\U0001f469", "\U0001f469\u200d",
    "\u0663", "²", "\u2177", "\u24b6",
]  # fmt: skip


def add_random_tokens(tokenizer, rng, n):
    for content in rng.sample(ODD_TOKENS, n):
        if not content.isascii() and tokenizer.token_to_id(content) is not None:
            continue  # "é" is also how a vocabulary writes the byte 0xE9: one id for two texts, which tfm refuses
        flags = [rng.random() < 0.3 for _ in range(3)]
        # transformers, and so convert.py, makes GPT-2's <|endoftext|> special whatever tokenizer.json says.
        special = rng.random() < 0.5 or content == "<|endoftext|>"
        tokenizer.add_tokens(
            [
                AddedToken(
                    content,
                    special=special,
                    normalized=rng.random() < 0.5,
                    lstrip=flags[0],
                    rstrip=flags[1],
                    single_word=flags[2],
                )
            ]
        )


def roberta(vocab, merges, rng, prefix_space):
    """A byte-level BPE in RoBERTa's clothes."""
    vocab = dict(vocab)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    for text in special:
        vocab.setdefault(text, len(vocab))
    tokenizer = new_tokenizer(models.BPE(vocab, merges), add_prefix_space=prefix_space)
    normalized = rng.random() < 0.5
    tokenizer.add_special_tokens([AddedToken(text, normalized=normalized) for text in special[:4]])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]), trim_offsets=True, add_prefix_space=prefix_space
    )
    return tokenizer


BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert(text, template=True, vocab_size=20000, prefix="##", max_word=100, cleanup=True, **normalizer):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer) if normalizer else None
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=BERT_TOKENS,
        continuing_subword_prefix=prefix,
        initial_alphabet=[] if vocab_size < 5000 else LETTERS[::7],
    )
    tokenizer.train_from_iterator(text, trainer)
    vocab = tokenizer.get_vocab()
    tokenizer.model = models.WordPiece(
        vocab, unk_token="[UNK]", continuing_subword_prefix=prefix, max_input_chars_per_word=max_word
    )
    tokenizer.decoder = decoders.WordPiece(prefix=prefix, cleanup=cleanup)
    cls, sep = (("[" + name + "]", vocab["[" + name + "]"]) for name in ("CLS", "SEP"))
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[cls, sep]
        )
    else:
        tokenizer.post_processor = processors.BertProcessing(sep, cls)
    return tokenizer


BERT_ODD_TOKENS = ["Zürich", "ZURICH", "[x]", "\u00c9\u00c9", "the", "##ing", "[MASK", "a b", "ﬁ", "\u4e2d\u6587", "İx",
                   "\u0300", "e\u0301", "don't do", "of", "OF", "\u1e9e"]  # fmt: skip


def berts(text, rng):
    """(name, tokenizer) pairs of WordPiece tokenizers."""
    usual = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    yield BERT_UNCASED, bert(text, **usual)
    yield "bert cased", bert(text, template=False, **{**usual, "lowercase": False})
    yield "bert lower case with accents", bert(text, **{**usual, "strip_accents": False})
    yield "bert cased without accents", bert(text, **{**usual, "lowercase": False, "strip_accents": True})
    yield "bert, nothing cleaned", bert(text, **{**usual, "clean_text": False, "handle_chinese_chars": False})
    yield "bert without normalizer", bert(text, cleanup=False)
    yield "bert, short words and another prefix", bert(text, prefix="_", max_word=7, **usual)
    yield "bert, no prefix", bert(text[:5000], vocab_size=3000, prefix="", **usual)
    for i in range(4):
        tokenizer = bert(text[:20000], vocab_size=6000, **{**usual, "lowercase": i % 2 == 0})
        seen = {""}
        for content in rng.sample(BERT_ODD_TOKENS, rng.randrange(3, len(BERT_ODD_TOKENS))):
            flags = {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "single_word")}
            # The library takes all memory where normalization leaves nothing of a token, and finds any of several that
            # it makes equal.
            what = tokenizer.normalizer.normalize_str(content)
            normalized = rng.random() < 0.7 and what not in seen
            seen.update([what] if normalized else [])
            added = AddedToken(content, special=rng.random() < 0.3, normalized=normalized, **flags)
            tokenizer.add_tokens([added])
        yield f"bert with added tokens {i}", tokenizer


EVERY_PAIR = "every pair of bytes"
BERT_UNCASED = "bert uncased"


def variants(text, rng):
    """(name, tokenizer) pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    # Every two bytes are a token, so that the ids show where the text was cut, whatever the characters.
    pairs = [(a, b) for a in alphabet for b in alphabet]
    rng.shuffle(pairs)
    tokens = alphabet + [a + b for a, b in pairs]
    yield EVERY_PAIR, new_tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))

    trained = train(text, 20000, initial_alphabet=alphabet)
    vocab, merges = trained["vocab"], [tuple(pair) for pair in trained["merges"]]
    yield "trained", new_tokenizer(models.BPE(vocab, merges))
    yield "prefix space", new_tokenizer(models.BPE(vocab, merges), add_prefix_space=True)

    shuffled = merges[:]
    rng.shuffle(shuffled)
    yield "shuffled merges", new_tokenizer(models.BPE(vocab, shuffled))

    # Every way to make a token of two others is a merge.
    splits = [(t[:i], t[i:]) for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    rng.shuffle(splits)
    yield "all merges", new_tokenizer(models.BPE(vocab, splits))

    some = [pair for pair in merges if rng.random() < 0.8]
    yield "ignore merges", new_tokenizer(models.BPE(vocab, some, ignore_merges=True), add_prefix_space=True)
    yield "missing merges", new_tokenizer(models.BPE(vocab, some))

    poor = train(("".join(line.split()) for line in text[:2000]), 3000)  # not even a space
    vocab_poor, merges_poor = dict(poor["vocab"]), [tuple(pair) for pair in poor["merges"]]
    yield "missing bytes", new_tokenizer(models.BPE(vocab_poor, merges_poor), add_prefix_space=True)
    vocab_poor["<unk>"] = len(vocab_poor)
    for fuse in (False, True):
        model = models.BPE(vocab_poor, merges_poor, unk_token="<unk>", fuse_unk=fuse)
        yield f"unknown token, fuse_unk={fuse}", new_tokenizer(model, add_prefix_space=fuse)

    around = new_tokenizer(models.BPE(vocab, merges))
    around.add_special_tokens(["<s>", "</s>"])
    ids = [(t, around.token_to_id(t)) for t in ("<s>", "</s>")]
    around.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=ids
    )
    yield "prefix and suffix", around

    yield "roberta", roberta(vocab, merges, rng, False)
    yield "roberta, prefix space", roberta(vocab, merges, rng, True)
    yield from by_patterns(text, rng)
    yield from berts(text, rng)

    for i in range(16):
        tokenizer = new_tokenizer(models.BPE(vocab, merges), add_prefix_space=i % 4 == 3)
        add_random_tokens(tokenizer, rng, rng.randrange(1, 4) if i % 2 else rng.randrange(4, len(ODD_TOKENS)))
        yield f"added tokens {i}", tokenizer


# ---- Strings ---------------------------------------------------------------------------------------------------------


def code_point(rng):
    while True:
        c = rng.randint(*rng.choice(PLANES))
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def script_word(rng):
    """Letters and marks that are neighbours in Unicode, as those of one script are."""
    start = rng.randrange(len(LETTERS))
    letters = LETTERS[start : start + 40]
    return "".join(rng.choice(letters) + rng.choice(["", "", rng.choice(MARKS)]) for _ in range(rng.randrange(1, 9)))


def part(rng, words, added):
    kind = rng.randrange(18)
    if kind == 16:
        s = "".join(rng.choices(" \t\r\n\u3000", k=rng.randrange(1, 5)))
        return s + rng.choice(["", "a", "1", "12", "1234", "!", "?!\r\n", "\u0301", "'S", "\u0663"])
    if kind == 17:
        s = script_word(rng) + rng.choice("aeoucAEISZ") + "".join(rng.choices(MARKS, k=rng.randrange(3)))
        s += "".join(map(chr, rng.choices(COMPOSING, k=rng.randrange(4))))
        return unicodedata.normalize(rng.choice(["NFC", "NFD"]), s)
    if kind == 14:
        return script_word(rng) + rng.choice([" ", "", ", ", "-"])
    if kind == 15:
        return "".join(rng.choices(KEPT_MARKS, k=rng.randrange(2, 9)))
    if kind <= 2:
        return rng.choice(words) + rng.choice(["", " ", " ", "\n"])
    if kind == 3:
        return "".join(rng.choices(SPACES, k=rng.randrange(1, 6)))
    if kind == 4:
        return rng.choice(" \t\n\r\xa0") * rng.randrange(1, 9)
    if kind == 5:
        return rng.choice(CONTRACTIONS)
    if kind == 6:
        return rng.choice(EMOJI)
    if kind == 7:
        return "".join(rng.choices(DIGITS, k=rng.randrange(1, 5)))
    if kind == 8:
        return rng.choice("aeiou ñ1'") + "".join(rng.choices(MARKS, k=rng.randrange(1, 4)))
    if kind == 9:
        return "".join(rng.choices(LETTERS, k=rng.randrange(1, 6)))
    if kind == 10:
        return "".join(code_point(rng) for _ in range(rng.randrange(1, 6)))
    if kind == 11:
        return "".join(chr(rng.randrange(128)) for _ in range(rng.randrange(1, 9)))
    if kind == 12:
        return rng.choice(words) * rng.randrange(1, 60 if rng.random() < 0.05 else 4)
    if not added:
        return ""
    token = rng.choice(added)
    return token if rng.random() < 0.7 else token[: rng.randrange(1, len(token) + 1)]


def random_string(rng, words, added):
    s = ""
    for _ in range(rng.randrange(1, 9)):
        s += part(rng, words, added)
        if added and rng.random() < 0.15:
            s += "".join(rng.choices(added + [" ", "\t", "\u3000"], k=3))
    return s


# ---- Comparing -------------------------------------------------------------------------------------------------------


class Counts:
    passed = 0
    failed = 0

    def add(self, good, what, text="", wanted="", got=""):
        self.passed += good
        self.failed += not good
        if not good and self.failed <= 10:
            print(f"DIFFERENT: {what}\n  text   {ascii(text)}\n  wanted {wanted}\n  got    {got}")


def encoded(tokenizer, texts, special, plain):
    """The right answers; None where the library panics, as it does when one added token takes with rstrip what another
    one takes with lstrip."""
    tokenizer.encode_special_tokens = not special
    try:
        return tokenizer.encode_batch(texts, add_special_tokens=not plain)
    except BaseException as error:  # a panic is no Exception
        if type(error).__name__ != "PanicException":
            raise
    return [None] if len(texts) == 1 else [e for text in texts for e in encoded(tokenizer, [text], special, plain)]


def wanted_ids(tokenizer, strings, special, plain):
    wanted = []
    for i in range(0, len(strings), 1000):  # an Encoding takes much memory
        for encoding in encoded(tokenizer, strings[i : i + 1000], special, plain):
            wanted.append(None if encoding is None else " ".join(map(str, encoding.ids)))
    return wanted


def options_of(special, plain, *more):
    return [*(["--special"] if special else []), *(["--plain"] if plain else []), *more]


def compare_lines(arguments, model, name, tokenizer, strings, special, plain, counts):
    """A line of input for each string."""
    strings = [s.replace("\n", "\u2028").rstrip("\r") for s in strings]
    wanted = wanted_ids(tokenizer, strings, special, plain)
    options = options_of(special, plain)
    text = "".join(s + "\n" for s in strings).encode()
    got = run_tfm(arguments, model, text, options).decode().split("\n")[:-1]
    counts.add(len(got) == len(strings), f"{name} {options}: number of lines", "", len(strings), len(got))
    for s, w, g in zip(strings, wanted, got):
        counts.add(w in (g, None), f"{name} {options}", s, w, g)


def compare_pairs(arguments, model, name, tokenizer, strings, plain, counts):
    """Two strings in a line, with a tab between; ids and token types."""
    strings = [s.replace("\n", "\u2028").replace("\t", " ").rstrip("\r") for s in strings]
    pairs = list(zip(strings[::2], strings[1::2]))
    encodings = encoded(tokenizer, pairs, False, plain)
    text = "".join("\t".join(pair) + "\n" for pair in pairs).encode()
    for key, option in (("ids", []), ("type_ids", ["--types"])):
        got = run_tfm(arguments, model, text, ["--pair", *option, *options_of(False, plain)]).decode().split("\n")[:-1]
        counts.add(len(got) == len(pairs), f"{name} pairs: number of lines", "", len(pairs), len(got))
        for pair, encoding, g in zip(pairs, encodings, got):
            wanted = None if encoding is None else " ".join(map(str, getattr(encoding, key)))
            counts.add(wanted in (g, None), f"{name} pairs, {key}", pair, wanted, g)


def compare_decoding(arguments, model, name, tokenizer, strings, rng, counts):
    """The ids of strings, and any ids."""
    tokens = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    ids = [encoding.ids for encoding in encoded(tokenizer, strings, True, False) if encoding is not None]
    ids += [rng.choices(tokens, k=rng.randrange(1, 12)) for _ in strings]
    wanted = [tokenizer.decode(line, skip_special_tokens=False) for line in ids]
    lines = [(line, text) for line, text in zip(ids, wanted) if "\n" not in text]
    text = "".join(" ".join(map(str, line)) + "\n" for line, _ in lines).encode()
    got = run_tfm(arguments, model, text, ["--decode"]).decode().split("\n")[:-1]
    counts.add(len(got) == len(lines), f"{name} decoding: number of lines", "", len(lines), len(got))
    for (line, text), g in zip(lines, got):
        counts.add(text == g, f"{name} decoding", str(line), ascii(text), ascii(g))


def compare_whole(arguments, model, name, tokenizer, text, special, plain, counts):
    """One text with line ends in it."""
    (wanted,) = wanted_ids(tokenizer, [text], special, plain)
    options = options_of(special, plain, "--whole")
    got = run_tfm(arguments, model, text.encode(), options).decode().rstrip("\n")
    if wanted is None:
        return
    at = next((i for i, (w, g) in enumerate(zip(wanted.split(), got.split())) if w != g), 0)
    parts = wanted.split()[at:][:20], got.split()[at:][:20]
    counts.add(wanted == got, f"{name} {options}, at id {at}", text[:1000], *parts)


def compare_round_trip(arguments, model, name, rng, counts):
    """Any bytes come back, well-formed or not."""
    for _ in range(20):
        parts = [code_point(rng).encode() if i % 2 else rng.randbytes(rng.randrange(1, 9)) for i in range(500)]
        text = b"".join(p[: rng.randrange(1, len(p) + 1)] for p in parts)
        ids = run_tfm(arguments, model, text, ["--whole"])
        back = run_tfm(arguments, model, ids, ["--decode", "--special"])
        counts.add(text in (back, back[:-1]), f"{name}: round trip", text, text, back)


def every_character(rng):
    """Every character, in places that show its class, 16 of them in a string. Of those that no version of Unicode gives a
    meaning (planes 4 to 13, the rest of 14, private use in 15 and 16), one in sixteen, and the ends of the planes."""
    chosen = [c for c in ALL if c < 0x40000 or 0xE0000 <= c < 0xE1000 or c % 65536 in (0, 65535) or rng.randrange(16) == 0]
    places = [f"a{chr(c)}b {chr(c)}1{chr(c)}2!{chr(c)}? {chr(c)}{chr(c)} x" for c in chosen]
    return ["".join(places[i : i + 16]) for i in range(0, len(places), 16)]


def compare(arguments, model, name, tokenizer, words, n, rng, counts):
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    modes = [(True, False), (False, False), (True, True), (False, True)]
    before = counts.failed
    for special, plain in modes:
        strings = [random_string(rng, words, added) for _ in range(n // len(modes))]
        compare_lines(arguments, model, name, tokenizer, strings, special, plain, counts)
        for i in range(0, len(strings), 5000):
            compare_whole(arguments, model, name, tokenizer, "".join(strings[i : i + 500]), special, plain, counts)
    compare_lines(arguments, model, name, tokenizer, ["", " ", "'", "a", "\u2028"], False, False, counts)
    strings = [random_string(rng, words, added) for _ in range(1 + n // 8)]
    for plain in (False, True):
        compare_pairs(arguments, model, name, tokenizer, strings, plain, counts)
    if isinstance(tokenizer.model, models.WordPiece):
        compare_decoding(arguments, model, name, tokenizer, strings, rng, counts)
    compare_whole(arguments, model, name, tokenizer, "", False, False, counts)
    print(f"{name}: {n} strings, {counts.failed - before} failed", flush=True)


def training_text(files, rng):
    """Lines of Python's own library, words of letters of every script, and the lines of the files."""
    lines = []
    library = sysconfig.get_paths()["stdlib"]
    for name in sorted(os.listdir(library))[:60]:
        if name.endswith(".py"):
            with open(os.path.join(library, name), encoding="utf-8") as file:
                lines += file.readlines()
    for name in files:
        with open(name, encoding="utf-8", newline="") as file:
            lines += file.read().splitlines(keepends=True)
    for directory, _, names in os.walk("/usr/share/doc"):
        for name in sorted(names)[:1]:
            if name == "copyright" and len(lines) < 100000:
                with open(os.path.join(directory, name), encoding="utf-8", errors="replace") as file:
                    lines += file.readlines()[:50]
    for start in range(0, len(LETTERS), 40):
        script = LETTERS[start : start + 40]
        lines += ["".join(rng.choices(script + [" "], k=12)) + "\n" for _ in range(3)]
    rng.shuffle(lines)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--strings", type=int, default=100000, help="how many strings in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text", nargs="*", default=[], metavar="FILE", help="more text to train on and to take from")
    parser.add_argument("--tfm", default="build/tfm", help="the program")
    parser.add_argument("--convert", default="tools/convert.py", help="the converter")
    parser.add_argument("--only", default="", metavar="WORD", help="only the tokenizers with this word in their names")
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    text = training_text(arguments.text, rng)
    words = [w for line in text[:20000] for w in line.split()] or ["word"]
    tokenizers = [(c, load_checkpoint(c)) for c in arguments.checkpoints] + [
        variant for variant in variants(text, rng) if arguments.only in variant[0]
    ]
    counts = Counts()
    with tempfile.TemporaryDirectory() as directory:
        for i, (name, tokenizer) in enumerate(tokenizers):
            model = os.path.join(directory, f"{i}.tfm")
            checkpoint = name
            if i >= len(arguments.checkpoints):
                checkpoint = os.path.join(directory, str(i))
                write_checkpoint(tokenizer, checkpoint)
            convert(arguments, checkpoint, model)
            compare(arguments, model, name, tokenizer, words, arguments.strings // len(tokenizers), rng, counts)
            if name in (EVERY_PAIR, BERT_UNCASED) or name in [f"pattern {splitter[0]}" for splitter in SPLITTERS]:
                compare_lines(arguments, model, name, tokenizer, every_character(rng), False, False, counts)
            if name == EVERY_PAIR:
                compare_round_trip(arguments, model, name, rng, counts)
    print(f"{counts.passed} passed, {counts.failed} failed")
    return 1 if counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
