#include "cpu/simd/baseline.h"

#include "cpu/linear/dot_baseline.h"

#include "cpu/int4_linear/kernel.inl"
