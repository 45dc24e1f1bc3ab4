#!/usr/bin/env python3
"""Compares embed, classify and fill-mask with sentence-transformers and transformers: random encoders of odd shapes and
of every family, with tokenizers of their own, saved as their libraries save them.

usage: tests/live_encoders.py [--seed N] [--build DIRECTORY]

Vectors, probabilities and labels are within 1e-4 of what the libraries say; a line has the same vector among others as
alone; int8 vectors have a cosine of 0.998 with those. Needs torch, transformers, tokenizers, sentencepiece and
sentence-transformers. The last line is `N passed, N failed`; exit status 1 if one failed.
"""

import argparse
import io
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings

import sentencepiece
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import test_convert
from test_convert import CONVERT, ROOT, check

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import models as sentence_models

LONGEST = 64  # tokens


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------

def bert_tokenizer(words, size, lower):
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=lower)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.decoder = decoders.WordPiece()
    trained.train_from_iterator(words, trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    trained.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.BertTokenizerFast(tokenizer_object=trained, do_lower_case=lower, model_max_length=LONGEST)


def roberta_tokenizer(words, size):
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator([" ".join(words)], trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    trained.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return transformers.RobertaTokenizerFast(tokenizer_object=trained, model_max_length=LONGEST)


def xlm_roberta_tokenizer(words, size):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(words[i:i + 12]) for i in range(0, len(words), 12)), model_writer=file,
        vocab_size=size, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    vocabulary = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    vocabulary += [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, pieces.get_piece_size())]
    return transformers.XLMRobertaTokenizerFast(vocab=vocabulary + [("<mask>", 0.0)], model_max_length=LONGEST)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

def families(generator, words):
    """(name of the classes, configuration, tokenizer) triples."""
    heads, size = generator.choice([(6, 6), (3, 11), (5, 8), (7, 5), (1, 33)])
    shape = dict(hidden_size=heads * size, num_attention_heads=heads, num_hidden_layers=generator.randrange(1, 4),
                 intermediate_size=generator.choice([7, 50, 90, 131]))
    small, cased = bert_tokenizer(words, 131, True), bert_tokenizer(words, 301, False)
    byte_level, pieces = roberta_tokenizer(words, 401), xlm_roberta_tokenizer(words, 207)
    for tokenizer in (small, cased):
        yield ("Bert", transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=LONGEST, **shape),
               tokenizer)
    offset = dict(max_position_embeddings=LONGEST + 2, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, **shape)
    yield "Roberta", transformers.RobertaConfig(vocab_size=len(byte_level), **offset), byte_level
    yield "XLMRoberta", transformers.XLMRobertaConfig(vocab_size=len(pieces), **offset), pieces
    yield ("DistilBert", transformers.DistilBertConfig(
        vocab_size=len(small), max_position_embeddings=LONGEST, dim=shape["hidden_size"], n_heads=heads,
        n_layers=shape["num_hidden_layers"], hidden_dim=shape["intermediate_size"],
        sinusoidal_pos_embds=generator.random() < 0.5), small)  # the table is in the checkpoint either way
    yield ("Electra", transformers.ElectraConfig(vocab_size=len(small), max_position_embeddings=LONGEST,
                                                 embedding_size=generator.choice([17, heads * size]), **shape), small)


def randomized(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4 if "embed" in name else 1 / math.sqrt(parameter.shape[1]))
            else:
                parameter.normal_(float("orm" in name and name.endswith("weight")), 0.15)
    return model.eval()


def read_words():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        words = [word for word in file.read().split() if not set("[<-") & set(word)]
    return words + "Привет, мир! 中文字 ありがとう שלום naïve Ünïcode ÀÉ".split()


def make_lines(generator, words):
    lines = ["", "   ", "中文字 ありがとう", "Привет, мир! שלום", "a\u00a0b \u200b c",
             "\U0001f600 \U0001f469\u200d\U0001f469", "x" * 300, " leading and trailing ", "don't can't I'll"]
    lines += [" ".join(generator.choices(words, k=generator.randrange(1, 60))) for _ in range(75)]
    generator.shuffle(lines)
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The programs
# ---------------------------------------------------------------------------------------------------------------------

