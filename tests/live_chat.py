"""Compares the chat templates of tfm.h with transformers' apply_chat_template, for the Jinja texts of the families as
their model cards and documentation give them. Needs torch, transformers, jinja2 and a C compiler.

usage: tests/live_chat.py [--cc CC] [--chat build/chat]

For each a small model with a tokenizer is saved by transformers, converted by convert.py (which has to find out what kind
of template it is), and asked for the ids of a few conversations by a small program around tfm_chat_ids.
"""

import argparse
import os
import pty
import select
import subprocess
import sys
import tempfile
import time

import tokenizers
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# name, special tokens, bos, eos, takes a system prompt, template
FAMILIES = [
    ("chatml", ["<|im_start|>", "<|im_end|>"], "", "<|im_end|>", True,
     "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
     "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    ("llama2", ["<s>", "</s>"], "<s>", "</s>", True,
     "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
     "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
     "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
     "{% if loop.index0 == 0 and system_message != false %}"
     "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
     "{% else %}{% set content = message['content'] %}{% endif %}"
     "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
     "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"),
    ("llama3", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>",
     "<|eot_id|>", True,
     "{% set loop_messages = messages %}{% for message in loop_messages %}"
     "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
     " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
     "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"),
    ("chatml", ["<|im_start|>", "<|im_end|>"], "", "<|im_end|>", True,  # a system prompt of its own: Qwen2, SmolLM2
     "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
     "{{ \"<|im_start|>system\\nYou're a \u00fcber-bear, made by us.\\nGrowl.<|im_end|>\\n\" }}{% endif %}"
     "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
     "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    ("llama3", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>",
     "<|eot_id|>", True,  # with dates: Llama 3.1
     '{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
     "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
     "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
     '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- "Cutting Knowledge Date: December 2023\\n" }}'
     '{{- "Today Date: " + date_string + "\\n\\n" }}{{- system_message }}{{- "<|eot_id|>" }}'
     "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
     " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
     "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"),
    ("zephyr", ["<s>", "</s>"], "<s>", "</s>", True,  # TinyLlama
     "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
     "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
     "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
     "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
     "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"),
    ("phi3", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"], "", "<|endoftext|>", True,
     "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
     "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
     "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
     "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
     "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"),
    ("mistral", ["<s>", "</s>"], "<s>", "</s>", False,  # 7B v0.2 of 2023
     "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
     "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
     "{{ message['content'] + eos_token}}{% endif %}{% endfor %}"),
    ("mistral", ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", True,  # Nemo: no spaces, the system prompt last
     '{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}'
     "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
     '{{- bos_token }}{%- for message in loop_messages %}{%- if message["role"] == "user" %}'
     "{%- if loop.last and system_message is defined %}"
     '{{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}'
     '{%- else %}{{- "[INST]" + message["content"] + "[/INST]" }}{%- endif %}'
     '{%- elif message["role"] == "assistant" %}{{- message["content"] + eos_token}}{%- endif %}{%- endfor %}'),
    ("mistral", ["<s>", "</s>"], "<s>", "</s>", False,
     "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
     "{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
     "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"),
    ("mistral", ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", False,
     "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
     "{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}"
     "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"),
    ("gemma", ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<end_of_turn>", False,
     "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
     "{% else %}{% set role = message['role'] %}{% endif %}"
     "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
     "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"),
]

PROGRAM = r"""
#define TFM_IMPLEMENTATION
#include "tfm.h"

/* MODEL ROLE TEXT...: the context's ids, up to the answer if the last role is the user. */
int main(int argc, char **argv) {
    static int32_t ids[65536];
    tfm_error error = {TFM_OK, ""};
    tfm_model *model = tfm_load(argv[1], NULL, &error);
    tfm_session *session = model ? tfm_session_create(model, NULL, &error) : NULL;
    tfm_chat *chat = session ? tfm_chat_create(session, NULL, &error) : NULL;
    size_t n = 0, i;
    int k;
    for (k = 2; chat && k + 1 < argc; k += 2)
        tfm_chat_add(chat, (tfm_role)atoi(argv[k]), argv[k + 1], &error);
    if (!chat || error.status || tfm_chat_ids(chat, 1, ids, 65536, &n, &error))
        return fprintf(stderr, "%s\n", error.message), 1;
    printf("%s\n", tfm_chat_template(chat));
    for (i = 0; i < n; i++)
        printf("%ld ", (long)ids[i]);
    tfm_chat_free(chat);
    tfm_session_free(session);
    tfm_free(model);
    return 0;
}
"""

ROLES = {"system": 0, "user": 1, "assistant": 2}

