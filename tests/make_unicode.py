#!/usr/bin/env python3
"""Writes the tables of Unicode that tfm.h's tokenizers use, to standard output.

The tokenizers must split and change text as Hugging Face's `tokenizers` does, so the tables are asked of that library
itself, one code point after another, and not of a Unicode database whose version may be another one (the library
itself has several):
\\p{L}, \\p{N}, \\p{M} and \\s of its regular expressions; its idea of a word's character (which decides where an added
token with `single_word` matches) from what an added token does; BERT's punctuation from BertPreTokenizer; and what
BertNormalizer removes, strips and makes lower case.

    make_unicode.py              print the tables, to be pasted into tfm.h
    make_unicode.py --check F    compare with the tables in the file F; exit status 1 when they differ

Needs the Python package `tokenizers`. Takes half a minute.
"""
import argparse
import re
import sys
import textwrap
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

LETTER, NUMBER, SPACE, MARK, WORD, PUNCTUATION, CONTROL, ACCENT = 1, 2, 4, 8, 16, 32, 64, 128
HANGUL = range(0xAC00, 0xD7A4)  # decomposed by arithmetic

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


def bert(**options):
    """Part of BertNormalizer, as a function."""
    usual = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
    return normalizers.BertNormalizer(**{**usual, **options}).normalize_str


def each(function):
    """What a normalizer makes of every code point: {code point: text}."""
    return {c: function(chr(c)) for c in CODE_POINTS}


def bert_spaces_and_punctuation():
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    pieces = {c: len(split("a" + chr(c) + "b")) for c in CODE_POINTS}
    return {c for c, n in pieces.items() if n == 2}, {c for c, n in pieces.items() if n == 3}


def check_normalizer(spaces):
    """What tfm.h takes for granted."""
    full = bert(clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True)
    cleaned, loud = bert(clean_text=True), bert(handle_chinese_chars=True, lowercase=True)
    for c in CODE_POINTS:
        size = len(chr(c).encode())
        assert len(full(chr(c)).encode()) <= 3 * size and len(loud(chr(c)).encode()) <= 3 * size, hex(c)
        assert cleaned(chr(c)) in ("", chr(c)) if c not in spaces else cleaned(chr(c)) in ("", " "), hex(c)
    # Each character by itself: no final sigma.
    assert bert(lowercase=True)("\u039f\u03a3 \u03a3") == "\u03bf\u03c3 \u03c3"


def orders():
    """How canonical decomposition sorts marks: 0 for what is no such mark, 1, 2, ... in the order of their combining
    classes."""
    decompose = normalizers.NFD().normalize_str
    by_class = {}  # Python's classes: one mark for each, which the library sorts, too
    for c in CODE_POINTS:
        number = unicodedata.combining(chr(c))
        first, last = sorted((chr(c), "\u0345" if number < 240 else "\u0334"), key=unicodedata.combining)
        if number and decompose(chr(c)) == chr(c) and decompose(last + first) == first + last:
            by_class.setdefault(number, chr(c))
    marks = [by_class[number] for number in sorted(by_class)]

    def place(c):
        """The index of the mark in `marks` that has its class; None if it has none."""
        low, high = marks[0], marks[-1]  # every class but theirs is sorted before or after one of them
        if decompose(chr(c) + low) == chr(c) + low and decompose(high + chr(c)) == high + chr(c):
            return None
        after = [i for i, mark in enumerate(marks) if decompose(chr(c) + mark) == mark + chr(c) != chr(c) + mark]
        before = [i for i, mark in enumerate(marks) if decompose(mark + chr(c)) == chr(c) + mark != mark + chr(c)]
        same = set(range(len(marks))) - set(after) - set(before)
        assert len(same) == 1, hex(c)
        return same.pop()

    places = {c: place(c) for c in CODE_POINTS if decompose(chr(c)) == chr(c)}
    result = bytearray(0x110000)
    for c, p in places.items():
        if p is not None:
            result[c] = p + 1
    return result


