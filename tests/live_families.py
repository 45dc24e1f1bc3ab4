#!/usr/bin/env python3
"""Compares converted models with transformers and PyTorch, family by family, on tiny random checkpoints of odd shapes.

usage: tests/live_families.py [--seed N] [--only WORD] [--rounds N] [--tfm build/tfm] [--keep DIRECTORY]

Every checkpoint is saved as its library saves it, converted by tools/convert.py, and run by the small reference runtime
below, which is written from the file's description alone: hidden states, logits, pooled vectors and classifiers' scores
are within 1e-4 of the largest of what the model itself says.

--tfm PROGRAM  also compares what `PROGRAM dump` writes
--only WORD    only the cases with this word in their names
--keep DIR     leaves checkpoints and converted files there

Needs torch, transformers and safetensors; gguf for the files in that format. The last line is `N passed, N failed`;
exit status 1 if one failed.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time

try:
    import gguf
except ImportError:
    gguf = None
import numpy
import safetensors.torch
import torch
import transformers
from torch import nn
from torch.nn import functional

import test_convert
from test_convert import CONVERT, ROOT, TfmFile

TOLERANCE = 1e-4  # parts of the largest value


# ---------------------------------------------------------------------------------------------------------------------
# The reference runtime: a .tfm file as its description says it, in as few lines as that takes
# ---------------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": functional.relu, "gelu": functional.gelu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "silu": functional.silu, "tanh": torch.tanh,
}


def to_tensor(kind, layout, shape, data):
    if kind in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        tensor = torch.frombuffer(bytearray(data), dtype=dtype).float()
    else:
        blocks = numpy.frombuffer(data, dtype=numpy.uint8)
        tensor = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).copy())
    return tensor.view(shape) if layout == "rows" else tensor.view(shape[::-1]).T


class Runtime:
    """Runs one sequence at a time, without a cache."""

    def __init__(self, path):
        self.file = TfmFile(path)
        self.path = path
        self.tensors = {name: to_tensor(*entry) for name, entry in self.file.tensors.items()}

    def has(self, key):
        return key in self.file.metadata

    def get(self, key, default=None):
        return self.file[key] if self.has(key) else default

    def tensor(self, name):
        """A tensor, or the parts that hold its rows; None where there is neither."""
        if name in self.tensors:
            return self.tensors[name]
        parts = [self.tensors[key] for key in self.tensors if key.startswith(name + "#")]
        return torch.cat(parts) if parts else None

    def linear(self, name, x):
        return functional.linear(x, self.tensor(name + ".weight"), self.tensor(name + ".bias"))

    def norm(self, name, x, stack, kind=None):
        weight, bias = self.tensor(name + ".weight"), self.tensor(name + ".bias")
        weight = weight + self.get(stack + ".norm_weight_offset", 0.0)
        eps = self.get(stack + ".norm_eps")
        if (kind or self.get(stack + ".norm")) == "layer":
            return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    # --- Attention ---

    def rotate(self, x, stack):
        """x: [heads, tokens, head_dim]."""
        frequencies = torch.tensor(self.file.metadata[stack + ".rotary_frequencies"])
        angles = torch.arange(x.shape[1])[:, None].float() * frequencies
        scale = self.get(stack + ".rotary_scale", 1.0)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        half = len(frequencies)
        turned, rest = x[..., :2 * half], x[..., 2 * half:]
        if self.get(stack + ".rotary_interleaved", 0):
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turned[..., :half], turned[..., half:]
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned, rest), -1)

    def relative_bias(self, stack, n_queries, n_keys):
        """[heads, queries, keys]: T5's buckets, exact near and logarithmic far away."""
        buckets, most = self.get(stack + ".relative_buckets"), self.get(stack + ".relative_max_distance")
        distance = torch.arange(n_keys)[None] - torch.arange(n_queries)[:, None]
        bucket = torch.zeros_like(distance)
        if not self.get(stack + ".causal"):
            buckets //= 2
            bucket = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        far = exact + (torch.log(distance.float().clamp(min=1) / exact) / math.log(most / exact)
                       * (buckets - exact)).long()
        bucket = bucket + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
        return self.tensor(stack + ".relative_bias.weight")[bucket].permute(2, 0, 1)

    def attend(self, stack, layer, q, k, v, mask, is_cross=False):
        """q: [tokens, heads * head_dim]; k, v: [keys, kv_heads * head_dim]; mask: [queries, keys], true: seen."""
        head_dim = self.get(stack + ".head_dim")
        q, k, v = (x.view(len(x), -1, head_dim).transpose(0, 1) for x in (q, k, v))
        name = "%s.blocks.%d.attention." % (stack, layer)
        if not is_cross:
            if self.tensor(name + "q_norm.weight") is not None:
                q = self.norm(name + "q_norm", q, stack, "rms")
                k = self.norm(name + "k_norm", k, stack, "rms")
            if self.get(stack + ".positions") == "rotary":
                q, k = self.rotate(q, stack), self.rotate(k, stack)
        groups = self.get(stack + ".n_heads") // self.get(stack + ".n_kv_heads")
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scales = self.file.metadata[stack + ".attention_scale"]
        scores = q @ k.transpose(1, 2) * scales[layer if len(scales) > 1 else 0]
        cap = self.get(stack + ".attention_softcap")
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        if not is_cross and self.get(stack + ".positions") == "relative":
            scores = scores + self.relative_bias(stack, q.shape[1], k.shape[1])
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def self_mask(self, stack, layer, n, seen):
        """What each query sees: by order, by window, by the padding mask."""
        query, key = torch.arange(n)[:, None], torch.arange(n)[None]
        mask = torch.ones(n, n, dtype=torch.bool)
        if self.get(stack + ".causal"):
            mask &= key <= query
        window = self.file.metadata.get(stack + ".sliding_window", [0] * (layer + 1))[layer]
        if window:
            mask &= query - key < window
        return mask if seen is None else mask & seen[None].bool()

    def self_attention(self, stack, layer, x, seen):
        name = "%s.blocks.%d.attention" % (stack, layer)
        head_dim = self.get(stack + ".head_dim")
        q_dim, kv_dim = self.get(stack + ".n_heads") * head_dim, self.get(stack + ".n_kv_heads") * head_dim
        q, k, v = self.linear(name + ".qkv", x).split((q_dim, kv_dim, kv_dim), -1)
        mask = self.self_mask(stack, layer, len(x), seen)
        return self.linear(name + ".out", self.attend(stack, layer, q, k, v, mask))

    def cross_attention(self, stack, layer, x, memory, seen):
        name = "%s.blocks.%d.cross" % (stack, layer)
        k, v = self.linear(name + ".kv", memory).chunk(2, -1)
        mask = torch.ones(len(x), len(memory), dtype=torch.bool)
        mask = mask if seen is None else mask & seen[None].bool()
        return self.linear(name + ".out", self.attend(stack, layer, self.linear(name + ".q", x), k, v, mask, True))

    # --- Blocks ---

    def ffn(self, stack, layer, x):
        name = "%s.blocks.%d.ffn" % (stack, layer)
        function = ACTIVATIONS[self.get(stack + ".activation")]
        up = self.linear(name + ".up", x)
        if self.get(stack + ".ffn") == "gated":
            gate, up = up.chunk(2, -1)
            return self.linear(name + ".down", function(gate) * up)
        return self.linear(name + ".down", function(up))

    def block(self, stack, layer, x, seen, memory, memory_seen):
        name = "%s.blocks.%d." % (stack, layer)
        place = self.get(stack + ".norm_place")

        def normed(which, value):
            return self.norm(name + which, value, stack)

        if self.get(stack + ".parallel", 0):
            first = normed("attention_norm", x)
            has_second = name + "ffn_norm.weight" in self.tensors
            second = normed("ffn_norm", x) if has_second else first
            return x + self.self_attention(stack, layer, first, seen) + self.ffn(stack, layer, second)
        sublayers = [("attention_norm", "attention_post_norm", lambda y: self.self_attention(stack, layer, y, seen)),
                     ("cross_norm", "", lambda y: self.cross_attention(stack, layer, y, memory, memory_seen)),
                     ("ffn_norm", "ffn_post_norm", lambda y: self.ffn(stack, layer, y))]
        for before, after, function in sublayers:
            if before == "cross_norm" and not self.get(stack + ".cross"):
                continue
            if place == "post":
                x = normed(before, x + function(x))
            elif place == "sandwich":
                x = x + normed(after, function(normed(before, x)))
            else:
                x = x + function(normed(before, x))
        return x

    def run(self, stack, x, seen=None, memory=None, memory_seen=None):
        for layer in range(self.get(stack + ".n_layers")):
            x = self.block(stack, layer, x, seen, memory, memory_seen)
        return self.norm(stack + ".final_norm", x, stack) if self.get(stack + ".final_norm") else x

    # --- Both ends ---

    def embed(self, stack, ids, types=None):
        x = self.tensor("token_embedding.weight")[ids] * self.get("embedding_scale", 1.0)
        if self.has("n_token_types"):
            x = x + self.tensor("token_type_embedding.weight")[torch.zeros_like(ids) if types is None else types]
        if self.get(stack + ".positions") == "learned":
            first = self.get(stack + ".position_offset", 0)
            x = x + self.tensor(stack + ".position_embedding.weight")[first:first + len(ids)]
        if self.get(stack + ".embedding_norm", 0):
            x = self.norm(stack + ".embedding_norm", x, stack)
        return self.linear("embedding_projection", x) if self.has("d_embedding") else x

    def logits(self, hidden, stack):
        if self.has("head_transform"):
            hidden = ACTIVATIONS[self.get("head_transform")](self.linear("head.transform", hidden))
            hidden = self.norm("head.norm", hidden, stack)
        table = self.tensor("head.weight" if self.get("head") == "own" else "token_embedding.weight")
        logits = functional.linear(hidden * self.get("logit_scale", 1.0), table, self.tensor("head.bias"))
        cap = self.get("logit_softcap")
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def pooled(self, hidden):
        return ACTIVATIONS[self.get("pooler_activation")](self.linear("pooler", hidden[0]))

    def sentence(self, hidden, seen):
        """The vector of a text."""
        kind, rows = self.get("pooling"), hidden[seen.bool()]
        vector = hidden[0] if kind == "cls" else rows.mean(0) if kind == "mean" else rows.max(0).values
        return functional.normalize(vector, dim=0) if self.get("pool_normalize", 0) else vector

    def scores(self, hidden):
        hidden = hidden[0] if self.get("classifier") == "sequence" else hidden
        if self.has("classifier_activation"):
            hidden = ACTIVATIONS[self.get("classifier_activation")](self.linear("classifier.dense", hidden))
        return self.linear("classifier", hidden)

    def outputs(self, ids, decoder_ids=None, types=None, seen=None):
        """Everything that the file can say about a sequence of ids."""
        kind, found, memory = self.get("model.kind"), {}, None
        if kind != "decoder":
            memory = found["hidden"] = self.run("encoder", self.embed("encoder", ids, types), seen)
        if kind == "encoder-decoder":
            found["memory"] = memory
            found["hidden"] = self.run("decoder", self.embed("decoder", decoder_ids), None, memory, seen)
        if kind == "decoder":
            found["hidden"] = self.run("decoder", self.embed("decoder", ids))
        if self.get("head") != "none":
            found["logits"] = self.logits(found["hidden"], "encoder" if kind == "encoder" else "decoder")
        if self.has("pooler_activation"):
            found["pooler"] = self.pooled(found["hidden"])
        if self.has("pooling"):
            found["sentence"] = self.sentence(found["hidden"], torch.ones(len(ids)) if seen is None else seen)
        if self.has("classifier"):
            found["scores"] = self.scores(found["hidden"])
        return found


