#!/bin/sh
# The native code for AArch64 on another machine: compiled with warnings as errors, and its tests run in an emulator.
# Values only: an emulator says nothing about speed. Run from anywhere; needs cmake, ninja, and of Debian the packages
# g++-aarch64-linux-gnu and qemu-user. With a Python that has pybind11 the binding is compiled, too:
#   tools/cross_aarch64.sh [PYTHON]
set -eu
cd "$(dirname "$0")/.."
work=build/aarch64
cxx=${CXX:-aarch64-linux-gnu-g++}
emulator=${QEMU:-qemu-aarch64}

# Static, so that the emulator needs no libraries of the machine.
cmake -S tests/native -B "$work" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_EXE_LINKER_FLAGS=-static
ninja -C "$work"

if [ $# -gt 0 ]; then
    # Python's own headers are of this machine, whose types have the same sizes; the binding is looked at, not linked.
    "$1" -c 'import pybind11, sysconfig; print("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include())' |
        xargs "$cxx" -std=c++17 -fsyntax-only -Wall -Wextra -Werror -Icsrc csrc/cpu/module.cpp
fi

# Every level; then processors without the last one and without any: the levels that must be there are named.
"$emulator" -cpu max "$work/levels" baseline neon_dotprod neon_i8mm
"$emulator" -cpu neoverse-n1 "$work/levels" baseline neon_dotprod
"$emulator" -cpu cortex-a72 "$work/levels" baseline
