#!/usr/bin/env python3
"""Writes the table of Unicode character classes that tfm.h's tokenizers use, to standard output.

The tokenizers must split text where Hugging Face's `tokenizers` splits it, so the classes are asked of that library
itself, one code point after another, and not of a Unicode database whose version may be another one:
\\p{L}, \\p{N}, \\p{M} and \\s of its regular expressions, and its idea of a word's character (which decides where an
added token with `single_word` matches) from what an added token does.

    make_unicode.py              print the table, to be pasted into tfm.h
    make_unicode.py --check F    compare with the table in the file F; exit status 1 when they differ

Needs the Python package `tokenizers`. Takes half a minute.
"""
import argparse
import re
import sys
import textwrap

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

LETTER, NUMBER, SPACE, MARK, WORD = 1, 2, 4, 8, 16

# Surrogates are no characters; UTF-8 does not have them.
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]

# The first release of Unicode that has this code point as a letter: says which version the library was built with.
FIRST_LETTERS = [("15.0", 0x1E030), ("15.1", 0x2EBF0), ("16.0", 0x1C89), ("17.0", 0x323B0)]


def chunks(size):
    for i in range(0, len(CODE_POINTS), size):
        yield CODE_POINTS[i : i + size]


def matching(pattern):
    """The code points that match a pattern of the library's regular expressions."""
    remove = pre_tokenizers.Split(Regex(pattern), "removed")
    rest = set()
    for chunk in chunks(4096):
        for piece, _ in remove.pre_tokenize_str("".join(map(chr, chunk))):
            rest.update(map(ord, piece))
    return set(CODE_POINTS) - rest


def positions_of_token(tokenizer, text):
    encoding = tokenizer.encode(text)
    return {start: end for id, (start, end) in zip(encoding.ids, encoding.offsets) if id == 1}


def with_added_token(**options):
    tokenizer = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    tokenizer.add_tokens([AddedToken("@T@", normalized=False, **options)])
    return tokenizer


def word_characters():
    """Those before which a `single_word` token does not match."""
    tokenizer = with_added_token(single_word=True)
    found = set()
    for chunk in chunks(2048):
        positions = positions_of_token(tokenizer, "".join(chr(c) + "@T@-" for c in chunk))
        found.update(c for i, c in enumerate(chunk) if 5 * i + 1 not in positions)
    return found


def stripped_characters():
    """Those that a token with `rstrip` takes along."""
    tokenizer = with_added_token(rstrip=True)
    found = set()
    for chunk in chunks(2048):
        positions = positions_of_token(tokenizer, "".join("-@T@" + chr(c) for c in chunk))
        found.update(c for i, c in enumerate(chunk) if positions[5 * i + 1] == 5 * i + 5)
    return found


def classes():
    letters, numbers, spaces, marks = (matching(p) for p in (r"\p{L}", r"\p{N}", r"\s", r"\p{M}"))
    words = word_characters()
    # One table serves both of the library's regular expression engines only as long as they agree on white space.
    assert stripped_characters() == spaces
    version = max((v for v, c in FIRST_LETTERS if c in letters), default="14.0 or older")
    result = bytearray(0x110000)
    for members, bit in ((letters, LETTER), (numbers, NUMBER), (spaces, SPACE), (marks, MARK), (words, WORD)):
        for c in members:
            result[c] |= bit
    return version, result


def rows(items):
    return textwrap.fill(" ".join(f"{item}," for item in items), 120, initial_indent="    ", subsequent_indent="    ")


def table():
    version, of = classes()
    runs = [c for c in range(0x110000) if c == 0 or of[c] != of[c - 1]]
    ascii_rows = rows(of[:128])
    run_rows = rows(f"0x{c << 8 | of[c]:X}" for c in runs)
    return f"""\
/* BEGIN UNICODE {version}: the classes as Hugging Face tokenizers has them, written by tests/make_unicode.py */
static const unsigned char tfm__ascii_classes[128] = {{
{ascii_rows}
}};

/* Every run of code points of one class: (first code point << 8 | class), in order. */
static const uint32_t tfm__unicode_runs[{len(runs)}] = {{
{run_rows}
}};
/* END UNICODE */
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", metavar="FILE", help="compare with the table in FILE")
    arguments = parser.parse_args()
    if not arguments.check:
        sys.stdout.write(table())
        return 0
    with open(arguments.check, encoding="utf-8") as file:
        found = re.search(r"/\* BEGIN UNICODE .*?/\* END UNICODE \*/\n", file.read(), re.S)
    same = found is not None and found.group() == table()
    print(f"{arguments.check}: the Unicode table is {'as it should be' if same else 'missing or different'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
