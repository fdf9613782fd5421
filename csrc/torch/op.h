// How a function of the inputs of an op becomes an op of torch, over its stable ABI (torch
// >= 2.11).
//
// The inputs are a struct (inputs.h) whose members name themselves as they are read. Reading
// them from torch's stack makes a call; the same reading, of nothing, writes the schema:
//
//     struct Inputs {                                     "(Tensor query, float? scale=None)"
//       Arguments& from;
//       Tensor query = from.tensor("query");
//       std::optional<double> scale = from.maybe_number("scale");
//     };
//
// Each argument that Python hands over costs 0.1 us, so callers leave out those at the end that
// are as the schema has them. One that is left out still costs 0.06 us, in which torch looks it up
// by name, hence overloads that have the first arguments alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The arguments of a schema as text. They have their defaults where nothing without one follows.
class Schema {
 public:
  // Of at most so many arguments.
  explicit Schema(uint64_t limit) : left_(limit) {}

  void add(const std::string& argument, const char* otherwise) {
    if (left_ == 0) return;
    --left_;
    const std::string text = (text_.empty() && bare_.empty() ? "" : ", ") + argument;
    bare_ += text;
    if (otherwise) {
      defaulted_ += text + "=" + otherwise;
    } else {
      text_ += bare_;
      bare_.clear(), defaulted_.clear();
    }
  }

  std::string text() const { return text_ + defaulted_; }

 private:
  uint64_t left_;
  std::string text_, bare_, defaulted_;
};

// The arguments of an op, one after the other: of a call, or of none, for its schema.
class Arguments {
 public:
  // Takes what a call has put there, which is to be taken once; what follows has its defaults.
  Arguments(StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}
  // Adds types, names and defaults, and gives values without meaning.
  explicit Arguments(Schema* schema) : schema_(schema) {}

  Tensor tensor(const char* name) { return take<Tensor>("Tensor", name); }
  MaybeTensor maybe_tensor(const char* name) { return take<MaybeTensor>("Tensor?", name, "None"); }
  bool flag(const char* name) { return take<bool>("bool", name, "False"); }
  double number(const char* name, const char* otherwise = nullptr) {
    return take<double>("float", name, otherwise);
  }
  std::optional<double> maybe_number(const char* name) {
    return take<std::optional<double>>("float?", name, "None");
  }
  // Of an op that writes to it.
  MaybeTensor written(const char* name) {
    const std::string type = "Tensor(" + std::string(1, next_written_++) + "!)?";
    return take<MaybeTensor>(type.c_str(), name, "None");
  }
  // A traced program may compute it from shapes.
  int64_t integer(const char* name, const char* otherwise = nullptr) {
    return take<int64_t>("SymInt", name, otherwise);
  }
  std::optional<int64_t> maybe_integer(const char* name) {
    return take<std::optional<int64_t>>("SymInt?", name, "None");
  }

  // grad_0, grad_1, ...
  template <size_t kCount>
  std::array<MaybeTensor, kCount> gradients() {
    static_assert(kCount <= 4);
    constexpr const char* kNames[] = {"grad_0", "grad_1", "grad_2", "grad_3"};
    std::array<MaybeTensor, kCount> taken;
    for (size_t i = 0; i < kCount; ++i) taken[i] = maybe_tensor(kNames[i]);
    return taken;
  }

 private:
  template <class T>
  T take(const char* type, const char* name, const char* otherwise = nullptr) {
    if (next_ != end_) return torch::stable::detail::to<T>(*next_++);
    if (schema_) schema_->add(std::string(type) + " " + name, otherwise);
    return T();
  }

  StableIValue *next_ = nullptr, *end_ = nullptr;
  Schema* schema_ = nullptr;
  char next_written_ = 'a';
};

// Gradients of the outputs of an op; none where nothing depends on an output.
template <size_t kOutputs>
struct Gradients {
  Arguments& from;
  std::array<MaybeTensor, kOutputs> of = from.gradients<kOutputs>();

  const MaybeTensor& operator[](size_t output) const { return of[output]; }
};

// What an op returns, as text and onto the stack.

inline std::string text(const Tensor*) { return "Tensor"; }
inline std::string text(const std::string*) { return "str"; }

template <class... T>
std::string text(const std::tuple<T...>*) {
  std::string all;
  ((all += (all.empty() ? "" : ", ") + text(static_cast<const T*>(nullptr))), ...);
  return "(" + all + ")";
}

template <class T>
void put(StableIValue* stack, const T& result) {
  *stack = torch::stable::detail::from(result);
}

template <class... T>
void put(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... each) { (put(stack++, each), ...); }, results);
}

// A kernel's arguments, read in the order of its parameters.
template <auto kKernel>
struct Call;

template <class Result_, class Inputs, Result_ (*kKernel)(const Inputs&)>
struct Call<kKernel> {
  using Result = Result_;
  Arguments& from;
  Inputs inputs{from};

  Result run() const { return kKernel(inputs); }
};

template <class Result_, size_t kOutputs, class Inputs,
          Result_ (*kKernel)(const Gradients<kOutputs>&, bool, const Inputs&)>
struct Call<kKernel> {
  using Result = Result_;
  Arguments& from;
  Gradients<kOutputs> gradients{from};
  bool mask_gradient = from.flag("mask_gradient");
  Inputs inputs{from};

  Result run() const { return kKernel(gradients, mask_gradient, inputs); }
};

struct Op {
  const char* name;
  uint64_t arguments;
  std::string (*signature)(uint64_t arguments);
  void (*run)(StableIValue* stack, uint64_t inputs, uint64_t outputs);
};

template <auto kKernel>
std::string signature(uint64_t limit) {
  Schema inputs(limit);
  Arguments arguments(&inputs);
  static_cast<void>(Call<kKernel>{arguments});
  std::string all = "(";  // GCC 12 warns of "(" + text
  all += inputs.text() + ") -> ";
  return all += text(static_cast<typename Call<kKernel>::Result*>(nullptr));
}

template <auto kKernel>
void run_boxed(StableIValue* stack, uint64_t inputs, uint64_t) {
  Arguments arguments(stack, inputs);
  put(stack, Call<kKernel>{arguments}.run());
}

// The op `name` of a kernel: Result f(const Inputs&), or, of a backward,
// Result f(const Gradients<outputs>&, bool mask_gradient, const Inputs&). `name.overload` may have
// the first `arguments` alone, where the others have defaults.
template <auto kKernel>
constexpr Op op(const char* name, uint64_t arguments = UINT64_MAX) {
  return {name, arguments, signature<kKernel>, run_boxed<kKernel>};
}

using Library = torch::stable::detail::StableLibrary;

template <class Ops>
void define(Library& library, const Ops& ops) {
  for (const Op& op : ops) library.def((op.name + op.signature(op.arguments)).c_str());
}

template <class Ops>
void implement(Library& library, const Ops& ops) {
  for (const Op& op : ops) library.impl(op.name, op.run);
}

}  // namespace
