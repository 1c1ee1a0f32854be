// A QPiSSA layer in the memory of a device.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "pissa/core/fused_linear.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"
#include "support/matrices.h"
#include "support/transferring_backend.h"

namespace pissa::test {

class DeviceLayer {
 public:
  DeviceLayer(std::int64_t tokens, std::int64_t out, std::int64_t in, std::int64_t r, float scaling = 1.0f)
      : at_(context_),
        x_(random_.dense(tokens, in), Format::bf16, Stored::kAligned, Stored::kAligned),
        dy_(random_.dense(tokens, out), Format::bf16, Stored::kAligned, Stored::kAligned),
        weight_(random_, out, in, 64, true),
        a_(random_.dense(r, in), Format::f32),
        b_(random_.dense(out, r), Format::f32),
        y_(context_, tokens, out, Format::bf16),
        xa_(context_, tokens, r, thin_format<cuda::CudaBackend>(x_.view())),
        sums_(context_, r, in + out, Format::bf16),
        dx_(context_, tokens, in, Format::bf16),
        grad_a_(context_, r, in, Format::f32),
        grad_b_(context_, out, r, Format::f32),
        x(at_(x_.view())),
        dy(at_(dy_.view())),
        weight(at_(weight_.view())) {
    adapter.a = at_(a_.view());
    adapter.b = at_(b_.view());
    adapter.a0 = at_(a_.view());
    adapter.b0 = at_(b_.view());
    adapter.scaling = scaling;
    keeps_sums = FactorSums::kept<cuda::CudaBackend>(x, adapter);
    at_.finish();
  }
  void forward() {
    cuda::CudaBackend cuda(context_);
    linear_forward(cuda, x, weight, {}, adapter, y_.view(), xa_.view(), sums());
  }
  void backward() {
    cuda::CudaBackend cuda(context_);
    linear_backward(cuda, dy, x, weight, adapter, xa_.view(), dx_.view(), grad_a_.view(), grad_b_.view(), sums());
  }
  void run() {
    forward();
    backward();
  }
  /// Both passes of the adapter's part alone, on top of y.
  void run_low_rank() {
    cuda::CudaBackend cuda(context_);
    add_low_rank_forward(cuda, y_.view(), x, adapter, y_.view(), xa_.view(), sums());
    add_low_rank_backward(cuda, dy, x, adapter, xa_.view(), {}, grad_a_.view(), grad_b_.view(), sums());
  }
  /// A graph of both passes, for its stream.
  cudaGraphExec_t capture(cudaStreamCaptureMode mode) {
    EXPECT_EQ(cudaStreamBeginCapture(context_.stream, mode), cudaSuccess);
    run();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(context_.stream, &graph), cudaSuccess);
    EXPECT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    cudaGraphDestroy(graph);
    return exec;
  }
  /// y, dx and the gradients of the factors, byte by byte; on the device 0xff from then on, which is NaN.
  std::vector<unsigned char> take_results() {
    std::vector<unsigned char> bytes;
    for (const cuda::Buffer* buffer : {&y_, &xa_, &dx_, &grad_a_, &grad_b_}) {
      const MutableMatrix matrix = buffer->view();
      const auto size = static_cast<std::size_t>(matrix.rows * matrix.cols * element_size(matrix.format));
      bytes.resize(bytes.size() + size);
      cudaMemcpyAsync(bytes.data() + bytes.size() - size, matrix.data, size, cudaMemcpyDeviceToHost, context_.stream);
      cudaStreamSynchronize(context_.stream);
      cudaMemsetAsync(matrix.data, 0xff, size, context_.stream);
    }
    return bytes;
  }

 private:
  FactorSums sums() const {
    return keeps_sums ? FactorSums::at(sums_.view().data, Format::bf16, adapter) : FactorSums{};
  }

  const cuda::Context& context_ = cuda::standalone_context();
  Random random_{1};
  Staging at_;
  Stored x_, dy_;
  StoredNf4 weight_;
  Stored a_, b_;
  cuda::Buffer y_, xa_, sums_, dx_, grad_a_, grad_b_;
  Matrix x, dy, weight;

 public:
  Adapter adapter;
  bool keeps_sums = false;
};

}  // namespace pissa::test
