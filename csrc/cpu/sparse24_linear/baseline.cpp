#include "cpu/sparse/baseline.h"

#include "cpu/sparse24_linear/kernel.inl"
