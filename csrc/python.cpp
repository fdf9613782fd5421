// fastfusion._native: what the compiled part is and what the machine can run.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/api.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

std::vector<std::string> isas(bool runnable) {
  std::vector<std::string> names;
  for (int i = 0; ff::compiled_isa(i); ++i)
    if (!runnable || ff::supported_isa(i)) names.emplace_back(ff::compiled_isa(i));
  return names;
}

// Without a name: what FASTFUSION_CPU_ISA says, else the best.
std::string select_isa(const std::string& name) {
  const char* variable = std::getenv("FASTFUSION_CPU_ISA");
  const std::string wanted = name.empty() && variable ? variable : name;
  if (const char* reason = ff::select_isa(wanted.c_str())) {
    std::string message = "instruction set '" + wanted + "': " + reason + "; usable here:";
    for (const std::string& isa : isas(true)) message += " " + isa;
    throw std::invalid_argument(message);
  }
  return ff::kernels().isa;
}

ff::Type type_of(const std::string& dtype) {
  return dtype == "bfloat16"  ? ff::Type::kBFloat16
         : dtype == "float16" ? ff::Type::kFloat16
         : dtype == "int8"    ? ff::Type::kUInt8
                              : ff::Type::kFloat32;
}

std::string attention_path(const std::string& dtype, int64_t q_len, int64_t kv_len, bool causal,
                           bool dropout) {
  ff::AttentionForward p{};
  p.type = type_of(dtype), p.q_len = q_len, p.kv_len = kv_len;
  p.right = causal ? 0 : ff::kEndless, p.dropout = dropout, p.scale = 1.0f;
  const std::string path = ff::kernels().attention_path(p);
  const int64_t splits = ff::kernels().attention_splits(p);
  return splits == 1 ? path : path + ", keys in " + std::to_string(splits) + " pieces";
}

double peak_operations(const std::string& dtype, int64_t rounds) {
  return ff::kernels().peak_operations(type_of(dtype), rounds);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about the compiled part of fastfusion and the choice of instruction set.";
  m.def("isa", [] { return std::string(ff::kernels().isa); }, "The instruction set in use.");
  m.def("attention_path", &attention_path, py::arg("dtype"), py::arg("q_len"),
        py::arg("kv_len") = 0, py::arg("causal") = false, py::arg("dropout") = false,
        "How attention of these would run, in words.");
  m.def("peak_operations", &peak_operations, py::arg("dtype"), py::arg("rounds"),
        "Multiplies and adds in the arithmetic that a dtype is computed in, and does nothing else; "
        "returns the number of operations.");
  m.def("lanes", [] { return ff::kernels().lanes; }, "float32 values in a register of it.");
  m.def("isas", &isas, py::arg("runnable") = false,
        "The instruction sets that are compiled in, best first; only those that this machine "
        "runs if `runnable`.");
  m.def("select_isa", &select_isa, py::arg("name") = "",
        "Use an instruction set for all calls from now on; by default the one that "
        "FASTFUSION_CPU_ISA names, else the best. Raises ValueError where it cannot be used.");
  m.def(
      "cpu_features", [] { return split(ff::cpu_features()); },
      "Instruction-set extensions of this machine.");
  m.def(
      "build", [] { return std::string(FF_BUILD_COMPILER ", torch " FF_BUILD_TORCH); },
      "Compiler and torch version of the build.");
}
