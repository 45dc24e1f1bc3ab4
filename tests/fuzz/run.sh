#!/bin/sh
# run.sh SECONDS: each job for so long, two at a time. libFuzzer: models, each kind of tokenizer, saved conversations,
# generation; AFL++, if it is there: files of all kinds, conversations, generation; and tools/convert.py. They begin with
# the inputs of tests/fuzz/corpus and of seeds.py. What crashes, leaks, takes more than 10 s or more than 1 GB stays in
# build/fuzz. At the end a table, with the coverage if llvm-cov is there. Needs clang with libFuzzer.
seconds=${1:-60}
dir=build/fuzz
status=0
mkdir -p $dir
flags="-std=c99 -O1 -g -DTFM_NO_SIMD"
export TFM_FUZZ_MODELS=$dir/seeds/models
build_afl() { # and, as a library, what adds checksums to the inputs that AFL++ makes
    afl-clang-fast $flags -fsanitize=address tests/fuzz/fuzz.c /usr/lib/afl/libAFLDriver.a -o $dir/fuzz-afl -lm &&
        clang $flags -DFUZZ_AFL_MUTATOR -shared -fPIC tests/fuzz/fuzz.c -o $dir/mutator.so -lm
}

rm -rf $dir/*.log $dir/seeds
touch $dir/started
jobs="model byte_bpe wordpiece unigram spm_bpe chat generate convert"
if command -v afl-fuzz >/dev/null; then
    jobs="$jobs afl-files afl-chat afl-generate"
else
    build_afl() { echo "AFL++ is not here: without it"; }
fi
build_afl >$dir/afl-build.txt 2>&1 &
afl_build=$!
clang $flags -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined tests/fuzz/fuzz.c -o $dir/fuzz -lm &&
    python3 tests/fuzz/seeds.py $dir/seeds &&
    TFM_FUZZ=chat TFM_FUZZ_SEED=$dir/seeds/chat/said $dir/fuzz -runs=0 >/dev/null 2>&1 || exit 1
for kind in model byte_bpe wordpiece unigram spm_bpe chat generate; do
    cp tests/fuzz/corpus/$kind/* $dir/seeds/$kind/
done
clang $flags -fsanitize=fuzzer -fprofile-instr-generate -fcoverage-mapping tests/fuzz/fuzz.c -o $dir/fuzz-coverage -lm || exit 1
wait $afl_build || {
    cat $dir/afl-build.txt
    exit 1
}
mkdir -p $dir/seeds/files
for kind in model byte_bpe wordpiece unigram spm_bpe; do
    for seed in $dir/seeds/$kind/*; do
        cp "$seed" "$dir/seeds/files/$kind-${seed##*/}"
    done
done

fuzz() { # fuzz KIND
    mkdir -p "$dir/$1"
    TFM_FUZZ=$1 $dir/fuzz -dict=tests/fuzz/words.dict -max_len=65536 -timeout=10 -rss_limit_mb=1024 \
        -malloc_limit_mb=512 -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="$dir/$1-" "$dir/$1" \
        "$dir/seeds/$1" >"$dir/$1.log" 2>&1 && return
    echo "fuzzing $1:"
    grep -A 25 "ERROR\|SUMMARY\|runtime error" "$dir/$1.log"
    return 1
}

afl() { # afl KIND
    rm -rf "$dir/afl-$1"
    TFM_FUZZ=$1 AFL_CUSTOM_MUTATOR_LIBRARY=$dir/mutator.so AFL_NO_UI=1 AFL_NO_AFFINITY=1 AFL_SKIP_CPUFREQ=1 \
        AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES=1 timeout -k 5 $((seconds + 60)) afl-fuzz -V "$seconds" -m none -t 10000 \
        -x tests/fuzz/words.dict -i "$dir/seeds/$1" -o "$dir/afl-$1" $dir/fuzz-afl >"$dir/afl-$1.log" 2>&1
    awk '$1 == "execs_done" {print "stat::number_of_executed_units:", $3}' "$dir/afl-$1/default/fuzzer_stats" \
        >>"$dir/afl-$1.log" || {
        tail -20 "$dir/afl-$1.log"
        return 1
    }
    found=$(find "$dir/afl-$1/default/crashes" "$dir/afl-$1/default/hangs" -name 'id*' 2>/dev/null)
    [ -z "$found" ] && return
    echo "AFL++ with $1:" "$found"
    return 1
}

job() { # job NAME
    case $1 in
    convert)
        python3 tests/fuzz/fuzz_convert.py "$seconds" $dir/convert >"$dir/convert.log" 2>&1 && return
        tail -40 "$dir/convert.log"
        return 1
        ;;
    afl-*) afl "${1#afl-}" ;;
    *) fuzz "$1" ;;
    esac
}

set -- $jobs
while [ $# -gt 0 ]; do
    job "$1" &
    shift
    if [ $# -gt 0 ]; then
        job "$1" || status=1
        shift
    fi
    wait $! || status=1
done
python3 tests/fuzz/coverage.py $dir $dir/fuzz-coverage || status=1
echo "$(cat $dir/*.log | awk '/number_of_executed_units/ {n += $2} END {print n + 0}') inputs, status $status"
exit $status
