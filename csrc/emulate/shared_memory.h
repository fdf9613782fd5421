// The shared memory of a block: arrays with red zones around them.
#pragma once

#include <cstring>

#include "fibers.h"
#include "cuda/launch.h"

namespace ff::cuda::emulation {
namespace {

// All bytes 0xff: NaN in every floating-point type, so that what is read unwritten shows.
constexpr int kPoison = 0xff;

class SharedMemory {
 public:
  struct Array {
    char* data;
    int64_t bytes;
  };

  bool allocate() {
    if (memory_) return true;
    void* memory = mmap(nullptr, kCapacity, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memory_ = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
    return memory_ != nullptr;
  }

  int count() const { return count_; }
  const Array& operator[](int index) const { return arrays_[index]; }
  int64_t bytes() const { return bytes_; }  // as Launch::shared_bytes counts them

  // False where there are too many.
  bool add(int64_t bytes) {
    const int64_t rounded = (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    if (count_ == kArrays || bytes_ + rounded > kBytes) return false;
    if (count_ == 0) poison(memory_, kRedZone);
    char* data = count_ ? end_ : memory_ + kRedZone;
    end_ = data + rounded + kRedZone;
    std::memset(data, kPoison, size_t(bytes));
    poison(data + bytes, end_ - (data + bytes));
    arrays_[count_++] = {data, bytes};
    bytes_ += rounded;
    return true;
  }

  bool contains16(const void* pointer) const {
    const auto* at = static_cast<const char*>(pointer);
    for (int i = 0; i < count_; ++i) {
      const Array& array = arrays_[i];
      if (at >= array.data && at + 16 <= array.data + array.bytes) return true;
    }
    return false;
  }

  // Forgets the arrays. The first byte of a red zone that was written as an offset from the array
  // in front of it (before the first one: negative), that array in `index`; or 0.
  int64_t clear(int* index) {
    int64_t written = 0;
#if FF_ASAN
    if (count_) __asan_unpoison_memory_region(memory_, size_t(end_ - memory_));
#endif
    *index = 0;
    for (int64_t i = 0; count_ && i < kRedZone && !written; ++i)
      if (is_written(memory_ + i)) written = i - kRedZone;
    for (int a = 0; a < count_ && !written; ++a) {
      const char* data = arrays_[a].data;
      const char* end = a + 1 < count_ ? arrays_[a + 1].data : end_;
      for (const char* at = data + arrays_[a].bytes; at < end && !written; ++at)
        if (is_written(at)) written = at - data, *index = a;
    }
    count_ = 0;
    bytes_ = 0;
    return written;
  }

 private:
  static constexpr int kArrays = 64;
  static constexpr int64_t kBytes = 256 << 10;
  // Wider than a row, so that a read that is one row too far finds NaN and not the next array.
  static constexpr int64_t kRedZone = 4096;
  static constexpr size_t kCapacity = size_t(kBytes + (kArrays + 1) * kRedZone);

  static bool is_written(const char* at) { return uint8_t(*at) != kPoison; }

  static void poison(char* begin, int64_t bytes) {
    std::memset(begin, kPoison, size_t(bytes));
#if FF_ASAN
    __asan_poison_memory_region(begin, size_t(bytes));
#endif
  }

  char* memory_ = nullptr;
  char* end_ = nullptr;
  Array arrays_[kArrays];
  int count_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace ff::cuda::emulation
