#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if defined(__x86_64__)
// Whether the processor has AMX for bfloat16. Clang before 18 knows no name for it.
bool has_amx() {
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & amx_bf16) && (edx & amx_tile);
}

// Asks the kernel, once a process, whether threads may use AMX. Old kernels and sandboxes refuse.
bool amx_is_permitted() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023,
                 tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return permitted;
#else
  return false;
#endif
}
#endif

// A program must not depend on a matrix unit that computes other sums than those that were tested.
bool works(const Kernels& table) { return !table.unit_works || table.unit_works(); }

bool supports(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx2") return avx2;
  if (name == "avx512" || name == "amx_emulated")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx512bf16") return supports("avx512") && __builtin_cpu_supports("avx512bf16");
  if (name == "amx") return supports("avx512bf16") && has_amx() && amx_is_permitted();
#endif
  return name == "baseline";
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#define ISA(name) {&isa_##name::kernels, supports(#name) && works(isa_##name::kernels)},
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

// The tables of the instruction sets that this machine can run, best last. A table without kernels for
// a number type has those of the table before it.
const std::vector<Kernels>& tables() {
  static const std::vector<Kernels> all = [] {
    std::vector<Kernels> all_tables;
    for (const Isa& isa : isas()) {
      if (!isa.supported) continue;
      Kernels table = *isa.kernels;
      if (!table.float32.cells && !all_tables.empty()) table.float32 = all_tables.back().float32;
      if (!table.float64.cells && !all_tables.empty()) table.float64 = all_tables.back().float64;
      if (!table.bfloat16.cells && !all_tables.empty()) table.bfloat16 = all_tables.back().bfloat16;
      all_tables.push_back(table);
    }
    return all_tables;
  }();
  return all;
}

const Kernels& table_named(const std::string& name, const std::string& prefix) {
  for (const Kernels& table : tables())
    if (name == table.name) return table;
  throw std::invalid_argument(
      prefix + name + " is not an instruction set that this machine can run (built: " +
      joined(built_isas()) + "; of these supported here: " + joined(supported_isas()) + ")");
}

const Kernels& chosen_at_start() {
  const char* name = std::getenv("RNNFAST_ISA");
  if (name && *name) return table_named(name, "RNNFAST_ISA=");
  for (auto table = tables().rbegin(); table != tables().rend(); ++table)
    if (!table->emulated) return *table;
  throw std::invalid_argument("this machine can run none of the instruction sets that were built: " +
                              joined(built_isas()));
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> table = &chosen_at_start();
  return table;
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

template <class T>
std::vector<std::string> isas_with() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported && isa.kernels->of<T>().cells) names.push_back(isa.kernels->name);
  return names;
}
template std::vector<std::string> isas_with<float>();
template std::vector<std::string> isas_with<double>();
template std::vector<std::string> isas_with<Bfloat16>();

namespace {

std::atomic<int> forced_parts{-1};

}  // namespace

// Three parts are more exact than multiply-adds (rms error 3.0e-8 against 5.4e-8 for sums of 512), and
// so permitted by default. A probe on an Intel processor needed 0.6 to 0.75 of their time for batches
// of 32 rows and more, and one row may need more time than now. All batch sizes of a layer must have
// the same sums, so the border is to be measured with these kernels before any layer is above it.
int float32_parts(Precision precision, index hidden) {
  constexpr index least_hidden_in_three_parts = index{1} << 40;
  int parts = forced_parts.load(std::memory_order_relaxed);
  if (parts < 0 && precision == Precision::medium) parts = 1;
  if (parts < 0 && precision == Precision::high) parts = 2;
  if (parts < 0) parts = hidden >= least_hidden_in_three_parts ? 3 : 0;
  return parts > 0 && kernels().in_parts[parts - 1].cells ? parts : 0;
}

void force_float32_parts(int parts) {
  if (parts > 3)
    throw std::invalid_argument("parts is " + std::to_string(parts) + "; expected at most 3");
  forced_parts = parts;
}

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

void force_isa(const std::string& name) {
  in_use() = name.empty() ? &chosen_at_start() : &table_named(name, "");
}

}  // namespace rnnfast
