#!/bin/sh
# The programs as a user calls them: exit status, what goes to stdout and to stderr, and what is left behind.
# Prints a line for each failed check, and at the end `N passed, N failed`.
model=examples/models/stories.tfm
dir=build/test_programs
passed=0
failed=0
rm -rf "$dir"
mkdir -p "$dir"

check() { # check WHAT CONDITION...
    what=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "$what: not ($*)"
    fi
}

run() { # run COMMAND...: fills $status, $dir/out and $dir/err
    "$@" >"$dir/out" 2>"$dir/err" </dev/null
    status=$?
}

says() {
    grep -q -e "$1" "$dir/err"
}

# An error: that status, a message with those words that begins with the program's name, nothing on stdout.
fails() { # fails STATUS WORDS COMMAND...
    expected=$1
    words=$2
    shift 2
    run "$@"
    check "$*: exit status $status" [ "$status" -eq "$expected" ]
    check "$*: message '$(head -n 1 "$dir/err" | cut -c 1-100)'" says "$words"
    check "$*: who says it" says "^$(basename "$1"): "
    check "$*: stdout" [ ! -s "$dir/out" ]
}

no_output_left() {
    [ ! -e "$dir/x.npy" ] && [ ! -e "$dir/x.npy.part" ] && [ ! -e "$dir/x.tfm" ] && [ ! -e "$dir/x.tfm.part" ]
}

# ---- wrong usage
fails 2 "command is missing" build/tfm
fails 2 "unknown command" build/tfm frobnicate
for command in info quantize dump tokenize perplexity bench; do
    fails 2 "missing" build/tfm $command
    fails 2 "unknown option --frobnicate" build/tfm $command $model --frobnicate
done
fails 2 "one argument too many" build/tfm info $model $model
fails 2 "value is missing" build/tfm dump $model --ids
fails 2 "needs --ids and -o, or --input and -o" build/tfm dump $model
fails 2 "needs --ids and -o, or --input and -o" build/tfm dump $model --input x.npy
fails 2 "expected a number" build/tfm dump $model --ids 1 --threads many -o $dir/x.npy
for threads in 1025 2147483648 4294967297; do
    fails 2 "at most 1024" build/tfm dump $model --ids 1 --threads $threads -o $dir/x.npy
    fails 2 "at most 1024" build/tfm quantize $model $dir/x.tfm --threads $threads
done
fails 2 "expected logits, hidden or pooled" build/tfm dump $model --ids 1 --what everything -o $dir/x.npy
fails 2 "unknown type" build/tfm quantize $model $dir/x.tfm --type f13
fails 2 "unknown option" build/gpt2 --frobnicate
fails 2 "value is missing" build/gpt2 -m
fails 2 "expected a number" build/gpt2 -n many
fails 2 "-p and --prompt-ids" build/gpt2 -p x --prompt-ids 1
fails 2 "threads: expected a number greater than 0, found '0'" build/tfm dump $model --ids 1 --threads 0 -o $dir/x.npy
fails 1 "no pooled output" build/tfm dump $model --ids 1 --what pooled -o $dir/x.npy
fails 1 "no/such" build/tfm bench $model --json $dir/no/such/x.json
fails 2 "expected a number" build/gpt2 --temp -1
fails 2 "top-p: expected a probability" build/gpt2 --top-p 2
fails 2 "min-p: expected a probability" build/gpt2 --temp 1 --min-p 1.5
fails 2 "unknown type" build/gpt2 --type f13
run build/minimal
check "minimal without arguments" [ "$status" -eq 2 ]
for program in build/tfm build/gpt2 build/embed build/fill-mask build/classify; do
    run $program --help
    check "$program --help" [ "$status" -eq 0 ]
    check "$program --help says something" [ -s "$dir/out" ]
done

fails 2 "model is missing" build/chat
fails 2 "unknown option" build/chat $model --frobnicate
fails 2 "one argument too many" build/chat $model $model
fails 2 "value is missing" build/chat $model --system
fails 2 "expected a number" build/chat $model -n many
fails 2 "unknown type" build/chat $model --kv f13
fails 2 "unknown type" build/gpt2 -m $model -p a --kv f13
fails 2 "unknown type" build/tfm perplexity $model README.md --kv f13
run build/chat --help
check "chat --help" [ "$status" -eq 0 ]

# ---- bad files
head -c 100000 $model >"$dir/short.tfm"
head -c 40 $model >"$dir/tiny.tfm"
: >"$dir/empty.tfm"
echo "this is a text" >"$dir/text.tfm"
{
    head -c 3000000 $model
    printf 'XXXXXXXX'
    tail -c +3000009 $model
} >"$dir/damaged.tfm"
{
    head -c 200 $model
    printf 'XXXXXXXX'
    tail -c +209 $model
} >"$dir/header.tfm"
for file in missing short tiny empty text header; do
    for command in "build/tfm info" "build/tfm tokenize" "build/tfm quantize --type f16 $dir/x.tfm" "build/gpt2 -m" \
        "build/tfm dump --ids 1 -o $dir/x.npy"; do
        case $command in
        *quantize*) set -- build/tfm quantize "$dir/$file.tfm" "$dir/x.tfm" ;;
        *) set -- $command "$dir/$file.tfm" ;;
        esac
        fails 1 "$dir/$file.tfm" "$@"
        check "$*: leaves nothing" no_output_left
    done
done
fails 1 "$dir" build/gpt2 -m "$dir"
fails 1 "truncated" build/tfm info "$dir/short.tfm"
fails 1 "not a .tfm file" build/tfm info "$dir/text.tfm"
run build/tfm info $model --verify
check "info --verify" [ "$status" -eq 0 ]
check "info says what is there" grep -q "token_embedding.weight" "$dir/out"
run build/tfm info "$dir/damaged.tfm" --verify
check "info --verify of damaged data: $status" [ "$status" -eq 1 ]
check "info --verify of damaged data names the tensor" says "checksum of tensor"