class Programs:
    def __init__(self, build, folder):
        self.build, self.folder, self.number = build, folder, 0

    def run(self, what, program, *arguments, lines=()):
        """The lines that it writes, or None."""
        done = subprocess.run([os.path.join(self.build, program), *arguments], capture_output=True,
                              input="".join(line + "\n" for line in lines).encode())
        good = check(done.returncode == 0, "%s: %s: %s" % (what, program, done.stderr.decode()))
        return done.stdout.decode(errors="replace").split("\n")[:-1] if good else None

    def convert(self, what, folder):
        out = folder + ".tfm"
        done = subprocess.run([sys.executable, CONVERT, folder, out], capture_output=True, text=True)
        return out if check(done.returncode == 0, "%s: %s" % (what, done.stderr)) else None

    def new_folder(self):
        self.number += 1
        return os.path.join(self.folder, str(self.number))


def vectors_of(lines):
    return torch.tensor([[float(number) for number in line.split(" ")] for line in lines])


def check_embed(programs, generator, kind, config, tokenizer, lines):
    base, folder = programs.new_folder(), programs.new_folder()
    randomized(getattr(transformers, kind + "Model")(config)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    pooling, longest = generator.choice(["cls", "mean", "max"]), generator.choice([None, 23])
    normalize = generator.random() < 0.5
    what = "%s, %s, cut to %s, %s" % (kind, pooling, longest, "normalized" if normalize else "as it is")
    parts = [sentence_models.Transformer(base, max_seq_length=longest),
             sentence_models.Pooling(config.hidden_size, pooling_mode=pooling)]
    model = SentenceTransformer(modules=parts + ([sentence_models.Normalize()] if normalize else []), device="cpu")
    model.save(folder)
    expected = torch.from_numpy(model.encode(lines, show_progress_bar=False))
    path = programs.convert(what, folder)
    found = path and programs.run(what, "embed", path, lines=lines)
    if not found or not check(len(found) == len(lines), "%s: %d lines" % (what, len(found))):
        return
    for line, own in list(zip(lines, found))[:8]:
        check(programs.run(what, "embed", path, "--threads", "1", lines=[line]) == [own], "%s: %r alone" % (what, line))
    off = (vectors_of(found) - expected).abs().max() / expected.abs().max()
    check(off < 1e-4, "%s: off by %.2g" % (what, off))
    programs.run(what, "tfm", "quantize", path, path + ".int8")
    rounded = vectors_of(programs.run(what, "embed", path + ".int8", lines=lines))
    cosine = torch.nn.functional.cosine_similarity(rounded, expected)
    check(cosine.mean() >= 0.998, "%s: int8: cosine %.5f" % (what, cosine.mean()))
    print("embed       %-48s off by %.1e; int8: cosine %.5f, least %.5f" % (what, off, cosine.mean(), cosine.min()),
          flush=True)


def labels_of(line):
    return [(label, float(value)) for label, value in (part.rsplit(" ", 1) for part in line.split("\t"))]


def compare_labels(what, found, expected, names):
    """The worst difference. found: (label, probability) pairs, the best first; expected: probabilities."""
    found_of = dict(found)
    if not check(sorted(found_of) == sorted(names), "%s: labels %s" % (what, sorted(found_of))):
        return 0.0
    check(expected[names.index(found[0][0])] > expected.max() - 1e-5, "%s: %s is not the best" % (what, found[0][0]))
    off = max(abs(found_of[name] - p) for name, p in zip(names, expected.tolist()))
    check(off < 1e-4, "%s: off by %.2g" % (what, off))
    return off


def labelled(programs, kind, head, config, tokenizer, names):
    config = type(config)(**dict(config.to_dict(), id2label=dict(enumerate(names)),
                                 label2id={name: i for i, name in enumerate(names)}))
    model, folder = randomized(getattr(transformers, kind + head)(config)), programs.new_folder()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, programs.convert(kind + head, folder)


def check_sequences(programs, generator, kind, config, tokenizer, lines):
    names = ["bad", "so so", "ポジティブ", "\\ \"4\""][:generator.randrange(2, 5)]
    model, path = labelled(programs, kind, "ForSequenceClassification", config, tokenizer, names)
    # An empty second text is one to the tokenizer, and none to transformers.
    inputs = [(line,) for line in lines] + [(a, b) for a, b in zip(lines, lines[7:] + lines[:7]) if b]
    inputs = [texts for texts in inputs if len(tokenizer(*texts).input_ids) <= LONGEST]
    found = path and programs.run(kind, "classify", path, "--top", "9", lines=["\t".join(texts) for texts in inputs])
    if not found or not check(len(found) == len(inputs), "%s: %d labels of %d" % (kind, len(found), len(inputs))):
        return
    worst = 0.0
    for texts, line in zip(inputs, found):
        expected = model(**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(-1)
        worst = max(worst, compare_labels("%s, classes of %r" % (kind, texts), labels_of(line), expected, names))
    print("classify    %-48s off by %.1e, %d texts and pairs" % (kind, worst, len(inputs)), flush=True)


def check_tokens(programs, kind, config, tokenizer, lines):
    names = ["O", "B-PER", "I-PER"]
    model, path = labelled(programs, kind, "ForTokenClassification", config, tokenizer, names)
    inputs = [line for line in lines if len(tokenizer(line).input_ids) <= LONGEST]
    found = path and programs.run(kind, "classify", path, "--top", "3", lines=inputs)
    rows, worst = [line for line in found or [] if line], 0.0
    expected = []
    for text in inputs:
        encoded = tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
        special = encoded.pop("special_tokens_mask")[0]
        expected += list(model(**encoded).logits[0].softmax(-1)[special == 0])
    check(len(rows) == len(expected), "%s: %d tokens of %d" % (kind, len(rows), len(expected)))
    for row, wanted in zip(rows, expected):
        labels = labels_of(row.split("\t", 1)[1])
        worst = max(worst, compare_labels(kind + ", classes of tokens", labels, wanted, names))
    print("classify    %-48s off by %.1e, %d tokens" % (kind, worst, len(rows)), flush=True)


def check_masks(programs, generator, kind, config, tokenizer, words):
    model, folder = randomized(getattr(transformers, kind + "ForMaskedLM")(config)), programs.new_folder()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path, worst = programs.convert(kind, folder), 0.0
    for _ in range(4 if path else 0):
        parts = [" ".join(generator.choices(words, k=3)) for _ in range(generator.randrange(2, 4))]
        encoded = tokenizer((" %s " % tokenizer.mask_token).join(parts), return_tensors="pt")
        if len(encoded.input_ids[0]) > LONGEST:
            continue
        found = programs.run(kind, "fill-mask", path, " [MASK] ".join(parts), "--top", "3")
        masks = (encoded.input_ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]
        best = model(**encoded).logits[0][masks].softmax(-1).topk(3)
        expected = ["%d\t%.6f" % (i + 1, p) for i, row in enumerate(best.values.tolist()) for p in row]
        if not found or not check(len(found) >= len(expected), "%s: %d guesses" % (kind, len(found))):
            continue
        for line, wanted, token in zip(found, expected, best.indices.flatten().tolist()):
            (number, p, text), (wanted_number, wanted_p) = line.split("\t"), wanted.split("\t")
            worst = max(worst, abs(float(p) - float(wanted_p)))
            check(number == wanted_number and abs(float(p) - float(wanted_p)) < 1e-4,
                  "%s: %r, not %r" % (kind, line, wanted))
            name = tokenizer.convert_ids_to_tokens(token).removeprefix("##").lstrip("Ġ▁")
            check(not name.isascii() or text == name, "%s: guess %r, not %r" % (kind, text, name))
    print("fill-mask   %-48s off by %.1e" % (kind, worst), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--build", default=os.path.join(ROOT, "build"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are too small to gain from more
    torch.manual_seed(arguments.seed)
    generator, words, start = random.Random(arguments.seed), read_words(), time.monotonic()
    lines = make_lines(generator, words)
    print("seed %d" % arguments.seed)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        programs = Programs(arguments.build, folder)
        for kind, config, tokenizer in families(generator, words):
            check_embed(programs, generator, kind, config, tokenizer, lines)
            check_sequences(programs, generator, kind, config, tokenizer, lines)
            check_tokens(programs, kind, config, tokenizer, lines)
            check_masks(programs, generator, kind, config, tokenizer, words)
    print("%.0f seconds" % (time.monotonic() - start))
    print("%d passed, %d failed" % (test_convert.Results.passed, test_convert.Results.failed))
    return test_convert.Results.failed != 0


if __name__ == "__main__":
    sys.exit(main())
