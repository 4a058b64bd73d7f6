// What bench/peak.py and bench/memory.py ask for.
#include "fastnn/probe.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>

#include <mutex>
#include <unordered_map>

#include "cpu/scratch.h"

namespace fastnn::bindings {

namespace py = pybind11;
namespace {

// torch's own allocator, whose blocks are counted with the kernels' working memory.
class CountingAllocator final : public c10::Allocator {
 public:
  static CountingAllocator& get() {
    static auto* const allocator = new CountingAllocator;  // never destroyed: tensors that it made may live longer
    return *allocator;
  }

  void install(bool on) {
    c10::Allocator* const current = c10::GetCPUAllocator();
    if (on && current != this) usual_ = current;
    if (usual_) c10::SetCPUAllocator(on ? this : usual_, 255);
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* data = usual_->raw_allocate(bytes);
    if (data) {
      const std::lock_guard lock(mutex_);
      sizes_[data] = static_cast<int64_t>(bytes);
      cpu::count_scratch(static_cast<int64_t>(bytes));
    }
    return {data, data, &release, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void release(void* data) {  // called for blocks that came before the counting, too
    CountingAllocator& self = get();
    {
      const std::lock_guard lock(self.mutex_);
      if (const auto found = self.sizes_.find(data); found != self.sizes_.end()) {
        cpu::count_scratch(-found->second);
        self.sizes_.erase(found);
      }
    }
    self.usual_->raw_deallocate(data);
  }

  c10::Allocator* usual_ = nullptr;
  std::mutex mutex_;
  std::unordered_map<void*, int64_t> sizes_;
};

int64_t scratch_before = 0;

}  // namespace

void bind_probe(py::module_& m) {
  m.def(
      "probe_fma",
      [](bool float64, int threads) { return cpu::probe_fma(float64 ? DType::Float64 : DType::Float32, threads); },
      py::arg("float64"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("probe_bandwidth", &cpu::probe_bandwidth, py::arg("bytes"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("probe_scratch_reset", [] { cpu::scratch_peak = scratch_before = cpu::scratch_held; });
  m.def(
      "probe_scratch_peak", [] { return cpu::scratch_peak - scratch_before; },
      "Bytes of working memory that kernels held at most since the last reset, beyond what was held then.");
  m.def(
      "probe_allocations", [](bool on) { CountingAllocator::get().install(on); }, py::arg("on"),
      "Count what torch allocates on the CPU with the kernels' working memory, from now on or no longer.");
}

}  // namespace fastnn::bindings