# ---- bad input
fails 1 "prompt is empty" build/gpt2 -p ""
fails 1 "513 tokens" build/gpt2 --prompt-ids "$(seq -s , 1 513)"
fails 1 "out of range" build/gpt2 --prompt-ids 1,4096
fails 1 "expected numbers" build/gpt2 --prompt-ids 1,x
run build/gpt2 --prompt-ids "$(seq -s , 1 512)" --ids -n 2
check "a full context is an error" [ "$status" -eq 1 ]
check "a full context: message" says "^gpt2: the context is full"
check "a full context: the token that needed no room was printed" [ "$(wc -w <"$dir/out")" -eq 1 ]
for ids in 1,2,4096 -1 99999999999; do
    fails 1 "range\|expected numbers" build/tfm dump $model --ids $ids -o $dir/x.npy
done
fails 1 "expected numbers" build/tfm dump $model --ids "" -o $dir/x.npy
fails 1 "expected numbers" build/tfm dump $model --ids 1,,2 -o $dir/x.npy
fails 1 "decoder-ids is for models with a decoder" build/tfm dump tests/golden/encoder_mlm.tfm --ids "$(seq -s , 1 30)" \
    --decoder-ids 0 --what hidden -o $dir/x.npy
fails 1 "context of 513 tokens" build/tfm dump $model --ids "$(seq -s , 1 513)" -o $dir/x.npy
fails 1 "unknown instruction set" build/tfm dump $model --ids 1 --isa 8086 -o $dir/x.npy
export TFM_ISA=8086
fails 1 "unknown instruction set" build/gpt2
unset TFM_ISA
fails 1 "No such file\|no/such" build/tfm dump $model --ids 1 -o $dir/no/such/x.npy
fails 1 "No such file\|no/such" build/tfm quantize $model $dir/no/such/x.tfm
fails 1 "missing.txt" build/tfm perplexity $model $dir/missing.txt
printf 'a' >"$dir/a.txt"
fails 1 "nothing to score" build/tfm perplexity $model $dir/a.txt
fails 1 "context" build/tfm perplexity $model $dir/a.txt --context 513
fails 1 "decoder" build/tfm perplexity tests/golden/beams_t5.tfm README.md
fails 1 "decoder" build/tfm perplexity tests/golden/encoder_mlm.tfm README.md
cp $model $dir/only.tfm
ln $dir/only.tfm $dir/same.tfm
fails 1 "would be lost" build/tfm dump $dir/only.tfm --ids 1,2 -o $dir/only.tfm
fails 1 "would be lost" build/tfm dump $dir/only.tfm --ids 1,2 -o $dir/same.tfm
fails 1 "would be lost" build/tfm bench $dir/only.tfm --json $dir/./only.tfm
fails 1 "would be lost" build/tfm bench $dir/only.tfm --svg $dir/only.tfm
check "the model is still there" cmp -s $model $dir/only.tfm
build/chat $model -n 3 >"$dir/out" 2>"$dir/err" <&-
check "chat: closed standard input: exit status" [ $? -eq 1 ]
check "chat: closed standard input" says "standard input can't be read"
build/chat $model -n 3 >"$dir/out" 2>"$dir/err" <tests
check "chat: a directory as standard input" says "standard input can't be read"
mkfifo "$dir/pipe"
fails 1 "not a regular file" build/tfm info "$dir/pipe"
check "errors leave nothing behind" no_output_left

# ---- output that can't be written, and output that is no file
if [ -c /dev/full ]; then
    for command in "build/gpt2 -n 3" "build/minimal $model Once" "build/tfm info $model" "build/tfm --help" \
        "build/gpt2 --help" "build/tfm tokenize $model" "build/tfm perplexity $model LICENSE"; do
        echo "some text" | $command >/dev/full 2>"$dir/err"
        check "$command: to a full disk: exit status" [ $? -eq 1 ]
    done
    ln -s /dev/full "$dir/full" # a link: what would replace it does no harm
    fails 1 "No space left" build/tfm dump $model --ids 1,2 -o "$dir/full"
    fails 1 "not a regular file" build/tfm quantize $model "$dir/full"
    check "a device is not replaced" [ -c "$dir/full" ]
    check "a device has no temporary file" [ ! -e "$dir/full.part" ]
fi
echo before >"$dir/file.npy"
ln -s file.npy "$dir/link.npy"
for file in "$dir/link.npy" "$dir/file.npy"; do
    run build/tfm dump $model --ids 1,2 -o "$file"
    check "dump to $file" [ "$(wc -c <"$dir/file.npy")" -eq 32896 ]
done
ln -s file.tfm "$dir/link.tfm"
echo before >"$dir/file.tfm"
run build/tfm quantize $model "$dir/link.tfm"
check "quantize to a link" cmp -s "$dir/file.tfm" $model
check "a link stays what it is" [ -h "$dir/link.npy" -a -h "$dir/link.tfm" ]
rm "$dir/file.tfm"
fails 1 "link.tfm: a link that leads to no file" build/tfm quantize $model "$dir/link.tfm"
check "quantize to a link that leads nowhere: it stays" [ -h "$dir/link.tfm" ]
rm "$dir/link.tfm"
ln -s /dev/stdout "$dir/stdout"
build/tfm dump $model --ids 1,2 -o "$dir/stdout" >"$dir/out"
check "dump to /dev/stdout, a file" cmp -s "$dir/out" "$dir/file.npy"
check "dump to /dev/stdout, a file: the link stays" [ -h "$dir/stdout" ]
check "dump into a pipe" [ "$(build/tfm dump $model --ids 1,2 -o "$dir/stdout" | wc -c)" -eq 32896 ]

