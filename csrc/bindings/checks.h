// What every binding asks of its arguments, and the words it asks in.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fastnn/types.h"

namespace fastnn::bindings {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Activation activation_of(const char* op, std::optional<std::string_view> name) {
  if (!name) return Activation::None;
  std::string known;
  for (const ActivationRow& row : kActivations) {
    if (*name == row.name) return row.activation;
    known += known.empty() ? row.name : std::string(", ") + row.name;
  }
  TORCH_CHECK_VALUE(false, "fastnn.", op, ": activation must be None or one of ", known, "; got '", std::string(*name),
                    "'.");
}

// The algorithm of that name, an enumeration's position in the list of its names.
template <class Algorithm, size_t COUNT>
Algorithm algorithm_of(const char* op, const char* const (&names)[COUNT], std::string_view name) {
  std::string known;
  for (size_t i = 0; i < COUNT; ++i) {
    if (name == names[i]) return static_cast<Algorithm>(i);
    known += std::string(i ? ", " : "") + names[i];
  }
  TORCH_CHECK_VALUE(false, "fastnn.", op, ": algorithm must be one of ", known, "; got '", std::string(name), "'.");
}

inline std::optional<DType> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::Float32;
    case at::kDouble: return DType::Float64;
    case at::kBFloat16: return DType::BFloat16;
    case at::kHalf: return DType::Float16;
    default: return std::nullopt;
  }
}

// Whether a kernel exists for a tensor of this device, layout and dtype; fake and meta tensors count.
inline bool served(const Tensor& t) {
  return (t.is_cpu() || t.is_meta()) && t.layout() == at::kStrided && dtype_of(t) && !t.is_nested() && !t.is_neg();
}
inline bool served(const OptionalTensor& t) { return !t || !t->defined() || served(*t); }

inline void check_same(const char* op, const char* name, const Tensor& t, const Tensor& first, const char* first_name) {
  TORCH_CHECK(t.scalar_type() == first.scalar_type(), "fastnn.", op, ": ", name, " must have the dtype of ", first_name,
              " (", first.scalar_type(), "); got ", t.scalar_type(), ".");
  TORCH_CHECK(t.device() == first.device(), "fastnn.", op, ": ", name, " must be on the device of ", first_name, " (",
              first.device(), "); got ", t.device(), ".");
}

// What a question about a call's algorithm asks with, where autocast will give input and weight one dtype: input, or a tensor
// like it of weight's dtype.
inline Tensor cast_alike(const Tensor& input, const Tensor& weight) {
  if (input.scalar_type() == weight.scalar_type()) return input;
  return at::empty_strided(input.sizes(), input.strides(), input.options().dtype(weight.scalar_type()));
}

// Threads for one call: torch.set_num_threads, and one inside somebody's parallel region.
inline int num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// ---- arguments of the Python entries -------------------------------------------------------------------------------

// Under torch.func's transforms, and where a tensor carries a tangent of forward mode, a call belongs to the Functions of
// fastnn/functional/_transforms.py: the C++ Functions know neither.
inline bool transformed(py::handle h) {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         (THPVariable_Check(h.ptr()) && THPVariable_Unpack(h.ptr())._fw_grad(0).defined());
}

// A tensor of torch's own two classes, or of another that Python says the ops serve: one that overrides
// __torch_function__ belongs to its class, not to a kernel.
inline bool plain(py::handle h) {
  if (transformed(h)) return false;
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(h.ptr()));
  if (h.is_none() || type == THPVariableClass || !THPVariable_Check(h.ptr())) return true;
  static PyObject* const parameter = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
  if (type == parameter) return true;
  static PyObject* const takes_class =
      py::object(py::module_::import("fastnn._fallback").attr("takes_class")).release().ptr();
  return py::handle(takes_class)(py::handle(type)).cast<bool>();
}

inline const Tensor& tensor_argument(const char* op, const char* name, py::handle h) {
  if (!THPVariable_Check(h.ptr()))
    throw py::type_error(std::string("fastnn.") + op + ": " + name + " must be a Tensor; got " +
                         Py_TYPE(h.ptr())->tp_name + ".");
  return THPVariable_Unpack(h.ptr());
}
inline OptionalTensor optional_tensor_argument(const char* op, const char* name, py::handle h) {
  if (h.is_none()) return std::nullopt;
  return tensor_argument(op, name, h);
}
// Valid while the Python string lives.
inline std::optional<std::string_view> optional_string_argument(const char* op, const char* name, py::handle h) {
  if (h.is_none()) return std::nullopt;
  Py_ssize_t size = 0;
  const char* text = PyUnicode_Check(h.ptr()) ? PyUnicode_AsUTF8AndSize(h.ptr(), &size) : nullptr;
  if (!text)
    throw py::type_error(std::string("fastnn.") + op + ": " + name + " must be a str or None; got " +
                         Py_TYPE(h.ptr())->tp_name + ".");
  return std::string_view(text, size);
}
// Whether the weights are still as the stamp says, and may be packed (frozen.cpp).
bool fresh(py::handle stamp, const std::vector<py::handle>& weights);
inline py::object wrap(Tensor t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(t))); }

}  // namespace fastnn::bindings
