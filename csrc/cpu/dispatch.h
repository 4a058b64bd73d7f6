// Which ISA's kernels run. Chosen once from cpuid, or by FASTNN_CPU_ISA=baseline|avx2|avx512.
#pragma once

namespace fastnn::cpu {

enum class Isa : int { Baseline, Avx2, Avx512 };
inline constexpr int kIsaCount = 3;
inline constexpr const char* kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512"};

bool isa_available(Isa isa);     // built, and this CPU runs it
Isa current_isa();               // the one in use
bool set_isa(const char* name);  // false, and nothing changed, when the name is unknown or not available

// One op's kernels, a table for each ISA (null where not built); `table()` is the one to call.
template <class Table>
struct Variants {
  const Table* tables[kIsaCount];
  const Table& table() const { return *tables[static_cast<int>(current_isa())]; }
};

}  // namespace fastnn::cpu