# ---------------------------------------------------------------------------------------------------------------------
# What the models themselves say
# ---------------------------------------------------------------------------------------------------------------------

class Inputs:
    def __init__(self, ids, decoder_ids=None, types=None, seen=None):
        self.ids, self.decoder_ids, self.types, self.seen = ids, decoder_ids, types, seen


def random_inputs(generator, model, runtime):
    """Ids for the longest sequence up to 40 tokens; for encoders padding and token types."""
    config = model.config
    stack = "decoder" if runtime.get("model.kind") == "decoder" else "encoder"
    n = min(40, runtime.get(stack + ".n_positions"))
    ids = torch.tensor([generator.randrange(4, config.vocab_size) for _ in range(n)])
    if stack == "decoder":
        return Inputs(ids)
    seen = (torch.arange(n) < max(1, n - generator.randrange(0, 6))).long()
    types = None
    if runtime.get("n_token_types", 1) > 1:
        types = torch.tensor([generator.randrange(runtime.get("n_token_types")) for _ in range(n)])
    decoder_ids = torch.tensor([0] + [generator.randrange(config.vocab_size) for _ in range(17)])
    return Inputs(ids, decoder_ids if runtime.get("model.kind") == "encoder-decoder" else None, types, seen)


def expected_outputs(model, inputs):
    """As Runtime.outputs, by transformers."""
    base = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    arguments = {"input_ids": inputs.ids[None]}
    for key, value in (("attention_mask", inputs.seen), ("token_type_ids", inputs.types),
                       ("decoder_input_ids", inputs.decoder_ids)):
        if value is not None:
            arguments[key] = value[None]
    inner_module = model.decoder if inputs.decoder_ids is not None else base
    captured = []
    handle = inner_module.register_forward_hook(lambda module, args, result: captured.append(result))
    with torch.inference_mode():
        result = model(**arguments)
    handle.remove()
    inner, name = captured[0], type(model).__name__
    found = {"hidden": inner[0][0]}
    if inputs.decoder_ids is not None:
        found["memory"] = result.encoder_last_hidden_state[0]
    if name.endswith(("ForTokenClassification", "ForSequenceClassification", "ElectraForPreTraining")):
        scores = result.logits[0]
        found["scores"] = scores[:, None] if name == "ElectraForPreTraining" else scores
    elif name == "BertForPreTraining":
        found["logits"], found["pooler"] = result.prediction_logits[0], inner.pooler_output[0]
    elif "logits" in result:
        found["logits"] = result.logits[0]
    if "pooler_output" in inner and inner.pooler_output is not None and "scores" not in found:
        found["pooler"] = inner.pooler_output[0]
    return found


def difference(found, expected):
    """In parts of the largest."""
    if found.shape != expected.shape:
        return math.inf
    worst = ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    return worst if worst == worst else math.inf


