#!/bin/sh
# Runs the C tests, the tests of the programs and of the header, and ends with the sum of all: `N passed, N failed`.
status=0
passed=0
failed=0
for run in build/tests "sh tests/test_programs.sh" "sh tests/test_header.sh"; do
    $run >build/test.log 2>&1 || status=1
    sed '$d' build/test.log
    last=$(tail -n 1 build/test.log)
    case $last in
    *" passed, "*" failed")
        passed=$((passed + ${last%% passed*}))
        rest=${last##*passed, }
        failed=$((failed + ${rest%% failed*}))
        ;;
    *)
        echo "$last"
        echo "$run ended early"
        failed=$((failed + 1))
        ;;
    esac
done
echo "$passed passed, $failed failed"
[ "$status" -eq 0 ] && [ "$failed" -eq 0 ]
