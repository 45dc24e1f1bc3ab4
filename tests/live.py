#!/usr/bin/env python3
"""Compares the programs with transformers, live, on random GPT-2s of odd shapes that are new with every seed.

usage: tests/live.py [--seed N] [--tfm build/tfm] [--gpt2 build/gpt2] [--demo MODEL.tfm] [--demo-checkpoint DIRECTORY]

- `tfm dump`: logits and hidden states at every position, on every instruction set that this CPU runs, within 1e-4 of
  the largest; one thread and two give the same bits;
- `gpt2`: 200 tokens of greedy text are transformers', for prompts of text and of ids;
- `tfm tokenize`: the ids of random strings are those of tokenizers, which a new vocabulary was trained with;
- `tfm quantize`: int8 logits beside fp32 ones, on random weights and on a checkpoint with outlier channels;
- `tfm perplexity`: within 0.1 % on texts of 100 KB, for a random model and for the demo model's checkpoint; within 1 %
  for the demo model, which may be quantized.

Needs torch and transformers. The last line is `N passed, N failed`; exit status 1 if one failed.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time

import tokenizers
import torch
import transformers

import make_golden
from make_golden import clear_greedy, convert, greedy, greedy_margin, nasty_texts, random_gpt2, run_model, token_ids

ROOT = make_golden.ROOT
ISAS = ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neondot")


# ---------------------------------------------------------------------------------------------------------------------
# Checks, programs
# ---------------------------------------------------------------------------------------------------------------------

class Checks:
    """Counts; says what failed."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, good, what):
        if good:
            self.passed += 1
        else:
            self.failed += 1
            print("FAILED:", what, flush=True)
        return good


class Programs:
    """The programs under test. What they can't do is a failed check, and None."""

    def __init__(self, tfm, gpt2, checks):
        self.tfm, self.gpt2, self.checks = tfm, gpt2, checks
        self.isas = []

    def run(self, command, text=b"", isa=""):
        done = subprocess.run(command, input=text, capture_output=True, env=dict(os.environ, TFM_ISA=isa))
        shown = " ".join(command)
        good = self.checks.check(done.returncode == 0, "%s: exit status %d: %s" % (
            shown[:300], done.returncode, done.stderr.decode(errors="replace")))
        return done.stdout.decode() if good else None

    def find_isas(self, model, out):
        """The instruction sets that this CPU runs: the others are refused with that reason, and no other."""
        for isa in ISAS:
            done = subprocess.run([self.tfm, "dump", model, "--ids", "0", "--isa", isa, "-o", out], capture_output=True)
            if b"can't run the instruction set" not in done.stderr:
                self.isas.append(isa)
        print("instruction sets:", ", ".join(self.isas), flush=True)

    def dump(self, model, ids, what, out, *options):
        """The array and its bytes."""
        command = [self.tfm, "dump", model, "--ids", ",".join(map(str, ids)), "--what", what, "-o", out, *options]
        if self.run(command) is None:
            return None, None
        with open(out, "rb") as file:
            data = file.read()
        os.unlink(out)
        rows, columns = (int(n) for n in data[:128].split(b"'shape': (")[1].split(b")")[0].split(b","))
        return torch.frombuffer(bytearray(data[128:]), dtype=torch.float32).view(rows, columns), data

    def perplexity(self, model, text, context, stride):
        out = self.run([self.tfm, "perplexity", model, text, "--context", str(context), "--stride", str(stride)])
        return out and float(out.split("perplexity ")[-1])

    def greedy(self, model, n, isa, *prompt):
        out = self.run([self.gpt2, "-m", model, *prompt, "-n", str(n), "--temp", "0", "--ids", "--ignore-eos"], isa=isa)
        return out and [int(number) for number in out.split()]

    def tokenize(self, model, text, *options):
        out = self.run([self.tfm, "tokenize", model, "--whole", *options], text.encode())
        return out is not None and [int(number) for number in out.split()]


# ---------------------------------------------------------------------------------------------------------------------
# Random models
# ---------------------------------------------------------------------------------------------------------------------