def check_outputs(what, found, expected):
    """The worst difference."""
    test_convert.check(set(found) == set(expected), "%s: outputs %s where %s are expected"
                       % (what, sorted(found), sorted(expected)))
    worst = 0.0
    for key in sorted(set(found) & set(expected)):
        off = difference(found[key], expected[key])
        test_convert.check(off <= TOLERANCE, "%s: %s is off by %.2g" % (what, key, off))
        worst = max(worst, off)
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# tfm dump
# ---------------------------------------------------------------------------------------------------------------------

# What the program calls an output. (The encoder's own states have no name in it.)
DUMPED = {"hidden": "hidden", "logits": "logits", "pooler": "pooled", "sentence": "pooled"}


def check_dump(program, what, path, inputs, expected):
    """The program's outputs against the model's. Returns the worst difference."""
    worst = 0.0
    keys = set(expected) & set(DUMPED)
    if "sentence" in keys:
        keys.discard("pooler")  # what a sentence-transformers directory calls pooled is the other
    for key in sorted(keys):
        out = path + ".npy"
        command = [program, "dump", path, "--ids", ",".join(map(str, inputs.ids.tolist())), "--what", DUMPED[key],
                   "-o", out]
        options = ("--decoder-ids", inputs.decoder_ids), ("--types", inputs.types), ("--mask", inputs.seen)
        for option, value in options:
            if value is not None:
                command += [option, ",".join(map(str, value.tolist()))]
        done = subprocess.run(command, capture_output=True, text=True)
        if not test_convert.check(done.returncode == 0, "%s: %s: %s" % (what, " ".join(command)[:300], done.stderr)):
            continue
        found = torch.from_numpy(numpy.load(out))
        wanted = expected[key]
        if inputs.seen is not None and inputs.decoder_ids is None and wanted.dim() > 1:
            found, wanted = found[:int(inputs.seen.sum())], wanted[:int(inputs.seen.sum())]  # padding's don't count
        off = difference(found.reshape(wanted.shape) if found.numel() == wanted.numel() else found, wanted)
        test_convert.check(off <= TOLERANCE, "%s: dump's %s is off by %.2g" % (what, key, off))
        worst = max(worst, off)
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------

CASES = []


def case(name):
    """Registers a function from a random generator to a model and what more there is to say; see run_case."""
    def register(function):
        CASES.append((name, function))
        return function
    return register


def randomized(model, scale=0.3):
    """Norms and biases, too, in place of ones and zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn_like(parameter) * scale * 2 / math.sqrt(min(fan, 64)))
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0 if "gemma" not in type(model).__name__.lower() else 0.0)
    return model.eval()


def save_state(model, folder, state=None, name="model.safetensors", **config):
    """config.json and the whole state dict, for what save_pretrained would change."""
    os.makedirs(folder, exist_ok=True)
    values = dict(model.config.to_dict(), architectures=[type(model).__name__])
    values.update(config)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump({key: value for key, value in values.items() if value != "drop"}, file)
    state = {key: tensor.clone().contiguous() for key, tensor in (state or model.state_dict()).items()}
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(state, os.path.join(folder, name))
    else:
        torch.save(state, os.path.join(folder, name))


def convert(checkpoint, out, *options):
    command = [sys.executable, "-I", "-S", CONVERT, checkpoint, out, *options]
    return subprocess.run(command, capture_output=True, text=True)


class Runner:
    def __init__(self, folder, program):
        self.folder, self.program = folder, program
        self.number = 0

    def run(self, name, function, generator):
        self.number += 1
        what = name
        folder = os.path.join(self.folder, "%03d %s" % (self.number, name))
        made = function(generator, folder)
        if made is None:
            print("%-44s not compared: the package gguf is not there" % what)
            return
        model, options = made if isinstance(made, tuple) else (made, {})
        if not os.path.exists(folder):
            model.save_pretrained(folder)
        out = folder + ".tfm"
        done = convert(options.get("checkpoint", folder), out, *options.get("arguments", []))
        if not test_convert.check(done.returncode == 0, "%s: %s" % (what, done.stderr.strip()[-600:])):
            return
        runtime = Runtime(out)
        for key, value in options.get("says", {}).items():
            test_convert.check_equal(runtime.file.metadata.get(key), value, "%s: %s" % (what, key))
        reference = options.get("reference")
        if reference is not None:
            print("%-44s off by %.1e" % (what, reference(what, runtime, self.program)), flush=True)
            return
        inputs = random_inputs(generator, model, runtime)
        if model.dtype != torch.float32:  # which tfm.h calculates in, also with frequencies and scales of embeddings
            model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        expected = expected_outputs(model.float(), inputs)
        expected.update(options.get("more", lambda *_: {})(expected, inputs))
        found = runtime.outputs(inputs.ids, inputs.decoder_ids, inputs.types, inputs.seen)
        if "logits" not in expected and runtime.get("head") == "tied":  # a model without a head that has one for free
            del found["logits"]
        worst = check_outputs(what, found, expected)
        dumped = check_dump(self.program, what, out, inputs, expected) if self.program else 0.0
        print("%-44s off by %.1e%s" % (what, worst, "; dump by %.1e" % dumped if self.program else ""), flush=True)


def odd(generator, low, high):
    return generator.randrange(low, high) | 1


# --- BERT and its relatives ---

def bert_sizes(generator, **more):
    heads = generator.choice([1, 3, 7])
    sizes = dict(vocab_size=odd(generator, 60, 300), hidden_size=heads * generator.choice([5, 8, 11]),
                 num_hidden_layers=generator.randrange(1, 4), num_attention_heads=heads,
                 intermediate_size=odd(generator, 17, 70), max_position_embeddings=odd(generator, 30, 70),
                 type_vocab_size=2)
    return dict(sizes, **more)


def register_bert(kind, config_kind, **more):
    heads = {"Model": {}, "ForMaskedLM": {}, "ForSequenceClassification": {"num_labels": 3},
             "ForTokenClassification": {"num_labels": 5}}
    if kind == "Bert":
        heads["ForPreTraining"] = {}
    if kind == "Electra":
        heads["ForPreTraining"] = {}
    for head, settings in heads.items():
        def make(generator, _, head=head, settings=settings):
            config = config_kind(**bert_sizes(generator, **more, **settings))
            return randomized(getattr(transformers, kind + head)(config))
        CASES.append((kind + head, make))


register_bert("Bert", transformers.BertConfig)
register_bert("Roberta", transformers.RobertaConfig, layer_norm_eps=1e-5, pad_token_id=1)
register_bert("XLMRoberta", transformers.XLMRobertaConfig, type_vocab_size=1, pad_token_id=3)
register_bert("Camembert", transformers.CamembertConfig, layer_norm_eps=1e-5, pad_token_id=1, type_vocab_size=1)
register_bert("Electra", transformers.ElectraConfig, embedding_size=13)


@case("Electra without a projection")
def _(generator, _):
    sizes = bert_sizes(generator)
    return randomized(transformers.ElectraForMaskedLM(transformers.ElectraConfig(
        embedding_size=sizes["hidden_size"], **sizes)))


def distilbert(generator, kind, **more):
    heads = generator.choice([1, 3, 7])
    return randomized(kind(transformers.DistilBertConfig(
        vocab_size=odd(generator, 60, 300), dim=heads * 5, n_heads=heads, n_layers=generator.randrange(1, 4),
        hidden_dim=odd(generator, 17, 70), max_position_embeddings=odd(generator, 30, 70), **more)))


for _kind, _more in (("Model", {}), ("ForMaskedLM", {}), ("ForSequenceClassification", {"num_labels": 4}),
                     ("ForTokenClassification", {"num_labels": 2})):
    CASES.append(("DistilBert" + _kind, lambda generator, _, kind=_kind, more=_more: distilbert(
        generator, getattr(transformers, "DistilBert" + kind), **more)))


@case("BERT with TensorFlow's names, in .bin")
def _(generator, folder):
    model = randomized(transformers.BertForMaskedLM(transformers.BertConfig(**bert_sizes(generator))))
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
             for name, tensor in model.state_dict().items()}
    state["bert.embeddings.position_ids"] = torch.arange(model.config.max_position_embeddings)[None]
    state["cls.seq_relationship.weight"], state["cls.seq_relationship.bias"] = torch.ones(2, 4), torch.ones(2)
    save_state(model, folder, state, "pytorch_model.bin")
    return model


@case("BERT with a head of its own")
def _(generator, folder):
    model = transformers.BertForMaskedLM(transformers.BertConfig(tie_word_embeddings=False, **bert_sizes(generator)))
    randomized(model)
    model.cls.predictions.decoder.bias = model.cls.predictions.bias
    save_state(model, folder)
    return model, {"says": {"head": "own"}}


def untied(model, head):
    """What nothing reads when the head is not tied: a bias beside the decoder's own."""
    with torch.no_grad():
        head.bias.copy_(torch.full_like(head.bias, 0.5))
    return model, {"says": {"head": "own"}}


