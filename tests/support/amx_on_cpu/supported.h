// Included before csrc/cpu/dispatch.cpp: the processor has a matrix unit, which processor.cpp emulates,
// and the operating system permits its use.
#pragma once

#include <cstring>

#include <sys/syscall.h>
#include <unistd.h>

template <class... Arguments>
long permitted_syscall(long number, Arguments... arguments) {
  return number == SYS_arch_prctl ? 0 : syscall(number, arguments...);
}

#define syscall permitted_syscall
#define __builtin_cpu_supports(feature) \
  (std::strncmp(feature, "amx-", 4) == 0 || __builtin_cpu_supports(feature))