def random_shapes(generator):
    """Configurations: what must be there, and around that whatever comes."""
    def odd(low, high):
        return generator.randrange(low, high) | 1

    activations = ["gelu_new", "gelu", "relu", "silu", "tanh", "gelu_pytorch_tanh", "quick_gelu"]
    generator.shuffle(activations)
    kinds = [  # heads, head size, context, type of the checkpoint, more
        (1, odd(5, 60), odd(20, 90), torch.float32, {}),
        (3, odd(3, 15), odd(129, 300), torch.float32, dict(tie_word_embeddings=False, n_inner=odd(17, 90))),
        (25, odd(1, 5), odd(20, 60), torch.float32, dict(scale_attn_by_inverse_layer_idx=True)),
        (3, 11, 1, torch.float32, {}),
        (2, odd(5, 20), odd(20, 70), torch.float16, dict(n_inner=odd(17, 90))),
        (5, odd(3, 12), odd(20, 70), torch.bfloat16, dict(tie_word_embeddings=False)),
        (4, 16, 64, torch.float32, dict(n_inner=112, scale_attn_weights=False)),
        (25, 4, 33, torch.float16, dict(scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False)),
        (7, 9, odd(200, 300), torch.bfloat16, dict(layer_norm_epsilon=1e-3)),
    ]
    for i, (heads, size, context, dtype, more) in enumerate(kinds):
        yield dict(n_head=heads, n_embd=heads * size, n_layer=generator.randrange(1, 4), n_positions=context,
                   vocab_size=128 if i == 6 else odd(30, 700), dtype=dtype, scale=generator.choice([1.0, 2.0, 3.0]),
                   activation_function=activations[i % len(activations)], seed=generator.randrange(2 ** 31), **more)


def steady_gpt2(generator, shape):
    """The model with that shape, its weights smaller if need be. Where transformers in float32 is off by more than 5e-6
    from transformers in float64, rounding is what the logits show, and 1e-4 of them no measure of anything."""
    while True:
        model = random_gpt2(**shape)
        ids = [generator.randrange(shape["vocab_size"]) for _ in range(shape["n_positions"])]
        single, double = run_model(model.float(), ids)[0], run_model(model.double(), ids)[0]
        if close(single, double) < 5e-6:
            return model.to(shape["dtype"])
        shape["scale"] *= 0.7


def describe(shape):
    return ", ".join("%s %s" % (key, str(value).replace("torch.", "")) for key, value in shape.items())