@case("BERT with a head and a bias of its own")
def _(generator, _):
    model = transformers.BertForMaskedLM(transformers.BertConfig(tie_word_embeddings=False, **bert_sizes(generator)))
    return untied(randomized(model), model.cls.predictions)


@case("RoBERTa with a head and a bias of its own")
def _(generator, _):
    model = transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(tie_word_embeddings=False, pad_token_id=1, **bert_sizes(generator)))
    return untied(randomized(model), model.lm_head)


@case("BERT with labels and kinds of problems")
def _(generator, _):
    labels = ["sad\tor\0\x1b\x7f\x85 so", "glad\r\nor so", "Ümlaut"]
    config = transformers.BertConfig(problem_type="multi_label_classification", **bert_sizes(generator))
    config.id2label = dict(enumerate(labels))
    model = randomized(transformers.BertForSequenceClassification(config))
    return model, {"says": {"classifier_labels": "sad or  so\nglad or so\nÜmlaut", "classifier_problem": "multi"}}


@case("RoBERTa with one label")
def _(generator, _):
    config = transformers.RobertaConfig(num_labels=1, pad_token_id=1, **bert_sizes(generator))
    model = randomized(transformers.RobertaForSequenceClassification(config))
    return model, {"says": {"classifier_problem": "regression"}}


def sentence_transformer(generator, folder, modules, pooling):
    model = randomized(transformers.BertModel(transformers.BertConfig(**bert_sizes(generator))))
    model.save_pretrained(os.path.join(folder, modules[0][0]))
    os.makedirs(os.path.join(folder, "1_Pooling"))
    files = {"modules.json": [{"idx": i, "name": str(i), "path": path, "type": kind}
                              for i, (path, kind) in enumerate(modules)],
             "1_Pooling/config.json": dict(pooling, word_embedding_dimension=model.config.hidden_size),
             "sentence_bert_config.json": {"max_seq_length": 21, "do_lower_case": False}}
    for name, value in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(value, file)
    return model


@case("sentence-transformers: mean, normalized")
def _(generator, folder):
    prefix = "sentence_transformers.models."
    model = sentence_transformer(generator, folder, [("", prefix + "Transformer"), ("1_Pooling", prefix + "Pooling"),
                                                     ("2_Normalize", prefix + "Normalize")],
                                 {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
                                  "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False})

    def vector(expected, inputs):
        return {"sentence": functional.normalize(expected["hidden"][inputs.seen.bool()].mean(0), dim=0)}

    return model, {"more": vector, "says": {"pooling": "mean", "pool_normalize": [1], "pool_max_tokens": [21]}}


@case("sentence-transformers: cls, in a directory below")
def _(generator, folder):
    prefix = "sentence_transformers.models."
    model = sentence_transformer(generator, folder, [("0_Transformer", prefix + "Transformer"),
                                                     ("1_Pooling", prefix + "Pooling")], {"pooling_mode": "cls"})
    return model, {"more": lambda expected, _: {"sentence": expected["hidden"][0]}, "says": {"pooling": "cls"}}


# --- T5 ---

def t5_sizes(generator, **more):
    sizes = dict(vocab_size=odd(generator, 60, 300), d_model=generator.choice([14, 24, 33]),
                 d_kv=generator.choice([5, 8, 11]), d_ff=odd(generator, 17, 70), num_heads=generator.choice([1, 3, 7]),
                 num_layers=generator.randrange(1, 4), num_decoder_layers=generator.randrange(1, 4),
                 relative_attention_num_buckets=generator.choice([8, 12]),
                 relative_attention_max_distance=generator.choice([15, 30]), decoder_start_token_id=0)
    return dict(sizes, **more)


@case("T5ForConditionalGeneration")
def _(generator, _):
    return randomized(transformers.T5ForConditionalGeneration(transformers.T5Config(**t5_sizes(generator))))


@case("T5Model")
def _(generator, _):
    return randomized(transformers.T5Model(transformers.T5Config(**t5_sizes(generator))))


@case("T5 v1.1")
def _(generator, folder):
    config = transformers.T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **t5_sizes(generator))
    model = randomized(transformers.T5ForConditionalGeneration(config))
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    save_state(model, folder, tie_word_embeddings=False, scale_decoder_outputs="drop")
    return model, {"says": {"head": "own", "logit_scale": None, "generation.start_id": [0]}}


@case("T5 with a gated SiLU, in .bin")
def _(generator, folder):
    config = transformers.T5Config(feed_forward_proj="gated-silu", **t5_sizes(generator))
    model = randomized(transformers.T5ForConditionalGeneration(config))
    state = model.state_dict()
    key = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    state[key] = torch.ones(config.relative_attention_num_buckets, config.num_heads)
    save_state(model, folder, state, "pytorch_model.bin", scale_decoder_outputs="drop")
    return model


@case("MT5ForConditionalGeneration")
def _(generator, _):
    return randomized(transformers.MT5ForConditionalGeneration(transformers.MT5Config(**t5_sizes(generator))))


@case("T5EncoderModel")
def _(generator, _):
    return randomized(transformers.T5EncoderModel(transformers.T5Config(**t5_sizes(generator))))


# --- LLaMA-style decoders ---

def llama_sizes(generator, head_dim=None, **more):
    heads, kv_heads = generator.choice([(1, 1), (3, 1), (6, 2), (7, 7), (4, 2)])
    head_dim = head_dim or generator.choice([6, 8, 10, 18])
    sizes = dict(vocab_size=odd(generator, 60, 300), hidden_size=heads * head_dim,
                 num_hidden_layers=generator.randrange(1, 4), num_attention_heads=heads, num_key_value_heads=kv_heads,
                 intermediate_size=odd(generator, 17, 70), max_position_embeddings=odd(generator, 40, 70))
    return dict(sizes, **more)


def llama(kind, config_kind, **fixed):
    def make(generator, _):
        settings = dict(llama_sizes(generator, **fixed), **{key: fixed[key] for key in ("head_dim",) if key in fixed})
        return randomized(kind(config_kind(**settings)))
    return make


def old_names(model, theta=None, scaling=None, **more):
    """config.json as it was before version 5 of transformers."""
    return dict(rope_parameters="drop", rope_theta=theta, rope_scaling=scaling, **more)


def register_llama(name, kind, config_kind, **fixed):
    CASES.append((name, llama(kind, config_kind, **fixed)))


_llama = (transformers.LlamaForCausalLM, transformers.LlamaConfig)
register_llama("LlamaForCausalLM", *_llama)
register_llama("LlamaModel", transformers.LlamaModel, transformers.LlamaConfig)
register_llama("LLaMA with biases, tied", *_llama, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
register_llama("LLaMA with a head_dim of its own", *_llama, num_attention_heads=2, num_key_value_heads=1,
               hidden_size=22, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, **{"head_dim": 14})
for _name, _rope in (
        ("linear", {"rope_type": "linear", "factor": 2.5, "rope_theta": 1000.0}),
        ("llama3", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16, "rope_theta": 100.0}),
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}),
        ("yarn with everything", {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 20,
                                  "rope_theta": 50.0, "beta_fast": 5.0, "beta_slow": 0.5, "truncate": False,
                                  "mscale": 0.7, "mscale_all_dim": 1.1}),
        ("yarn with a scale", {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 20,
                               "rope_theta": 50.0, "attention_factor": 0.83})):
    register_llama("LLaMA, rotary scaling: " + _name, *_llama, rope_parameters=_rope, head_dim=18)