def compositions(without_marks):
    """The characters that are others with something behind them, a step at a time, but for those that don't come together
    again and that stripping accents decomposes as well: ([[character, first, second or 0]], and the places of those that canonical
    composition puts together again, by (first, second))."""
    decompose, compose = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    decomposed = {c: decompose(chr(c)) for c in CODE_POINTS if decompose(chr(c)) != chr(c) and c not in HANGUL}
    whole = {text: chr(c) for c, text in sorted(decomposed.items(), reverse=True)}
    whole.update({text: compose(text) for text in decomposed.values() if len(compose(text)) == 1})
    steps, again = [], []
    for c, text in decomposed.items():
        if text == without_marks[c] and compose(text) != chr(c):
            continue
        if whole[text] != chr(c):  # another character with the same parts
            steps.append([c, ord(whole[text]), 0])
            continue
        first = whole.get(text[:-1], text[:-1])
        assert len(first) == 1, hex(c)
        if compose(text) == chr(c):
            again.append(len(steps))
            assert len(chr(c).encode()) <= len((first + text[-1]).encode())
        steps.append([c, ord(first), ord(text[-1])])
    assert all(len(text) <= 4 and len(text.encode()) <= 3 * len(chr(c).encode()) for c, text in decomposed.items())
    again.sort(key=lambda i: steps[i][1:])
    return steps, again


def lower_case_runs():
    """[first, last, step, what is added] of runs of code points whose lower case is that much further on."""
    lower = each(bert(lowercase=True))
    assert [c for c in CODE_POINTS if len(lower[c]) != 1] == [0x130] and lower[0x130] == "i\u0307"
    runs = []
    for c in CODE_POINTS:
        distance = ord(lower[c][0]) - c
        if c < 128 or c == 0x130 or not distance:
            continue
        last = runs[-1] if runs else None
        if last and last[3] == distance and (c - last[1] == last[2] or last[0] == last[1] and c - last[1] <= 2):
            last[1], last[2] = c, c - last[1]
        else:
            runs.append([c, c, 1, distance])
    return runs