def close(found, expected):
    """The largest difference in parts of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def check_dump(programs, checks, model, path, name, ids, out):
    """Every instruction set against transformers, two threads against one."""
    with torch.inference_mode():
        expected = dict(zip(("logits", "hidden"), run_model(model, ids)))
    worst = 0
    for isa in programs.isas:
        for what in ("logits", "hidden"):
            found, data = programs.dump(path, ids, what, out, "--isa", isa, "--threads", "1")
            if found is None:
                continue
            where = "%s: %s of %d tokens on %s" % (name, what, len(ids), isa)
            if checks.check(found.shape == expected[what].shape, "%s: the shape is %s" % (where, list(found.shape))):
                difference = close(found, expected[what])
                checks.check(difference <= 1e-4, "%s: off by %g of the largest" % (where, difference))
                worst = max(worst, difference) if difference == difference else math.inf
            again = programs.dump(path, ids, what, out, "--isa", isa, "--threads", "2")[1]
            checks.check(again == data, "%s: two threads give other bits" % where)
    return worst


def check_models(programs, checks, generator, directory):
    for i, shape in enumerate(random_shapes(generator)):
        checkpoint, path = os.path.join(directory, "model%d" % i), os.path.join(directory, "model%d.tfm" % i)
        model = steady_gpt2(generator, shape)
        name = "model %d (%s)" % (i, describe(shape))
        model.save_pretrained(checkpoint)
        convert(checkpoint, path)
        model = model.float()
        out, worst = os.path.join(directory, "out.npy"), 0
        if not programs.isas:
            programs.find_isas(path, out)
        for n in sorted({1, shape["n_positions"], min(shape["n_positions"], generator.randrange(2, 40))}):
            ids = [generator.randrange(shape["vocab_size"]) for _ in range(n)]
            worst = max(worst, check_dump(programs, checks, model, path, name, ids, out))
        n = min(200, shape["n_positions"] - 1)
        if programs.gpt2 and n:
            prompt, expected = clear_greedy(model, generator, min(9, shape["n_positions"] - n), n, 2e-5)
            for isa in programs.isas:
                found = programs.greedy(path, n, isa, "--prompt-ids", ",".join(map(str, prompt)))
                checks.check(found == expected, "%s: greedy text of %d tokens differs on %s" % (name, n, isa))
        print("%s: off by %.1e" % (name, worst), flush=True)


def outliers(model, generator):
    """What real checkpoints have and random ones do not: channels much larger than the rest, in norms, values and FFN."""
    d_model = model.config.n_embd
    pick = lambda n, of: torch.tensor(generator.sample(range(of), n))
    with torch.no_grad():
        for block in model.transformer.h:
            attention, up = block.attn.c_attn, block.mlp.c_fc  # Conv1D: [in, out]
            for norm, matrix in ((block.ln_1, attention), (block.ln_2, up)):
                norm.bias += 0.1 * torch.randn(d_model)
                channels = pick(6, d_model)
                norm.weight[channels] *= 50
                norm.bias[channels] *= 50
                matrix.weight[channels] /= 50
            channels = pick(4, d_model)
            attention.weight[:, 2 * d_model + channels] *= 50
            attention.bias[2 * d_model + channels] *= 50
            block.attn.c_proj.weight[channels] /= 50
            units = pick(4, 4 * d_model)
            up.weight[:, units] *= 20
            up.bias[units] *= 20


def check_int8(programs, checks, generator, directory):
    """The cosine between the logits of the fp32 file and of the int8 file: of random weights, and with outliers."""
    for name, make, least in (("random", None, 0.9995), ("outliers", outliers, 0.998)):
        shape = dict(n_layer=6, n_head=6, n_embd=384, vocab_size=5003, n_positions=256, bos_token_id=0, eos_token_id=0)
        torch.manual_seed(generator.randrange(1 << 30))
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
        if make:
            make(model, generator)
        path, quantized = os.path.join(directory, name + ".tfm"), os.path.join(directory, name + "_int8.tfm")
        model.save_pretrained(os.path.join(directory, name))
        convert(os.path.join(directory, name), path)
        programs.run([programs.tfm, "quantize", path, quantized])
        ids, out = [generator.randrange(5003) for _ in range(200)], os.path.join(directory, "out.npy")
        exact, found = (programs.dump(p, ids, "logits", out)[0] for p in (path, quantized))
        if exact is None or found is None:
            continue
        cosine = torch.nn.functional.cosine_similarity(exact.double(), found.double(), dim=1)
        agree = (exact.argmax(1) == found.argmax(1)).double().mean()
        checks.check(cosine.mean() >= least, f"int8, {name}: cosine {cosine.mean():.6f} below {least}")
        print(f"int8, {name}: cosine of logits {cosine.mean():.6f} (least {cosine.min():.6f}), top-1 {agree:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# A model with a tokenizer of its own
# ---------------------------------------------------------------------------------------------------------------------

def corpus(generator, size):
    """Text: English and C from the header, and characters from everywhere."""
    with open(os.path.join(ROOT, "tfm.h"), encoding="utf-8") as file:
        lines = file.read().split("\n")
    parts, length = [], 0
    while length < size:
        start = generator.randrange(len(lines))
        part = "\n".join(lines[start:start + generator.randrange(1, 30)])
        if generator.random() < 0.2:
            part += make_golden.random_characters(generator, generator.randrange(1, 20))
        parts.append(part)
        length += len(part.encode())
    return cut("\n".join(parts), size)


def cut(text, size):
    """The first `size` bytes, and no part of a character."""
    return text.encode()[:size].decode(errors="ignore")


def train_tokenizer(text, size, directory):
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trained.train_from_iterator([text], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>",
                                         bos_token="<|endoftext|>").save_pretrained(directory)
    return transformers.GPT2TokenizerFast.from_pretrained(directory)


def check_tokenizer(programs, checks, tokenizer, path, generator):
    for text in nasty_texts(generator.randrange(2 ** 31), 150):
        for special, options in ((False, []), (True, ["--special"])):
            expected = token_ids(tokenizer, text, special)
            checks.check(programs.tokenize(path, text, *options) == expected,
                         "the ids of %.200r%s differ" % (text, " with special tokens" if special else ""))


def clear_prompt(model, tokenizer, text, generator, n):
    """A piece of the text whose greedy continuation is not a matter of rounding, and that continuation."""
    while True:
        start = generator.randrange(len(text) - 60)
        prompt = text[start:start + generator.randrange(1, 60)]
        ids = token_ids(tokenizer, prompt, False)
        if "\0" in prompt or len(ids) + n > model.config.n_positions:  # no argument of a program holds a 0
            continue
        expected = greedy(model, ids, n)
        if greedy_margin(model, ids, expected) > 2e-5:
            return prompt, expected


def check_texts(programs, checks, generator, directory):
    checkpoint, path = os.path.join(directory, "texts"), os.path.join(directory, "texts.tfm")
    text = corpus(generator, 100000)
    tokenizer = train_tokenizer(text, generator.randrange(300, 800) | 1, checkpoint)
    shape = dict(n_head=3, n_embd=39, n_layer=2, n_positions=281, vocab_size=len(tokenizer),
                 seed=generator.randrange(2 ** 31))
    model = random_gpt2(**shape)
    model.save_pretrained(checkpoint)
    convert(checkpoint, path)
    check_tokenizer(programs, checks, tokenizer, path, generator)
    for _ in range(3 if programs.gpt2 else 0):
        prompt, expected = clear_prompt(model, tokenizer, text, generator, 200)
        for isa in programs.isas:
            found = programs.greedy(path, 200, isa, "-p", prompt)
            checks.check(found == expected, "greedy text after %r differs on %s" % (prompt, isa))
    for context, stride in ((281, 281), (64, 33), (2, 1)):
        check_perplexity(programs, checks, (model, tokenizer), [(path, 1e-3)], text, directory, context, stride)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity
# ---------------------------------------------------------------------------------------------------------------------

def windows(n, context, stride):
    """(begin, end, first token to score) of each window: a token is scored in the first window that holds it, but a
    window's first token never is."""
    begin = done = 0
    while done < n:
        end = min(begin + context, n)
        yield begin, end, max(done, begin + 1)
        begin, done = begin + stride, end


