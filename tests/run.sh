#!/bin/sh
# Runs the C tests, beside them the tests of the programs and of the header, and ends with the sum of all:
# `N passed, N failed`.
status=0
passed=0
failed=0

run() { # run NAME COMMAND...
    name=$1
    shift
    "$@" >"build/$name.log" 2>&1
    echo $? >"build/$name.status"
}

run programs sh tests/test_programs.sh &
run header sh tests/test_header.sh &
run tests build/tests
wait
for name in tests programs header; do
    sed '$d' "build/$name.log"
    last=$(tail -n 1 "build/$name.log")
    case $last in
    *" passed, "*" failed")
        passed=$((passed + ${last%% passed*}))
        rest=${last##*passed, }
        failed=$((failed + ${rest%% failed*}))
        ;;
    *)
        echo "$last"
        echo "the tests of build/$name.log ended early"
        failed=$((failed + 1))
        ;;
    esac
    [ "$(cat "build/$name.status")" -eq 0 ] || status=1
done
echo "$passed passed, $failed failed"
[ "$status" -eq 0 ] && [ "$failed" -eq 0 ]
