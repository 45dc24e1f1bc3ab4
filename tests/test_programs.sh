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
for command in info quantize dump tokenize perplexity; do
    fails 2 "missing" build/tfm $command
    fails 2 "unknown option --frobnicate" build/tfm $command $model --frobnicate
done
fails 2 "one argument too many" build/tfm info $model $model
fails 2 "value is missing" build/tfm dump $model --ids
fails 2 "needs --ids and -o" build/tfm dump $model
fails 2 "expected a number" build/tfm dump $model --ids 1 --threads many -o $dir/x.npy
fails 2 "expected logits, hidden or pooled" build/tfm dump $model --ids 1 --what everything -o $dir/x.npy
fails 2 "unknown type" build/tfm quantize $model $dir/x.tfm --type f13
fails 2 "unknown option" build/gpt2 --frobnicate
fails 2 "value is missing" build/gpt2 -m
fails 2 "expected a number" build/gpt2 -n many
fails 2 "expected a number" build/gpt2 --temp -1
fails 2 "unknown type" build/gpt2 --type f13
run build/minimal
check "minimal without arguments" [ "$status" -eq 2 ]
for program in build/tfm build/gpt2; do
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
check "errors leave nothing behind" no_output_left

# ---- text
text() { # the text that gpt2 writes with these options
    build/gpt2 -p "Once upon a time" -n 40 "$@" 2>/dev/null
}
first=$(text --temp 0)
check "greedy is repeatable" [ "$first" = "$(text --temp 0)" ]
check "greedy, two threads" [ "$first" = "$(text --temp 0 --threads 2)" ]
check "greedy, one thread" [ "$first" = "$(text --temp 0 --threads 1)" ]
check "greedy, plain C kernels" [ "$first" = "$(text --temp 0 --isa scalar)" ]
check "greedy, TFM_ISA" [ "$first" = "$(TFM_ISA=scalar text --temp 0)" ]
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
check "chat: other keys and values" says "keys and values are f16, the session's f32"
chat "/load $dir/a.chat\n" --type f32 --kv f16 >/dev/null
check "chat: weights of another type" says "another model, or with weights of another type"
rm "$dir/a.chat"
chat "Hello\n/save $dir/no/such/a.chat\n" >/dev/null
check "chat: a file that can't be written" says "no/such/a.chat.part"
check "chat: nothing is left" none
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
run build/tfm info "$dir/f32.tfm" --verify
check "what it wrote is good" [ "$status" -eq 0 ]
run build/tfm quantize "$dir/f32.tfm" "$dir/usual.tfm"
check "quantize makes int8 unless told otherwise" [ "$(wc -c <"$dir/usual.tfm")" -eq "$(wc -c <$model)" ]
run build/tfm quantize "$dir/f32.tfm" "$dir/f32.tfm" --type f16
check "quantize onto itself" [ "$status" -eq 0 ]
run build/tfm info "$dir/f32.tfm" --verify
check "that is good, too" [ "$status" -eq 0 ]
check "no temporary file stays" [ ! -e "$dir/f32.tfm.part" ]

rm -rf "$dir"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
