#!/bin/sh
# run.sh SECONDS: fuzzes models and each kind of tokenizer for so long each, two at a time, from small seeds. What crashes,
# leaks, takes more than 10 s or more than 1 GB stays in build/fuzz. Needs clang with libFuzzer.
seconds=${1:-60}
dir=build/fuzz
status=0
mkdir -p $dir
clang -std=c99 -O1 -g -DTFM_NO_SIMD -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined tests/fuzz/fuzz.c \
    -o $dir/fuzz -lm && python3 tests/fuzz/seeds.py $dir/seeds || exit 1

fuzz() { # fuzz KIND
    mkdir -p "$dir/$1"
    $dir/fuzz -dict=tests/fuzz/words.dict -max_len=65536 -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=512 \
        -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="$dir/$1-" "$dir/$1" "$dir/seeds/$1" \
        >"$dir/$1.log" 2>&1 && return
    echo "fuzzing $1:"
    grep -A 25 "ERROR\|SUMMARY\|runtime error" "$dir/$1.log"
    return 1
}

for kinds in "model byte_bpe" "wordpiece unigram" spm_bpe; do
    set -- $kinds
    fuzz "$1" &
    [ -z "${2:-}" ] || fuzz "$2" || status=1
    wait $! || status=1
done
echo "$(cat $dir/*.log | grep number_of_executed_units | awk '{n += $2} END {print n + 0}') inputs, status $status"
exit $status
