#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace rnnfast {

// isas.inc, from the build: ISA(name) for each instruction set, better ones later.
#define ISA(name)                 \
  namespace isa_##name {          \
    extern const Kernels kernels; \
  }
#include "isas.inc"
#undef ISA

namespace {

struct Isa {
  const Kernels* kernels;
  bool supported;
};

bool supports(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx2") return avx2;
  if (name == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx512bf16") return supports("avx512") && __builtin_cpu_supports("avx512bf16");
#endif
  return name == "baseline";
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#define ISA(name) {&isa_##name::kernels, supports(#name)},
#include "isas.inc"
#undef ISA
  };
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// What an instruction set leaves to the ones before it is theirs.
Kernels choose() {
  const char* forced = std::getenv("RNNFAST_ISA");
  Kernels chosen{};
  bool found = false;
  for (const Isa& isa : isas()) {
    if (found || !isa.supported) continue;
    const Kernels before = chosen;
    chosen = *isa.kernels;
    if (!chosen.float32.cells) chosen.float32 = before.float32;
    if (!chosen.float64.cells) chosen.float64 = before.float64;
    found = forced && std::string(forced) == chosen.name;
  }
  if (forced && *forced && !found)
    throw std::runtime_error(
        "RNNFAST_ISA=" + std::string(forced) +
        " is not an instruction set that this machine can run (built: " + joined(built_isas()) +
        "; of these supported here: " + joined(supported_isas()) + ")");
  return chosen;
}

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.kernels->name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.kernels->name);
  return names;
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace rnnfast
