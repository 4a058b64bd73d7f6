// What tells one state of some weights from another: fastnn/nn/_frozen.py packs again when it changes.
#include <ATen/core/grad_mode.h>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bindings/checks.h"
#include "cpu/dispatch.h"

namespace fastnn::bindings {
namespace {

// Of each tensor: identity, storage, version counter, dtype, shape and strides; and the ISA, as wide as whose vectors
// the panels are. None where nothing may be packed: a gradient is wanted, or the tensor is another device's, a
// subclass's or a transform's.
std::optional<std::vector<int64_t>> marks_of(const std::vector<py::handle>& weights) {
  std::vector<int64_t> marks = {static_cast<int64_t>(cpu::current_isa())};
  marks.reserve(1 + 9 * weights.size());
  for (const py::handle h : weights) {
    if (!plain(h)) return std::nullopt;
    const Tensor& t = tensor_argument("freeze", "weights", h);
    if (!t.is_cpu() || !t.has_storage() || !served(t) || t.key_set().has_any(c10::python_ks)) return std::nullopt;
    if (t.requires_grad() && at::GradMode::is_enabled()) return std::nullopt;
    for (const int64_t mark :
         {reinterpret_cast<int64_t>(t.unsafeGetTensorImpl()), reinterpret_cast<int64_t>(t.const_data_ptr()),
          t.is_inference() ? 0 : static_cast<int64_t>(t._version()), static_cast<int64_t>(t.scalar_type()), t.dim()})
      marks.push_back(mark);
    marks.insert(marks.end(), t.sizes().begin(), t.sizes().end());
    marks.insert(marks.end(), t.strides().begin(), t.strides().end());
  }
  return marks;
}

py::object stamp(const std::vector<py::handle>& weights) {
  const auto marks = marks_of(weights);
  if (!marks) return py::none();
  return py::bytes(reinterpret_cast<const char*>(marks->data()), marks->size() * sizeof(int64_t));
}

}  // namespace

bool fresh(py::handle stamp, const std::vector<py::handle>& weights) {
  const auto marks = marks_of(weights);
  const size_t size = marks ? marks->size() * sizeof(int64_t) : 0;
  return marks && static_cast<size_t>(PyBytes_Size(stamp.ptr())) == size &&
         std::memcmp(PyBytes_AsString(stamp.ptr()), marks->data(), size) == 0;
}

void bind_frozen(py::module_& m) {
  m.def("stamp", stamp, py::arg("weights"));
  m.def(
      "fresh", [](const py::bytes& stamp, const std::vector<py::handle>& weights) { return fresh(stamp, weights); },
      py::arg("stamp"), py::arg("weights"), "Whether the weights are still those of the stamp, and may be packed.");
}

}  // namespace fastnn::bindings
