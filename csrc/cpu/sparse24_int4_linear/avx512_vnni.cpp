#include "cpu/sparse/avx512_vnni.h"

#include "cpu/sparse24_int4_linear/kernel.inl"
