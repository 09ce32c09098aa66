#!/bin/sh
# Builds the native core's own tests and runs them: csrc/tests/build.sh FOLDER [plain|address|thread]...
# Without a kind: all three, one after the other. Any report of a sanitizer ends it with an error. CXX chooses the
# compiler.
set -eu

sources=$(dirname "$0")
folder=$1
shift
test $# -gt 0 || set -- plain address thread
compiler=${CXX:-g++}
# Without recovery a report ends the program; frame pointers make its stack whole.
common="-std=c++17 -g -O1 -fno-omit-frame-pointer -D_GNU_SOURCE -pthread"

for kind in "$@"; do
  case $kind in
    plain) flags="-O3" ;;
    address) flags="-fsanitize=address,undefined -fno-sanitize-recover=all" ;;
    thread) flags="-fsanitize=thread" ;;
    *) echo "$0: no such kind of build: $kind" >&2; exit 2 ;;
  esac
  mkdir -p "$folder/$kind"
  list=$(cd "$sources/.." && ls ./*.cpp tests/*.cpp | grep -v module.cpp)
  # Two at a time: as many as the smallest machine has cores.
  for source in $list; do
    echo "$compiler $common $flags -c $sources/../$source -o $folder/$kind/$(basename "$source" .cpp).o"
  done | xargs -P 2 -I {} sh -c '{}'
  # shellcheck disable=SC2086  # words on purpose
  $compiler $common $flags "$folder/$kind"/*.o -ldl -o "$folder/$kind/test_native"
  echo "$kind:"
  (
    cd "$folder/$kind"
    ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 \
      TSAN_OPTIONS=halt_on_error=1 ./test_native
  )
done
