#!/usr/bin/env bash
# The native kernels with every memory access and all undefined behaviour checked: the tests of the C++
# alone, then those of the Python interface. Arguments go to pytest. Needs GCC or Clang, and Linux.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=build/sanitize
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

cmake -S . -B "$build" -G Ninja -DLOKI_ATTN_SANITIZE=ON -DLOKI_ATTN_TESTS=ON >"$build.log" ||
    { cat "$build.log" >&2; exit 1; }
cmake --build "$build"
[[ -f $build/libloki_attn.so ]] || { cat "$build/native_missing.txt" >&2; exit 1; }

# Leaks are not looked for: Python and torch keep much until the end. The other two concern torch, whose
# libraries free across allocators and define the same names twice.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0
export UBSAN_OPTIONS=print_stacktrace=1
ctest --test-dir "$build" --output-on-failure --no-tests=error

# The interpreter is not instrumented, so the runtime must be loaded before it; and with it the C++
# library, or exceptions thrown before ours is loaded could not be followed.
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
runtime=$("$compiler" -print-file-name=libasan.so)
[[ $runtime == /* ]] || runtime=$("$compiler" -print-file-name="libclang_rt.asan-$(uname -m).so")
# --capture=sys lets the report of a sanitizer through.
[[ $# -gt 0 ]] || set -- tests/kernels/test_native*.py
LD_PRELOAD="$runtime $("$compiler" -print-file-name=libstdc++.so.6)" \
    .venv/bin/python -m pytest -n 0 --capture=sys --native-library "$build/libloki_attn.so" "$@"
