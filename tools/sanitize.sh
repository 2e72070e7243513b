#!/bin/sh
# The native code under the sanitizers of the compiler. Run from the repository, with a Python that has the test tools:
#   tools/sanitize.sh PYTHON         thread sanitizer on the pool, then address and undefined behaviour on the op tests
#   tools/sanitize.sh PYTHON pool    the pool alone, which takes seconds
#   tools/sanitize.sh PYTHON native  address and undefined behaviour on the native tests, without Python: minutes
# Leaks are not looked for: Python and torch keep memory until the process ends.
set -eu
cd "$(dirname "$0")/.."
python=$1
what=${2:-all}
work=.cache/sanitize
mkdir -p "$work"
cxx=${CXX:-c++}

if [ "$what" = native ]; then
    PATH=$(dirname "$python"):$PATH
    cmake -S tests/native -B "$work/native" -G Ninja -DLLMKERN_SANITIZE=ON >"$work/configure.log"
    ninja -C "$work/native"
    exec "$work/native/levels"
fi

"$cxx" -std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=thread -Icsrc tests/native/pool.cpp -o "$work/pool" -pthread -ldl
"$work/pool"
[ "$what" = all ] || exit 0

PATH=$(dirname "$python"):$PATH
export PATH
cmake -S . -B "$work/build" -G Ninja -DLLMKERN_SANITIZE=ON -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$work/configure.log"
ninja -C "$work/build"
rm -rf "$work/site"
mkdir -p "$work/site"
cp -r python/llmkern python/llmkern_cli "$work/site"
rm -f "$work"/site/llmkern/_C*.so
cmake --install "$work/build" --prefix "$work/site" >/dev/null

# Every op and level with sizes around each edge of the kernels. What starts other processes is left out: they would
# inherit the preloaded libraries.
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$PWD/$work/site" HF_HUB_OFFLINE=1
"$python" -c 'from llmkern import _C; assert "/sanitize/site/" in _C.__file__, _C.__file__'
exec "$python" -m pytest -q -p no:cacheprovider \
    tests/test_ops.py tests/ops/test_column_blocks.py tests/ops/test_threads.py \
    -k "not opcheck and not compile and not fork and not sanitizer"
