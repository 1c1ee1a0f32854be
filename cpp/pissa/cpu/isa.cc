#include "pissa/cpu/isa.h"

#include <cerrno>
#include <cstdlib>
#include <string>
#include <system_error>
#include <utility>

#include "pissa/cpu/blas.h"
#include "pissa/cpu/choice.h"
#include "pissa/cpu/kernels.h"
#include "pissa/cpu/x86.h"

#if defined(PISSA_ARM) && defined(__APPLE__)
#include <dlfcn.h>
#include <sys/sysctl.h>
#elif defined(PISSA_ARM)
#include <sys/auxv.h>
#elif defined(PISSA_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(PISSA_X86) && defined(_WIN32)
#include <windows.h>
#endif

namespace pissa::cpu {
namespace {

#if defined(PISSA_ARM) && defined(__APPLE__)
bool has(const char* feature) {
  int found = 0;
  std::size_t size = sizeof found;
  return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found != 0;
}
bool has_dot() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_bf16() { return has("hw.optional.arm.FEAT_BF16"); }
#elif defined(PISSA_ARM)
constexpr unsigned long kHwcapDot = 1UL << 20, kHwcap2Bf16 = 1UL << 14;  // of Linux; older headers lack some
bool has_dot() { return (getauxval(AT_HWCAP) & kHwcapDot) != 0; }
bool has_bf16() { return (getauxval(AT_HWCAP2) & kHwcap2Bf16) != 0; }
#endif

#if defined(PISSA_ARM) && defined(__APPLE__)
const Kernels& neon() { return has_bf16() ? neonbf16::kernels() : baseline::kernels(); }

// Of Accelerate, which every macOS has; null if this one is different.
Sgemm accelerate_sgemm() {
  static const auto sgemm = [] {
    void* library = dlopen("/System/Library/Frameworks/Accelerate.framework/Accelerate", RTLD_LAZY | RTLD_LOCAL);
    return library ? reinterpret_cast<Sgemm>(dlsym(library, "cblas_sgemm")) : nullptr;
  }();
  return sgemm;
}

const Kernels& accelerate_kernels() {
  static const Kernels table =
      with_blas("accelerate", neon(), [](const GemmProblem& problem, const Block& block, const Panels& panels) {
        gemm_block_by(accelerate_sgemm(), neon(), problem, block, panels);
      });
  return table;
}
#endif

#if defined(PISSA_X86)
#if defined(__linux__)
// Why the tile registers were refused, for the error of the request.
std::string why_refused(int error) {
  if (error == ENOSPC) {  // Linux has looked at the signal stacks of all threads
    return "an alternate signal stack of this process is too small for AMX's tile registers (ENOSPC)";
  }
  return "the system does not permit AMX's tile registers: " + std::generic_category().message(error);
}
#endif

// Why the system refuses AMX's tile registers, or nullptr.
const char* tiles_refused() {
  [[maybe_unused]] constexpr unsigned kTileData = 18;  // the register's number in XCR0
#if defined(__linux__)
  // Since 5.16, Linux lets a process use them if it requests them.
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  static const std::string refused =
      syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? "" : why_refused(errno);
  return refused.empty() ? nullptr : refused.c_str();
#elif defined(_WIN32)
  // As Windows does since 11 and Server 2022. Its older releases lack the function.
  using Enable = BOOL(WINAPI*)(DWORD64);
  static const bool enabled = [] {
    const auto function = GetProcAddress(GetModuleHandleW(L"kernel32.dll"), "EnableProcessOptionalXStateFeatures");
    return function && reinterpret_cast<Enable>(reinterpret_cast<void*>(function))(DWORD64{1} << kTileData);
  }();
  return enabled ? nullptr : "the system does not permit AMX's tile registers";
#else
  return "its registers are asked for on Linux and Windows only";
#endif
}
#endif

std::vector<Candidate> candidates() {
  std::vector<Candidate> all{{"baseline", baseline::kernels, nullptr}};
#if defined(PISSA_ARM)
  all.push_back({"neondot", neondot::kernels, has_dot() ? nullptr : "the processor lacks the dot-product extension"});
  all.push_back({"neonbf16", neonbf16::kernels, has_bf16() ? nullptr : "the processor lacks the BF16 extension"});
#if defined(__APPLE__)
  all.push_back({"accelerate", accelerate_kernels, accelerate_sgemm() ? nullptr : "the system lacks Accelerate"});
#endif
#elif defined(PISSA_X86)
  const X86Features has = x86_features();
  constexpr const char* kNoAvx512Bf16 = "the processor lacks AVX512_BF16";
  const char* const no_tiles = !has.avx512bf16 ? kNoAvx512Bf16
                               : !has.amxbf16  ? "the processor lacks AMX-BF16"
                                               : tiles_refused();
  all.push_back({"avx2", avx2::kernels, has.avx2 ? nullptr : "the processor lacks AVX2 or FMA or F16C"});
  all.push_back({"avxvnni", avxvnni::kernels, has.avxvnni ? nullptr : "the processor lacks AVX-VNNI"});
  all.push_back({"avx512", avx512::kernels, has.avx512 ? nullptr : "the processor lacks AVX-512 (F BW DQ VL)"});
  all.push_back({"avx512vnni", avx512vnni::kernels, has.avx512vnni ? nullptr : "the processor lacks AVX512_VNNI"});
  all.push_back({"avx512bf16", avx512bf16::kernels, has.avx512bf16 ? nullptr : kNoAvx512Bf16});
  // Intel's cores start a VDPBF16PS every second cycle, and two FMAs in each, so bfloat16 is multiplied faster after a
  // conversion to float32: 200 GF/s for 93, on a core of an Emerald Rapids. On AMD's cores, VDPBF16PS has twice the
  // rate of FMA.
  if (has.avx512bf16 && has.intel) std::swap(all[all.size() - 2], all.back());
  all.push_back({"amxbf16", amxbf16::kernels, no_tiles});
#endif
  return all;
}

const Choice& choice() {
  static const Choice chosen = [] {
    const char* wanted = std::getenv("PISSA_ISA");
    return choose(candidates(), wanted ? wanted : "");
  }();
  return chosen;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (!candidate.lacking) names.emplace_back(candidate.isa);
  }
  return names;
}

const Kernels& kernels() { return *choice().kernels; }

const Kernels& kernels(const std::string& isa) { return *choose(candidates(), isa).kernels; }

std::vector<std::string> unused_isas() { return choice().unused; }

std::string isa_failure() { return choice().failure; }

}  // namespace pissa::cpu
