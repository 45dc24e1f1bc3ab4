#!/usr/bin/env python3
"""Writes the table of grapheme cluster classes that tfm.h's SentencePiece tokenizers use, to standard output.

Hugging Face's `tokenizers` applies a model's precompiled charsmap to whole grapheme clusters of less than 6 bytes, and
to characters one by one in longer ones. What a cluster is, is asked of the library itself, with a charsmap that makes
one "Z" of each non-ASCII cluster, or of each character in a long one: how many there are tells the clusters apart.

    make_graphemes.py              print the table, to be pasted into tfm.h
    make_graphemes.py --check F    compare with the table in the file F; exit status 1 when they differ

Needs the Python package `tokenizers`.
"""
import argparse
import re
import struct
import sys
import textwrap

from tokenizers import normalizers

OTHER, CONTROL, EXTEND, CONJUNCT_EXTEND, LINKER, SPACING, PREPEND, LEAD, VOWEL, TRAIL, SYLLABLE, PICTURE, CONSONANT = range(13)
CODE_POINTS = [c for c in range(0x80, 0x110000) if not 0xD800 <= c < 0xE000]
SYLLABLES = range(0xAC00, 0xD7A4)  # of Hangul, whose parts are arithmetic
ACUTE, ZWJ, HEART, KA, VIRAMA = "\u0301", "\u200d", "\u2764", "\u0915", "\u094d"


def byte_charsmap(first, text):
    """A charsmap with `text` for every character that begins with one of the bytes: a double array of one level."""
    units = [0] * 1024
    units[0] = 256 << 10  # the offset of the root's children
    for byte in first:
        place, target = 256 ^ byte, 512 + byte
        units[place] = byte | 1 << 8 | (place ^ target) << 10
        units[target] = 1 << 31  # the text's place, 0
    trie = struct.pack("<1024I", *units)
    return struct.pack("<I", len(trie)) + trie + text + b"\0"


normalize = normalizers.Precompiled(byte_charsmap(range(0xC2, 0xF5), b"Z")).normalize_str


def counted(pattern):
    """How many clusters or characters there are in pattern(c), for every c."""
    found = {}
    for i in range(0, len(CODE_POINTS), 4096):
        part = CODE_POINTS[i : i + 4096]
        lines = normalize("\n".join(pattern(chr(c)) for c in part)).split("\n")
        assert len(lines) == len(part)
        found.update(zip(part, (line.count("Z") for line in lines)))
    return found


def where(pattern, count):
    return {c for c, n in counted(pattern).items() if n == count}


def classes():
    control = where(lambda c: c + ACUTE + "\u0302", 2)
    lines = {}
    for i in range(0, len(CODE_POINTS), 4096):
        part = CODE_POINTS[i : i + 4096]
        lines.update(zip(part, normalize("\n".join(chr(c) + "a" for c in part)).split("\n")))
    prepend = {c for c in CODE_POINTS if lines[c] == "Z"}
    with_a = normalizers.Precompiled(byte_charsmap([ord("a")], b"Z")).normalize_str
    extending = set()
    for i in range(0, len(CODE_POINTS), 4096):
        part = CODE_POINTS[i : i + 4096]
        found = with_a("\n".join("a" + chr(c) for c in part)).split("\n")
        extending.update(c for c, line in zip(part, found) if line == "Z")
    extend = extending & where(lambda c: HEART + c + ZWJ + HEART + ACUTE, 5)
    between = extend & where(lambda c: KA + c + VIRAMA + KA + ACUTE, 5)
    linker = extend & where(lambda c: KA + c + KA + ACUTE, 4)
    picture = where(lambda c: c + ZWJ + HEART + ACUTE, 4) - extending
    consonant = where(lambda c: c + VIRAMA + KA + ACUTE, 4) - extending - prepend
    # (Whether a character of 4 bytes is joined to what is before it makes no difference to anything.)
    short = {c for c in CODE_POINTS if c < 0x10000}
    lead = where(lambda c: c + "\uac00" + ACUTE, 3) - extending - prepend
    trail = where(lambda c: "\u11a8" + c + ACUTE, 3) & short - extending - control
    vowel = where(lambda c: c + "\u11a8" + ACUTE, 3) - extending - prepend - trail - set(SYLLABLES)
    result = bytearray(0x110000)
    for members, kind in ((control, CONTROL), (extending, SPACING), (extend, EXTEND), (between, CONJUNCT_EXTEND),
                          (linker, LINKER), (prepend, PREPEND), (lead, LEAD), (vowel, VOWEL), (trail, TRAIL),
                          (SYLLABLES, SYLLABLE), (picture, PICTURE), (consonant, CONSONANT)):
        for c in members:
            assert kind in (EXTEND, CONJUNCT_EXTEND, LINKER) or not result[c], (hex(c), kind, result[c])
            result[c] = kind
    return result


def table():
    of = classes()
    runs = [c for c in range(0x110000) if c >= 0x80 and of[c] != of[c - 1]]
    items = textwrap.fill(" ".join(f"0x{c << 8 | of[c]:X}," for c in runs), 116, initial_indent="    ",
                          subsequent_indent="    ")
    return f"""\
/* BEGIN GRAPHEMES: the classes as Hugging Face tokenizers has them, written by tests/make_graphemes.py */
/* Every run of code points of one class: (first code point << 8 | class), in order; before the first: TFM__CLUSTER_OTHER. */
static const uint32_t tfm__grapheme_runs[{len(runs)}] = {{
{items}
}};
/* END GRAPHEMES */
"""


def numbers(text):
    found = re.search(r"/\* BEGIN GRAPHEMES.*?END GRAPHEMES \*/\n", text, re.S)
    return re.findall(r"0x[0-9A-F]+", found.group()) if found else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", metavar="FILE", help="compare with the table in this file")
    arguments = parser.parse_args()
    if not arguments.check:
        sys.stdout.write(table())
        return 0
    with open(arguments.check, encoding="utf-8") as file:
        same = numbers(file.read()) == numbers(table())
    print("1 passed, 0 failed" if same else "0 passed, 1 failed")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
