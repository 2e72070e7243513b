#include "cpu/sparse/neon_dotprod.h"

#include "cpu/sparse24_int4_linear/kernel.inl"