@case("LLaMA, configuration from before version 5")
def _(generator, folder):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}
    model = llama(*_llama, head_dim=16, rope_parameters=dict(rope, rope_theta=300.0))(generator, folder)
    state = model.state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_state(model, folder, state, "pytorch_model.bin", **old_names(model, 300.0, rope, head_dim="drop"))
    return model


@case("LLaMA, types mixed")
def _(generator, folder):
    model = llama(*_llama, attention_bias=True)(generator, folder)
    layer = model.model.layers[0]
    layer.self_attn.q_proj.to(torch.bfloat16)
    layer.self_attn.k_proj.to(torch.float16)
    layer.mlp.up_proj.to(torch.float64)
    layer.mlp.gate_proj.to(torch.float16)
    save_state(model, folder)
    return model


for _dtype in (torch.float16, torch.bfloat16, torch.float64):
    CASES.append(("LLaMA, %s" % _dtype, lambda generator, _, dtype=_dtype: llama(*_llama)(generator, _).to(dtype)))

register_llama("MistralForCausalLM", transformers.MistralForCausalLM, transformers.MistralConfig, sliding_window=7)
register_llama("Mistral without a window", transformers.MistralForCausalLM, transformers.MistralConfig,
               sliding_window=None)
_qwen2 = (transformers.Qwen2ForCausalLM, transformers.Qwen2Config)
register_llama("Qwen2ForCausalLM", *_qwen2)
register_llama("Qwen2 with windows", *_qwen2, use_sliding_window=True, sliding_window=9, max_window_layers=1,
               num_hidden_layers=3, tie_word_embeddings=True)
register_llama("Qwen2 with layer types", *_qwen2, use_sliding_window=True, sliding_window=5, num_hidden_layers=3,
               layer_types=["sliding_attention", "full_attention", "sliding_attention"])


@case("Qwen2, configuration from before version 5")
def _(generator, folder):
    model = llama(*_qwen2, use_sliding_window=True, sliding_window=6, max_window_layers=1, num_hidden_layers=2,
                  rope_parameters={"rope_type": "default", "rope_theta": 777.0})(generator, folder)
    save_state(model, folder, layer_types="drop", **old_names(model, 777.0))
    return model


_phi3 = (transformers.Phi3ForCausalLM, transformers.Phi3Config)
register_llama("Phi3ForCausalLM", *_phi3, pad_token_id=0, sliding_window=8)
register_llama("Phi-3, partly rotated", *_phi3, pad_token_id=0, head_dim=12, rope_parameters={
    "rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.67})
_qwen3 = (transformers.Qwen3ForCausalLM, transformers.Qwen3Config)
register_llama("Qwen3ForCausalLM", *_qwen3, head_dim=10)
register_llama("Qwen3 with biases and a wide head", *_qwen3, head_dim=24, hidden_size=21, attention_bias=True,
               tie_word_embeddings=True)


def gemma(kind, config_kind, dtype=torch.float32, **fixed):
    def make(generator, _):
        settings = llama_sizes(generator, **dict(dict(head_dim=14), **fixed))
        settings["hidden_size"] = settings["num_attention_heads"] * generator.choice([9, 12, 15])
        settings["head_dim"] = fixed.get("head_dim", 14)
        return randomized(kind(config_kind(**settings))).to(dtype)
    return make


_gemma2 = (transformers.Gemma2ForCausalLM, transformers.Gemma2Config)
CASES += [
    ("GemmaForCausalLM", gemma(transformers.GemmaForCausalLM, transformers.GemmaConfig)),
    ("Gemma, bfloat16", gemma(transformers.GemmaForCausalLM, transformers.GemmaConfig, torch.bfloat16)),
    ("Gemma, float16", gemma(transformers.GemmaForCausalLM, transformers.GemmaConfig, torch.float16)),
    ("GemmaModel", gemma(transformers.GemmaModel, transformers.GemmaConfig)),
    ("Gemma2ForCausalLM", gemma(*_gemma2, sliding_window=6, num_hidden_layers=3, query_pre_attn_scalar=11,
                                attn_logit_softcapping=1.5, final_logit_softcapping=2.5)),
    ("Gemma 2, bfloat16", gemma(*_gemma2, torch.bfloat16, sliding_window=6, num_hidden_layers=3)),
    ("Gemma 2 without bounds", gemma(*_gemma2, sliding_window=11, num_hidden_layers=2, attn_logit_softcapping=None,
                                     final_logit_softcapping=None)),
]


@case("Gemma whose configuration says gelu")
def _(generator, folder):
    model = gemma(transformers.GemmaForCausalLM, transformers.GemmaConfig)(generator, folder)
    save_state(model, folder, hidden_act="gelu", hidden_activation=None, **old_names(model, 10000.0))
    return model


# --- Phi, GPT-NeoX ---

def phi(generator, **more):
    heads, kv_heads = generator.choice([(1, 1), (3, 1), (6, 2), (7, 7)])
    return randomized(transformers.PhiForCausalLM(transformers.PhiConfig(
        vocab_size=odd(generator, 60, 300), hidden_size=heads * 12, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=generator.randrange(1, 4),
        intermediate_size=odd(generator, 17, 70), max_position_embeddings=55, **more)))


def neox(generator, **more):
    heads = generator.choice([1, 3, 7])
    return randomized(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=odd(generator, 60, 300), hidden_size=heads * 16, num_attention_heads=heads,
        num_hidden_layers=generator.randrange(1, 4), intermediate_size=odd(generator, 17, 70),
        max_position_embeddings=55, **more)))


@case("PhiForCausalLM")
def _(generator, _):
    return phi(generator)


