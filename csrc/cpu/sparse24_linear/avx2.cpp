#include "cpu/sparse/avx2.h"

#include "cpu/sparse24_linear/kernel.inl"
