#include "dispatch.h"

#include <cstdlib>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace fluxion {
namespace {

#if defined(__x86_64__) || defined(__i386__)
// Not every supported compiler knows this one by name.
bool has_f16c() {
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// Best first. __builtin_cpu_supports also asks the operating system whether it saves the registers.
std::vector<const KernelTable*> usable() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("popcnt") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && avx512_vnni_kernels() != nullptr) tables.push_back(avx512_vnni_kernels());
  if (avx512 && avx512_kernels() != nullptr) tables.push_back(avx512_kernels());
  if (avx2 && avx2_kernels() != nullptr) tables.push_back(avx2_kernels());
#endif
  tables.push_back(scalar_kernels());
  return tables;
}

struct Choice {
  std::vector<const KernelTable*> tables = usable();
  const KernelTable* chosen = tables.front();
  std::string names;
  std::string problem;

  Choice() {
    for (const KernelTable* table : tables) {
      if (!names.empty()) names += ",";
      names += table->name;
    }
    const char* wanted = std::getenv("FLUXION_CPU_VARIANT");
    if (wanted == nullptr || *wanted == '\0') return;
    for (const KernelTable* table : tables) {
      if (std::string(wanted) == table->name) {
        chosen = table;
        return;
      }
    }
    problem = std::string("expected FLUXION_CPU_VARIANT to be one of ") + names + ", got " +
              wanted + "; unset it or name a usable variant";
  }
};

const Choice& choice() {
  static const Choice* instance = new Choice();
  return *instance;
}

}  // namespace

const KernelTable& kernels() { return *choice().chosen; }

const KernelTable* find_kernels(const std::string& name) {
  for (const KernelTable* table : choice().tables) {
    if (name == table->name) return table;
  }
  return nullptr;
}

const char* variant_names() { return choice().names.c_str(); }

const char* variant_problem() { return choice().problem.c_str(); }

}  // namespace fluxion
