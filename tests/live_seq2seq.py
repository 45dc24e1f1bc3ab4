#!/usr/bin/env python3
"""Compares translate with transformers, live, on random T5s of odd shapes that are new with every seed.

usage: tests/live_seq2seq.py [--seed N] [--translate build/translate] [--inputs 50]

T5 v1.0 (ReLU, tied), v1.1 (gated GELU, its own head) and mT5, each with a tokenizer that is trained for it: greedy ids and
those of 4 beams, 32 tokens at most, for 50 random lines each, all in one run of the program; one thread and two give the
same; every instruction set does, for the first lines. Lines where transformers itself gives other ids when the weights are
off by 2e-6 of themselves are skipped, and counted: there two texts are equal but for rounding.

Needs torch, transformers and sentencepiece. The last line is `N passed, N failed`; exit status 1 if one failed.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time

import sentencepiece
import torch
import transformers

import make_golden
from make_golden import convert, is_clear_search, random_t5, shifted, t5_pieces, training_lines

ISAS = ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neondot")


def odd(generator, low, high):
    return generator.randrange(low, high) | 1


def random_sizes(generator):
    n_layers = generator.randrange(1, 4)  # no less than the decoder's: transformers' cache has that many
    return dict(d_model=generator.choice([14, 24, 33, 52]), d_kv=generator.choice([5, 8, 11, 17]),
                d_ff=odd(generator, 17, 90), num_heads=generator.choice([1, 3, 7]), num_layers=n_layers,
                num_decoder_layers=generator.randrange(1, n_layers + 1), relative_attention_num_buckets=generator.choice([8, 12]),
                relative_attention_max_distance=generator.choice([15, 30]), end_scale=generator.choice([2.0, 3.0, 4.0]),
                seed=generator.randrange(2 ** 31))


def variants(generator, n_pieces):
    """(name, model) pairs."""
    gated = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    yield "T5 v1.0", random_t5(vocab_size=n_pieces, **random_sizes(generator))
    yield "T5 v1.1", random_t5(vocab_size=n_pieces + odd(generator, 1, 30), **gated, **random_sizes(generator))
    yield "mT5", random_t5(vocab_size=n_pieces + 5, kind=transformers.MT5ForConditionalGeneration,
                           config=transformers.MT5Config, **random_sizes(generator))


def save(model, name, pieces, folder):
    model.save_pretrained(folder)
    with open(os.path.join(folder, "spiece.model"), "wb") as file:
        file.write(pieces.SerializeToString())
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
        file.write('{"tokenizer_class": "%sTokenizer", "extra_ids": 0}' % ("MT5" if name == "mT5" else "T5"))
    convert(folder, folder + ".tfm")
    return folder + ".tfm"


def random_lines(generator, n):
    lines = training_lines()
    return [" ".join(generator.choice(lines).split()[:generator.choice([1, 2, 3, 5, 8, 12])]) for _ in range(n)]


class Comparison:
    def __init__(self, program):
        self.program, self.passed, self.failed, self.compared, self.skipped = program, 0, 0, 0, 0

    def check(self, good, what):
        if good:
            self.passed += 1
        else:
            self.failed += 1
            print("FAILED:", what, flush=True)
        return good

    def translate(self, path, lines, beams, *options, isa=""):
        """The ids of each line; None if this CPU can't."""
        done = subprocess.run([self.program, path, "-n", "32", "--beams", str(beams), "--ids", *options],
                              input="".join(line + "\n" for line in lines).encode(), capture_output=True,
                              env=dict(os.environ, TFM_ISA=isa))
        if b"can't run the instruction set" in done.stderr:
            return None
        self.check(done.returncode == 0 and not done.stderr, "%s: %s" % (path, done.stderr.decode(errors="replace")))
        return [[int(number) for number in line.split()] for line in done.stdout.decode().split("\n")[:-1]]

    def compare(self, name, model, path, lines, inputs, beams):
        models = [model, shifted(model, 1, 2e-6)]
        found = self.translate(path, lines, beams)
        self.check(self.translate(path, lines, beams, "--threads", "1") == found, "%s: one thread differs" % name)
        for isa in ISAS:
            part = self.translate(path, lines[:6], beams, isa=isa)
            self.check(part is None or part == found[:6], "%s, %d beams: other ids on %s" % (name, beams, isa))
        if not self.check(len(found) == len(lines), "%s: %d lines for %d" % (name, len(found), len(lines))):
            return
        for line, ids, tokens in zip(lines, inputs, found):
            expected = is_clear_search(models, ids, num_beams=beams, max_new_tokens=32)
            if expected is None:
                self.skipped += 1
                continue
            self.compared += 1
            self.check(tokens == expected[0][0], "%s, %d beams, %r: %s, expected %s" % (
                name, beams, line, tokens, expected[0][0]))


def main():
    parser = argparse.ArgumentParser(description="Compares translate with transformers on random T5s.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=50)
    parser.add_argument("--translate", default=os.path.join(make_golden.ROOT, "build", "translate"))
    arguments = parser.parse_args()
    make_golden.quiet()
    torch.set_num_threads(1)  # the models are too small to gain from more
    comparison, start = Comparison(arguments.translate), time.monotonic()
    generator = random.Random(arguments.seed)
    print("seed %d" % arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        pieces = t5_pieces(folder)
        processor = sentencepiece.SentencePieceProcessor(model_proto=pieces.SerializeToString())
        for i, (name, model) in enumerate(variants(generator, len(pieces.pieces))):
            path = save(model, name, pieces, os.path.join(folder, "model%d" % i))
            lines = random_lines(generator, arguments.inputs)
            inputs = [processor.encode(line) + [1] for line in lines]
            for beams in (1, 4):
                comparison.compare(name, model.double(), path, lines, inputs, beams)
            print("%s: %d texts compared so far, %d skipped" % (name, comparison.compared, comparison.skipped), flush=True)
    comparison.check(comparison.compared > comparison.skipped, "most texts were skipped")
    print("%.0f seconds" % (time.monotonic() - start))
    print("%d passed, %d failed" % (comparison.passed, comparison.failed))
    return comparison.failed != 0


if __name__ == "__main__":
    sys.exit(main())
