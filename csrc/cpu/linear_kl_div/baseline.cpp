#include "cpu/simd/baseline.h"

#include "cpu/linear_kl_div/kernel.inl"