# What is said. Special tokens in it are text to tfm.h and tokens to apply_chat_template: there are none.
CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello!"), ("user", "How are you?")],
    [("system", "You are a bear.\n\nBears growl."), ("user", "  a  b  "), ("assistant", "Grr.\n"), ("user", "1 + 1 = ?\n"),
     ("assistant", "\u00e9\u4e2d\U0001f43b"), ("user", "")],
    [("user", "x" * 300 + " \t y"), ("assistant", "['INST', <, >, <|im, [/INS]"), ("user", "it's\r\nso")],
    # White space that is not ASCII, around everything; a first message that is nothing else.
    [("system", "\u00a0 s\n"), ("user", "\u2003\u00a0 u \u3000\x1f"), ("assistant", "\x85\u1680a\u2028"), ("user", "\u200bu\x1c")],
    [("system", "s "), ("user", "\t\u202f\n"), ("assistant", "\u205f"), ("user", "u")],
]


def make_checkpoint(folder, tokens, bos, eos, template):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, **({"bos_token": bos} if bos else {}))
    fast.add_special_tokens({"additional_special_tokens": [t for t in tokens if t not in (bos, eos)]})
    fast.chat_template = template
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=len(fast), n_positions=2048, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return fast


def check_family(family, program, folder):
    """(checks passed, failures)"""
    name, tokens, bos, eos, has_system, template = family
    fast = make_checkpoint(folder, tokens, bos, eos, template)
    path = os.path.join(folder, "model.tfm")
    subprocess.run([sys.executable, os.path.join(ROOT, "tools", "convert.py"), folder, path], check=True,
                   stderr=subprocess.DEVNULL)
    passed, failures = 0, []
    for said in CONVERSATIONS:
        if said[0][0] == "system" and not has_system:
            said = said[1:]
        messages = [{"role": role, "content": text} for role, text in said]
        expected = fast.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected_ids = fast(expected, add_special_tokens=False)["input_ids"]
        arguments = [part for role, text in said for part in (str(ROLES[role]), text)]
        kind, ids = subprocess.run([program, path, *arguments], check=True, capture_output=True,
                                   text=True).stdout.split("\n")
        if kind == name and [int(number) for number in ids.split()] == expected_ids:
            passed += 1
        else:
            failures.append("%s: %r: %s %s, expected %s %s" % (
                name, said, kind, repr(fast.decode([int(n) for n in ids.split()])), name, repr(expected)))
    return passed, failures


def read_until(terminal, end, seconds=20):
    """What comes from a terminal, up to this text or the program's end."""
    text = b""
    try:
        while end not in text and select.select([terminal], [], [], seconds)[0]:
            text += os.read(terminal, 1)
    except OSError:
        pass
    return text


def check_terminal(chat):
    """The chat program at a terminal: Ctrl-C ends an answer or drops a typed line, Ctrl-D ends the program.

    As check_family."""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(chat, [chat, os.path.join(ROOT, "examples", "models", "stories.tfm"), "-n", "0", "--threads", "1"])
    passed, failures = 0, []
    for typed, expected in ((b"", b"> "), (b"Once upon a time\n", b" of the"), (b"\x03", b"\n> "),
                            (b"half a line", b"line"), (b"\x03", b"\n> "), (b"\x03", b"\n> "), (b"/history\n", b"assistant: "),
                            (b"/frobnicate\n", b"unknown command"), (b"\x04", b"\n")):
        time.sleep(0.1)  # it waits for a line before it gets one
        os.write(terminal, typed)
        found = read_until(terminal, expected)
        if found.endswith(expected):
            passed += 1
        else:
            failures.append("chat at a terminal: %r: %r, expected %r" % (typed, found, expected))
    _, status = os.waitpid(process, 0)
    return (passed + 1, failures) if status == 0 else (passed, failures + ["chat at a terminal: status %d" % status])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--chat", default=os.path.join(ROOT, "build", "chat"))
    args = parser.parse_args()
    passed, failures = check_terminal(args.chat)
    with tempfile.TemporaryDirectory() as folder:
        source, program = os.path.join(folder, "ids.c"), os.path.join(folder, "ids")
        with open(source, "w", encoding="utf-8") as file:
            file.write(PROGRAM)
        subprocess.run([args.cc, "-std=c99", "-O1", "-I", ROOT, source, "-o", program, "-lm"], check=True)
        for index, family in enumerate(FAMILIES):
            checkpoint = os.path.join(folder, str(index))
            os.mkdir(checkpoint)
            good, bad = check_family(family, program, checkpoint)
            passed += good
            failures += bad
    for failure in failures:
        print(failure)
    print("%d passed, %d failed" % (passed, len(failures)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
