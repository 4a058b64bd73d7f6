// What fastnn/testing.py asks for: an allocator that puts each tensor against a page without access.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cstring>
#include <string>

namespace fastnn::bindings {

namespace py = pybind11;
namespace {

struct Mapping {
  void* start;
  size_t length;
};

void unmap(void* context) {
  auto* mapping = static_cast<Mapping*>(context);
  munmap(mapping->start, mapping->length);
  delete mapping;
}

// [no access][pages of NaN with the data at their end or at their start][no access]
class GuardAllocator final : public c10::Allocator {
 public:
  bool after = true;

  c10::DataPtr allocate(size_t bytes) override {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + page) / page * page, length = inner + 2 * page;
    void* start = mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(start != MAP_FAILED, "fastnn.testing: no memory for a guarded tensor of ", bytes, " bytes.");
    char* pages = static_cast<char*>(start) + page;
    TORCH_CHECK(mprotect(pages, inner, PROT_READ | PROT_WRITE) == 0, "fastnn.testing: mprotect failed.");
    std::memset(pages, 0xff, inner);
    return {after ? pages + (inner - bytes) : pages, new Mapping{start, length}, &unmap, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

void guard_allocations(const std::string& side) {
  static GuardAllocator guard;
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  guard.after = side != "before";
  c10::SetCPUAllocator(side == "off" ? usual : &guard, 255);
}

}  // namespace

void bind_testing(py::module_& m) { m.def("_guard_allocations", &guard_allocations, py::arg("side")); }

}  // namespace fastnn::bindings
