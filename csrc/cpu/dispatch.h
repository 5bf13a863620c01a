// Picks the instruction set.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace rnnfast {

std::vector<std::string> built_isas();
std::vector<std::string> supported_isas();  // of those built, what this machine can run, best last

// The table in use: the best supported one, or the one that the environment variable RNNFAST_ISA names.
// Throws std::runtime_error where that was not built or this machine lacks it.
const Kernels& kernels();

}  // namespace rnnfast
