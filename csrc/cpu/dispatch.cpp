// Chooses the kernel table of this machine, once for everything that links to the library.

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "api.h"

namespace ff {

extern const KernelTable scalar_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
extern const KernelTable avx512bf16_kernels;
#elif defined(__aarch64__)
extern const KernelTable neon_kernels;
extern const KernelTable neonbf16_kernels;
#endif

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the system whether it saves the wide registers. Clang knows no
// "f16c" there before 15; its registers are AVX's.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
         (ecx & bit_F16C) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Whoever has the products of bfloat16 has those of integers: Cooper Lake and later, Zen 4 and
// later.
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
// Armv8.6 has both.
bool has_bf16() {
  constexpr unsigned long kBoth = HWCAP2_BF16 | HWCAP2_I8MM;
  return (getauxval(AT_HWCAP2) & kBoth) == kBoth;
}
#endif

struct Row {
  const KernelTable* table;
  bool (*supported)();
};

// Best first.
const Row kTables[] = {
#if defined(__x86_64__)
    {&avx512bf16_kernels, has_avx512bf16},
    {&avx512_kernels, has_avx512},
    {&avx2_kernels, has_avx2},
#elif defined(__aarch64__)
    {&neonbf16_kernels, has_bf16},
    {&neon_kernels, [] { return true; }},
#endif
    {&scalar_kernels, [] { return true; }},
};
constexpr int kCount = sizeof kTables / sizeof kTables[0];

std::atomic<const KernelTable*> chosen{nullptr};

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  float* get(size_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = (floats + 1023) / 1024 * 1024;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (!data_) size_ = 0;
    } else if (size_ > kKeep && floats <= kKeep) {
      // One huge call must not pin its memory for the life of the thread.
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      return get(floats);
    }
    return data_;
  }

 private:
  static constexpr size_t kKeep = size_t{4} << 20;  // floats: 16 MB
  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

float* scratch(size_t floats) {
  static thread_local Scratch memory;
  return memory.get(floats ? floats : 1);
}

float* shared_scratch(size_t floats) {
  static thread_local Scratch memory;
  return memory.get(floats ? floats : 1);
}

float* layer_scratch(size_t floats) {
  static thread_local Scratch memory;
  return memory.get(floats ? floats : 1);
}

const char* compiled_isa(int index) {
  return index >= 0 && index < kCount ? kTables[index].table->isa : nullptr;
}

bool supported_isa(int index) { return index >= 0 && index < kCount && kTables[index].supported(); }

const char* select_isa(const char* name) {
  const bool automatic = !name || !*name;
  for (const Row& row : kTables) {
    if (!automatic && std::strcmp(name, row.table->isa) != 0) continue;
    if (row.supported()) {
      chosen.store(row.table, std::memory_order_release);
      return nullptr;
    }
    if (!automatic) return "this machine does not have it";
  }
  return "no kernels of that name are compiled in";
}

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_acquire);
  if (!table) {
    const char* wanted = std::getenv("FASTFUSION_CPU_ISA");
    if (select_isa(wanted)) select_isa(nullptr);
    table = chosen.load(std::memory_order_acquire);
  }
  return *table;
}

const char* cpu_features() {
#if defined(__x86_64__)
  static char text[256];
  static std::atomic<bool> ready{false};
  if (!ready.load(std::memory_order_acquire)) {
    char line[256] = "";
    const auto add = [&line](bool present, const char* name) {
      if (!present) return;
      if (*line) std::strcat(line, " ");
      std::strcat(line, name);
    };
    add(__builtin_cpu_supports("avx2"), "avx2");
    add(__builtin_cpu_supports("fma"), "fma");
    add(has_f16c(), "f16c");
    add(__builtin_cpu_supports("avx512f"), "avx512f");
    add(__builtin_cpu_supports("avx512bw"), "avx512bw");
    add(__builtin_cpu_supports("avx512dq"), "avx512dq");
    add(__builtin_cpu_supports("avx512vl"), "avx512vl");
    add(__builtin_cpu_supports("avx512vnni"), "avx512vnni");
    add(__builtin_cpu_supports("avx512bf16"), "avx512bf16");
    std::strcpy(text, line);
    ready.store(true, std::memory_order_release);
  }
  return text;
#elif defined(__aarch64__)
  return has_bf16() ? "asimd bf16 i8mm" : "asimd";
#else
  return "";
#endif
}

}  // namespace ff
