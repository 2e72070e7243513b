#include "cpu/sparse/avx512_vnni.h"

#include "cpu/bitmask_linear/kernel.inl"
