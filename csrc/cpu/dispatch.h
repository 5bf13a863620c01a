// Picks the instruction set.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace rnnfast {

std::vector<std::string> built_isas();
std::vector<std::string> supported_isas();  // of those built, what this machine can run, best last
// Of these, those that have kernels of their own for a type of numbers.
template <class T>
std::vector<std::string> isas_with();

// The table in use: the best supported one, or the one that the environment variable RNNFAST_ISA names.
// Throws std::invalid_argument where that was not built or this machine lacks it.
const Kernels& kernels();

// For tests: every call from now on uses this instruction set; with an empty name, the one of the
// start. The caller must let no call run meanwhile, and go backward in the instruction set of the
// forward call. Throws as kernels().
void force_isa(const std::string& name);

}  // namespace rnnfast
