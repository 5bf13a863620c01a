// Picks the instruction set.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace rnnfast {

std::vector<std::string> built_isas();
std::vector<std::string> supported_isas();  // of those built, what this machine can run, best last
// Those of supported_isas() that have kernels of their own for a number type.
template <class T>
std::vector<std::string> isas_with();

// The table in use: that of the best supported instruction set, or of the one that the environment
// variable RNNFAST_ISA names. Throws std::invalid_argument where the named one was not built or this
// machine lacks it.
const Kernels& kernels();

// What a caller allows in products of float32, as torch.set_float32_matmul_precision does.
enum class Precision { highest, high, medium };

// Into how many bfloat16 numbers the products of a layer split a float32; 0: they are multiply-adds.
int float32_parts(Precision precision, index hidden);

// For tests: the answer of float32_parts from now on, where there are such kernels; negative: its own.
void force_float32_parts(int parts);

// For tests: every call from now on uses this instruction set; an empty name restores the choice made
// at the start. No call may run meanwhile, and backward must use the instruction set of its forward
// call. Throws as kernels() does.
void force_isa(const std::string& name);

}  // namespace rnnfast
