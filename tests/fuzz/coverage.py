#!/usr/bin/env python3
"""What a run of the fuzzers reached: coverage.py DIRECTORY PROGRAM. PROGRAM, built by clang with -fcoverage-mapping, reads
every input that a job has kept in DIRECTORY. For each job: executions, what it found, and the lines of tfm.h that are
reached of those of its floor, the sections that the job is about. Needs llvm-profdata and llvm-cov."""
import glob
import os
import re
import shutil
import subprocess
import sys

TFM_H = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tfm.h")
TOKENIZER = "f: (A hash table|A tokenizer's tables|Checking them|Encoding: |The kinds of|Added tokens)"
FLOORS = {  # sections, as their banners name them
    "model": "e: (sorted|parsing|matrices|byte order|folding|writing)|g: the (description|weights)|g: loading",
    "byte_bpe": TOKENIZER + "|f: Byte-level BPE|f: Unicode's composed",
    "wordpiece": TOKENIZER + "|f: WordPiece",
    "unigram": TOKENIZER + "|f: SentencePiece",
    "spm_bpe": TOKENIZER + "|f: SentencePiece: (its|normalizing|encoding|decoding)|f: Byte-level BPE: merging",
    "chat": "h: chat",
    "generate": "h: (sequences|random|sampling|text that|generation|several|beam)",
}
FLOORS.update({"afl-files": "[efg]: ", "afl-chat": FLOORS["chat"], "afl-generate": FLOORS["generate"]})


def sections():
    """[(first line, "floor: name")] of tfm.h."""
    found, floor = [], ""
    with open(TFM_H, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            banner = re.match(r" \* ([a-h])\. [A-Z]", line)
            part = re.match(r"/\* ---- (.*)", line)
            if banner or part:
                floor = banner.group(1) if banner else floor
                found.append((number, "%s: %s" % (floor, part.group(1) if part else "")))
    return found


def lines_of(program, job, directory):
    """{line of tfm.h: how often it ran}"""
    kind = job.replace("afl-", "")
    inputs = [os.path.join(directory, job, "default", "queue")] if kind != job else [os.path.join(directory, job)]
    profile = os.path.join(directory, job + ".profile")
    environment = dict(os.environ, TFM_FUZZ=kind, LLVM_PROFILE_FILE=profile + ".raw")
    subprocess.run([program, "-runs=0", *inputs, os.path.join(directory, "seeds", kind)], env=environment, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(["llvm-profdata", "merge", "-sparse", profile + ".raw", "-o", profile], check=True)
    text = subprocess.run(["llvm-cov", "export", "-format=lcov", program, "-instr-profile=" + profile], check=True,
                          stdout=subprocess.PIPE, universal_newlines=True).stdout
    counts, inside = {}, False
    for line in text.splitlines():
        if line.startswith("SF:"):
            inside = line.endswith("tfm.h")
        elif inside and line.startswith("DA:"):
            number, count = map(int, line[3:].split(",")[:2])
            counts[number] = max(counts.get(number, 0), count)
    return counts


def within(counts, floor):
    """How many lines of the floor there are, and how many of them ran."""
    starts = sections() + [(1 << 30, "")]
    spans = [(start, starts[i + 1][0]) for i, (start, name) in enumerate(starts[:-1]) if re.match(floor, name)]
    lines = [number for number in counts if any(start <= number < end for start, end in spans)]
    return sum(counts[number] > 0 for number in lines), len(lines)


def executions(directory, job):
    with open(os.path.join(directory, job + ".log"), errors="replace") as file:
        return sum(map(int, re.findall(r"number_of_executed_units: +(\d+)", file.read())))


def findings(directory, job):
    """Inputs of this run that crashed, leaked, hung or took too much memory."""
    since = os.path.getmtime(os.path.join(directory, "started"))
    found = [path for kind in ("crash", "leak", "oom", "timeout") for path in
             glob.glob(os.path.join(glob.escape(directory), "%s-%s-*" % (job, kind)))]
    found += glob.glob(os.path.join(glob.escape(directory), job, "default", "[ch]*s", "id*"))  # crashes, hangs
    return sum(os.path.getmtime(path) >= since for path in found)


def main():
    directory, program = sys.argv[1:]
    print("%-14s %10s %8s   %s" % ("job", "executions", "findings", "lines of its floor of tfm.h"))
    for log in sorted(glob.glob(os.path.join(glob.escape(directory), "*.log"))):
        job = os.path.basename(log)[:-4]
        reached = "-"
        if job in FLOORS and shutil.which("llvm-cov") and shutil.which("llvm-profdata"):
            counts = lines_of(program, job, directory)
            some, all_lines = within(counts, FLOORS[job])
            reached = "%d of %d, %.1f %%; of all: %d" % (some, all_lines, 100 * some / max(all_lines, 1),
                                                         sum(count > 0 for count in counts.values()))
        print("%-14s %10d %8d   %s" % (job, executions(directory, job), findings(directory, job), reached))


if __name__ == "__main__":
    main()