def without_accents(stripped):
    """Runs of code points that stripping accents changes into others, what each of them becomes, and those that become
    several: ([first], [index of what it becomes], [code points, or 0x110000 + index of several], [[three of them]])."""
    firsts, starts, results, several = [], [], [], []
    before = None
    for c in CODE_POINTS:
        text = stripped[c]
        if text in ("", chr(c)) or c in HANGUL:
            continue
        if c - 1 != before:
            firsts.append(c)
            starts.append(len(results))
        before = c
        if len(text) == 1:
            results.append(ord(text))
        else:
            results.append(0x110000 + len(several))
            several.append([ord(x) for x in text] + [0] * (3 - len(text)))
    starts.append(len(results))
    for c in HANGUL:
        i = c - HANGUL[0]
        jamo = [0x1100 + i // 588, 0x1161 + i // 28 % 21] + ([0x11A7 + i % 28] if i % 28 else [])
        assert stripped[c] == "".join(map(chr, jamo)), hex(c)
    return firsts, starts, results, several


def classes():
    letters, numbers, spaces, marks = (matching(p) for p in (r"\p{L}", r"\p{N}", r"\s", r"\p{M}"))
    words = word_characters()
    bert_spaces, punctuation = bert_spaces_and_punctuation()
    controls = {c for c, text in each(bert(clean_text=True)).items() if text == ""}
    accents = {c for c, text in each(bert(strip_accents=True)).items() if text == ""}
    # One table serves the library's regular expression engines and BERT only as long as they agree on white space.
    assert stripped_characters() == spaces == bert_spaces
    check_normalizer(spaces)
    version = max((v for v, c in FIRST_LETTERS if c in letters), default="14.0 or older")
    result = bytearray(0x110000)
    of_bits = ((letters, LETTER), (numbers, NUMBER), (spaces, SPACE), (marks, MARK), (words, WORD))
    for members, bit in (*of_bits, (punctuation, PUNCTUATION), (controls, CONTROL), (accents, ACCENT)):
        for c in members:
            result[c] |= bit
    return version, result


def shortest(number):
    return min(str(number), f"0x{number:X}", key=len)


def rows(items):
    """Items, a comma after each, in lines; an item with spaces in it stays in one."""
    text = " ".join(f"{item},".replace(" ", "~") for item in items)
    text = textwrap.fill(text, 120, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
    return text.replace("~", " ")


def table():
    version, of = classes()
    runs = [c for c in range(0x110000) if c == 0 or of[c] != of[c - 1]]
    ascii_rows = rows(of[:128])
    run_rows = rows(f"0x{c << 8 | of[c]:X}" for c in runs)
    stripped = each(bert(strip_accents=True))
    order = orders()
    steps, again = compositions(stripped)
    order_runs = [c for c in range(0x110000) if c == 0 or order[c] != order[c - 1]]
    assert all(of[c] & MARK for c in range(0x110000) if order[c])
    lower = lower_case_runs()
    firsts, starts, results, several = without_accents(stripped)
    return f"""\
/* BEGIN UNICODE {version}: the tables as Hugging Face tokenizers has them, written by tests/make_unicode.py */
/* clang-format off */
static const unsigned char tfm__ascii_classes[128] = {{
{ascii_rows}
}};

/* Every run of code points of one class: (first code point << 8 | class), in order. */
static const uint32_t tfm__unicode_runs[{len(runs)}] = {{
{run_rows}
}};

/* How canonical decomposition sorts marks: runs as above, of 0 for what is no such mark, and 1, 2, ... */
static const uint32_t tfm__order_runs[{len(order_runs)}] = {{
{rows(f"0x{c << 8 | order[c]:X}" for c in order_runs)}
}};
#define TFM__N_ORDERS {max(order)}

/* Lower case beyond ASCII: the first code points of runs; their last one, step, and how much further on the lower case
   is. (And U+0130 becomes an i with a dot, U+0307.) */
static const uint32_t tfm__lower_firsts[{len(lower)}] = {{
{rows(shortest(run[0]) for run in lower)}
}};
static const int32_t tfm__lower_runs[{len(lower)}][3] = {{
{rows("{" + ", ".join(map(shortest, run[1:])) + "}" for run in lower)}
}};

/* What accents are stripped from: the first code points of runs; the place in tfm__unaccented where a run's results
   begin; what each code point becomes, or 0x110000 + its place in tfm__unaccented_several. Hangul is not here. */
static const uint32_t tfm__unaccented_firsts[{len(firsts)}] = {{
{rows(map(shortest, firsts))}
}};
static const uint16_t tfm__unaccented_starts[{len(starts)}] = {{
{rows(starts)}
}};
static const uint32_t tfm__unaccented[{len(results)}] = {{
{rows(map(shortest, results))}
}};
static const uint32_t tfm__unaccented_several[{len(several)}][3] = {{
{rows("{" + ", ".join(map(shortest, item)) + "}" for item in several)}
}};

/* Canonical decomposition, a step at a time, where accents or their like come apart: character, first, second (0: there
   is none). */
static const uint32_t tfm__decompositions[{len(steps)}][3] = {{
{rows("{" + ", ".join(map(shortest, step)) + "}" for step in steps)}
}};

/* The places of those that canonical composition makes, in the order of (first, second). */
static const uint16_t tfm__compositions[{len(again)}] = {{
{rows(again)}
}};
/* clang-format on */
/* END UNICODE */
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", metavar="FILE", help="compare with the tables in FILE")
    arguments = parser.parse_args()
    if not arguments.check:
        sys.stdout.write(table())
        return 0
    with open(arguments.check, encoding="utf-8") as file:
        found = re.search(r"/\* BEGIN UNICODE .*?/\* END UNICODE \*/\n", file.read(), re.S)
    same = found is not None and found.group() == table()
    print(f"{arguments.check}: the Unicode tables are {'as they should be' if same else 'missing or different'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
