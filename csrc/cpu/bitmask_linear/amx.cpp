#include "cpu/sparse/amx.h"

#include "cpu/bitmask_linear/kernel.inl"
