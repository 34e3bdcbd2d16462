// The launches of csrc/cuda/head.cu on the emulator, from Python: arguments are the structures that the kernels take.
#include <algorithm>

#include "emulator.h"

#include "../../../csrc/cuda/head_kernels.cuh"

namespace {

using namespace iprm::device;

template <class T>
void forward(const Forward<T>& args, unsigned blocks, unsigned seed) {
  const int64_t shared = forward_shared<T>(args.head.classes);
  emulator::launch(blocks, kThreads, shared, seed, [&] { head_forward_kernel<T>(args); });
}

template <class T>
void backward(const Backward<T>& args, unsigned seed) {
  const int64_t classes = args.head.classes;
  if (args.head.rows > 0)
    emulator::launch(unsigned(tiles_of(args.head.rows)), kThreads, features_shared<T>(classes), seed, [&] {
      head_backward_features_kernel<T>(args);
    });
  if (classes == 0) return;
  emulator::launch(unsigned(head_blocks(args.head.columns, classes)), kThreads, heads_shared<T>(), seed + 1, [&] {
    head_backward_heads_kernel<T>(args);
  });
}

// Calls work.template operator()<T>() with the type of that name in Python.
template <class Work>
void dispatch(const char* type, const Work& work) {
  if (std::strcmp(type, "float32") == 0) work.template operator()<float>();
  else if (std::strcmp(type, "float64") == 0) work.template operator()<double>();
  else if (std::strcmp(type, "bfloat16") == 0) work.template operator()<__nv_bfloat16>();
  else if (std::strcmp(type, "float16") == 0) work.template operator()<__half>();
  else std::abort();
}

}  // namespace

extern "C" {

int64_t tiles(int64_t rows) { return tiles_of(rows); }

int64_t scratch(const char* type, int64_t rows, int64_t classes) {
  int64_t elements = 0;
  dispatch(type, [&]<class T>() { elements = backward_scratch<T>(rows, classes); });
  return elements;
}

void head_forward(const char* type, const void* args, unsigned blocks, unsigned seed) {
  dispatch(type, [&]<class T>() { forward(*static_cast<const Forward<T>*>(args), blocks, seed); });
}

void head_backward(const char* type, const void* args, unsigned seed) {
  dispatch(type, [&]<class T>() { backward(*static_cast<const Backward<T>*>(args), seed); });
}
}