def expected_perplexity(model, ids, context, stride):
    """By transformers; windows of the same length together."""
    ids = torch.tensor(ids)
    total, scored = 0.0, 0
    batch, groups = max(1, 4096 // context), {}
    for begin, end, first in windows(len(ids), context, stride):
        groups.setdefault(end - begin, []).append((begin, first))
    with torch.inference_mode():
        for length, group in groups.items():
            for i in range(0, len(group), batch):
                part = group[i:i + batch]
                tokens = torch.stack([ids[begin:begin + length] for begin, _ in part])
                losses = -model(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
                for row, (begin, first) in zip(losses, part):
                    total += row[first - begin - 1:].double().sum().item()
                    scored += length - (first - begin)
    return math.exp(total / scored)


def check_perplexity(programs, checks, reference, paths, text, directory, context, stride):
    """The models `paths`, each with its tolerance, against the reference: transformers' model and tokenizer."""
    model, tokenizer = reference
    file = os.path.join(directory, "text.txt")
    with open(file, "w", encoding="utf-8", newline="") as out:
        out.write(text)
    expected = expected_perplexity(model, token_ids(tokenizer, text, False), context, stride)
    for path, tolerance in paths:
        found = programs.perplexity(path, file, context, stride)
        if found is None:
            continue
        what = "%s, %d bytes in windows of %d, each %d on: perplexity %.4f, transformers' %.4f" % (
            os.path.basename(path), len(text.encode()), context, stride, found, expected)
        print(what, flush=True)
        checks.check(abs(found / expected - 1) <= tolerance, what)


# ---------------------------------------------------------------------------------------------------------------------
# The demo model
# ---------------------------------------------------------------------------------------------------------------------

def write_stories(model, tokenizer, size):
    """Text as the model itself would write it: the beginnings of many stories, written side by side."""
    begin = torch.zeros(250, 1, dtype=torch.long)
    with torch.inference_mode():
        ids = model.generate(begin, attention_mask=begin + 1, do_sample=True, top_k=60, max_new_tokens=130,
                             eos_token_id=None, pad_token_id=0)
    text = "\n".join(tokenizer.decode([number for number in row if number]) for row in ids.tolist())
    return cut(text, size)


def check_demo(programs, checks, generator, path, checkpoint, directory):
    for needed in (path, checkpoint):
        if not os.path.exists(needed):
            print("the demo model is not compared: %s is not there" % needed)
            return
    model = transformers.GPT2LMHeadModel.from_pretrained(checkpoint).float().eval()
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(checkpoint)
    torch.manual_seed(generator.randrange(2 ** 31))
    text = write_stories(model, tokenizer, 100000)
    converted = os.path.join(directory, "demo.tfm")
    convert(checkpoint, converted)
    models = [(converted, 1e-3), (path, 1e-2)]
    for context, stride in ((512, 512), (200, 150)):
        check_perplexity(programs, checks, (model, tokenizer), models, text, directory, context, stride)


def main():
    parser = argparse.ArgumentParser(description="Compares the programs with transformers on random GPT-2s.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tfm", default=os.path.join(ROOT, "build", "tfm"))
    parser.add_argument("--gpt2", default=os.path.join(ROOT, "build", "gpt2"))
    parser.add_argument("--demo", default=os.path.join(ROOT, "examples", "models", "stories.tfm"))
    parser.add_argument("--demo-checkpoint", default=os.path.join(ROOT, "..", "shared", "demo-gpt2"))
    arguments = parser.parse_args()
    make_golden.quiet()
    torch.set_num_threads(1)  # the models are too small to gain from more
    checks, start = Checks(), time.monotonic()
    if not os.path.exists(arguments.gpt2):
        print("no greedy text is compared: %s is not there" % arguments.gpt2)
        arguments.gpt2 = None
    programs = Programs(arguments.tfm, arguments.gpt2, checks)
    generator = random.Random(arguments.seed)
    print("seed %d" % arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        check_models(programs, checks, generator, directory)
        check_int8(programs, checks, generator, directory)
        check_texts(programs, checks, generator, directory)
        check_demo(programs, checks, generator, arguments.demo, arguments.demo_checkpoint, directory)
    print("%.0f seconds" % (time.monotonic() - start))
    print("%d passed, %d failed" % (checks.passed, checks.failed))
    return checks.failed != 0


if __name__ == "__main__":
    sys.exit(main())
