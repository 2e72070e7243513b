#include "cpu/sparse/amx.h"

#include "cpu/sparse24_linear/kernel.inl"
