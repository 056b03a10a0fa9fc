// The loop over the proxies with fp32 products made of fp16 pieces, on CUDA: dhcl_ops/_products.py
// says how far they can be off, SplitOperands in dhcl_ops/_contrastive_stream.py is the same in
// PyTorch. Only contrastive.cpp includes this.
#pragma once
#include <algorithm>

#include "contrastive_stream.h"

namespace dhcl {
namespace {

// The terms of a product whose factors have one or two pieces, the small ones first: how many, and
// which take the low piece of the left and of the right factor, bit by bit.
struct Terms {
  int32_t count;
  uint32_t left_low, right_low;
};

Terms terms_of(int32_t left_pieces, int32_t right_pieces) {
  if (left_pieces == 2 && right_pieces == 2) return {3, 0b010, 0b001};
  if (left_pieces == 2) return {2, 0b01, 0b00};
  if (right_pieces == 2) return {2, 0b00, 0b01};
  return {1, 0, 0};
}

// 16-bit numbers are exact in fp16 after scaling.
int32_t pieces_of(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 2 : 1; }

Tensor columns_of(const Tensor& t, int64_t start, int64_t count) {
  AtenTensorHandle view = nullptr;
  DHCL_TORCH_CALL(aoti_torch_aten_narrow(t.get(), 1, start, count, &view));
  return Tensor(view);
}

// Columns that a tensor core reads as they lie in memory: a whole number of its vectors.
int64_t whole_vectors(int64_t columns) { return (columns + 7) / 8 * 8; }

class SplitStream {
 public:
  SplitStream(const Tensor& features, const Tensor& proxies, int64_t columns, bool weighted)
      : proxies_(proxies),
        weighted_(weighted),
        rows_(features.size(0)),
        width_(features.size(1)),
        pieces_(pieces_of(proxies)),
        terms_(terms_of(pieces_of(features), pieces_)) {
    left_ = buffer(rows_, terms_.count * width_, ScalarType::Half);
    row_units_ = new_float(proxies, rows_);
    split(features, terms_.left_low, *left_, *row_units_);
    // Products in fp32, their weights in two pieces, the chunk's pieces and units.
    const int64_t per_column = (weighted ? 8 : 4) * rows_ + 2 * width_ * terms_.count + 4;
    columns_ = columns_in_chunk<Cuda>(columns, per_column, proxies.size(0));
    room_ = whole_vectors(columns_);
    chunk_ = buffer(room_, terms_.count * width_, ScalarType::Half);
    units_ = new_float(proxies, columns_);
    products_ = new_float(proxies, rows_ * room_);
    if (!weighted) return;
    high_ = buffer(1, rows_ * room_, ScalarType::Half);
    low_ = buffer(1, rows_ * room_, ScalarType::Half);
    factors_ = new_float(proxies, rows_);
    largest_units_ = new_float(proxies, rows_);
    part_ = buffer(rows_, pieces_ * width_, ScalarType::Float);
    low_part_ = buffer(rows_, width_, ScalarType::Float);
    sums_ = buffer(rows_, width_, ScalarType::Float);
  }

  // Streams all proxies through the rows' sums, which p holds, and gives what was read out (B, d).
  MaybeTensor run(ContrastiveStreamParams p, const ContrastiveListed& listed) const {
    p.dtype = ContrastiveDtype::kFloat32;
    p.weight_dtype = ContrastiveDtype::kFloat16;
    p.products = products_->mutable_data_ptr();
    p.row_units = float_data(*row_units_);
    p.column_units = float_data(*units_);
    if (weighted_) {
      p.weights = high_->mutable_data_ptr();
      p.low_weights = low_->mutable_data_ptr();
      p.factors = factors_->mutable_data_ptr();
      p.largest_units = float_out(*largest_units_);
    }
    for (p.start = 0; p.start < proxies_.size(0); p.start += p.num_cols) {
      p.num_cols = std::min(columns_, proxies_.size(0) - p.start);
      p.fresh = p.start == 0;
      const Tensor chunk = rows_of(*chunk_, 0, p.num_cols);
      split(rows_of(proxies_, p.start, p.num_cols), terms_.right_low, chunk, *units_);
      multiply<Cuda>(*left_, torch::stable::transpose(chunk, 0, 1), first(*products_, p.num_cols));
      if (listed.rows != nullptr) launch<launch_contrastive_weigh>(weighing(p, listed));
      launch<launch_contrastive_stream>(p);
      if (weighted_) read_out(chunk, p.fresh);
    }
    return sums_;
  }

 private:
  Tensor buffer(int64_t rows, int64_t columns, ScalarType dtype) const {
    return torch::stable::new_empty(proxies_, {rows, columns}, dtype);
  }
  // The beginning of a buffer as a matrix of B rows.
  Tensor first(const Tensor& flat, int64_t columns) const {
    const Tensor whole = torch::stable::view(flat, {rows_ * room_});
    return torch::stable::view(rows_of(whole, 0, rows_ * columns), {rows_, columns});
  }
  template <auto kLaunch, typename Params>
  void launch(const Params& p) const {
    const CudaScope scope(proxies_);
    kLaunch(p, scope.stream());
    scope.check_launch();
  }

  void split(const Tensor& rows, uint32_t low_terms, const Tensor& operand,
             const Tensor& units) const {
    const Tensor whole = torch::stable::contiguous(rows);
    ContrastiveSplitParams p{};
    p.operand = operand.mutable_data_ptr();
    p.units = float_out(units);
    p.rows = whole.const_data_ptr();
    p.num_rows = whole.size(0);
    p.dim = whole.size(1);
    p.terms = terms_.count;
    p.low_terms = low_terms;
    p.dtype = dtype_of("contrastive", "operands", whole);
    launch<launch_contrastive_split>(p);
  }

  // Adds the chunk's proxies by their weights: the high weights with each of the proxies' pieces,
  // which come first in a chunk's rows, the low weights with their high one, the last of these.
  void read_out(const Tensor& chunk, bool fresh) const {
    const int64_t last = (pieces_ - 1) * width_;
    multiply<Cuda>(first(*high_, chunk.size(0)), columns_of(chunk, 0, last + width_), *part_);
    multiply<Cuda>(first(*low_, chunk.size(0)), columns_of(chunk, last, width_), *low_part_);
    ContrastiveFoldPiecesParams p{};
    p.sums = float_out(*sums_);
    p.part = float_data(*part_);
    p.low_part = float_data(*low_part_);
    p.factors = float_data(*factors_);
    p.units = float_data(*largest_units_);
    p.num_rows = rows_;
    p.dim = width_;
    p.pieces = pieces_;
    p.fresh = fresh;
    launch<launch_contrastive_fold_pieces>(p);
  }

  Tensor proxies_;
  bool weighted_;
  int64_t rows_, width_;
  int32_t pieces_;  // of the proxies
  Terms terms_;
  int64_t columns_ = 0, room_ = 0;  // in a chunk, and in its buffers
  MaybeTensor left_, row_units_, chunk_, units_, products_;
  MaybeTensor high_, low_, factors_, largest_units_, part_, low_part_, sums_;
};

}  // namespace
}  // namespace dhcl
