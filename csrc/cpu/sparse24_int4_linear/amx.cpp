#include "cpu/sparse/amx.h"

#include "cpu/sparse24_int4_linear/kernel.inl"
