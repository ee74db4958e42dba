// What the programs of this folder have in common: raw arrays from stdin, raw arrays to stdout.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace emulate {

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != size_t(count)) {
    std::fprintf(stderr, "stdin ended early\n");
    std::exit(3);
  }
  return values;
}

// What is left of stdin.
template <class T>
std::vector<T> read_all() {
  std::vector<T> values;
  for (T value; std::fread(&value, sizeof(T), 1, stdin) == 1;) values.push_back(value);
  return values;
}

template <class T>
void write(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// The arguments of main as integers, after the program's name and that of a dtype.
inline std::vector<int64_t> integers(int count, char** arguments) {
  std::vector<int64_t> values;
  for (int i = 2; i < count; ++i) values.push_back(std::atoll(arguments[i]));
  return values;
}

template <class Float, class Double>
int by_dtype(int count, char** arguments, const Float& single, const Double& twice) {
  if (count < 2) return 2;
  const std::vector<int64_t> values = integers(count, arguments);
  return arguments[1] == std::string("float") ? single(values) : twice(values);
}

}  // namespace emulate