# ---- text
text() { # the text that gpt2 writes with these options
    build/gpt2 -p "Once upon a time" -n 40 "$@" 2>/dev/null
}
first=$(text --temp 0)
check "greedy is repeatable" [ "$first" = "$(text --temp 0)" ]
check "greedy, two threads" [ "$first" = "$(text --temp 0 --threads 2)" ]
check "greedy, one thread" [ "$first" = "$(text --temp 0 --threads 1)" ]
# From here no two words are nearly as likely (0.17 between their logits). Plain C rounds in another order, so that here and
# there it quantizes a number to its neighbour, and by then logits differ by 0.03.
clear=$(text -p "One day, a girl" --temp 0)
check "greedy, plain C kernels" [ "$clear" = "$(text -p "One day, a girl" --temp 0 --isa scalar)" ]
check "greedy, TFM_ISA" [ "$clear" = "$(TFM_ISA=scalar text -p "One day, a girl" --temp 0)" ]
check "something was written" [ ${#first} -gt 40 ]
sampled=$(text --temp 0.9 --top-k 40 --top-p 0.95 --min-p 0.01 --repeat-penalty 1.1 --seed 5)
check "same seed, same text" [ "$sampled" = "$(text --temp 0.9 --top-k 40 --top-p 0.95 --min-p 0.01 --repeat-penalty 1.1 \
    --seed 5 --threads 2)" ]
check "another seed, another text" [ "$sampled" != "$(text --temp 0.9 --top-k 40 --top-p 0.95 --min-p 0.01 \
    --repeat-penalty 1.1 --seed 6)" ]
run build/gpt2 -n 7 --ids
check "--ids: as many as -n" [ "$(wc -w <"$dir/out")" -eq 7 ]
check "statistics" says "tokens/s"
ids=$(cat "$dir/out")
check "--ids are the text's" [ "$(echo "$ids" | build/tfm tokenize $model --decode)" = "$(build/gpt2 -n 7 2>/dev/null)" ]
check "a stop string ends the text" [ "$(text --temp 0 --stop "there was")" = ", " ]
run build/minimal $model "Once upon a time"
check "minimal writes" [ -s "$dir/out" ]
check "minimal succeeds" [ "$status" -eq 0 ]
run build/gpt2 -n 600 --ignore-eos --keep 8 --ids
check "--keep goes on past the context" [ "$(wc -w <"$dir/out")" -eq 600 ]

# ---- tokenize
printf 'Hello world\n\n  two  spaces\r\n\303\251t\303\251 \360\237\220\273\n<|endoftext|>\n\377\376 \200\n' >"$dir/lines.txt"
build/tfm tokenize $model <"$dir/lines.txt" >"$dir/ids.txt"
check "a line for each line" [ "$(wc -l <"$dir/ids.txt")" -eq 6 ]
check "an empty line has no ids" [ -z "$(sed -n 2p "$dir/ids.txt")" ]
build/tfm tokenize $model --decode <"$dir/ids.txt" >"$dir/back.txt"
check "there and back again" cmp -s "$dir/lines.txt" "$dir/back.txt"
check "special tokens are text" [ "$(sed -n 5p "$dir/ids.txt" | wc -w)" -gt 1 ]
check "--special: they are not" [ "$(sed -n 5p "$dir/lines.txt" | build/tfm tokenize $model --special)" = 0 ]
build/tfm tokenize $model --whole <"$dir/lines.txt" >"$dir/ids.txt"
check "--whole: one line" [ "$(wc -l <"$dir/ids.txt")" -eq 1 ]
build/tfm tokenize $model --whole --decode <"$dir/ids.txt" >"$dir/back.txt"
check "--whole: there and back again" cmp -s "$dir/lines.txt" "$dir/back.txt"
check "the last line needs no end" [ "$(printf 'a' | build/tfm tokenize $model)" = "$(printf 'a\n' | build/tfm tokenize $model)" ]
check "--plain adds nothing" [ "$(echo x | build/tfm tokenize $model --plain)" = "$(echo x | build/tfm tokenize $model)" ]
echo "1 2 4096" | build/tfm tokenize $model --decode >"$dir/out" 2>"$dir/err"
check "an id that is none: status" [ $? -eq 1 ]
check "an id that is none: message" says "not the id of a token"

# ---- chat
chat() { # chat LINES OPTIONS...: the answers, a line each
    lines=$1
    shift
    printf "$lines" | build/chat $model --system "A tale." -n 12 "$@" >"$dir/chat.out" 2>"$dir/err"
    status=$?
    cat "$dir/chat.out"
}
none() {
    [ ! -e "$dir/a.chat" ] && [ ! -e "$dir/a.chat.part" ]
}
both=$(chat "Hello bear\nWhy is that?\n")
check "chat: a last line without its end" [ "$both" = "$(chat "Hello bear\n\nWhy is that?")" ]
check "chat: no prompt in a pipe" [ "$(chat "/reset\n/quit\nHello\n")" = "" ]
check "chat: two threads, plain C kernels" [ "$both" = "$(chat "Hello bear\nWhy is that?\n" --threads 2)" ]
check "chat: it remembers" [ "$both" != "$(chat "Hello bear\n/reset\nWhy is that?\n")" ]
check "chat: /save and /load go on as if nothing had been" [ "$both" = "$(chat "Hello bear\n/save $dir/a.chat\n")
$(chat "/load $dir/a.chat\nWhy is that?\n")" ]
check "chat: no temporary file stays" [ ! -e "$dir/a.chat.part" ]
chat "Hello bear\nWhy is that?\n/stats\n/history\n" >/dev/null
check "chat: /stats: the beginning was in memory" grep -q "from memory, 1[0-9] new" "$dir/chat.out"
check "chat: /history" grep -q "^user: Why is that?" "$dir/chat.out"
chat "/help\n" --system "" >"$dir/out"
check "chat: /help" grep -q "^/save FILE" "$dir/out"
chat "Hello\n/frobnicate\nHello\n" >/dev/null
check "chat: an unknown command ends a pipe" [ "$status" -eq 1 ]
check "chat: an unknown command: message" says "^chat: unknown command '/frobnicate'"
for file in missing.chat short.tfm text.tfm empty.tfm; do
    chat "/load $dir/$file\n" >"$dir/out"
    check "chat: /load $file: status" [ "$status" -eq 1 ]
    check "chat: /load $file: message" says "^chat: $dir/$file: "
    check "chat: /load $file: stdout" [ ! -s "$dir/out" ]
done
head -c 20000 "$dir/a.chat" >"$dir/b.chat"
chat "/load $dir/b.chat\n" >/dev/null
check "chat: a truncated conversation" says "truncated"
{ head -c 20000 "$dir/a.chat" && printf 'XXXX' && tail -c +20005 "$dir/a.chat"; } >"$dir/b.chat"
chat "/load $dir/b.chat\n" >/dev/null
check "chat: a damaged conversation" says "checksum"
chat "/load $dir/a.chat\n" --kv f32 >/dev/null
check "chat: other keys and values" says "keys and values are bf16, the session's f32"
chat "/load $dir/a.chat\n" --kv int8 >/dev/null
check "chat: other keys and values" says "keys and values are bf16, the session's i8"
chat "/load $dir/a.chat\n" --type f32 --kv f16 >/dev/null
check "chat: weights of another type" says "another model, or with weights of another type"
rm "$dir/a.chat"
chat "Hello\n/save $dir/no/such/a.chat\n" >/dev/null
check "chat: a file that can't be written" says "no/such/a.chat.part"
check "chat: nothing is left" none
(
    ulimit -f 8
    chat "Hello\n/save $dir/full.chat\n" >/dev/null
)
check "chat: /save on a full disk" says "full.chat.part"
check "chat: /save on a full disk leaves nothing" [ ! -e "$dir/full.chat" ] && [ ! -e "$dir/full.chat.part" ]
chat "Hello\n" --context 8 >/dev/null
check "chat: no room for a message" says "^chat: the system prompt and the message take"
chat "Hello\n" --template chatml >/dev/null
check "chat: a template that the model has no tokens for" says "no token '<|im_start|>'"
lines=$(yes 'And then?' | head -n 40 | build/chat $model -n 20 --context 200 2>"$dir/err" | wc -l)
check "chat: a long conversation goes on: $lines lines" [ "$lines" -ge 40 ]
check "chat: without an error" [ ! -s "$dir/err" ]
fails 1 "$dir/short.tfm" build/chat "$dir/short.tfm"

# ---- perplexity, quantize
head -c 3000 README.md >"$dir/text.txt"
run build/tfm perplexity $model "$dir/text.txt" --context 64 --stride 32
check "perplexity's last line" [ "$(tail -n 1 "$dir/out" | cut -d ' ' -f 1)" = perplexity ]
perplexity=$(tail -n 1 "$dir/out")
run build/tfm perplexity $model "$dir/text.txt" --context 64 --stride 32 --threads 1
check "perplexity does not depend on the threads" [ "$(tail -n 1 "$dir/out")" = "$perplexity" ]
run build/tfm quantize $model "$dir/f32.tfm" --type f32
check "quantize succeeds" [ "$status" -eq 0 ]
check "quantize prints the size and the time" says "f32.tfm: [0-9]* tensors, $(wc -c <"$dir/f32.tfm") bytes, .* seconds"
run build/tfm info "$dir/f32.tfm" --verify
check "what it wrote is good" [ "$status" -eq 0 ]
run build/tfm quantize "$dir/f32.tfm" "$dir/usual.tfm"
check "quantize makes int8 unless told otherwise" [ "$(wc -c <"$dir/usual.tfm")" -eq "$(wc -c <$model)" ]
run build/tfm quantize "$dir/f32.tfm" "$dir/f32.tfm" --type f16
check "quantize onto itself" [ "$status" -eq 0 ]
run build/tfm info "$dir/f32.tfm" --verify
check "that is good, too" [ "$status" -eq 0 ]
check "no temporary file stays" [ ! -e "$dir/f32.tfm.part" ]
build/tfm quantize $model "$dir/f16.tfm" --type f16 2>"$dir/err"
check "quantize onto itself writes what it writes elsewhere" [ "$(build/tfm info "$dir/f32.tfm" | tail -n +2)" = \
    "$(build/tfm info "$dir/f16.tfm" | tail -n +2)" ]

# ---- quantize on a full disk, and killed: the output is there as a whole or not at all, what was there stays. A limit on
# the size of files stands in for the disk: 2000 blocks of 512 or 1024 bytes, where the output has 11 MB.
build/tfm quantize $model "$dir/f32.tfm" --type f32 2>"$dir/err"
cp "$dir/f32.tfm" "$dir/before.tfm"
limited() { # limited OUT: ends with quantize's status
    (
        ulimit -f 2000
        exec build/tfm quantize "$dir/f32.tfm" "$1" --type f16
    ) >"$dir/out" 2>"$dir/err"
}
for out in "$dir/x.tfm" "$dir/f32.tfm"; do
    limited "$out"
    check "quantize to $out on a full disk: status" [ $? -eq 1 ]
    check "quantize to $out on a full disk: message" says "^tfm: $out.part: can't be written: "
    check "quantize to $out on a full disk: leaves nothing" no_output_left
    check "quantize to $out on a full disk: nothing there, either" [ ! -e "$out.part" ]
    check "quantize to $out on a full disk: the input" cmp -s "$dir/f32.tfm" "$dir/before.tfm"
    rm -f "$out.part"
done
killed=0
for round in 1 2 3 4; do
    for out in "$dir/x.tfm" "$dir/f32.tfm"; do
        rm -f "$out.part" "$dir/x.tfm"
        {
            build/tfm quantize "$dir/f32.tfm" "$out" --type int8 --threads 1 2>"$dir/err" &
            pid=$!
            while [ ! -s "$out.part" ] && kill -0 $pid; do :; done # something is written
            kill -9 $pid
            wait $pid
        } 2>"$dir/shell"
        status=$?
        if [ $status -gt 128 ] && [ -s "$out.part" ]; then
            killed=$((killed + 1))
            check "quantize to $out, killed: no output" [ ! -e "$dir/x.tfm" ]
            check "quantize to $out, killed: the input" cmp -s "$dir/f32.tfm" "$dir/before.tfm"
        else # it was faster
            check "quantize to $out, finished: status $status" [ $status -eq 0 ]
            run build/tfm info "$out" --verify
            check "quantize to $out, finished: what it wrote is good" [ "$status" -eq 0 ]
            cp "$dir/before.tfm" "$dir/f32.tfm"
        fi
    done
done
check "quantize was killed in the middle $killed times of 8" [ $killed -gt 0 ]
: >"$dir/f32.tfm.part" # what was left is no obstacle
run build/tfm quantize "$dir/f32.tfm" "$dir/f32.tfm"
check "quantize after a killed one" [ "$status" -eq 0 ]
run build/tfm info "$dir/f32.tfm" --verify
check "quantize after a killed one: what it wrote is good" [ "$status" -eq 0 ]
check "quantize after a killed one: no temporary file stays" [ ! -e "$dir/f32.tfm.part" ]
rm -f "$dir/before.tfm" "$dir/x.tfm" "$dir/x.tfm.part"

# ---- dump of vectors: tests/test_vectors.c compares the results with PyTorch's
vectors=tests/golden/vectors_Transformer
x="$dir/in.npy"
build/tfm dump tests/golden/encoder_sentence.tfm --ids 1,2,3,4 --what hidden -o "$x"
build/tfm dump tests/golden/encoder_sentence.tfm --ids 5,6,7 --what hidden -o "$dir/y.npy"
decode() { # decode OUT OPTIONS...
    out=$1
    shift
    run build/tfm dump ${vectors}Decoder.tfm --input "$x" --decoder-input "$dir/y.npy" -o "$out" "$@"
}
decode "$dir/all.npy"
check "dump of vectors: exit status" [ "$status" -eq 0 ]
check "dump of vectors: [3, 33]" [ "$(wc -c <"$dir/all.npy")" -eq $((128 + 3 * 33 * 4)) ]
decode "$dir/one.npy" --mask 1,1,1,1 --threads 1 --what hidden
check "dump of vectors: a mask that hides nothing, one thread" cmp -s "$dir/one.npy" "$dir/all.npy"
decode "$dir/one.npy" --mask 1,0,1,1
check "dump of vectors: another mask" [ "$(cksum <"$dir/one.npy")" != "$(cksum <"$dir/all.npy")" ]
vectors_fail() { # vectors_fail STATUS WORDS MODEL OPTIONS...
    expected=$1
    words=$2
    shift 2
    fails "$expected" "$words" build/tfm dump "$@" -o "$dir/x.npy"
}
vectors_fail 2 "takes the place of --ids" ${vectors}Encoder.tfm --input "$x" --ids 1
vectors_fail 2 "decoder-input is for --input" ${vectors}.tfm --ids 1 --decoder-input "$x"
vectors_fail 2 "expected hidden" ${vectors}Encoder.tfm --input "$x" --what pooled
vectors_fail 1 "no token embeddings: it takes vectors, --input" ${vectors}.tfm --ids 1
vectors_fail 1 "this one takes --ids" $model --input "$x"
vectors_fail 1 "for models with a decoder" ${vectors}Encoder.tfm --input "$x" --decoder-input "$x"
vectors_fail 1 "a decoder takes --input, which it attends to, and --decoder-input" ${vectors}Decoder.tfm --input "$x"
vectors_fail 1 "in.npy: the vectors' length is not the model's d_model" ${vectors}.tfm --input "$x"
vectors_fail 1 "mask has 2 numbers, and --input 4" ${vectors}Decoder.tfm --input "$x" --decoder-input "$x" --mask 1,1
vectors_fail 1 "no token is left" ${vectors}Decoder.tfm --input "$x" --decoder-input "$x" --mask 0,0,0,0
bad="$dir/bad.npy"
bad_npy() { # bad_npy WORDS: that is said of $bad
    vectors_fail 1 "^tfm: $bad: $1" ${vectors}Decoder.tfm --input "$x" --decoder-input "$bad"
}
rm -f "$bad"
bad_npy "No such file"
: >"$bad"
bad_npy "not a .npy file"
cp README.md "$bad"
bad_npy "not a .npy file"
build/tfm dump tests/golden/encoder_sentence.tfm --ids 1,2 --what pooled -o "$bad"
bad_npy "expected two dimensions"
for change in "'<f4'/'<f8' expected.numbers.of.type.float32" "False/True. expected.the.rows" "(4,/(0, expected.two.dimensions" \
    "(4,/(x, expected.two.dimensions" "33)/32) the.vectors'.length" "(4,/(9, the.size.of.the.file" \
    "33)/99999999999999999999) the.vectors'.length"; do
    LC_ALL=C sed "s/${change% *}/" "$x" >"$bad"
    bad_npy "${change#* }"
done
head -c 100 "$x" >"$bad"
bad_npy "the file is truncated"
head -c 600 "$x" >"$bad"
bad_npy "the size of the file does not fit its shape"
{ cat "$x" && printf abcd; } >"$bad"
bad_npy "the size of the file does not fit its shape"
check "dump of vectors: errors leave nothing behind" no_output_left

# ---- bench: the lengths of a range, and their padding. What is measured is only looked at for being there.
for range in 8-4 0-5 4- -4 4--5 4-5-6 4-x 4-99999999999999999999 99999999999999999999-4 0 "" many; do
    fails 2 "^tfm: --prompt: expected a number greater than 0, or a range as 4-128, found $range" \
        build/tfm bench $model --batch 5 --prompt "$range" --json "$dir/bench.json"
done
fails 1 "takes vectors: bench has no job for it" build/tfm bench ${vectors}Encoder.tfm --type int8
fails 2 "a range of lengths is for a --batch of at least 2, found 4-8" build/tfm bench $model --prompt 4-8
run build/tfm bench tests/golden/encoder_mlm.tfm --type int8 --batch 4 --prompt 5-99 --gen 9 --json "$dir/bench.json"
check "bench of a range" [ "$status" -eq 0 ]
cat "$dir/pipe" >"$dir/piped.json" &
build/tfm bench tests/golden/encoder_mlm.tfm --type int8 --prompt 5 --json "$dir/pipe" >"$dir/out.pipe" 2>&1 || kill $!
wait
check "bench: JSON into a pipe" grep -q tokens "$dir/piped.json"
check "bench of a range: cut to the model's positions" says "^tfm: --prompt: reduced to 40, for the model's context"
check "bench of a range: what is padded" grep -q "tokens: 89 of 160\.$" "$dir/out" # 5, 16, 28, 40
check "bench of a range: seconds, padded seconds and gain in the table" \
    grep -q "^int8  encode .* [-0-9.e]* *[-0-9.e]* *[0-9.]* x$" "$dir/out"
check "bench of a range: tokens and padding in JSON" [ "$(sed 's/[^a-z0-9_.:,-]//g' "$dir/bench.json" | awk -F '[:,]' '/tokens/ {
    for (i = 1; i < NF; i += 2) value[$i] = $(i + 1)
    off = value["padding_gain"] * value["seconds"] / value["padded_seconds"] - 1
    rate = value["tokens_per_s"] * value["seconds"] / value["tokens"] - 1
    print value["tokens"], value["batch"], (off < 1e-4 && off > -1e-4 && rate < 1e-4 && rate > -1e-4) }')" = "89 4 1" ]

# ---- translate
t5=tests/golden/beams_t5.tfm
translate() { # what it writes for those lines
    printf '%s' "$lines" | build/translate $t5 -n 20 "$@" 2>"$dir/err"
}
lines='in the
abc de

a b c d e, f
d
'
answers=$(translate; echo end)
check "translate: a line for each line" [ "$(echo "$answers" | wc -l)" -eq 6 ]
check "translate: an empty line for an empty line" [ -z "$(echo "$answers" | sed -n 3p)" ]
check "translate: something was written" [ ${#answers} -gt 20 ]
check "translate: nothing on stderr" [ ! -s "$dir/err" ]
check "translate: answers begin without a space" [ -z "$(echo "$answers" | grep '^ ')" ]
ids=$(translate --ids)
check "translate: the text is the ids'" [ "$(echo "$ids" | build/tfm tokenize $t5 --decode; echo end)" = "$answers" ]
check "translate: two threads" [ "$ids" = "$(translate --ids --threads 2)" ]
check "translate: plain C kernels" [ "$ids" = "$(translate --ids --isa scalar)" ]
beams=$(translate --ids --beams 4)
check "translate: beams find something else" [ "$ids" != "$beams" ]
check "translate: beams, one thread" [ "$beams" = "$(translate --ids --beams 4 --threads 1)" ]
all=$beams
check "translate: a line alone gives the same" [ "$(echo "$all" | sed -n 2p)" = \
    "$(echo 'abc de' | build/translate $t5 -n 20 --ids --beams 4)" ]
check "translate: the length penalty counts" [ "$(translate --ids --beams 4 --length-penalty -5 | wc -w)" -le \
    "$(translate --ids --beams 4 --length-penalty 5 | wc -w)" ]
check "translate: no input, no output" [ -z "$(build/translate $t5 </dev/null)" ]
{
    echo a
    seq -s ' a ' 1 600
    echo b
} | build/translate $t5 -n 5 --ids >"$dir/out" 2>"$dir/err"
check "translate: a line that is longer than the texts in training" [ $? -eq 0 ]
check "translate: is answered as it is alone, and those around it are" [ "$(cat "$dir/out")" = \
    "$(for line in a "$(seq -s ' a ' 1 600)" b; do echo "$line" | build/translate $t5 -n 5 --ids; done)" ]
fails 2 "model is missing" build/translate
fails 2 "unknown option" build/translate $t5 --frobnicate
fails 2 "value is missing" build/translate $t5 -n
fails 2 "expected a number" build/translate $t5 --beams 0
fails 2 "one argument too many" build/translate $t5 $t5
fails 1 "no encoder-decoder" build/translate $model
fails 1 "missing.tfm" build/translate $dir/missing.tfm
fails 1 "unknown instruction set" build/translate $t5 --isa 8086
run build/translate --help
check "translate --help" [ "$status" -eq 0 ]

# ---- encoders: what the programs print beside what transformers gives (encoder_programs.txt is make_golden.py's)
golden=tests/golden/encoder

expected() { # expected NAME: the lines of that name, without it
    sed -n "s/^$1 //p" ${golden}_programs.txt
}

# The same words, and numbers that differ by less than 1e-4, as many as there are.
same_numbers() { # same_numbers FILE FILE
    awk '
        function is_number(text) { return text ~ /^-?[0-9.]+(e-?[0-9]+)?$/ }
        function differ(a, b) {
            if (!is_number(a) || !is_number(b))
                return a != b
            return a - b > 1e-4 || b - a > 1e-4
        }
        NR == FNR { line[NR] = $0; n++; next }
        {
            m++
            if (split(line[FNR], word) != NF)
                wrong++
            for (i = 1; i <= NF; i++)
                wrong += differ(word[i], $i)
        }
        END { exit wrong > 0 || n != m || !n }' "$1" "$2"
}

cat >"$dir/lines.txt" <<'END'
The cat sleeps.
a big red house under the tree, a big red house under the tree, a big red house

She runs over the river
END
expected embed >"$dir/expected.txt"
build/embed ${golden}_sentence.tfm <"$dir/lines.txt" >"$dir/vectors.txt"
check "embed: transformers' vectors" same_numbers "$dir/vectors.txt" "$dir/expected.txt"
check "embed: a line for each, 33 numbers" [ "$(awk '{ print NF }' "$dir/vectors.txt" | tr '\n' ' ')" = "33 33 33 33 " ]
sed -n 4p "$dir/lines.txt" | build/embed ${golden}_sentence.tfm --threads 1 >"$dir/out"
check "embed: a line alone has the same numbers" [ "$(cat "$dir/out")" = "$(sed -n 4p "$dir/vectors.txt")" ]
seq 150 | build/embed ${golden}_sentence.tfm >"$dir/many.txt"
check "embed: more than a batch" [ "$(wc -l <"$dir/many.txt")" -eq 150 ]
check "embed: the last of them is what it is alone" \
    [ "$(echo 150 | build/embed ${golden}_sentence.tfm)" = "$(tail -n 1 "$dir/many.txt")" ]
build/embed ${golden}_sentence.tfm --isa scalar --pool mean --normalize <"$dir/lines.txt" >"$dir/out"
check "embed: --pool and --normalize" same_numbers "$dir/out" "$dir/expected.txt"
build/embed ${golden}_sentence.tfm --pool mean <"$dir/lines.txt" >"$dir/out"
check "embed: --pool alone does not normalize" [ "$(cut -c 1-60 "$dir/out")" != "$(cut -c 1-60 "$dir/vectors.txt")" ]
build/embed ${golden}_sentence.tfm --pool max <"$dir/lines.txt" >"$dir/out2"
check "embed: --pool max is something else" [ "$(cat "$dir/out2")" != "$(cat "$dir/out")" ]
build/embed ${golden}_sentence.tfm --similarity "The cat sleeps." <"$dir/lines.txt" >"$dir/out"
expected similar >"$dir/expected.txt"
check "embed --similarity: the order and cosines of transformers" same_numbers "$dir/out" "$dir/expected.txt"
printf 'one\r\ntwo' | build/embed ${golden}_sentence.tfm >"$dir/out"
check "embed: CR LF, and a last line without an end" [ "$(cat "$dir/out")" = "$(printf 'one\ntwo\n' | build/embed ${golden}_sentence.tfm)" ]
run build/embed ${golden}_sentence.tfm
check "embed: no lines, no vectors" [ "$status" -eq 0 ] && check "embed: no lines: stdout" [ ! -s "$dir/out" ]
many=$(printf 'word %.0s' $(seq 60))
printf 'short\n%s\n' "$many" | build/embed ${golden}_mlm.tfm >"$dir/out" 2>"$dir/err"
check "embed: too long a line: status" [ $? -eq 1 ]
check "embed: too long a line: message" says "^embed: line 2: the text has .* tokens, and the model takes 40 at most"
check "embed: too long a line: stdout" [ ! -s "$dir/out" ]
printf '%s\n' "$many" | build/embed ${golden}_sentence.tfm >"$dir/out"
check "embed: a model that says where to cut" [ "$(wc -w <"$dir/out")" -eq 33 ]

build/fill-mask ${golden}_mlm.tfm "The capital of [MASK] is Paris." --top 3 >"$dir/out"
head -n 3 "$dir/out" | cut -f 2- >"$dir/found.txt"
expected fill-mask >"$dir/expected.txt"
check "fill-mask: transformers' tokens and probabilities" same_numbers "$dir/found.txt" "$dir/expected.txt"
check "fill-mask: the text" [ "$(sed -n 4p "$dir/out")" = "The capital of $(sed -n '1s/.* //p' "$dir/expected.txt") is Paris." ]
run build/fill-mask ${golden}_mlm.tfm "[MASK][MASK], [MASK]"
check "fill-mask: five for each, and the text" [ "$(cut -f 1 "$dir/out" | tr -d '\n' | cut -c 1-15)" = 111112222233333 ]
check "fill-mask: no mask is left" [ "$(tail -n 1 "$dir/out" | grep -c MASK)" -eq 0 ]

build/classify ${golden}_sequence.tfm "The cat sleeps." --top 3 | tr '\t' '\n' | sed 's/\(.*\) \(.*\)/\2 \1/' >"$dir/out"
expected classify-one >"$dir/expected.txt"
check "classify: transformers' labels" same_numbers "$dir/out" "$dir/expected.txt"
build/classify ${golden}_sequence.tfm "the film was good" "they love it!" --top 3 | tr '\t' '\n' |
    sed 's/\(.*\) \(.*\)/\2 \1/' >"$dir/out"
expected classify-pair >"$dir/expected.txt"
check "classify: a pair" same_numbers "$dir/out" "$dir/expected.txt"
printf 'The cat sleeps.\nthe film was good\tthey love it!\n' | build/classify ${golden}_sequence.tfm >"$dir/out"
check "classify: lines, the likeliest of each" \
    [ "$(cat "$dir/out")" = "$(build/classify ${golden}_sequence.tfm "The cat sleeps.";
        build/classify ${golden}_sequence.tfm "the film was good" "they love it!")" ]
seq 150 | sed 's/5/the cat\tsleeps/' >"$dir/many.txt"
build/classify ${golden}_sequence.tfm --top 3 <"$dir/many.txt" >"$dir/out"
check "classify: more than a batch" [ "$(wc -l <"$dir/out")" -eq 150 ]
while IFS= read -r line; do
    printf '%s\n' "$line" | build/classify ${golden}_sequence.tfm --top 3 --threads 1
done <"$dir/many.txt" >"$dir/out2"
check "classify: all are what they are alone" cmp -s "$dir/out" "$dir/out2"
build/classify ${golden}_token.tfm "She runs over the river" | sed 's/\(.*\)\t\(.*\) \(.*\)/\3 \2 \1/' >"$dir/out"
expected tokens >"$dir/expected.txt"
check "classify: tokens" same_numbers "$dir/out" "$dir/expected.txt"
printf 'a cat\n\na dog\n' | build/classify ${golden}_token.tfm >"$dir/out"
check "classify: tokens of lines" [ "$(cut -f 1 "$dir/out" | tr '\n' ' ')" = "a cat   a dog " ]

# lines: each has its answer, whatever is in it; how they end makes no difference
printf 'a cat\n\n \nnot \377\200 UTF-8\n\357\273\277BOM\nthe dog\n' >"$dir/lf.txt"
sed "s/\$/$(printf '\r')/" "$dir/lf.txt" >"$dir/crlf.txt"
printf '%s' "$(cat "$dir/lf.txt")" >"$dir/end.txt"
seq 300 >"$dir/many.txt"
for program in "build/embed ${golden}_sentence.tfm" "build/classify ${golden}_sequence.tfm" \
    "build/embed ${golden}_sentence.tfm --similarity cat"; do
    $program <"$dir/lf.txt" >"$dir/out" 2>"$dir/err"
    check "$program: a line for each line" [ "$(wc -l <"$dir/out")" -eq 6 -a ! -s "$dir/err" ]
    $program <"$dir/end.txt" >"$dir/out2"
    check "$program: a last line without an end" cmp -s "$dir/out" "$dir/out2"
    $program <"$dir/crlf.txt" >"$dir/out2"
    check "$program: CR LF" cmp -s "$dir/out" "$dir/out2"
    check "$program: no lines" [ "$($program </dev/null | wc -c)" -eq 0 ]
    check "$program: one empty line" [ "$(echo | $program | wc -l)" -eq 1 ]
    $program <"$dir/many.txt" >"$dir/out" 2>"$dir/err"
    check "$program: no progress into a file" [ ! -s "$dir/err" ]
    if script -qec true /dev/null </dev/null >"$dir/terminal" 2>&1; then # util-linux's: a terminal for what it runs
        script -qec "$program <$dir/many.txt >$dir/out2" /dev/null </dev/null >"$dir/terminal"
        check "$program: progress on a terminal" grep -q "300 .*lines" "$dir/terminal"
        check "$program: with the same results" cmp -s "$dir/out" "$dir/out2"
        script -qec "$program <$dir/many.txt" /dev/null </dev/null | tr -d '\r' >"$dir/terminal"
        check "$program: the results on a terminal" [ "$(grep -c -v "of 300 lines$" "$dir/terminal")" -eq 300 ]
    fi
done

run build/block
check "block" [ "$status" -eq 0 ]
check "block prints all numbers" [ "$(wc -l <"$dir/out")" -eq 33 ]

fails 2 "MODEL is missing" build/embed
fails 2 "MODEL is missing" build/classify
fails 2 "an argument is missing" build/fill-mask
fails 2 "an argument is missing" build/fill-mask ${golden}_mlm.tfm
for program in build/embed build/fill-mask build/classify; do
    fails 2 "unknown option --frobnicate" $program ${golden}_mlm.tfm --frobnicate
    fails 2 "value is missing after --threads" $program ${golden}_mlm.tfm --threads
    fails 2 "expected a number" $program ${golden}_mlm.tfm --threads 0
    text=x
    [ $program = build/embed ] && text=
    fails 1 "unknown instruction set" $program ${golden}_mlm.tfm $text --isa 8086
    for file in missing short empty text header; do
        fails 1 "$dir/$file.tfm" $program "$dir/$file.tfm" $text
    done
done
fails 2 "one argument too many" build/embed ${golden}_mlm.tfm x
fails 2 "expected mean, cls or max" build/embed ${golden}_mlm.tfm --pool everything
fails 2 "top: expected a number from 1 to" build/fill-mask ${golden}_mlm.tfm x --top none
fails 2 "one argument too many" build/fill-mask ${golden}_mlm.tfm a b
fails 2 "one argument too many" build/classify ${golden}_sequence.tfm a b c
fails 1 "no encoder" build/embed $model
fails 1 "no masked-LM head" build/fill-mask $model "a [MASK]"
fails 1 "no masked-LM head" build/fill-mask ${golden}_sentence.tfm "a [MASK]"
fails 1 "there is no \[MASK\] in the text" build/fill-mask ${golden}_mlm.tfm "a text"
fails 1 "no classifier" build/classify ${golden}_mlm.tfm "a text"
fails 1 "takes 40 at most" build/classify ${golden}_sequence.tfm "$many"
fails 1 "can have 1 to 40\|takes 40 at most" build/fill-mask ${golden}_mlm.tfm "$many [MASK]"
printf 'a\n%s\n' "$many" | build/classify ${golden}_sequence.tfm >"$dir/out" 2>"$dir/err"
check "classify: the line that is too long" says "^classify: line 2: the text has"

rm -rf "$dir"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
