#!/bin/sh
# The SQLite extension in SQLite's own shell: results, and what is said to bad arguments. Builds it if need be; needs
# sqlite3 and SQLite's header. Prints a line for each failed check, and at the end `N passed, N failed`.
model=tests/golden/encoder_sentence.tfm
dir=build/test_sqlite
passed=0
failed=0
rm -rf "$dir"
mkdir -p "$dir"
if ! make -s build/tfm_sqlite.so build/embed >"$dir/make" 2>&1; then
    cat "$dir/make"
    echo "0 passed, 1 failed"
    exit 1
fi

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

sql() { # sql STATEMENTS: what the shell prints, with the extension but without a model; errors after the rest
    printf '.load build/tfm_sqlite\n%s\n' "$1" | sqlite3 "$dir/test.db" 2>"$dir/errors"
    cat "$dir/errors"
}

with_model() { # with_model STATEMENTS: without the line that tfm_load prints
    sql "select tfm_load('$model');
$1" | tail -n +2
}

gives() { # gives EXPECTED STATEMENTS
    found=$(with_model "$2")
    check "$2: '$found'" [ "$found" = "$1" ]
}

# An error with those words, and a session that goes on: what follows it still works.
fails() { # fails WORDS STATEMENT
    found=$(with_model "$2;
select 'goes on', typeof(embed('x'));")
    case $found in
    "goes on|blob"*"$1"*) passed=$((passed + 1)) ;;
    *)
        failed=$((failed + 1))
        echo "$2: '$found', expected '$1' and to go on"
        ;;
    esac
}

# ---- results
check "tfm_load gives the size of the vectors" [ "$(sql "select tfm_load('$model');")" = 33 ]
gives 132 "select length(embed('a text'));"
gives "blob|132" "select typeof(embed('')), length(embed(''));"
gives 1.0 "select round(cosine(embed('The cat sleeps.'), embed('the CAT sleeps .')), 5);"
gives 1 "select embed('a text') = embed('a text');"
gives 0 "select embed('a text') = embed('another text');"
gives 1.0 "select cosine(x'0000803f00000040', x'0000004000008040');"
gives -1.0 "select cosine(x'0000803f', x'000000c0');"
gives 0.0 "select cosine(x'0000803f00000000', x'000000000000803f');"
printf 'The cat sleeps.\nShe runs over the river\n' >"$dir/lines"
build/embed "$model" --similarity "a small house" <"$dir/lines" | cut -f 1 >"$dir/expected"
with_model "create table if not exists notes(text, vector); delete from notes;
    insert into notes(text) values ('The cat sleeps.'), ('She runs over the river'), ('a small house');
    update notes set vector = embed(text);" >"$dir/out"
check "a table of vectors is made without a word" [ ! -s "$dir/out" ]
with_model "select printf('%.6f', cosine(vector, embed('a small house'))) from notes where text <> 'a small house' \
    order by 1 desc;" >"$dir/found"
check "the same cosines as build/embed's" cmp -s "$dir/expected" "$dir/found"
gives "a small house" \
    "select text from notes order by cosine(vector, embed('A small house')) desc limit 1;"
long="a big red house under the tree, a big red house under the tree, a big red house under a tree"
gives 1.0 "select round(cosine(embed('$long'), embed('$long and the river')), 5);" # cut to 24 tokens
check "tfm_load with threads" [ "$(sql "select tfm_load('$model', 2), length(embed('a text'));")" = "33|132" ]
check "another model takes the place of the first" [ "$(sql "select tfm_load('$model');
    create temp table t as select embed('a') as v;
    select tfm_load('tests/golden/encoder_mlm.tfm'); select v = embed('a') from t;" | tail -n 1)" = 0 ]

# ---- bad arguments
for call in "embed('x')" "length(embed(NULL))"; do
    found=$(sql "select $call;")
    check "$call without a model: '$found'" [ "${found#*embed: no model is loaded: call tfm_load}" != "$found" ]
done
fails "embed: expected a text, found NULL" "select embed(NULL)"
fails "embed: expected a text, found NULL" "insert into notes(text) values (NULL); update notes set vector = embed(text)"
gives "4|3" "update notes set vector = NULL; update notes set vector = embed(text) where text is not null;
    select count(*), count(vector) from notes; delete from notes where text is null;"
fails "embed: expected a text, found another type" "select embed(42)"
fails "embed: expected a text, found another type" "select embed(x'00')"
fails "wrong number of arguments to function embed" "select embed()"
fails "wrong number of arguments to function embed" "select embed('a', 'b')"
fails "cosine: expected two vectors, found NULL" "select cosine(NULL, embed('a'))"
fails "cosine: expected two vectors, found NULL" "select cosine(embed('a'), NULL)"
fails "cosine: expected two vectors as blobs, found another type" "select cosine(embed('a'), 'text')"
fails "cosine: expected two vectors as blobs, found another type" "select cosine(1.5, embed('a'))"
fails "cosine: expected blobs of float32" "select cosine(embed('a'), x'000000')"
fails "cosine: expected blobs of float32" "select cosine(x'', x'')"
fails "cosine: the two vectors have different lengths" "select cosine(embed('a'), x'0000803f')"
fails "cosine: a vector of zeros" "select cosine(x'00000000', x'0000803f')"
fails "cosine: a vector of zeros, or with numbers that are not finite" "select cosine(x'0000c07f', x'0000803f')"
fails "cosine: a vector of zeros, or with numbers that are not finite" "select cosine(x'0000807f', x'0000803f')"
fails "wrong number of arguments to function cosine" "select cosine(x'0000803f')"
fails "tfm_load: expected the path of a .tfm file as text" "select tfm_load(NULL)"
fails "tfm_load: expected the path of a .tfm file as text" "select tfm_load(7)"
fails "tfm_load: expected the path of a .tfm file as text" "select tfm_load(cast('$model' as blob))"
fails "tfm_load: expected the path of a .tfm file as text" "select tfm_load('$model' || char(0) || 'x')"
for threads in 0 1025 4294967297 2.9 "'2'" NULL; do
    fails "tfm_load: expected a number of threads from 1 to 1024" "select tfm_load('$model', $threads)"
done
fails "tfm_load: $dir/missing.tfm: No such file" "select tfm_load('$dir/missing.tfm')"
fails "tfm_load: $dir: not a regular file" "select tfm_load('$dir')"
fails "not a .tfm file" "select tfm_load('README.md')"
head -c 20000 "$model" >"$dir/short.tfm"
fails "truncated" "select tfm_load('$dir/short.tfm')"
fails "the model has no encoder" "select tfm_load('examples/models/stories.tfm')"
fails "unsafe use of tfm_load()" "drop view if exists v; create view v as select tfm_load('$model'); select * from v"
many=$(printf 'word %.0s' $(seq 60))
found=$(sql "select tfm_load('tests/golden/encoder_mlm.tfm');
select embed('$many');")
check "too long a text: '$found'" [ "${found#*embed: the text has }" != "$found" ]

# ---- two at the same time
many="select hex(embed(a.text || b.text || c.text)) from notes a, notes b, notes c order by a.rowid, b.rowid, c.rowid;"
with_model "$many" >"$dir/one" &
with_model "$many" >"$dir/two"
wait
check "two at the same time agree" cmp -s "$dir/one" "$dir/two"
check "both went on to the end" [ "$(wc -l <"$dir/one")" -eq 27 ]

rm -rf "$dir"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
