#!/bin/sh
# The header's hygiene: every public function has a comment of its own and is called by a test; what the implementation
# exports begins with tfm_; it has no variable that can be written. The last line is `N passed, N failed`.
passed=0
failed=0
dir=build/header
mkdir -p $dir

check() { # check WHAT STATUS
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "tests/test_header.sh: $1"
    fi
}

# Each public declaration, as `name documented` (1: the line before it ends a comment).
awk '/ \* PUBLIC API$/ { public = 1 }
    /#endif \/\* TFM_H \*\// { exit }
    public && /^TFM_API/ { match($0, /tfm_[a-z0-9_]+\(/); print substr($0, RSTART, RLENGTH - 1), before ~ /\*\/$/ }
    { before = $0 }' tfm.h >$dir/functions
[ "$(wc -l <$dir/functions)" -gt 80 ]
check "the public functions are not found in tfm.h" $?

# The tests' own calls, without comments; what test_main.c and test.h define counts as well.
cat tests/test*.c tests/test.h >$dir/tests.c
while read -r name documented; do
    [ "$documented" -eq 1 ]
    check "$name has no comment before it" $?
    grep -q "[^a-z_]$name(" $dir/tests.c
    check "$name is called by no test" $?
done <$dir/functions

# What the implementation defines; the Makefile has compiled it.
nm -g --defined-only $dir/implementation.o | awk '{print $3}' >$dir/exported
[ "$(wc -l <$dir/exported)" -ge "$(wc -l <$dir/functions)" ] && ! grep -v '^_*tfm_[a-z]' $dir/exported
check "the implementation exports other names than tfm_..." $?
sort $dir/exported | sed 's/^_tfm/tfm/' >$dir/exported.sorted
awk '{print $1}' $dir/functions | sort >$dir/functions.sorted
cmp -s $dir/exported.sorted $dir/functions.sorted
check "exported and declared functions differ: $(comm -3 $dir/exported.sorted $dir/functions.sorted | tr '\n' ' ')" $?
# (Constants that hold addresses are in .data.rel.ro, which is read-only when the program runs; nm shows them as d.)
[ -z "$(objdump -t $dir/implementation.o | awk '/ O / || /\*COM\*/' | grep -E '[[:space:]](\.data|\.bss|\.tdata|\.tbss|\*COM\*)[[:space:]]')" ]
check "the implementation has variables that can be written" $?
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