@case("Phi, another share rotated")
def _(generator, folder):
    model = phi(generator, rope_parameters={"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.34})
    save_state(model, folder, **old_names(model, 900.0, partial_rotary_factor=0.34))
    return model


@case("GPTNeoXForCausalLM")
def _(generator, _):
    return neox(generator)


@case("GPT-NeoX, one after the other, without biases")
def _(generator, _):
    return neox(generator, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new")


@case("GPT-NeoX, configuration from before version 5")
def _(generator, folder):
    model = neox(generator, rope_parameters={"rope_type": "default", "rope_theta": 300.0,
                                             "partial_rotary_factor": 0.5})
    state = {name.replace("lm_head", "embed_out"): tensor for name, tensor in model.state_dict().items()}
    state["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    save_state(model, folder, state, **old_names(model, rotary_emb_base=300, rotary_pct=0.5))
    return model


# --- GPT-2, the old way through the new code ---

@case("GPT2LMHeadModel")
def _(generator, _):
    heads = generator.choice([1, 3, 7])
    return randomized(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_head=heads, n_embd=heads * 5, n_layer=2, n_positions=41, vocab_size=odd(generator, 60, 300))))


# --- PyTorch's own modules ---

def dump_vectors(program, what, path, source, target, seen):
    """What the program's dump writes for vectors. target: None for an encoder; seen: which of the source's tokens are."""
    command = [program, "dump", path, "-o", path + ".npy", "--mask", ",".join(map(str, seen.int().tolist()))]
    for option, vectors in (("--input", source), ("--decoder-input", target)):
        if vectors is not None:
            numpy.save(path + option + ".npy", vectors.numpy())
            command += [option, path + option + ".npy"]
    done = subprocess.run(command, capture_output=True, text=True)
    test_convert.check(done.returncode == 0, "%s: %s" % (what, done.stderr))
    return torch.from_numpy(numpy.load(path + ".npy")) if done.returncode == 0 else torch.zeros(1)


def check_vectors(program, what, path, run, source, target):
    """The program's results, of the file and of what it makes of it in other types. run: PyTorch's, for a padding mask."""
    worst, seen = 0.0, torch.rand(len(source)) > 0.3
    seen[0] = True
    for kind, limit in (("", TOLERANCE), ("f16", 0.01), ("int8", 0.15)):  # narrow layers are rounded more coarsely
        if kind:
            subprocess.run([program, "quantize", path, path + "." + kind, "--type", kind], check=True,
                           capture_output=True)
        for mask in (torch.ones_like(seen), seen):
            found = dump_vectors(program, what, path + "." + kind if kind else path, source, target, mask)
            off = difference(found, run(mask.logical_not()))
            test_convert.check(off <= limit, "%s: dump%s is off by %.2g" % (what, " in " + kind if kind else "", off))
            worst = max(worst, 0.0 if kind else off)
    return worst


def torch_case(name, make, settings):
    def build(generator, folder):
        heads = generator.choice([1, 3, 7])
        sizes = dict(d_model=heads * generator.choice([5, 8, 11]), nhead=heads,
                     dim_feedforward=odd(generator, 17, 70), dropout=0.0)
        module = make(sizes)
        randomized(module)
        os.makedirs(folder)
        prefix = settings.get("state_prefix", "")
        state = {prefix + key: tensor for key, tensor in module.state_dict().items()}
        state.update(settings.get("others", {}))
        if settings.get("split"):
            state = split_attention(state, sizes["d_model"])
        torch.save(state, os.path.join(folder, "model.pt"))
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(dict(settings.get("config", {}), nhead=heads), file)
        return module, {"checkpoint": os.path.join(folder, "model.pt"),
                        "reference": reference(module, sizes["d_model"]),
                        "arguments": ["--arch", settings["arch"], "--config", os.path.join(folder, "config.json")]}

    def reference(module, width):
        def compare(what, runtime, program):
            source, target = torch.randn(13, width), torch.randn(9, width)
            kind = runtime.get("model.kind")
            causal = nn.Transformer.generate_square_subsequent_mask(9)

            def run(hidden):
                masks = dict(src_key_padding_mask=hidden[None], memory_key_padding_mask=hidden[None], tgt_mask=causal)
                if kind == "encoder":
                    return module(source[:, None], src_key_padding_mask=hidden[None])[:, 0].detach()
                if kind == "decoder":
                    del masks["src_key_padding_mask"]
                    return module(target[:, None], source[:, None], **masks)[:, 0].detach()
                return module(source[:, None], target[:, None], **masks)[:, 0].detach()

            expected = run(torch.zeros(13, dtype=torch.bool))
            if kind == "encoder":
                found = runtime.run("encoder", source)
            else:
                found = runtime.run("decoder", target, None,
                                    runtime.run("encoder", source) if kind == "encoder-decoder" else source)
            worst = check_outputs(what, {"hidden": found}, {"hidden": expected})
            return max(worst, check_vectors(program, what, runtime.path, run, source,
                                            None if kind == "encoder" else target)) if program else worst
        return compare

    CASES.append((name, build))


def split_attention(state, width):
    """The names that nn.MultiheadAttention has where keys or values have a width of their own."""
    split = {}
    for key, tensor in state.items():
        if key.endswith("in_proj_weight"):
            for i, letter in enumerate("qkv"):
                split[key.replace("in_proj", letter + "_proj")] = tensor[i * width:(i + 1) * width].clone()
        else:
            split[key] = tensor
    return split


def encoder_of(layers, norm, **more):
    def make(sizes):
        layer = nn.TransformerEncoderLayer(**sizes, **more)
        last = nn.LayerNorm(sizes["d_model"], eps=layer.norm1.eps) if norm else None
        return nn.TransformerEncoder(layer, layers, last, enable_nested_tensor=False)
    return make


def decoder_of(layers, norm, **more):
    def make(sizes):
        layer = nn.TransformerDecoderLayer(**sizes, **more)
        return nn.TransformerDecoder(layer, layers, nn.LayerNorm(sizes["d_model"]) if norm else None)
    return make


torch_case("nn.TransformerEncoder", encoder_of(2, False), {"arch": "nn.TransformerEncoder"})
torch_case("nn.TransformerEncoder, norms first", encoder_of(3, True, norm_first=True, activation="gelu",
                                                            layer_norm_eps=1e-3),
           {"arch": "nn.TransformerEncoder", "state_prefix": "net.encoder.",
            "others": {"embedding.weight": torch.ones(3, 4), "net.head.bias": torch.ones(2)},
            "config": {"norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-3}})
torch_case("nn.TransformerEncoder, a matrix for each", encoder_of(1, False),
           {"arch": "nn.TransformerEncoder", "split": True, "state_prefix": "module."})
torch_case("nn.TransformerDecoder", decoder_of(2, True), {"arch": "nn.TransformerDecoder"})
torch_case("nn.TransformerDecoder, no biases, split", decoder_of(2, False, bias=False, norm_first=True),
           {"arch": "nn.TransformerDecoder", "split": True, "config": {"norm_first": True, "num_layers": 2}})
torch_case("nn.Transformer", lambda sizes: nn.Transformer(num_encoder_layers=1, num_decoder_layers=2, **sizes),
           {"arch": "nn.Transformer"})
torch_case("nn.Transformer, norms first, no biases",
           lambda sizes: nn.Transformer(num_encoder_layers=3, num_decoder_layers=1, bias=False, norm_first=True,
                                        activation="gelu", **sizes),
           {"arch": "nn.Transformer", "state_prefix": "model.t.", "config": {"norm_first": True, "activation": "gelu",
                                                                             "num_encoder_layers": 3}})
torch_case("nn.TransformerEncoderLayer", lambda sizes: nn.TransformerEncoderLayer(**sizes),
           {"arch": "nn.TransformerEncoderLayer"})
torch_case("nn.TransformerDecoderLayer", lambda sizes: nn.TransformerDecoderLayer(**sizes),
           {"arch": "nn.TransformerDecoderLayer", "state_prefix": "block."})


# --- GGUF ---

class GgufMaker:
    """Writes a model of transformers as llama.cpp's converter does, and rounds its weights to what was written."""

    def __init__(self, path, arch, kinds):
        self.writer = gguf.GGUFWriter(path, arch)
        self.kinds = [gguf.GGMLQuantizationType[kind] for kind in kinds]
        self.count = 0

    def kind_for(self, shape):
        """The next of the types that rows of this length can have."""
        if len(shape) > 1:
            for _ in self.kinds:
                self.count += 1
                kind = self.kinds[self.count % len(self.kinds)]
                if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
                    return kind
        return gguf.GGMLQuantizationType.F32

    def put(self, name, *parameters, order=None, transpose=False, offset=0.0, kind=None):
        """The rows of the parameters, one after another, in the order given."""
        rows = torch.cat([parameter.detach().T if transpose else parameter.detach() for parameter in parameters])
        order = torch.arange(len(rows)) if order is None else order
        array = (rows[order] + offset).contiguous().numpy()
        kind = kind or self.kind_for(array.shape)
        packed = random_blocks(kind, array.shape) if kind.name in K_QUANTS else gguf.quants.quantize(array, kind)
        self.writer.add_tensor(name, packed, raw_dtype=kind)
        written = torch.empty_like(rows)
        written[order] = torch.from_numpy(gguf.quants.dequantize(packed, kind).reshape(array.shape).copy()) - offset
        start = 0
        for parameter in parameters:
            size = parameter.shape[-1 if transpose else 0]
            part = written[start:start + size]
            parameter.data.copy_(part.T if transpose else part)
            start += size

    def settings(self, config, **values):
        writer = self.writer
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_context_length(config.max_position_embeddings)
        for name, value in values.items():
            getattr(writer, "add_" + name)(value)

    def close(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


# Where the scales of a block are, two bytes each; the package doesn't write these types.
K_QUANTS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(kind, shape):
    """Random bits with scales that make weights of a usual size."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = torch.randint(0, 256, (*shape[:-1], shape[-1] // elements, size), dtype=torch.uint8).numpy()
    for place in K_QUANTS[kind.name]:
        scales = (torch.rand(blocks.shape[:-1]) * 1e-4 + 1e-5).half().numpy()
        blocks[..., place:place + 2] = scales[..., None].view(numpy.uint8)
    return blocks.reshape(*shape[:-1], -1)


def interleaved(n_heads, head_dim):
    """LLaMA's rows in llama.cpp: a pair that is rotated together stands together."""
    rows = torch.arange(n_heads * head_dim).view(n_heads, 2, head_dim // 2)
    return rows.transpose(1, 2).flatten()


def put_llama_blocks(maker, model, arch):
    config, gemma = model.config, arch.startswith("gemma")
    offset = float(gemma)
    for i, layer in enumerate(model.model.layers):
        block, attention = "blk.%d." % i, layer.self_attn
        for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads),
                              ("v", config.num_key_value_heads)):
            projection = getattr(attention, letter + "_proj")
            order = interleaved(heads, attention.head_dim) if arch == "llama" and letter != "v" else None
            maker.put(block + "attn_%s.weight" % letter, projection.weight, order=order)
            if projection.bias is not None:
                maker.put(block + "attn_%s.bias" % letter, projection.bias, order=order)
        if arch == "qwen3":
            maker.put(block + "attn_q_norm.weight", attention.q_norm.weight)
            maker.put(block + "attn_k_norm.weight", attention.k_norm.weight)
        maker.put(block + "attn_output.weight", attention.o_proj.weight)
        maker.put(block + "attn_norm.weight", layer.input_layernorm.weight, offset=offset)
        if arch == "gemma2":
            maker.put(block + "post_attention_norm.weight", layer.post_attention_layernorm.weight, offset=offset)
            maker.put(block + "ffn_norm.weight", layer.pre_feedforward_layernorm.weight, offset=offset)
            maker.put(block + "post_ffw_norm.weight", layer.post_feedforward_layernorm.weight, offset=offset)
        else:
            maker.put(block + "ffn_norm.weight", layer.post_attention_layernorm.weight, offset=offset)
        for name in ("gate", "up", "down"):
            maker.put(block + "ffn_%s.weight" % name, getattr(layer.mlp, name + "_proj").weight)
    maker.put("output_norm.weight", model.model.norm.weight, offset=offset)
    maker.put("token_embd.weight", model.model.embed_tokens.weight)
    if not config.tie_word_embeddings:
        maker.put("output.weight", model.lm_head.weight)


def gguf_case(name, arch, make, kinds, write, **says):
    def build(generator, folder):
        if gguf is None:
            return None
        os.makedirs(folder)
        path = os.path.join(folder, "model.gguf")
        model = make(generator, folder)
        maker = GgufMaker(path, arch, kinds)
        with torch.no_grad():
            write(maker, model)
        maker.close()
        return model, {"checkpoint": path, "says": says}
    CASES.append(("GGUF " + name, build))


def llama_gguf(arch, **more):
    def write(maker, model):
        config = model.config
        maker.settings(config, head_count_kv=config.num_key_value_heads, feed_forward_length=config.intermediate_size,
                       layer_norm_rms_eps=config.rms_norm_eps, rope_freq_base=config.rope_parameters["rope_theta"],
                       key_length=model.model.layers[0].self_attn.head_dim,
                       value_length=model.model.layers[0].self_attn.head_dim, eos_token_id=2, **more)
        if arch == "gemma2":
            maker.writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            maker.writer.add_final_logit_softcapping(config.final_logit_softcapping)
            maker.writer.add_sliding_window(config.sliding_window)
        put_llama_blocks(maker, model, arch)
    return write


def llama3_gguf(maker, model):
    llama_gguf("llama", rope_dimension_count=model.model.layers[0].self_attn.head_dim)(maker, model)
    rope = model.model.rotary_emb
    plain = 1.0 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    maker.writer.add_tensor("rope_freqs.weight", (plain / rope.inv_freq).numpy())


def yarn_gguf(maker, model):
    rope = model.config.rope_parameters
    llama_gguf("llama", rope_scaling_type=gguf.RopeScalingType.YARN, rope_scaling_factor=rope["factor"],
               rope_scaling_orig_ctx_len=rope["original_max_position_embeddings"])(maker, model)


def phi_gguf(fused):
    def write(maker, model):
        config = model.config
        attention = model.model.layers[0].self_attn
        maker.settings(config, head_count_kv=config.num_key_value_heads, feed_forward_length=config.intermediate_size,
                       layer_norm_eps=config.layer_norm_eps, rope_dimension_count=attention.rotary_ndims)
        for i, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            parts = [getattr(attention, letter + "_proj") for letter in "qkv"]
            for kind in ("weight", "bias"):
                tensors = [getattr(part, kind) for part in parts]
                if fused:
                    maker.put("blk.%d.attn_qkv.%s" % (i, kind), *tensors)
                for letter, tensor in zip("" if fused else "qkv", tensors):
                    maker.put("blk.%d.attn_%s.%s" % (i, letter, kind), tensor)
                for target, module in (("attn_output", attention.dense), ("attn_norm", layer.input_layernorm),
                                       ("ffn_up", layer.mlp.fc1), ("ffn_down", layer.mlp.fc2)):
                    maker.put("blk.%d.%s.%s" % (i, target, kind), getattr(module, kind))
        for kind in ("weight", "bias"):
            maker.put("output_norm." + kind, getattr(model.model.final_layernorm, kind))
            maker.put("output." + kind, getattr(model.lm_head, kind))
        maker.put("token_embd.weight", model.model.embed_tokens.weight)
    return write


def neox_gguf(maker, model):
    config, heads = model.config, model.config.num_attention_heads
    maker.settings(config, feed_forward_length=config.intermediate_size, layer_norm_eps=config.layer_norm_eps,
                   rope_dimension_count=4, parallel_residual=config.use_parallel_residual)
    order = torch.arange(3 * config.hidden_size).view(heads, 3, -1).transpose(0, 1).flatten()
    for i, layer in enumerate(model.gpt_neox.layers):
        for kind in ("weight", "bias"):
            maker.put("blk.%d.attn_qkv.%s" % (i, kind), getattr(layer.attention.query_key_value, kind), order=order)
            for target, module in (("attn_output", layer.attention.dense), ("attn_norm", layer.input_layernorm),
                                   ("ffn_norm", layer.post_attention_layernorm), ("ffn_up", layer.mlp.dense_h_to_4h),
                                   ("ffn_down", layer.mlp.dense_4h_to_h)):
                maker.put("blk.%d.%s.%s" % (i, target, kind), getattr(module, kind))
    for kind in ("weight", "bias"):
        maker.put("output_norm." + kind, getattr(model.gpt_neox.final_layer_norm, kind))
    maker.put("token_embd.weight", model.gpt_neox.embed_in.weight)
    maker.put("output.weight", model.get_output_embeddings().weight)


def gpt2_gguf(maker, model):
    config, base = model.config, model.transformer
    maker.settings(config, feed_forward_length=4 * config.n_embd, layer_norm_eps=config.layer_norm_epsilon)
    for i, layer in enumerate(base.h):
        for target, module in (("attn_qkv", layer.attn.c_attn), ("attn_output", layer.attn.c_proj),
                               ("ffn_up", layer.mlp.c_fc), ("ffn_down", layer.mlp.c_proj)):
            maker.put("blk.%d.%s.weight" % (i, target), module.weight, transpose=True)
            maker.put("blk.%d.%s.bias" % (i, target), module.bias)
        for target, module in (("attn_norm", layer.ln_1), ("ffn_norm", layer.ln_2)):
            maker.put("blk.%d.%s.weight" % (i, target), module.weight)
            maker.put("blk.%d.%s.bias" % (i, target), module.bias)
    maker.put("output_norm.weight", base.ln_f.weight)
    maker.put("output_norm.bias", base.ln_f.bias)
    maker.put("position_embd.weight", base.wpe.weight, kind=gguf.GGMLQuantizationType.F32)
    maker.put("token_embd.weight", base.wte.weight)


def gpt2_of(heads, size):
    def make(generator, _):
        return randomized(transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_head=heads, n_embd=heads * size, n_layer=2, n_positions=41, vocab_size=odd(generator, 60, 300))))
    return make


_wide = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=2)
_blocks = dict(hidden_size=96, num_attention_heads=3, num_key_value_heads=1, head_dim=32, intermediate_size=160)
_legacy, _k = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"], ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"]
gguf_case("llama, F32", "llama", llama(*_llama), ["F32"], llama_gguf("llama"), **{"generation.eos_ids": [2]})
gguf_case("llama, F16 and BF16", "llama", llama(*_llama), ["F16", "BF16"], llama_gguf("llama"))
gguf_case("llama with biases", "llama", llama(*_llama, attention_bias=True), ["F16"], lambda maker, model: (
    llama_gguf("llama")(maker, model),
    [maker.put("blk.%d.attn_output.bias" % i, layer.self_attn.o_proj.bias)
     for i, layer in enumerate(model.model.layers)]))
for _kind in _legacy:
    gguf_case("llama, " + _kind, "llama", llama(*_llama, **_blocks), [_kind], llama_gguf("llama"))
gguf_case("llama, old quantized types mixed", "llama", llama(*_llama, **_blocks), _legacy, llama_gguf("llama"))
for _kind in K_QUANTS:
    gguf_case("llama, " + _kind, "llama", llama(*_llama, **_wide, intermediate_size=512), [_kind], llama_gguf("llama"))
gguf_case("llama, types mixed", "llama", llama(*_llama, **_wide, intermediate_size=512, tie_word_embeddings=True), _k,
          llama_gguf("llama"))
gguf_case("llama 3's frequencies", "llama", llama(*_llama, head_dim=16, rope_parameters={
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 100.0}), ["F32"], llama3_gguf)
gguf_case("llama, yarn", "llama", llama(*_llama, head_dim=16, rope_parameters={
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}), ["F32"],
          yarn_gguf)
gguf_case("qwen2", "qwen2", llama(*_qwen2, **_blocks), _legacy, llama_gguf("qwen2"))
gguf_case("qwen3", "qwen3", llama(*_qwen3, **_wide, intermediate_size=256), _k, llama_gguf("qwen3"))
gguf_case("gemma", "gemma", gemma(transformers.GemmaForCausalLM, transformers.GemmaConfig), ["F32"],
          llama_gguf("gemma"))
gguf_case("gemma2", "gemma2", gemma(*_gemma2, sliding_window=6, num_hidden_layers=3, query_pre_attn_scalar=14,
                                    attn_logit_softcapping=2.0, final_logit_softcapping=3.0), ["F16"],
          llama_gguf("gemma2"))
gguf_case("phi2", "phi2", lambda generator, _: phi(generator), ["F32"], phi_gguf(True))
gguf_case("phi2 in parts", "phi2", lambda generator, _: phi(generator), ["F16"], phi_gguf(False))
gguf_case("gptneox", "gptneox", lambda generator, _: neox(generator), ["F16"], neox_gguf)
gguf_case("gptneox, one after the other", "gptneox", lambda generator, _: neox(generator, use_parallel_residual=False),
          ["F32"], neox_gguf)
gguf_case("gpt2", "gpt2", gpt2_of(3, 32), _legacy, gpt2_gguf)


# ---------------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--tfm")
    parser.add_argument("--keep")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    print("seed %d" % arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        runner = Runner(arguments.keep or temporary, arguments.tfm)
        for seed in range(arguments.seed, arguments.seed + arguments.rounds):
            for name, function in CASES:
                if arguments.only in name:
                    torch.manual_seed(seed)
                    runner.run(name, function, random.Random("%d %s" % (seed, name)))
    print("%.0f seconds" % (time.monotonic() - start))
    print("%d passed, %d failed" % (test_convert.Results.passed, test_convert.Results.failed))
    return test_convert.Results.failed != 0


if __name__ == "__main__":
    sys.exit(main())
