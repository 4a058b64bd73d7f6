// What tells one state of some weights from another: fastnn/nn/_frozen.py packs again when it changes.
#include <cstdint>
#include <vector>

#include "bindings/checks.h"
#include "cpu/dispatch.h"

namespace fastnn::bindings {
namespace {

// Of each tensor: identity, storage, version counter, dtype, shape and strides; and the ISA, as wide as whose vectors
// the panels are. None where nothing may be packed: a gradient is wanted, or the tensor is another device's, a
// subclass's or a transform's.
py::object stamp(const py::sequence& weights) {
  std::vector<int64_t> marks = {static_cast<int64_t>(cpu::current_isa())};
  for (const py::handle h : weights) {
    if (!plain(h)) return py::none();
    const Tensor& t = tensor_argument("freeze", "weights", h);
    if (!t.is_cpu() || !t.has_storage() || !served(t) || t.key_set().has_any(c10::python_ks)) return py::none();
    if (t.requires_grad() && at::GradMode::is_enabled()) return py::none();
    marks.insert(
        marks.end(),
        {reinterpret_cast<int64_t>(t.unsafeGetTensorImpl()), reinterpret_cast<int64_t>(t.const_data_ptr()),
         t.is_inference() ? 0 : static_cast<int64_t>(t._version()), static_cast<int64_t>(t.scalar_type()), t.dim()});
    marks.insert(marks.end(), t.sizes().begin(), t.sizes().end());
    marks.insert(marks.end(), t.strides().begin(), t.strides().end());
  }
  return py::bytes(reinterpret_cast<const char*>(marks.data()), marks.size() * sizeof(int64_t));
}

}  // namespace

void bind_frozen(py::module_& m) { m.def("stamp", stamp, py::arg("weights")); }

}  // namespace fastnn::bindings
