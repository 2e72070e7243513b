#include "cpu/sparse/avx2.h"

#include "cpu/sparse24_int4_linear/kernel.inl"
