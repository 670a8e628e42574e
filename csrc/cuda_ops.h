#pragma once

#include "device.h"
#include "pack_image_tokens.h"
#include "pair_loss.h"

// Kernel launches over device memory, on the caller's stream; they return the launch's error.
namespace mmrm {

// Doubles of scratch that launch_pair_loss_fwd needs.
int64_t pair_loss_scratch_size(int64_t num_pairs);

template <typename T>
cudaError_t launch_pair_loss_fwd(const PairLossInputs<T>& in, const PairLossOutputs<T>& out, double* scratch,
                                 cudaStream_t stream);

template <typename Bits>
cudaError_t launch_pack_image_tokens_fwd(const PackImageTokensFwd<Bits>& args, cudaStream_t stream);

template <typename T>
cudaError_t launch_pack_image_tokens_bwd(const PackImageTokensBwd<T>& args, cudaStream_t stream);

}  // namespace mmrm
