#include "cpu/simd/baseline.h"

#include "cpu/scale_search/kernel.inl"
