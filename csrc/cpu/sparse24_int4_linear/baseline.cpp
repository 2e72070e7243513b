#include "cpu/sparse/baseline.h"

#include "cpu/sparse24_int4_linear/kernel.inl"
