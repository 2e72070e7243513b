#include "cpu/sparse/neon_dotprod.h"

#include "cpu/sparse24_linear/kernel.inl"
