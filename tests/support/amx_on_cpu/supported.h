// Included before csrc/cpu/dispatch.cpp: the processor has a matrix unit, which processor.cpp emulates,
// and the operating system permits its use.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

template <class... Arguments>
long permitted_syscall(long number, Arguments... arguments) {
  return number == SYS_arch_prctl ? 0 : syscall(number, arguments...);
}

#define syscall permitted_syscall

inline int cpuid_with_amx(unsigned leaf, unsigned part, unsigned* eax, unsigned* ebx, unsigned* ecx,
                          unsigned* edx) {
  const int found = __get_cpuid_count(leaf, part, eax, ebx, ecx, edx);
  if (leaf == 7 && part == 0) *edx |= 1u << 22 | 1u << 24;  // AMX-BF16 and AMX-TILE
  return found;
}

#define __get_cpuid_count cpuid_with_amx
