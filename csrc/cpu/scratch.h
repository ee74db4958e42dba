// Aligned scratch memory that a thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace shampoo {

// 64-byte aligned because MKL and LAPACK choose their loops by the alignment of what they are
// given: with unaligned memory a block's bits would depend on where it lies.
class Scratch {
 public:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kKeep = size_t{64} << 20;  // bytes that a thread may hold on to

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // At least `bytes` bytes of unspecified content, valid until the next call.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = ::operator new(bytes, std::align_val_t{kAlignment});
      size_ = bytes;
    }
    return data_;
  }

  // Gives memory beyond kKeep back; called when an operation is done with it.
  void trim() {
    if (size_ > kKeep) release();
  }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{kAlignment});
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

// Pieces of one scratch memory, each aligned.
class Carve {
 public:
  // `bytes`: the sum of bytes<T>(count) over the pieces.
  Carve(Scratch& scratch, int64_t bytes) : at_(static_cast<char*>(scratch.reserve(bytes))) {}

  template <class T>
  static int64_t bytes(int64_t count) {
    constexpr int64_t unit = Scratch::kAlignment;
    return (count * int64_t{sizeof(T)} + unit - 1) / unit * unit;
  }
  template <class T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(std::exchange(at_, at_ + bytes<T>(count)));
  }

 private:
  char* at_;
};

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace shampoo
