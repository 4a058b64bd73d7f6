// The module fastnn._C: the entries of each op, and the switches of the dispatch.
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace fastnn::bindings {

void bind_conv2d(py::module_& m);
void bind_attention(py::module_& m);
void bind_attention_weights(py::module_& m);
void bind_linear(py::module_& m);
void bind_rnn(py::module_& m);
void bind_frozen(py::module_& m);
void bind_probe(py::module_& m);
void bind_testing(py::module_& m);

namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::kIsaCount; ++i)
    if (cpu::isa_available(static_cast<cpu::Isa>(i))) names.emplace_back(cpu::kIsaNames[i]);
  return names;
}

void set_cpu_isa(const std::string& name) {
  if (!cpu::set_isa(name.c_str()))
    throw py::value_error("fastnn._C._set_cpu_isa: name must be an ISA that this CPU has; got '" + name + "'.");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  bind_conv2d(m);
  bind_attention(m);
  bind_attention_weights(m);
  bind_linear(m);
  bind_rnn(m);
  bind_frozen(m);
  bind_probe(m);
  bind_testing(m);
  m.def("cpu_isas", cpu_isas, "ISAs whose kernels this CPU can run, the best last.");
  m.def(
      "cpu_isa", [] { return std::string(cpu::kIsaNames[static_cast<int>(cpu::current_isa())]); },
      "The ISA whose kernels run.");
#ifdef FASTNN_CUDA
  m.attr("cuda_ops") = py::make_tuple("linear", "attention", "attention_weights");
#else
  m.attr("cuda_ops") = py::tuple();
#endif
  m.def("_set_cpu_isa", set_cpu_isa, py::arg("name"), "Force the kernels of one ISA (tests).");
}

}  // namespace fastnn::bindings
