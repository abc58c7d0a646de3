// What one call is: sizes, strides, the relation's terms. Mirrored field by field by the ctypes structures in build.py.
#pragma once
#include <cstdint>

namespace dil {

constexpr int64_t kNoLimit = INT64_MIN;

struct Operand {  // [batch, heads, rows, dim] with a last stride of 1, strides in elements
  void* data;
  int64_t batch, head, row;
};

// A bias or its gradient, broadcast to [batch, heads, q_len, k_len]: strides are 0 along dims of size 1.
struct Square {
  void* data;  // or null
  int64_t batch, head, row, key;
};

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

enum Kind : int64_t { kEverything = 0, kSegment = 1, kWindow = 2, kSinks = 3, kBlocks = 4 };

struct Term {
  int64_t kind, dedupe;
  int64_t length, rate, head_start, head_stop;  // segment; query heads
  const int64_t* residues;                      // segment: one per key head, or null: each query's own class
  int64_t left, right, step;                    // window
  int64_t count;                                // sinks
  // Blocks: the columns of line n of list l are columns[starts[l * (lines + 1) + n]] to before the next start; one list for each
  // query head, or one for all; batch_lists: from one batch row's lists to the next one's, 0: all have the same.
  int64_t q_block, k_block, first_line, lines, lists, batch_lists;
  const int64_t* starts;
  const int32_t* columns;
};

// Row i of q stands at position q_offset + i * q_step, row j of k and v at k_start + j * k_step, below k_stop; these are k_rows.
// k_len is the length of the sequence that positions, padding and documents are of.
struct Call {
  int64_t batch, heads, kv_heads, q_len, k_len, head_dim, v_dim;
  int64_t q_offset, q_step, k_start, k_stop, k_step, k_rows, left, right;
  int64_t num_terms;
  const Term* terms;
  Operand q, k, v, out, lse;  // lse: contiguous [batch, heads, q_len]
  const bool* key_padding;    // or null
  int64_t padding_batch, padding_key;
  const int64_t* documents;  // or null; contiguous [document_rows, k_len]
  int64_t document_rows;
  const int64_t* row_limits;  // or null; contiguous [2, limit_rows, q_len]: first key and end of each query row
  int64_t limit_rows;
  double scale, softcap;  // softcap 0: none
  Square bias;            // added to the scaled and capped scores
  int64_t bias_dtype;
  int64_t dropout_seed, dropout_least;  // a draw of at least this keeps its pair
  double dropout_factor;                // of what is kept; 0: no dropout
  int64_t dropout_head;                 // query head 0 draws as this one
  int64_t threads;
  int64_t exact_lse;  // 0: nobody reads its digits
  int64_t wide;       // out, grad_q, grad_k and grad_v that are written are of the scores' dtype; out that is read is of q's
  // Backward: gradients that come in, and those that go out.
  Operand grad_out, grad_lse, grad_q, grad_k, grad_v;
  Square grad_bias;  // zeros in the scores' dtype
  void* workspace;   // or null
  int64_t workspace_size;
};

}  // namespace dil
