#!/bin/sh
# The kernels above avx2 on a machine that lacks their instructions: the module is built with the flags of avx2 and
# functions in the place of the AVX-512 and AMX intrinsics (tests/native/emulate), and the kernels' tests run on it.
#   tools/emulate.sh PYTHON                  a Python that has the test tools; every level above avx2
#   tools/emulate.sh PYTHON LEVEL [pytest arguments]    one of them, e.g. amx --maxfail 1
# It shows values: the arithmetic, the indices, what is read and written, and that tiles are configured. It does not show
# that the machine has the instructions, that the compiler's intrinsics and the assembly are used as they must be, or
# anything about speed.
set -eu
cd "$(dirname "$0")/.."
python=$1
shift
work=.cache/emulate

PATH=$(dirname "$python"):$PATH
export PATH
mkdir -p "$work"
cmake -S . -B "$work/build" -G Ninja -DLLMKERN_EMULATE=ON -DLLMKERN_WERROR=ON \
    -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$work/configure.log"
ninja -C "$work/build"
rm -rf "$work/site"
mkdir -p "$work/site"
cp -r python/llmkern python/llmkern_cli "$work/site"
rm -f "$work"/site/llmkern/_C*.so
cmake --install "$work/build" --prefix "$work/site" >/dev/null

PYTHONPATH=$PWD/$work/site HF_HUB_OFFLINE=1
export PYTHONPATH HF_HUB_OFFLINE
"$python" -c 'from llmkern import _C; assert "/emulate/site/" in _C.__file__, _C.__file__'
# The op tests of one level after the other; what does not depend on the level is left out.
test_level() {
    echo "level $1"
    level=$1
    shift
    "$python" -m pytest -q -p no:cacheprovider --level "$level" tests/test_ops.py tests/ops \
        -k "not opcheck and not compile and not fork and not sanitizer" "$@"
}
case ${1:-} in
    avx512* | amx) test_level "$@" ;;
    *)
        for level in avx512_vnni avx512_bf16 amx; do
            test_level "$level"
        done
        "$python" -m pytest -q -p no:cacheprovider tests/test_solvers_native.py
        ;;
esac
