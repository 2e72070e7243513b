#include "cpu/sparse/avx512_vnni.h"

#include "cpu/sparse24_linear/kernel.inl"
