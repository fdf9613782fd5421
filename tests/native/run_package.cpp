// Runs an AOTInductor package that calls ops of fastfusion, without Python:
//   run_package _torch_ops.so MODEL.pt2 INPUT OUTPUT BATCH LENGTH WIDTH
// INPUT is float32 (BATCH, LENGTH, WIDTH) as it lies in memory; OUTPUT is the first result.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

int main(int count, char** given) {
  if (count != 8) return std::fprintf(stderr, "7 arguments, please\n"), 2;
  // Its ops are registered as it is loaded, which has to be before the package is.
  if (dlopen(given[1], RTLD_NOW) == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  torch::inductor::AOTIModelPackageLoader package(given[2]);

  std::ifstream file(given[3], std::ios::binary);
  std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const std::vector<int64_t> sizes{std::atoll(given[5]), std::atoll(given[6]),
                                   std::atoll(given[7])};
  const at::Tensor input = at::from_blob(bytes.data(), sizes, at::kFloat);

  const at::Tensor output = package.run({input})[0].contiguous();
  std::ofstream(given[4], std::ios::binary)
      .write(static_cast<const char*>(output.const_data_ptr()), std::streamsize(output.nbytes()));
}
